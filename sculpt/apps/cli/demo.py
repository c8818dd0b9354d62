"""``sculpt demo``: the main jobs, with pictures and tables."""

from __future__ import annotations

import argparse
import importlib
from typing import Any

from sculpt.apps.cli.options import add_command, seed
from sculpt.shipped import Missing

__all__ = ["add"]

PARTS = ("molecules", "digits", "discs")


def add(commands: Any) -> None:
    """Put the command among the others."""
    parser = add_command(
        commands,
        "demo",
        help="the main jobs, with pictures and tables (about two minutes)",
        description="molecules: bind sEH and can be made, from two pretrained policies.\n"
        "digits: three image models and what is composed of them (in a clone of the repository).\n"
        "discs: three discs in the plane on every road, each measured against the exact answer.",
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)} (default: all)")
    parser.add_argument("-o", "--output", default="demo", metavar="FOLDER", help="where pictures and tables go (default: demo)")
    parser.add_argument("--seed", type=seed, default=0)
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    parts = options.parts or list(PARTS)
    if unknown := [part for part in parts if part not in PARTS]:
        raise ValueError(f"There is no demo {unknown[0]!r}; there are {', '.join(PARTS)}.")
    for i, part in enumerate(parts):
        if i:
            print("\n" + "─" * 100 + "\n")
        try:
            importlib.import_module(f"sculpt.apps.demos.{part}").run(options.output, seed=options.seed)
        except Missing as error:
            if options.parts:  # it was asked for
                raise
            print(f"{part} is left out: {error}")
