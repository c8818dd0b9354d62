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
from torch import nn
from tqdm.auto import tqdm

from sculpt.base import BaseModel
from sculpt.classifier import Guide
from sculpt.composition import Composition
from sculpt.files import read_json
from sculpt.gflownet.model import digest
from sculpt.molecules.results import Molecules, Rewards, Summary, Table, needs, reward_functions, score, write_parquet

__all__ = ["Library", "generate"]

# Readers of parquet folders pass over names that begin with an underscore or a dot.
MANIFEST = "_manifest.json"
# Their scores stand in the manifest, so that no two versions of a reward meet in one folder.
PROBES = ["CC(=O)Nc1ccc(O)cc1", "CCOC(=O)C1CCNCC1", "c1ccc(-c2nc3ccccc3s2)cc1"]


def generate(
    model: BaseModel,
    n: int,
    folder: str | Path,
    classifier: Guide | None = None,
    *,
    shard: int = 10_000,
    seed: int = 0,
    rewards: Rewards = None,
    resume: bool = True,
    rank: int | None = None,
    world: int | None = None,
    progress: bool = True,
    **options: Any,
) -> Library:
    """Write n molecules of a model or a composition to ``folder/part-00000.parquet`` and so on, and return the folder as a :class:`Library`.

    One shard is in memory at a time. Each is sampled on its own, from a seed that only ``seed`` and its number decide: without a
    classifier, and with ``correct=True``, it is a population of particles of its own. A shard that is there is whole; a call that was
    killed continues with those that are missing. Read the folder with ``pandas.read_parquet(folder)`` or any other reader of parquet:
    ``smiles``, ``count`` and the rewards; a molecule is once in a shard, and may be in several.

    Several processes, on one machine or on many with a common folder, share the work: ``accelerate launch``, ``torchrun`` or ``rank`` and
    ``world`` say which is which, and process r makes the shards r, r + world, ... What comes out does not depend on how many they are.

    Args:
        model: a molecule model or a composition of them.
        classifier: guides a composition.
        shard: molecules a shard.
        rewards: which scores to write, see :class:`Molecules`.
        resume: ``False`` refuses a folder in which molecules already are, for a single process.
        rank, world: the number of this process, and how many there are.
        options: of the model's own ``sample``, such as ``particles``, ``correct``, ``anchor`` and ``batch_size``.
    """
    if n < 1 or shard < 1:
        raise ValueError(f"Got n={n} and shard={shard}: both have to be at least 1.")
    if taken := sorted({"generator", "resample"} & set(options)):
        raise ValueError(
            f"{', '.join(taken)}: not an option here. Shards have seeds of their own (seed=) and equally weighted molecules."
        )
    options = {name: value for name, value in options.items() if value is not None}
    rank, world = _place(rank, world)
    if not isinstance(model.result(torch.zeros(0)), Molecules):
        raise ValueError(f"{model} makes no molecules. Sample it with its own sample(n).")
    needs("pyarrow", "A folder of shards")
    functions = reward_functions(rewards)
    guided = model
    if classifier is not None:
        steered = {name: options[name] for name in ("anchor", "form") if name in options}
        guided = _composition(model).guided(classifier, **steered)  # it refuses here what would be refused after an hour
    settings = {
        "formula": str(model),
        "models": [[str(leaf), leaf.key] for leaf in model.leaves],
        "classifier": digest(classifier) if isinstance(classifier, nn.Module) else classifier and type(classifier).__qualname__,
        "n": n,
        "shard": shard,
        "seed": seed,
        "rewards": {name: values.tolist() for name, values in score(PROBES, functions, progress=False).items()},
        "options": {name: str(value) for name, value in sorted(options.items())},
        "key": guided.key,
    }
    library = Library(folder)
    library.claim(settings, resume)
    mine = range(rank, library.shards, world)
    missing = [k for k in mine if not library.has(k)]
    total, done = (sum(library.size(k) for k in shards) for shards in (mine, set(mine) - set(missing)))
    title = str(model) if world == 1 else f"{model}, process {rank} of {world}"
    with tqdm(
        total=total, initial=done, desc=title, unit=" molecules", unit_scale=True, disable=not progress or rank > 0
    ) as bar:
        for k in missing:
            if library.has(k):  # by now another process may have made it
                continue
            generator = torch.Generator().manual_seed(_seed(seed, k))
            guide = () if classifier is None else (classifier,)
            samples = model.sample(library.size(k), *guide, **options, generator=generator, progress=False)
            library.write(k, samples, functions)
            bar.update(library.size(k))
    return library


