"""Noise levels: the clock of all diffusion models, float64 whatever the networks compute in."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

if TYPE_CHECKING:
    from sculpt.model import BaseModel

__all__ = ["Level", "common_start", "level", "like", "noise_levels", "noise_range", "share", "spread"]

Level = Float[Tensor, ""] | Float[Tensor, " b"] | float | int

WIDEST = 80.0
"""Where sampling starts at most: the base models' start N(0, s²) then misses their mean by a thousandth of a standard deviation."""

DATA_SCALE = 0.5
"""The noise level around which half of the steps lie: that of data scaled to about one, where its structure appears."""


def level(s: Level, device: torch.device) -> Float[Tensor, "*b"]:
    """A noise level on the clock: float64, where the samples are."""
    return torch.as_tensor(s, dtype=torch.float64, device=device)


def like(c: Float[Tensor, "*b"], z: Float[Tensor, "b *x"]) -> Tensor:
    """A coefficient in z's dtype, one per sample or one for all, ready to multiply z."""
    return c.to(z.dtype).reshape(c.shape + (1,) * (z.ndim - c.ndim)) if c.ndim else c.to(z.dtype)


def noise_range(models: Sequence[BaseModel]) -> tuple[float, float]:
    """The noise levels that all of the models cover."""
    models = [leaf for model in models for leaf in model.leaves]
    low, high = max(models, key=lambda model: model.s_min), min(models, key=lambda model: model.s_max)
    if low.s_min >= high.s_max:
        raise ValueError(
            f"The base models share no noise level: {low} starts at s={low.s_min:.3g}, {high} ends at s={high.s_max:.3g}. "
            "Check the schedulers: each has to be the one its model was trained with."
        )
    return low.s_min, min(high.s_max, WIDEST)


def common_start(models: Sequence[BaseModel]) -> Tensor | None:
    """The clean sample that all of the models start around, where they do."""
    first, *others = [leaf for model in models for leaf in model.leaves]
    for other in others:
        alike = (first.start is None) == (other.start is None)
        if not alike or not (first.start is None or (first.s_max == other.s_max and torch.equal(first.start, other.start))):
            raise ValueError(
                f"{first} and {other} start from different samples. Give both the same image and strength, or neither of them one."
            )
    return first.start


def share(s: Float[Tensor, "*b"], s_min: float, s_max: float, scale: float = DATA_SCALE) -> Float[Tensor, "*b"]:
    """The share of the way from ``s_max`` (0) to ``s_min`` (1) at noise level s.

    Half of the way is even in log s, half in arctan(s / scale): around the scale of the data structure appears, and samplers err most.
    """
    ends = torch.tensor([s_max, s_min], dtype=torch.float64, device=s.device)
    way = [
        ((part - end[0]) / (end[1] - end[0]))
        for part, end in ((s.log(), ends.log()), ((s / scale).atan(), (ends / scale).atan()))
    ]
    return sum(way) / 2


def spread(u: Float[Tensor, "*b"], s_min: float, s_max: float, scale: float = DATA_SCALE) -> Float[Tensor, "*b"]:
    """The noise levels at shares u of the way, see :func:`share`."""
    log_s = torch.linspace(math.log(s_max), math.log(s_min), 4096, dtype=torch.float64, device=u.device)
    way = share(log_s.exp(), s_min, s_max, scale)
    i = torch.searchsorted(way, u.double()).clamp(1, len(way) - 1)
    return torch.lerp(log_s[i - 1], log_s[i], (u.double() - way[i - 1]) / (way[i] - way[i - 1])).exp()


def noise_levels(models: Sequence[BaseModel], steps: int, device: torch.device | str = "cpu") -> Float[Tensor, "steps"]:
    """The levels of a run: ``steps`` network calls, the last of which denoises."""
    if steps < 2:
        raise ValueError(f"Sampling needs at least 2 steps, got {steps}.")
    s_min, s_max = noise_range(models)
    return spread(torch.linspace(0, 1, steps, dtype=torch.float64, device=device), s_min, s_max)
