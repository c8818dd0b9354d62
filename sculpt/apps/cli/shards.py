"""Folders of shards as the output of a command."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sculpt.apps.cli.options import count, device

if TYPE_CHECKING:
    from sculpt.model import BaseModel
    from sculpt.roads import Road

__all__ = ["add_shards", "own_device", "row", "sharded", "stopped", "write_shards"]


def add_shards(parser: argparse.ArgumentParser, things: str) -> None:
    """The options of a command whose output may be a folder."""
    parser.add_argument("--shards", action="store_true", help="write a folder of shards whatever the output's name looks like")
    parser.add_argument(
        "--shard", type=count, metavar="SIZE", help=f"{things} a shard (default: 10000, fewer where they are large)"
    )
    parser.set_defaults(stopped=stopped)


def sharded(options: argparse.Namespace) -> bool:
    """Whether a folder was asked for."""
    return options.shards or options.output.endswith(("/", "\\")) or Path(options.output).is_dir()


def stopped(options: argparse.Namespace) -> str:
    """What is told after an interruption."""
    if sharded(options):
        return f"The same command continues: {options.output} keeps the shards that are done."
    return "Nothing was written."


def own_device(options: argparse.Namespace) -> str:
    """One GPU for each process of a launcher."""
    chosen = device(options)
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if chosen == "cuda" else chosen


def write_shards(options: argparse.Namespace, model: BaseModel, road: Road | None, whence: str = "", **rows: Any) -> None:
    """Fill the folder, and tell what is in it."""
    from sculpt.library import generate

    settings = {"shard": options.shard, "seed": options.seed, "batch_size": options.batch_size}
    library = generate(model, options.n, options.output, road, steps=getattr(options, "steps", None), **settings, **rows)
    if missing := library.missing:  # other processes are still at it
        print(f"this process is done; {len(missing)} of {library.shards} shards are not there yet")
        return
    log_z = "" if library.log_z is None else f"{library.log_z:.4f}"
    said = {"formula": str(model), "classifier": whence, "verdicts": library.verdict, "log Z": log_z}
    print("".join(row(name, value) for name, value in said.items()), end="")
    if "rewards" in rows:
        print(library.summary())
    print(f"wrote {options.output}: {library.shards} shards, {len(library):,} samples")


def row(name: str, value: str) -> str:
    """A line of a table, where there is something to say."""
    return f"{name:>16}  {value}\n" if value else ""
