r"""Learning a network's calls from the steps of a probed pipeline: where x and t go in, and what its output is made of.

.. math:: F(x, t) = \sum_r w_r O_r, \qquad \text{an input} = c + d \, x[\text{index}] \;\text{or}\; a + b t \;\text{or fixed}
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sculpt.diffusion.diffusers.calls import Answer, Call, Given, Output, Source, State, Strand, Time
from sculpt.diffusion.diffusers.probing import BASE, Phase
from sculpt.diffusion.diffusers.switches import Switches
from sculpt.diffusion.diffusers.trees import LISTED, Path, at, axes, entries, first, mapped, rows
from sculpt.diffusion.diffusers.watch import Seen, Step
from sculpt.identity import digest

__all__ = ["Unknown", "learned", "tolerance"]


class Unknown(ValueError):
    """What a pipeline does is not of the kind that can be learned."""


def tolerance(*dtypes: torch.dtype) -> float:
    """Of a relative error, in the least precise of these."""
    worst = max(torch.finfo(dtype).eps for dtype in dtypes if dtype.is_floating_point)
    return max(1e-5, 4 * worst)


def learned(phase: Phase, twice: Step | None, T: int) -> list[Strand]:
    """The strands of one kind of steps: one for every row of the batch, or, without a step of two samples, one for every call.

    Args:
        phase: complete.
        twice: the same step with two samples; without one, samples are kept apart.
        T: where the scheduler's times end.

    Raises:
        Unknown: where something else is done.
    """
    return _Learner(phase, twice, T).strands()


class _Learner:
    def __init__(self, phase: Phase, twice: Step | None, T: int):
        self.T = T
        self.phase, self.last = phase, phase.steps[-1]
        self.steps = phase.steps[1:] + ([] if phase.late is None else [phase.late])
        self.zero, self.one = self.steps[0], self.steps[1]
        self.coded = self.steps[2 : 2 + phase.digits]
        self.random = [phase.steps[k] for k in phase.random]
        self.shape = tuple(self.last.x.shape[1:])
        self.axes = (
            None if twice is None else [self._axes(one, two) for one, two in zip(self.last.calls, twice.calls, strict=True)]
        )
        self.feeds = [_feeds(self.last.calls, c) for c in range(len(self.last.calls))]
        self.final = [
            c for c in range(len(self.last.calls)) if not any(feed[0] == c for feeds in self.feeds for feed in feeds.values())
        ]

    def _axes(self, one: Seen, two: Seen) -> dict[Path, int | None]:
        try:
            return axes(one.inputs, two.inputs)
        except ValueError as error:
            raise Unknown(f"{type(one.network).__name__} is called differently for two samples: {error}") from None

    def strands(self) -> list[Strand]:
        index, columns = self._traced()
        weights = self._weights(columns)
        answer = Answer(
            index=None if index is None else index,
            axis=LISTED if isinstance(first(self.last.calls[self.final[0]].output), list) else 0,
        )
        strands = []
        for c, own in itertools.groupby(zip(self._parts(), weights, strict=True), lambda pair: pair[0][0]):
            pairs = list(own)
            if self.axes is None:
                strands.append(self._strand(c, None, len(pairs), tuple(w for _, w in pairs), answer))
            else:
                strands += [self._strand(c, r, len(pairs), (w,), answer) for (_, r), w in pairs if w]
        return _merged(strands)

    # The output

    def _parts(self) -> list[tuple[int, int]]:
        """Every row of every call that counts."""
        return [(c, r) for c in self.final for r in range(len(_rows(self.last.calls[c])))]

    def _traced(self) -> tuple[Tensor | None, Any]:
        """Which numbers of a row are F's, and a function that gives these numbers of all rows."""
        if len({id(self.last.calls[c].network) for c in self.final}) > 1:
            names = " and ".join(dict.fromkeys(type(self.last.calls[c].network).__name__ for c in self.final))
            raise Unknown(f"{names} are called in one step, and what one answers is changed before the next takes it")
        total = self._F(self.one).double()
        if not (total.isfinite().all() and (total.abs() > 0.05).all()):
            raise Unknown(NOT_A_SUM)
        index = torch.zeros(self.shape, dtype=torch.long, device=total.device)
        for d, step in enumerate(self.coded):
            index += BASE**d * (self._F(step).double() / total).round().long().clamp(0, BASE - 1)
        index = index.flatten()
        sizes = {row.numel() for c in self.final for row in _rows(self.last.calls[c])}
        if len(sizes) != 1 or int(index.max()) >= min(sizes):
            raise Unknown(NOT_A_SUM)

        def columns(step: Step) -> Tensor:
            return torch.stack([row.flatten().double()[index] for c in self.final for row in _rows(step.calls[c])], -1)

        plain = (
            torch.equal(index, torch.arange(min(sizes), device=index.device))
            and tuple(_rows(self.last.calls[self.final[0]])[0].shape) == self.shape
        )
        return (None if plain else index), columns

    def _weights(self, columns: Any) -> list[float]:
        fitted, held_out = self.random
        A, F = columns(fitted), self._F(fitted).double().flatten()
        w = torch.linalg.lstsq(A.cpu(), F.cpu()[:, None]).solution[:, 0]
        error = tolerance(*(row.dtype for c in self.final for row in _rows(self.last.calls[c])), self._F(fitted).dtype)
        nice = (1000 * w).round() / 1000
        w = torch.where((nice - w).abs() < error, nice, w)
        for step in (held_out, *([] if self.phase.late is None else [self.phase.late])):
            miss = _relative(columns(step).cpu() @ w, self._F(step).double().flatten().cpu())
            if not miss < error * (1 + float(w.abs().sum())):
                raise Unknown(f"{NOT_A_SUM} (relative error {miss:.2g})")
        return w.tolist()

    def _F(self, step: Step) -> Tensor:
        """Of one sample, without a learned variance."""
        F = step.F[0]
        for axis, (n, m) in enumerate(zip(F.shape, self.shape, strict=True)):
            if n == 2 * m:
                F = F.narrow(axis, 0, m)
        if tuple(F.shape) != self.shape:
            raise Unknown(
                f"the scheduler steps samples of shape {self.shape} with an output of shape {tuple(step.F.shape[1:])}"
            )
        return F

    # The inputs

    def _strand(self, c: int, part: int | None, parts: int, weights: tuple[float, ...], answer: Answer) -> Strand:
        needed = sorted({c, *(feed for feed in _needed(self.feeds, c))})
        calls = tuple(self._call(k, needed, part, parts) for k in needed)
        return Strand(calls, weights, answer, single=part is None)

    def _call(self, c: int, needed: Sequence[int], part: int | None, parts: int) -> Call:
        seen = self.last.calls[c]
        own = len(_rows(seen)) if c in self.final else _count(seen)
        part, parts = (0, 1) if own == 1 else (part, parts)
        found = {} if self.axes is None else {path: axis for path, axis in self.axes[c].items()}

        def source(path: Path, value: Any) -> Source:
            axis = found.get(path)
            if path in self.feeds[c]:
                call, place = self.feeds[c][path]
                return Output(needed.index(call), place, axis)
            try:
                series = [
                    rows(at(step.calls[c].inputs, path), axis, part or 0, parts if part is not None else 1)
                    for step in self.steps
                ]
                return self._source(series, axis)
            except (Unknown, ValueError) as error:
                raise Unknown(f"the input {'.'.join(map(str, path))} of {type(seen.network).__name__} {error}") from None

        listed = {path: axis for path, axis in found.items() if axis == LISTED}
        return Call(seen.network, mapped(source, seen.inputs, stop=listed), switches=Switches.of(seen.network))

    def _source(self, series: list[Any], axis: int | None) -> Source:
        """Where an input comes from, of which there is one value for every step."""
        if axis == LISTED:
            if len(series[0]) != 1 or not isinstance(series[0][0], Tensor) or _same(series):
                return Given(series[-1], axis) if _same(series) else _refused()
            series = [value[0] for value in series]
        if _same(series):
            return Given(series[-1], axis)
        if not isinstance(series[0], Tensor):
            if any(isinstance(value, bool) or not isinstance(value, (int, float)) for value in series):
                return _refused()
            a, b = self._times([torch.tensor(float(value), dtype=torch.float64) for value in series])
            return Time(None, a, b, dtype=None)
        if series[0].ndim == 0 or axis is None and series[0].numel() == 1:
            # Networks of diffusers take a time for every sample where they take one for all.
            a, b = self._times(series)
            return (
                Time(0, a.reshape(()), b.reshape(()), _float(series[0].dtype))
                if self.axes is not None
                else Time(None, a, b, _float(series[0].dtype))
            )
        try:
            return self._state(series, axis)
        except Unknown:
            a, b = self._times(series)
            return Time(axis, a, b, _float(series[0].dtype))

    def _times(self, series: list[Tensor]) -> tuple[Tensor, Tensor]:
        """a and b of a + b t. Low precision hides them, so the plain ones are tried first."""
        t = torch.tensor([step.t for step in self.steps], dtype=torch.float64)
        t = t.reshape(-1, *[1] * series[0].ndim)
        values, dtype = torch.stack([value.detach().cpu().double() for value in series]), series[0].dtype
        error = tolerance(dtype) if dtype.is_floating_point else 0.5
        low, high = int(t.flatten().argmin()), int(t.flatten().argmax())
        if low == high or t.flatten()[low] == t.flatten()[high]:
            return _refused()
        b = (values[high] - values[low]) / (t[high] - t[low])
        for plain_a, plain_b in ((0.0, 1.0), (0.0, 1 / self.T), (1.0, -1 / self.T), (float(self.T), -1.0), (None, None)):
            a_, b_ = (
                (values[high] - b * t[high], b)
                if plain_a is None
                else (torch.full_like(b, plain_a), torch.full_like(b, plain_b))
            )
            if ((a_ + b_ * t - values).abs() <= error * values.abs().max()).all():
                return a_, b_
        return _refused()

    def _state(self, series: list[Tensor], axis: int | None) -> State:
        base, one = series[0].double(), series[1].double()
        factor, index = one - base, torch.zeros_like(base, dtype=torch.long)
        moved = factor.abs() > 0
        if not moved.any():
            return _refused()
        for d in range(self.phase.digits):
            digit = torch.where(moved, (series[2 + d].double() - base) / torch.where(moved, factor, 1.0), 0.0)
            index += BASE**d * digit.round().long().clamp(0, BASE - 1)
        n = self.last.x[0].numel()
        if int(index.max()) >= n:
            return _refused()
        for step, value in zip(self.steps, series, strict=True):
            expected = base + factor * step.x[0].double().flatten()[index]
            if not _relative(expected, value.double()) <= tolerance(value.dtype, step.x.dtype):
                return _refused()
        shape, plain = tuple(base.shape), bool((factor == 1).all() and (base == 0).all())
        index = index.flatten()
        if plain and index.numel() == n and torch.equal(index, torch.arange(n, device=index.device)):
            return State(axis, shape, series[0].dtype)
        return State(axis, shape, series[0].dtype, index, *(None, None) if plain else (base.flatten(), factor.flatten()))


