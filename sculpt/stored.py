"""A file of samples: what it says, and the shapes of its tensors, are checked before anything is made of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from sculpt.contents import VERSION
from sculpt.diagnostics import Diagnostics
from sculpt.entries import Entries, parse_json
from sculpt.weights import REAL, WHOLE, Weights

__all__ = ["FORMAT", "Stored"]

FORMAT = 1
MOST = 100_000_000
"""Bytes beside the tensors: as many as safetensors writes."""


class Stored:
    """What ``Samples.save`` wrote.

    Args:
        path: the file.
        decoders: the names of those that can be read back.
    """

    def __init__(self, path: Path, decoders: Sequence[str]):
        self.path, self._weights = path, Weights(path, most=MOST)
        if "sculpt" not in self._weights.metadata:
            raise ValueError(f"{path} is not a file of samples: it was not written by Samples.save.")
        where = f"{path}: its note"
        self._said = said = Entries(parse_json(self._weights.metadata["sculpt"], where), where)
        form, by = said.whole("format"), said.text("version", 80)
        if form != FORMAT:
            raise ValueError(
                f"{path} was written by sculpt {by} in format {form}, this sculpt ({VERSION}) reads format {FORMAT}. Read it with that "
                "version, or sample again."
            )
        shape = self._weights.shapes.get("x", ())
        if not shape or (shape[0] and not math.prod(shape)):
            raise self._damaged(f"its 'x' has shape {shape!s:.80}, expected samples along the first axis")
        self._weights.expect({"x": shape} | dict.fromkeys({"log_weights"} & self._weights.shapes.keys(), shape[:1]), "samples")
        self.n, self.name, self.decoder = shape[0], said.text("class", 200), said.choice("decoder", decoders)
        self.diagnostics = Diagnostics.read(said.inside("diagnostics"))

    def columns(self, names: Sequence[str]) -> dict[str, list[Any]]:
        """What else there is for each sample: texts under these names, numbers under others."""
        said, columns = self._said.inside("columns"), {}
        for name in {*names, *said.found}:
            columns[name] = (
                said.texts(name, max(self.n, 1)) if name in names else said.each(name, float, "numbers", max(self.n, 1))
            )
        if wrong := [name for name, values in columns.items() if len(values) != self.n]:
            raise self._damaged(f"its {wrong[0]} do not belong to {self.n} samples")
        return columns

    def tensors(self) -> tuple[Tensor, Tensor | None]:
        """The samples, and their log-weights where they have some."""
        tensors = self._weights.read()
        x, log_w = tensors["x"], tensors.get("log_weights")
        if x.dtype not in (*REAL, *WHOLE):
            raise self._damaged(f"its samples are of type {x.dtype}, expected real numbers")
        if log_w is not None and not (log_w.dtype in REAL and (log_w < math.inf).all()):
            raise self._damaged("its log-weights are no real numbers")
        return x, log_w

    def _damaged(self, why: str) -> ValueError:
        return ValueError(f"{self.path} is damaged, or not from this sculpt: {why}. Copy or download it again.")
