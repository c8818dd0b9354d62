"""A million molecules in constant memory: a folder of shards that any number of processes fill, and that a kill leaves whole."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from sculpt.classifier.guide import Guide
from sculpt.entries import read_json
from sculpt.identity import digest
from sculpt.model import BaseModel
from sculpt.molecules.results import Molecules, needs, origin, write_parquet
from sculpt.molecules.scores import Rewards, Summary, Table, reward_functions, score
from sculpt.roads import Road, as_road

__all__ = ["Library", "generate"]

# Readers of parquet folders pass over names that begin with an underscore or a dot.
MANIFEST = "_manifest.json"
# Their scores stand in the manifest, so that no two versions of a reward meet in one folder.
PROBES = ["CC(=O)Nc1ccc(O)cc1", "CCOC(=O)C1CCNCC1", "c1ccc(-c2nc3ccccc3s2)cc1"]


def generate(
    model: BaseModel,
    n: int,
    folder: str | Path,
    road: Road | Guide | None = None,
    *,
    shard: int = 10_000,
    seed: int = 0,
    rewards: Rewards = None,
    batch_size: int | None = None,
    share: tuple[int, int] | None = None,
    progress: bool = True,
) -> Library:
    """Write n molecules of a model or a composition to ``folder/part-00000.parquet`` and so on, and return the folder as a :class:`Library`.

    One shard is in memory at a time. Each is sampled on its own, from a seed that only ``seed`` and its number decide; where a road has
    particles, each shard is a population. A shard that is there is whole, and a call that was killed continues with those that are
    missing. Read the folder with ``pandas.read_parquet(folder)`` or any other reader of parquet: it has ``smiles``, ``count`` and the
    rewards. A shard has each of its molecules once; several shards may have the same molecule.

    Several processes, on one machine or on many with a common folder, share the work: ``accelerate launch``, ``torchrun`` or ``share``
    tells each of them which one it is, and process r makes the shards r, r + world, ... What comes out does not depend on how many
    they are.

    Args:
        model: a molecule model or a composition of them.
        n: how many molecules.
        folder: where the shards go. A folder that was begun with the same settings is continued, one with others is refused.
        road: how a composition is sampled, as in its own ``sample``.
        shard: molecules a shard.
        seed: of all shards together.
        rewards: which scores to write, see :class:`Molecules`.
        batch_size: how many states go through a network at once.
        share: ``(rank, world)``, the number of this process and how many there are.
        progress: show a bar.
    """
    if n < 1 or shard < 1:
        raise ValueError(f"Got n={n} and shard={shard}: both have to be at least 1.")
    rank, world = _place(share)
    if not issubclass(model.samples_class, Molecules):
        raise ValueError(f"{model} makes no molecules. Sample it with its own sample(n).")
    needs("pyarrow", "A folder of shards")
    functions = reward_functions(rewards)
    road = as_road(road) if model.models or road is not None else None
    _try(model, min(n, shard), road, batch_size)
    library = Library(folder)
    library.claim(
        {
            "formula": str(model),
            "models": [[str(leaf), leaf.key] for leaf in model.leaves],
            "key": model.key,
            "road": road and road.identity,
            "batch_size": batch_size,
            "n": n,
            "shard": shard,
            "seed": seed,
            "rewards": {name: values.tolist() for name, values in score(PROBES, functions, progress=False).items()},
        }
    )
    mine = range(rank, library.shards, world)
    missing = [k for k in mine if not library.has(k)]
    total, left = (sum(map(library.size, shards)) for shards in (mine, missing))
    title = str(model) if world == 1 else f"{model}, process {rank} of {world}"
    hidden = not progress or rank > 0
    with tqdm(total=total, initial=total - left, desc=title, unit=" molecules", unit_scale=True, disable=hidden) as bar:
        for k in missing:
            if library.has(k):  # by now another process may have made it
                continue
            generator, size = torch.Generator().manual_seed(_seed(seed, k)), library.size(k)
            samples = model.sample(size, road, batch_size=batch_size, generator=generator, progress=False)
            library.write(k, samples, functions)
            bar.update(size)
    return library


def _try(model: BaseModel, n: int, road: Road | None, batch_size: int | None) -> None:
    """Refuse now what would be refused in the first step of a shard, or could not be written after it."""
    if road is not None and road.selection is not None and not road.selection.resample:
        raise ValueError("resample=False: shards hold equally weighted molecules. Leave it out.")
    next(model.run(n, road, batch_size=batch_size, generator=torch.Generator()))


class Library:
    """A folder of molecules that :func:`generate` fills: its settings, which shards are there, and their tables one after another.

    Args:
        folder: where the shards are.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """What the folder was begun with: the manifest."""
        return read_json(self.folder / MANIFEST, "folder of molecules")

    @property
    def key(self) -> str:
        """A hash of the settings. Every shard carries it; rewards are left out, which another machine rounds differently."""
        return digest({name: value for name, value in self.settings.items() if name != "rewards"})

    @property
    def shards(self) -> int:
        """How many there are to be."""
        return -(-self.settings["n"] // self.settings["shard"])

    @property
    def missing(self) -> list[int]:
        """The shards that are not there yet."""
        return [k for k in range(self.shards) if not self.has(k)]

    def size(self, k: int) -> int:
        """How many molecules shard k has to hold."""
        return min(self.settings["shard"], self.settings["n"] - k * self.settings["shard"])

    def path(self, k: int) -> Path:
        """The file of shard k."""
        return self.folder / f"part-{k:05}.parquet"

    def has(self, k: int) -> bool:
        """Whether shard k is there and whole."""
        return self.about(k) is not None

    def about(self, k: int) -> dict[str, Any] | None:
        """What the run said about shard k: road, verdict, log Z; ``None`` where the shard is not there or not whole."""
        pyarrow, parquet = needs("pyarrow", "A folder of shards"), needs("pyarrow.parquet", "A folder of shards")
        try:
            metadata = parquet.read_metadata(self.path(k)).metadata
            about = json.loads(metadata[b"sculpt"])
        except (FileNotFoundError, pyarrow.ArrowInvalid, KeyError, TypeError, ValueError):
            return None
        return about if (about.get("key"), about.get("shard")) == (self.key, k) else None

    def tables(self) -> Iterator[Table]:
        """The table of each shard that is there: see :meth:`Molecules.table`."""
        parquet = needs("pyarrow.parquet", "A folder of shards")
        for k in range(self.shards):
            if self.has(k):
                table = parquet.read_table(self.path(k))
                yield {name: table[name].to_numpy() for name in table.column_names}

    def summary(self) -> Summary:
        """Means, shares of high scores and the number of different molecules, over all shards that are there."""
        summary = Summary()
        for table in self.tables():
            summary.add(table)
        return summary

    @property
    def verdict(self) -> str:
        """How many shards have which level of trust."""
        found = [about["level"] for k in range(self.shards) if (about := self.about(k)) is not None]
        parts = ", ".join(f"{count} {level}" for level, count in Counter(found).most_common())
        return f"{parts} ({len(found)} of {self.shards} shards)" if found else "no shard is there yet"

    def claim(self, settings: dict[str, Any]) -> None:
        """Begin the folder with these settings, or find that it was; refuse a folder of other settings."""
        self.folder.mkdir(parents=True, exist_ok=True)
        manifest, draft = self.folder / MANIFEST, self.folder / f".{MANIFEST}.{os.getpid()}"
        if not manifest.exists():
            if strangers := sorted(path.name for path in self.folder.glob("*.parquet")):
                raise ValueError(
                    f"{self.folder} holds {strangers[0]} of something else: no {MANIFEST} is there. Choose an empty folder."
                )
            draft.write_text(json.dumps(settings, indent=2) + "\n")
            try:
                os.link(draft, manifest)  # a link replaces nothing: where processes start together, one of them is first
            except FileExistsError:
                pass
            except OSError:  # a file system without links
                os.replace(draft, manifest)
            finally:
                draft.unlink(missing_ok=True)
        self.__dict__.pop("settings", None)
        there = self.settings
        if changed := [name for name, value in settings.items() if not _same(name, value, there.get(name))]:
            name = changed[0]
            raise ValueError(
                f"{self.folder} was begun with other settings: {', '.join(changed)} "
                f"({name} was {there.get(name)!r}, now it is {settings[name]!r}). Continue with the old ones, or choose another folder."
            )

    def write(self, k: int, samples: Molecules, rewards: Rewards) -> None:
        """Write shard k, all of it or nothing."""
        about = {"key": self.key, "shard": k} | origin(samples.diagnostics)
        table = samples.table(rewards, progress=False)
        del table["weight"]  # weights would sum to one in each shard; counts add up over all of them
        write_parquet(self.path(k), table, about)

    def __len__(self) -> int:
        return sum(self.size(k) for k in range(self.shards) if self.has(k))

    def __repr__(self) -> str:
        return f"Library({str(self.folder)!r}: {len(self):,} of {self.settings['n']:,} molecules of {self.settings['formula']})"


def _same(name: str, a: Any, b: Any) -> bool:
    """Whether two values of a setting agree. Rewards are compared by their scores of a few molecules, which machines round differently."""
    if name == "rewards" and isinstance(b, dict):
        return a.keys() == b.keys() and all(np.allclose(a[key], b[key], atol=1e-3, equal_nan=True) for key in a)
    return a == b


def _seed(seed: int, k: int) -> int:
    """The seed of shard k; neighbouring seeds and shards have nothing in common."""
    return int.from_bytes(hashlib.sha256(f"{seed} {k}".encode()).digest()[:7], "big")


def _place(share: tuple[int, int] | None) -> tuple[int, int]:
    """Which process this is, of how many: as the caller says, or else as accelerate or the launcher's environment does."""
    if share is not None:
        rank, world = share
    elif (accelerate := sys.modules.get("accelerate")) is not None and accelerate.state.is_initialized():
        state = accelerate.PartialState()
        rank, world = state.process_index, state.num_processes
    else:
        rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if not 0 <= rank < world:
        raise ValueError(
            f"Got process {rank} of {world}: processes are numbered from 0 to {world - 1}. Pass share=(rank, world)."
        )
    return rank, world