def _merged(strands: list[Strand]) -> list[Strand]:
    """Strands that are called alike are one: without a prompt, for example, a condition is its own null condition."""
    found: dict[str, Strand] = {}
    for strand in strands:
        key = digest(strand.described[1:], strand.kind)
        known = found.get(key)
        found[key] = strand if known is None else replace(known, weights=(known.weights[0] + strand.weights[0],))
    return list(found.values())


NOT_A_SUM = (
    "what it gives to its scheduler is no fixed weighted sum of what its networks answer. Turn off what rescales or normalises guidance, or "
    "changes it on the way (guidance_rescale=0, cfg_normalization=False, guidance_scale=1)"
)


def _refused() -> Any:
    raise Unknown("changes from step to step, and neither as the sample nor as the time")


def _relative(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm().clamp(min=1e-30))


def _float(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype.is_floating_point else torch.float32


def _same(series: list[Any]) -> bool:
    one = series[0]
    if isinstance(one, Tensor):
        return all(value is one or (value.shape == one.shape and torch.equal(value, one)) for value in series)
    if isinstance(one, (list, tuple)):
        return all(len(value) == len(one) and all(_same([a, b]) for a, b in zip(value, one, strict=True)) for value in series)
    return all(value is one or value == one for value in series)


def _rows(seen: Seen) -> list[Tensor]:
    """The rows of an output, in its first tensor or list."""
    out = first(seen.output)
    if isinstance(out, list) and not all(isinstance(row, Tensor) for row in out):
        raise Unknown(f"{type(seen.network).__name__} answers with a list of {', '.join({type(row).__name__ for row in out})}")
    return out if isinstance(out, list) else list(out)


def _count(seen: Seen) -> int:
    """The rows of a call whose output another one takes."""
    return next(len(value) for _, value in entries(seen.output) if isinstance(value, Tensor) and value.ndim)


def _feeds(calls: Sequence[Seen], c: int) -> dict[Path, tuple[int, Path]]:
    """Which inputs of a call are outputs of earlier ones: the call, and the place in its output."""
    made = {id(value): (k, place) for k in range(c) for place, value in entries(calls[k].output) if isinstance(value, Tensor)}
    return {path: made[id(value)] for path, value in entries(calls[c].inputs) if id(value) in made}


def _needed(feeds: Sequence[dict[Path, tuple[int, Path]]], c: int) -> set[int]:
    """The calls that a call rests on."""
    own = {call for call, _ in feeds[c].values()}
    return own.union(*(_needed(feeds, call) for call in own))
