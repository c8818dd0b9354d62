"""Sources: where each input of a network comes from. Most are conditions, the same at every step; one is the sample, one the time.

Notation: ``n`` samples, ``k`` rows of a strand in a network's batch, ``*x`` one sample.
"""

from __future__ import annotations

import abc
import functools
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sculpt.diffusion.diffusers.trees import LISTED, Path
from sculpt.identity import digest

__all__ = ["Given", "Output", "Source", "State", "Time"]


class Source(abc.ABC):
    """Where one input of a network comes from."""

    axis: int | None
    """that counts samples; ``None`` for what all samples and strands share"""

    @abc.abstractmethod
    def value(self, x: Float[Tensor, "n *x"], t: Float[Tensor, "*t"]) -> Any:
        """The input for these samples."""

    @property
    @abc.abstractmethod
    def kind(self) -> Any:
        """What has to be the same in strands that are one call."""

    @property
    @abc.abstractmethod
    def described(self) -> Any:
        """What tells it from others, for the model's key; ``None`` for the sample and the time as they are."""


@dataclass(frozen=True, eq=False)
class Given(Source):
    """A condition, which is the same at every step."""

    kept: Any
    axis: int | None = None
    cast: bool = False
    """whether it is brought to the dtype of x"""

    def value(self, x, t):
        if self.axis == LISTED:
            return list(self.kept) * len(x)
        if not isinstance(self.kept, Tensor):
            return self.kept
        kept = self.kept.to(x.device, x.dtype if self.cast and self.kept.is_floating_point() else self.kept.dtype)
        if self.axis is None or len(x) == 1:
            return kept
        if kept.shape[self.axis] == 1:
            return kept.expand(*(len(x) if i == self.axis else n for i, n in enumerate(kept.shape)))
        return torch.cat([kept] * len(x), self.axis)

    @functools.cached_property
    def kind(self):
        if self.axis == LISTED:
            return "list"
        if self.axis is None or not isinstance(self.kept, Tensor):
            return digest(self.kept)
        return self.axis, self.kept.dtype, tuple(self.kept.shape)

    @property
    def described(self):
        return self.axis, self.kept


@dataclass(frozen=True, eq=False)
class State(Source):
    """The noisy sample, as it is or rearranged: each number of the input is one of x, or a constant."""

    axis: int | None
    shape: tuple[int, ...] | None = None
    """of a strand's rows; that of x where there is none"""
    dtype: torch.dtype | None = None
    index: Int[Tensor, "r"] | None = None
    """which of x's numbers each is; in x's own order where there is none"""
    base: Float[Tensor, "r"] | None = None
    factor: Float[Tensor, "r"] | None = None

    def value(self, x, t):
        rows = x
        if self.index is not None:
            rows = x.flatten(1)[:, self.index.to(x.device)]
            rows = rows if self.factor is None else rows * self.factor.to(rows) + self.base.to(rows)  # type: ignore[union-attr]
        if self.shape is not None:
            rows = rows.reshape(len(x), *self.shape)
        rows = rows if self.dtype is None else rows.to(self.dtype)
        return rows if self.shape is None else _along(rows, self.axis)

    @property
    def kind(self):
        return self.axis, self.shape, self.dtype

    @property
    def described(self):
        return None if self.index is None else ("x", self.shape, self.index, self.base, self.factor)


@dataclass(frozen=True, eq=False)
class Time(Source):
    """The time, or what is affine in it: a + b t, a number or one for every place."""

    axis: int | None
    a: Tensor
    b: Tensor
    dtype: torch.dtype | None = torch.float32
    """``None`` for a plain number"""
    rounded: torch.dtype | None = None
    """of t, before anything is done with it"""

    def value(self, x, t):
        if self.axis is None:
            return (
                self.affine(t.reshape(())).item() if self.dtype is None else self.affine(t.reshape(()) if t.numel() == 1 else t)
            )
        return _along(self.affine(t.expand(len(x)).reshape(-1, *[1] * self.a.ndim)), self.axis)

    def affine(self, t: Tensor) -> Tensor:
        """a + b t in the dtype that the network takes."""
        t = (t if self.rounded is None else t.to(self.rounded)).double()
        new = self.a.to(t.device) + self.b.to(t.device) * t
        if self.dtype is None:
            return new
        return (new if self.dtype.is_floating_point else new.round()).to(self.dtype)

    @property
    def kind(self):
        return self.axis, tuple(self.a.shape), self.dtype, None if self.axis is not None else digest(self.a, self.b)

    @property
    def described(self):
        plain = self.a.numel() == 1 and float(self.a) == 0 and float(self.b) == 1
        return None if plain else ("t", self.a, self.b)


@dataclass(frozen=True)
class Output(Source):
    """What an earlier call of the same strand answered."""

    call: int
    path: Path
    axis: int | None = 0

    def value(self, x, t):
        raise TypeError("the output of a call is known after the call only")

    @property
    def kind(self):
        return self.call, self.path

    @property
    def described(self):
        return "output", self.call, self.path


def _along(rows: Tensor, axis: int | None) -> Any:
    """(n, *rows of a sample) as a network takes it: sample after sample along the axis."""
    if axis == LISTED:
        return list(rows.unbind(0))
    if axis is None or rows.ndim == 1:
        return rows[0] if axis is None else rows
    return rows.movedim(0, axis).flatten(axis, axis + 1)
