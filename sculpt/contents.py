"""The table of contents: where the public names are, and which classes a file may name."""

from __future__ import annotations

import importlib
from typing import TypeVar

__all__ = ["CLASSES", "VERSION", "find"]

VERSION = "0.2.0"

T = TypeVar("T")

CLASSES = {
    # results
    "Samples": "sculpt.samples",
    "Molecules": "sculpt.molecules.results",
    # networks and environments of checkpoints
    "VectorNetwork": "sculpt.diffusion.backbones",
    "ImageNetwork": "sculpt.diffusion.backbones",
    "UNetEncoder": "sculpt.diffusion.diffusers.encoder",
    "GridNetwork": "sculpt.actions.networks",
    "FragmentNetwork": "sculpt.molecules.network",
    "FragmentFeatures": "sculpt.molecules.network",
    "FragmentTrees": "sculpt.molecules.trees",
}
"""Class -> the module that has it. A file that names another one is refused: nothing is imported by what a file says."""


def find(name: str, kind: type[T]) -> type[T]:
    """The class of this name, with or without the module that it was in once; it has to be of this kind."""
    short = name.replace(":", ".").rpartition(".")[2]
    if short in CLASSES and (name == short or name.startswith("sculpt.")):
        cls = getattr(importlib.import_module(CLASSES[short]), short)
        if issubclass(cls, kind):
            return cls  # type: ignore[no-any-return]
    raise ValueError(
        f"{name!r} is not a {kind.__name__} of this sculpt; it reads classes of its own table only. Update sculpt, or read the file with the class that wrote it."
    )
