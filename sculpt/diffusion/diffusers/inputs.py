r"""Learning what a network is called with: the sample, :math:`c + d \, x[\text{index}]`, the time, :math:`a + b t`, or a condition."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sculpt.diffusion.diffusers.probing import BASE
from sculpt.diffusion.diffusers.sources import Given, Source, State, Time
from sculpt.diffusion.diffusers.trees import LISTED
from sculpt.diffusion.diffusers.watch import Step, one

__all__ = ["Inputs", "Unknown", "relative", "tolerance"]


class Unknown(ValueError):
    """What a pipeline does is not of the kind that can be learned."""


def tolerance(*dtypes: torch.dtype) -> float:
    """Of a relative error, in the least precise of these."""
    worst = max(torch.finfo(dtype).eps for dtype in dtypes if dtype.is_floating_point)
    return max(1e-5, 4 * worst)


def relative(got: Tensor, expected: Tensor) -> float:
    """The error of one against the other."""
    return float((got - expected).norm() / expected.norm().clamp(min=1e-30))


class Inputs:
    """The steps of one kind, as inputs are learned from them.

    Args:
        steps: the first with a sample of zeros, the second of ones, some of digits, and others.
        digits: how many there are of these.
        T: where the scheduler's times end.
        batched: whether it is known which axes count samples.
        rows: whether all rows that the scheduler is given are one sample.
    """

    def __init__(self, steps: Sequence[Step], digits: int, T: int, batched: bool, rows: bool):
        self.digits, self.batched, self.T = digits, batched, float(T)
        self.x = [one(step.x, rows).double().flatten() for step in steps]
        self.dtype = steps[0].x.dtype
        self.t = torch.tensor([step.t for step in steps], dtype=torch.float64)

    def source(self, series: list[Any], axis: int | None) -> Source:
        """Where an input comes from, of which there is one value for every step.

        Raises:
            Unknown: where it is none of what there is.
        """
        if axis == LISTED and len(series[0]) == 1 and isinstance(series[0][0], Tensor) and not _same(series):
            series = [value[0] for value in series]
        if _same(series):
            return Given(series[-1], axis)
        if not isinstance(series[0], Tensor):
            if axis == LISTED or any(isinstance(value, bool) or not isinstance(value, (int, float)) for value in series):
                return _refused()
            return self._time([torch.tensor(float(value), dtype=torch.float64) for value in series], None, None)
        if series[0].ndim == 0 or (axis is None and series[0].numel() == 1):
            # Networks of diffusers take a time for every sample where they take one for all.
            form = [value.reshape(()) for value in series] if self.batched else series
            return self._time(form, 0 if self.batched else None, series[0].dtype)
        try:
            return self._state(series, axis)
        except Unknown:
            return self._time(series, axis, series[0].dtype)

    def _time(self, series: list[Tensor], axis: int | None, dtype: torch.dtype | None) -> Time:
        """What is affine in t. Low precision hides it, so plain forms are tried first, and t rounded before as well."""
        t, values = self.t.reshape(-1, *[1] * series[0].ndim), torch.stack([value.detach().cpu().double() for value in series])
        low, high = int(self.t.argmin()), int(self.t.argmax())
        if self.t[low] == self.t[high]:
            return _refused()
        b = (values[high] - values[low]) / (self.t[high] - self.t[low])
        kind = dtype if dtype is None or dtype.is_floating_point else torch.float32
        like = torch.ones_like(b)
        plain = [(c * like, d * like) for c, d in ((0.0, 1.0), (0.0, 1 / self.T), (1.0, -1 / self.T), (self.T, -1.0))]
        for rounded in (None, kind) if kind in (torch.float16, torch.bfloat16) else (None,):
            for c, d in plain:
                time = Time(axis, c, d, kind, rounded)
                if torch.equal(time.affine(t).double(), values):
                    return time
        error = tolerance(series[0].dtype) if series[0].is_floating_point() else 0.5 / float(values.abs().max())
        for c, d in [*plain, (values[high] - b * self.t[high], b)]:
            if ((c + d * t - values).abs() <= error * values.abs().max()).all():
                return Time(axis, c, d, kind)
        return _refused()

    def _state(self, series: list[Tensor], axis: int | None) -> State:
        base, one = series[0].double(), series[1].double()
        factor, index = one - base, torch.zeros_like(base, dtype=torch.long)
        moved = factor != 0
        for d in range(self.digits):
            digit = torch.where(moved, (series[2 + d].double() - base) / torch.where(moved, factor, 1.0), 0.0)
            index += BASE**d * digit.round().long().clamp(0, BASE - 1)
        n = len(self.x[0])
        if not moved.any() or int(index.max()) >= n:
            return _refused()
        for x, value in zip(self.x, series, strict=True):
            if not relative(base + factor * x[index], value.double()) <= tolerance(value.dtype, self.dtype):
                return _refused()
        shape, index = tuple(base.shape), index.flatten()
        if not (factor == 1).all() or base.any():
            return State(axis, shape, series[0].dtype, index, base.flatten(), factor.flatten())
        plain = len(index) == n and torch.equal(index, torch.arange(n, device=index.device))
        return State(axis, shape, series[0].dtype, None if plain else index)


def _refused() -> Any:
    raise Unknown("changes from step to step, and neither as the sample nor as the time")


def _same(series: list[Any]) -> bool:
    one = series[0]
    if isinstance(one, Tensor):
        return all(value is one or (value.shape == one.shape and torch.equal(value, one)) for value in series)
    if isinstance(one, (list, tuple)):
        return all(len(value) == len(one) and all(_same([a, b]) for a, b in zip(value, one, strict=True)) for value in series)
    return all(value is one or value == one for value in series)
