"""What the demos share: the shipped models, the clock, tables."""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from sculpt.shipped import CLONE, Missing, shelf

__all__ = ["PRETRAINED", "Clock", "luck", "markdown", "modules", "pretrained"]

PRETRAINED = CLONE
"""The shipped models, in a clone of the repository."""


def pretrained(part: str, needed: str) -> Path:
    """The folder of the shipped models of one part of the demo: in the repository, or fetched from the Hub.

    Args:
        part: ``"digits"`` or ``"molecules"``.
        needed: what has to be there.
    """
    folder = PRETRAINED / part
    return folder if (folder / needed / "config.json").is_file() else shelf(part)


def modules(folder: Path, *names: str) -> list[ModuleType]:
    """Modules of a folder that is no package. The interpreter's path and its modules are as before afterwards.

    Args:
        folder: with files of Python, which import each other by their bare names.
        names: of the modules.
    """
    path, own = list(sys.path), {file.stem for file in folder.glob("*.py")}
    if missing := [name for name in names if name not in own]:
        raise Missing(
            f"{folder} has no {missing[0]}.py, which is code and not fetched: this part runs in a clone of sculpt's repository."
        )
    known = {name: sys.modules.pop(name) for name in own & set(sys.modules)}
    sys.path.insert(0, str(folder))
    try:
        return [importlib.import_module(name) for name in names]
    finally:
        sys.path[:] = path
        for name in own:
            sys.modules.pop(name, None)
        sys.modules.update(known)


class Clock:
    """Lines that begin with the seconds since the start."""

    def __init__(self) -> None:
        self.started, self.used = time.monotonic(), time.process_time()

    @property
    def seconds(self) -> float:
        """since the start"""
        return time.monotonic() - self.started

    @property
    def cpu(self) -> float:
        """seconds of a CPU core since the start, which others on the machine do not change"""
        return time.process_time() - self.used

    def say(self, text: str) -> None:
        """Print what is done next."""
        print(f"[{self.seconds:4.0f} s] {text}", flush=True)


def markdown(cells: Sequence[Sequence[str]]) -> str:
    """A table that reads well in a terminal and is Markdown too.

    Args:
        cells: by row; the first row is the head.
    """
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    rows = [cells[0], ["-" * width for width in widths], *cells[1:]]
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in rows)


def luck(shares: Tensor, n: int, repeats: int = 20) -> float:
    """The total variation from the target that n draws of an exact sampler have themselves, on average.

    Args:
        shares: of the target's cells or kinds.
        n: draws.
        repeats: of the n draws.
    """
    generator = torch.Generator().manual_seed(0)
    draws = torch.multinomial(shares.expand(repeats, -1), n, replacement=True, generator=generator)
    counts = torch.stack([torch.bincount(row, minlength=len(shares)) for row in draws])
    return 0.5 * float((counts / n - shares).abs().sum(-1).mean())
