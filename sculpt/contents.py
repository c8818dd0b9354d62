"""The table of contents: where the public names are, and which classes a file may name, with which arguments."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from sculpt.entries import Entries

__all__ = ["CLASSES", "VERSION", "arguments", "find"]

VERSION = "0.3.0"

T = TypeVar("T")

CLASSES = {
    # results
    "Samples": "sculpt.samples",
    "Molecules": "sculpt.molecules.results",
    "Texts": "sculpt.tokens.results",
    "Smiles": "sculpt.molecules.smiles",
    # networks and environments of checkpoints
    "VectorNetwork": "sculpt.diffusion.backbones",
    "ImageNetwork": "sculpt.diffusion.backbones",
    "UNetEncoder": "sculpt.diffusion.diffusers.encoder",
    "VectorField": "sculpt.diffusion.field",
    "NetworkField": "sculpt.diffusion.diffusers.field",
    "GridNetwork": "sculpt.actions.networks",
    "StateNetwork": "sculpt.actions.networks",
    "TokenFeatures": "sculpt.tokens.networks",
    "FragmentNetwork": "sculpt.molecules.network",
    "FragmentFeatures": "sculpt.molecules.network",
    "FragmentTrees": "sculpt.molecules.trees",
}
"""Class -> the module that has it. A file that names another one is refused: nothing is imported by what a file says."""

_READERS: dict[str, Callable[[Entries, str], Any]] = {
    "int": Entries.whole,
    "float": Entries.number,
    "bool": Entries.flag,
    "str": Entries.text,
    "int | None": lambda entries, name: entries.optional(name, entries.whole),
    "Sequence[int]": lambda entries, name: entries.each(name, int, "whole numbers", most=1000),
    "dict[str, Any]": lambda entries, name: entries.inside(name).found,
    "Iterable[Sequence[Any]]": Entries.list,
    "str | Iterable[Sequence[Any]] | None": Entries.list,  # a text would be a path
}
"""The annotation of a constructor's argument -> how a file's entry is read. Arguments of other kinds do not come from files."""


def find(name: str, kind: type[T]) -> type[T]:
    """The class of this name, with or without the module that it was in once; it has to be of this kind."""
    short = name.replace(":", ".").rpartition(".")[2]
    if short in CLASSES and (name == short or name.startswith("sculpt.")):
        cls = getattr(importlib.import_module(CLASSES[short]), short)
        if issubclass(cls, kind):
            return cls  # type: ignore[no-any-return]
    raise ValueError(
        f"{name!r:.200} is not a {kind.__name__} of this sculpt; it reads classes of its own table only. Update sculpt, or read the file with the class that wrote it."
    )


def arguments(cls: type, entries: Entries) -> dict[str, Any]:
    """A class's arguments from a file, each of the type that its constructor says."""
    known = {name: taken for name, taken in inspect.signature(cls).parameters.items() if taken.annotation in _READERS}
    for name in entries.found:
        if name not in known:
            raise entries.refuse(name, f"no such argument: {cls.__name__} takes {', '.join(known)}")
    return {
        name: _READERS[taken.annotation](entries, name)
        for name, taken in known.items()
        if name in entries or taken.default is inspect.Parameter.empty
    }
