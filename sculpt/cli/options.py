"""What several commands take: counts, models by name, conditions, the device."""

from __future__ import annotations

import argparse
import ast
from collections.abc import Sequence
from typing import Any

from sculpt.cli.formulas import FUNCTIONS

__all__ = ["add_correct", "conditions", "count", "device", "load_models", "named_paths"]


def count(text: str) -> int:
    if not (text.isdigit() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def add_correct(parser: argparse.ArgumentParser, things: str) -> None:
    correct = parser.add_mutually_exclusive_group()
    correct.add_argument(
        "--correct", action="store_true", default=None, help=f"weigh and select guided {things} until they are exact"
    )
    correct.add_argument(
        "--correct-densities", dest="correct", action="store_const", const="densities",
        help="the same by the models' own densities in place of the classifier's terminal head (GFlowNets)",
    )  # fmt: skip


def named_paths(pairs: Sequence[str]) -> dict[str, str]:
    paths: dict[str, str] = {}
    for pair in pairs:
        name, equals, path = pair.partition("=")
        if not (equals and name.isidentifier() and path):
            raise ValueError(
                f"--model {pair}: expected NAME=PATH with a name of letters and digits, e.g. --model a={pair.strip('=')}."
            )
        if name in paths:
            raise ValueError(f"--model {name} was given twice: {paths[name]} and {path}.")
        if name in FUNCTIONS:
            raise ValueError(f"--model {name}: that is the name of a function; choose another.")
        paths[name] = path
    return paths


def load_models(options: argparse.Namespace) -> dict[str, Any]:
    import torch

    import sculpt

    paths = named_paths(options.model)
    given = conditions(options.condition, list(paths))
    dtype = getattr(torch, options.dtype) if options.dtype else None
    models = {name: sculpt.load(path, device=device(options), dtype=dtype, **given[name]) for name, path in paths.items()}
    for name, model in models.items():
        if isinstance(model, sculpt.Classifier):
            raise ValueError(f"--model {name}: {paths[name]} is a classifier. Pass it as --classifier.")
        if isinstance(model, sculpt.Diffusion):
            model.name = name  # as the user calls it here, in formulas and in messages
    return models


def device(options: argparse.Namespace) -> str:
    import torch

    return options.device or ("cuda" if torch.cuda.is_available() else "cpu")


def conditions(pairs: Sequence[str], names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """``name.key=value`` for one model, ``key=value`` for all."""
    given: dict[str, dict[str, Any]] = {name: {} for name in names}
    for pair in pairs:
        left, equals, text = pair.partition("=")
        name, dot, key = left.rpartition(".")
        if not (equals and key.isidentifier()) or (dot and name not in given):
            raise ValueError(
                f"--with {pair}: expected KEY=VALUE or NAME.KEY=VALUE with a model's name ({', '.join(filter(None, names))})."
            )
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            value = text
        for target in [name] if dot else names:
            given[target][key] = value
    return given