class Library:
    """A folder of molecules that :func:`generate` fills: its settings, which shards are there, and their tables one after another."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """What the folder was begun with: the manifest."""
        return read_json(self.folder / MANIFEST, "folder of molecules")

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
        """What the sampler said about shard k: road, verdict, log Z."""
        pyarrow, parquet = needs("pyarrow", "A folder of shards"), needs("pyarrow.parquet", "A folder of shards")
        try:
            metadata = parquet.read_metadata(self.path(k)).metadata
            about = json.loads(metadata[b"sculpt"])
        except (FileNotFoundError, pyarrow.ArrowInvalid, KeyError, TypeError, ValueError):
            return None
        return about if (about.get("key"), about.get("shard")) == (self.settings["key"], k) else None

    def tables(self) -> Iterator[Table]:
        """The table of each shard that is there: see :meth:`Molecules.table`."""
        parquet = needs("pyarrow.parquet", "A folder of shards")
        for k in range(self.shards):
            if self.has(k):
                table = parquet.read_table(self.path(k))
                yield {name: table[name].to_numpy() for name in table.column_names}

    def summary(self) -> Summary:
        """Means and shares of high scores over all shards that are there, and how many molecules are different."""
        summary = Summary()
        for table in self.tables():
            summary.add(table)
        return summary

    @property
    def verdict(self) -> str:
        """The verdicts of all shards, counted by their first word."""
        found = [about["verdict"] for k in range(self.shards) if (about := self.about(k)) is not None]
        words = Counter(verdict.split(":")[0].rstrip(".") for verdict in found)
        parts = ", ".join(f"{count} {word}" for word, count in words.most_common())
        return f"{parts} ({len(found)} of {self.shards} shards)" if found else "no shard is there yet"

    def claim(self, settings: dict[str, Any], resume: bool) -> None:
        """Make the folder this run's, or find that it is; refuse where it is another's."""
        self.folder.mkdir(parents=True, exist_ok=True)
        manifest, draft = self.folder / MANIFEST, self.folder / f".{MANIFEST}.{os.getpid()}"
        if not manifest.exists():
            if strangers := sorted(path.name for path in self.folder.glob("*.parquet")):
                raise ValueError(
                    f"{self.folder} holds {strangers[0]} of something else: no {MANIFEST} is there. Choose an empty folder."
                )
            draft.write_text(json.dumps(settings, indent=2) + "\n")
            try:
                os.link(draft, manifest)  # unlike a rename it does not replace: of processes that start together one is first
            except FileExistsError:
                pass
            except OSError:  # a file system without links
                os.replace(draft, manifest)
            finally:
                draft.unlink(missing_ok=True)
        elif not resume and any(self.folder.glob("part-*")):
            raise ValueError(
                f"{self.folder} already holds molecules. Leave resume=False out to continue, or choose another folder."
            )
        self.__dict__.pop("settings", None)
        there = self.settings
        if changed := [name for name, value in settings.items() if not _same(name, value, there.get(name))]:
            name = changed[0]
            raise ValueError(
                f"{self.folder} was begun with other settings: {', '.join(changed)} "
                f"({name} was {there.get(name)!r}, now it is {settings[name]!r}). Continue with the old ones, or choose another folder."
            )

    def write(self, k: int, samples: Molecules, rewards: Rewards) -> None:
        """Shard k, all of it or nothing."""
        said = samples.diagnostics
        about = {"key": self.settings["key"], "shard": k, "formula": said.formula, "road": said.road, "verdict": said.verdict}
        about |= {"log_z": said.log_z, "log_z_error": said.log_z_error}
        table = samples.table(rewards, progress=False)
        del table["weight"]  # they would sum to one in each shard; counts go on adding up
        write_parquet(self.path(k), table, about)

    def __len__(self) -> int:
        return sum(self.size(k) for k in range(self.shards) if self.has(k))

    def __repr__(self) -> str:
        return f"Library({str(self.folder)!r}: {len(self):,} of {self.settings['n']:,} molecules of {self.settings['formula']})"


def _composition(model: BaseModel) -> Composition:
    if not isinstance(model, Composition):
        raise ValueError(f"A classifier guides compositions; {model} is a single model. Leave the classifier out.")
    return model


def _same(name: str, a: Any, b: Any) -> bool:
    """Of two settings. Rewards are compared by what they give to a few molecules: another machine rounds differently."""
    if name == "rewards" and isinstance(b, dict):
        return a.keys() == b.keys() and all(np.allclose(a[key], b[key], atol=1e-3, equal_nan=True) for key in a)
    return a == b


def _seed(seed: int, k: int) -> int:
    """Of shard k: neighbouring seeds and shards have nothing in common."""
    return int.from_bytes(hashlib.sha256(f"{seed} {k}".encode()).digest()[:7], "big")


def _place(rank: int | None, world: int | None) -> tuple[int, int]:
    """Which process this is, of how many: as it was said, or as accelerate knows it, or as the launcher wrote it down."""
    if (rank is None) != (world is None):
        raise ValueError(f"Got rank={rank} and world={world}: pass both or neither.")
    if rank is None:
        accelerate = sys.modules.get("accelerate")
        if accelerate is not None and accelerate.state.is_initialized():
            state = accelerate.PartialState()
            return state.process_index, state.num_processes
        rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if not 0 <= rank < world:
        raise ValueError(f"Got rank={rank} of world={world} processes: ranks go from 0 to {world - 1}.")
    return rank, world
