"""Which of several processes this one is."""

from __future__ import annotations

import os
import re
import sys
import warnings
from pathlib import Path

__all__ = ["place"]

# What launchers tell their processes: the number of this one, and how many there are.
_TOLD = [
    ("RANK", "WORLD_SIZE"),  # torchrun, and accelerate launch where it starts several
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("PMI_RANK", "PMI_SIZE"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),  # of srun; a batch script by itself is one process
]


def place(share: tuple[int, int] | None = None) -> tuple[int, int]:
    """The number of this process and how many there are: as the caller says, or as accelerate or the launcher does."""
    if share is not None:
        rank, world = share
    elif (accelerate := sys.modules.get("accelerate")) is not None and accelerate.state.is_initialized():
        state = accelerate.PartialState()
        rank, world = state.process_index, state.num_processes
    else:
        rank, world = _told()
    if not 0 <= rank < world:
        raise ValueError(
            f"Got process {rank} of {world}: processes are numbered from 0 to {world - 1}. Pass share=(rank, world)."
        )
    if share is None and world == 1 and (asked := _asked()) > 1:
        warnings.warn(
            f"{asked} processes were asked for and this is the only one: accelerate launch starts several for GPUs only, unless it is told "
            f"more. All of the work is done here; torchrun --nproc-per-node {asked} starts {asked} on any machine.",
            stacklevel=3,
        )
    return rank, world


def _told() -> tuple[int, int]:
    for rank, world in _TOLD:
        if rank in os.environ and world in os.environ:
            try:
                return int(os.environ[rank]), int(os.environ[world])
            except ValueError:
                raise ValueError(
                    f"The launcher says {rank}={os.environ[rank]!r} and {world}={os.environ[world]!r}, expected whole numbers."
                ) from None
    return 0, 1


def _asked() -> int:
    """How many processes the launcher was asked for, as far as it can be seen: accelerate does not tell a lone process."""
    if not any(name.startswith("ACCELERATE_") for name in os.environ):
        return 1
    try:
        words = Path(f"/proc/{os.getppid()}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return 1
    found = re.search(r"--num[-_]processes[= ](\d+)", " ".join(words))
    return int(found[1]) if found else 1
