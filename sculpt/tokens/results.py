"""Samples that are texts: tokens, log-densities under every base model, tables."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from sculpt.samples import Samples
from sculpt.tables import Table, needs, write_parquet
from sculpt.tokens.vocabulary import Vocabulary

if TYPE_CHECKING:
    import pandas

    from sculpt.model import BaseModel

__all__ = ["Reader", "Texts"]

DENSITY = "log p: "
"""Before a model's name, the column of its log-densities."""


@dataclass(frozen=True)
class Reader:
    """The models of some samples: they read and weigh them."""

    models: tuple[BaseModel, ...]

    @property
    def _first(self) -> Any:
        return next((model for model in self.models if hasattr(model, "vocabulary")), getattr(self.models[0], "anchor", None))

    def __call__(self, x: Int[Tensor, "b t"]) -> list[str]:
        return self._first.vocabulary.texts(x)

    def log_p(self, x: Int[Tensor, "b t"]) -> dict[str, list[float]]:
        """Log-densities under each model that knows its own; models of one name are numbered."""
        names = [str(model) for model in self.models]
        names = [name if names.count(name) == 1 else f"{name} ({i})" for i, name in enumerate(names)]
        told = {
            name: getattr(model, "log_p", lambda _: None)(x.to(model.device))
            for name, model in zip(names, self.models, strict=True)
        }
        return {name: log_p.tolist() for name, log_p in told.items() if log_p is not None}


class Texts(Samples):
    """Samples of language models. ``x`` has their tokens, -1 after the end.

    A result that was saved or pickled keeps its texts and log-densities, so whoever reads it needs no model.
    """

    columns = ("text",)

    @functools.cached_property
    def text(self) -> list[str]:
        """The texts, without prompt and end."""
        return list(super().decode())

    @functools.cached_property
    def log_p(self) -> dict[str, list[float]]:
        """By the name of each base model, the log-densities of the sequences under it."""
        if not isinstance(self.decoder, Reader):
            raise ValueError(
                "These samples were read back without their models and without log-densities: model.log_p(samples.x) has them."
            )
        return self.decoder.log_p(self.x)

    @property
    def tokens(self) -> list[list[int]]:
        """The tokens of each sequence, without its end."""
        return Vocabulary.tokens(self.x)

    def decode(self) -> list[str]:
        """The same as :attr:`text`."""
        return self.text

    # What goes wherever the samples go

    def _complete(self) -> None:
        super()._complete()
        if isinstance(self.decoder, Reader):
            _ = self.log_p

    def _kept(self) -> dict[str, list[Any]]:
        return super()._kept() | {f"{DENSITY}{name}": values for name, values in vars(self).get("log_p", {}).items()}

    def _keep(self, columns: dict[str, list[Any]]) -> None:
        super()._keep({name: values for name, values in columns.items() if not name.startswith(DENSITY)})
        if told := {name.removeprefix(DENSITY): values for name, values in columns.items() if name.startswith(DENSITY)}:
            self.log_p = told

    def __getstate__(self) -> dict[str, Any]:
        self._complete()
        kept = {"log_p": self.log_p} if "log_p" in vars(self) else {}
        return {name: value for name, value in super().__getstate__().items() if not name.startswith(DENSITY)} | kept

    # Tables

    def table(self) -> Table:
        """Columns by name, a row for each sequence: ``text``, ``length`` in tokens, ``weight`` (the weights sum to one), and ``log p: …``
        under each model."""
        self._complete()
        n = len(self)
        log_w = torch.zeros(n) if self.log_weights is None else self.log_weights.cpu()
        own = {f"{DENSITY}{name}": np.array(values, dtype=np.float64) for name, values in vars(self).get("log_p", {}).items()}
        length = np.array(list(map(len, self.tokens)), dtype=np.int64)
        return {
            "text": np.array(self.text, dtype=object),
            "length": length,
            "weight": torch.softmax(log_w.double(), 0).numpy(),
        } | own

    def rows(self) -> Table:
        """The same as :meth:`table`."""
        return self.table()

    def to_frame(self) -> pandas.DataFrame:
        """:meth:`table` as a pandas data frame."""
        return needs("pandas", "to_frame").DataFrame(self.table())

    def save(self, path: str | Path) -> None:
        """Write ``.parquet`` (the table), or what other samples write."""
        path = Path(path)
        if path.suffix == ".parquet":
            write_parquet(path, self.table(), self.origin())
        else:
            super().save(path)

    def picture(self, most: int = 64) -> tuple[Literal["png", "svg+xml", "text"], bytes]:
        """Some of the texts."""
        return "text", "\n".join(f"{text!r:.200}" for text in self.text[: min(most, 24)]).encode()
