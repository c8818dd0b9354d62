"""Large jobs in constant memory: a folder of shards that any number of processes fill, and that a kill leaves whole."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sculpt import preview
from sculpt.bars import bar
from sculpt.chain import check_count, check_whole
from sculpt.classifier.guide import Guide
from sculpt.contents import find
from sculpt.diagnostics import LEVELS, printable
from sculpt.entries import Entries, parse_json, read_json
from sculpt.files import create_file, remove_debris
from sculpt.identity import digest
from sculpt.launch import place
from sculpt.model import BaseModel
from sculpt.roads import Road, as_road
from sculpt.samples import Samples
from sculpt.tables import Table, needs, write_parquet

__all__ = ["Library", "generate"]

FORMAT = 2
# Readers of parquet folders pass over names that begin with an underscore or a dot.
MANIFEST, TENSORS = "_manifest.json", "_samples"
MOST_SHARDS = 1_000_000
SHARD_BYTES, SHARD = 2**27, 10_000
"""How large a shard is if nobody says: so many bytes, and no more than so many samples."""


def generate(
    model: BaseModel,
    n: int,
    folder: str | Path,
    road: Road | Guide | None = None,
    *,
    shard: int | None = None,
    seed: int = 0,
    steps: int | None = None,
    batch_size: int | None = None,
    share: tuple[int, int] | None = None,
    progress: bool = True,
    **rows: Any,
) -> Library:
    """Write n samples of a model or a composition to a folder of shards, and return it as a :class:`Library`.

    One shard is in memory at a time. Each is sampled on its own, from a seed that only ``seed`` and its number decide; where a road has
    particles, each shard is a population. A shard that is there is whole, and a call that was killed continues with those that are
    missing. ``pandas.read_parquet(folder)``, or any other reader of parquet, reads a row for each sample (``Library`` tells which
    columns); the samples themselves are read shard by shard.

    Several processes, on one machine or on many with a common folder, share the work: ``torchrun``, ``accelerate launch``, ``srun``,
    ``mpirun`` or ``share`` tells each of them which one it is, and process r makes the shards r, r + world, ... What comes out does not
    depend on how many they are.

    Args:
        model: a model or a composition.
        n: how many samples.
        folder: where the shards go. A folder that was begun with the same settings is continued, one with others is refused.
        road: how a composition is sampled, as in its own ``sample``.
        shard: samples a shard; by default 10,000, or fewer where they are large.
        seed: of all shards together.
        steps: of a diffusion model, as in its own ``sample``.
        batch_size: how many states go through a network at once.
        share: ``(rank, world)``, the number of this process and how many there are.
        progress: show a bar.
        rows: what a row is to have, for samples that offer a choice: ``rewards`` of molecules.

    Example:
        >>> library = sculpt.generate(one & two, 200, "cells", shard=100)
        >>> library.shards, sum(len(samples) for samples in library)
        (2, 200)
    """
    shard = _shard(model) if shard is None else shard
    check_count(n)
    check_whole("shard", shard)
    check_whole("seed", seed, least=-(2**63))
    if -(-n // shard) > MOST_SHARDS:
        raise ValueError(f"n={n:,} in shards of {shard:,} are more than {MOST_SHARDS:,} files. Make the shards larger.")
    rank, world = place(share)
    needs("pyarrow", "A folder of shards")
    road = as_road(road) if model.models or road is not None else None
    how = {"steps": steps, "batch_size": batch_size}
    # What would be refused in the first step of a shard is refused now.
    next(model.run(min(n, shard), road, generator=torch.Generator(), **how))
    library = Library(folder)
    sizes = {"n": n, "shard": shard, "seed": seed}
    library.claim(
        _origin(model) | {"road": road and road.identity} | how | sizes | {"rows": model.samples_class.described(**rows)}
    )
    mine = range(rank, library.shards, world)
    missing = [k for k in mine if not library.has(k)]
    total, left = (sum(map(library.size, shards)) for shards in (mine, missing))
    title = str(model) if world == 1 else f"{model}, process {rank} of {world}"
    hidden = not progress or rank > 0
    form = {"unit": " samples", "unit_scale": True, "delay": 0}
    with bar(title=title, total=total, initial=total - left, show=not hidden, **form) as done:
        for k in missing:
            if library.has(k):  # by now another process may have made it
                continue
            generator = torch.Generator().manual_seed(library.seed(k))
            samples = model.sample(library.size(k), road, generator=generator, progress=not hidden and len(missing) == 1, **how)
            library.write(k, samples, **rows)
            done.update(library.size(k))
    return library


def _origin(model: BaseModel) -> dict[str, Any]:
    """What the samples are of."""
    models = [[str(leaf), leaf.key] for leaf in model.leaves]
    said = {"formula": str(model), "samples": model.samples_class.__name__, "models": models, "key": model.key}
    return {"kind": "library", "format": FORMAT} | said


def _shard(model: BaseModel) -> int:
    return max(1, min(SHARD, SHARD_BYTES // (4 * max(1, math.prod(model.shape)))))


class Library:
    """A folder of samples that :func:`generate` fills.

    Shard k is ``part-0000k.parquet``, a row for each sample: its coordinates where these are few, or a molecule's SMILES, count and
    rewards; its ``log_weight`` in the shard, the shard's estimate ``log_z`` where the road gives one, ``shard`` and ``seed``. What is no
    number for a table, such as images, is in ``_samples/0000k.safetensors``. Shards are weighed by their Z: a population that found more
    of the target counts for more.

    Args:
        folder: where the shards are.

    Example:
        >>> library = sculpt.generate(one & two, 200, "cells", shard=100)
        >>> [len(samples) for samples in sculpt.Library("cells")]  # one shard in memory at a time
        [100, 100]
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)

    # Settings

    @cached_property
    def settings(self) -> dict[str, Any]:
        """What the folder was begun with: the manifest."""
        path = self.folder / MANIFEST
        found = Entries(read_json(path, "folder of samples: a library of sculpt"), str(path))
        found.choice("kind", ["library"])
        found.choice("format", [FORMAT])
        n, shard = found.whole("n", 1, 2**53), found.whole("shard", 1, 2**53)
        if -(-n // shard) > MOST_SHARDS:
            raise found.refuse("shard", f"one of which n = {n:,} samples make at most {MOST_SHARDS:,}")
        for name in ("formula", "samples", "key"):
            found.text(name)
        found.whole("seed", -(2**63), 2**63)
        found.inside("rows")
        return found.found

    @property
    def key(self) -> str:
        """A hash of the settings. Every shard carries it; rewards are left out, which another machine rounds differently."""
        return digest({name: value for name, value in self.settings.items() if name != "rows"})

    @property
    def shards(self) -> int:
        """How many there are to be."""
        return -(-self.settings["n"] // self.settings["shard"])

    def size(self, k: int) -> int:
        """How many samples shard k has to hold."""
        return min(self.settings["shard"], self.settings["n"] - k * self.settings["shard"])

    def seed(self, k: int) -> int:
        """The seed of shard k; neighbouring seeds and shards have nothing in common."""
        return int.from_bytes(hashlib.sha256(f"{self.settings['seed']} {k}".encode()).digest()[:7], "big")

    def claim(self, settings: Mapping[str, Any]) -> None:
        """Begin the folder with these settings, or find that it was; refuse a folder of other settings."""
        self.folder.mkdir(parents=True, exist_ok=True)
        manifest = self.folder / MANIFEST
        for folder in (self.folder, self.folder / TENSORS):
            remove_debris(folder)
        if not manifest.exists():
            if strangers := sorted(path.name for path in self.folder.glob("*.parquet")):
                raise ValueError(
                    f"{self.folder} holds {strangers[0]} of something else: no {MANIFEST} is there. Choose an empty folder."
                )
            create_file(manifest, (json.dumps(settings, indent=2) + "\n").encode())
        self.__dict__.pop("settings", None)
        there = self.settings
        if changed := [name for name, value in settings.items() if not _same(name, value, there.get(name))]:
            name = changed[0]
            raise ValueError(
                f"{self.folder} was begun with other settings: {', '.join(changed)} "
                f"({name} was {there.get(name)!r}, now it is {settings[name]!r}). Continue with the old ones, or choose another folder."
            )

    # Shards

    def path(self, k: int) -> Path:
        """The table of shard k."""
        return self.folder / f"part-{k:05}.parquet"

    def write(self, k: int, samples: Samples, **rows: Any) -> None:
        """Write shard k; its table goes last, and says that it is there."""
        about: dict[str, Any] = {"key": self.key, "shard": k, "samples": len(samples)} | samples.origin()
        if samples.keeps_x:
            samples.save(self._tensors(k))
            content = self._tensors(k).read_bytes()
            about |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        table = samples.rows(**rows)
        with np.errstate(divide="ignore"):
            table["log_weight"] = np.log(table.pop("weight"))
        log_z, n = samples.log_z, len(table["log_weight"])
        table |= {"log_z": np.full(n, np.nan if log_z is None else log_z)}
        table |= {"shard": np.full(n, k), "seed": np.full(n, self.seed(k))}
        write_parquet(self.path(k), table, about)

    def has(self, k: int) -> bool:
        """Whether shard k is there and whole."""
        return self.about(k) is not None

    def about(self, k: int) -> dict[str, Any] | None:
        """What the run said about shard k: road, verdict, log Z; ``None`` where the shard is not there or not whole."""
        pyarrow, parquet = needs("pyarrow", "A folder of shards"), needs("pyarrow.parquet", "A folder of shards")
        try:
            metadata = parquet.read_metadata(self.path(k)).metadata
            about = Entries(parse_json(metadata[b"sculpt"].decode(), str(self.path(k))), str(self.path(k)))
            if (about.text("key"), about.whole("shard")) != (self.key, k):
                return None
            about.whole("samples", 1)
            about.choice("level", LEVELS)
            about.optional("particles", about.whole, least=1)
            if about.flag("selected") or about.get("log_z") is not None:
                about.number("log_z")
            if "sha256" in about and self._tensors(k).stat().st_size != about.get("bytes"):
                return None
        except (OSError, pyarrow.ArrowException, KeyError, TypeError, ValueError):
            return None
        return about.found

    @property
    def missing(self) -> list[int]:
        """The shards that are not there yet."""
        return [k for k in range(self.shards) if not self.has(k)]

    def _tensors(self, k: int) -> Path:
        return self.folder / TENSORS / f"{k:05}.safetensors"

    def _there(self) -> dict[int, dict[str, Any]]:
        return {k: about for k in range(self.shards) if (about := self.about(k)) is not None}

    # Reading

    @property
    def weights(self) -> dict[int, float]:
        """What each shard that is there counts, of one: as many samples as it has, times its Z where weights selected them."""
        there = self._there()
        if not there:
            return {}
        log_w = [math.log(about["samples"]) + (about["log_z"] if about["selected"] else 0.0) for about in there.values()]
        return dict(zip(there, torch.softmax(torch.tensor(log_w, dtype=torch.float64), 0).tolist(), strict=True))

    @property
    def log_z(self) -> float | None:
        """The estimate of the target's log-normaliser from all shards that are there."""
        there = self._there().values()
        if not there or any(about["log_z"] is None for about in there):
            return None
        n, log_z = torch.tensor(
            [(about["particles"] or about["samples"], about["log_z"]) for about in there], dtype=torch.float64
        ).T
        return float((n.log() + log_z).logsumexp(0) - n.sum().log())

    def samples(self, k: int, model: BaseModel | None = None) -> Samples:
        """The samples of shard k.

        Args:
            k: of the shard.
            model: decodes what only it can decode.
        """
        about = self.about(k)
        if about is None or "sha256" not in about:
            raise ValueError(
                f"{self.folder} has no samples of shard {k}: {'its table is all' if about else 'it is not there yet'}."
            )
        if hashlib.sha256(self._tensors(k).read_bytes()).hexdigest() != about["sha256"]:
            raise ValueError(
                f"{self._tensors(k)} is damaged. Delete it and call sculpt.generate again: it makes what is missing."
            )
        return Samples.load(self._tensors(k), model=model)

    def __iter__(self) -> Iterator[Samples]:
        """The samples of each shard that is there, one after another."""
        return (self.samples(k) for k in range(self.shards) if self.has(k))

    def tables(self) -> Iterator[Table]:
        """The table of each shard that is there; its ``weight`` sums to one over all of their samples."""
        parquet = needs("pyarrow.parquet", "A folder of shards")
        for k, share in self.weights.items():
            table = parquet.read_table(self.path(k), partitioning=None)  # a folder named beta=32 is no column
            columns = {name: table[name].to_numpy() for name in table.column_names}
            if "log_weight" not in columns:
                raise ValueError(
                    f"{self.path(k)} has no column log_weight. Delete it and call sculpt.generate again: it makes what is missing."
                )
            yield columns | {"weight": np.exp(columns["log_weight"]) * share}

    def summary(self) -> Any:
        """Of molecules: what they are worth, how many are different, what they are like; over all shards that are there."""
        return find(self.settings["samples"], Samples).summed(self.tables(), len(self), self.settings["formula"])

    @property
    def verdict(self) -> str:
        """How many shards have which level of trust."""
        found = [about["level"] for about in self._there().values()]
        parts = ", ".join(f"{count} {level}" for level, count in Counter(found).most_common())
        return f"{parts} ({len(found)} of {self.shards} shards)" if found else "no shard is there yet"

    def __len__(self) -> int:
        return sum(about["samples"] for about in self._there().values())

    def __repr__(self) -> str:
        there = f"{self.shards - len(self.missing)} of {self.shards} shards"
        return f"Library({str(self.folder)!r}: {len(self):,} samples of {self.settings['formula']}, {there})"

    def _repr_html_(self) -> str:
        rows = {"library": repr(self), "verdicts": self.verdict, "log Z": "" if self.log_z is None else f"{self.log_z:.4f}"}
        return preview.table([(name, printable(value)) for name, value in rows.items() if value])


def _same(name: str, a: Any, b: Any) -> bool:
    """Whether two values of a setting agree. Rewards are compared by their scores of a few molecules, which machines round differently."""
    if name == "rows" and isinstance(b, dict):
        return a.keys() == b.keys() and all(np.allclose(a[key], b[key], atol=1e-3, equal_nan=True) for key in a)
    return a == b
