"""Learning a network's calls from the steps of a probed pipeline: a strand for every row of the batch that counts."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from sculpt.diffusion.diffusers.calls import Answer, Call, Stage, Strand
from sculpt.diffusion.diffusers.inputs import Inputs, Unknown
from sculpt.diffusion.diffusers.outputs import learned_sum, rows_of
from sculpt.diffusion.diffusers.probing import Phase
from sculpt.diffusion.diffusers.sources import Output, Source
from sculpt.diffusion.diffusers.switches import Switches
from sculpt.diffusion.diffusers.trees import LISTED, Path, at, axes, entries, first, mapped, rows
from sculpt.diffusion.diffusers.watch import Seen, Step
from sculpt.identity import digest

__all__ = ["learned"]


def learned(phase: Phase, twice: Step | None, T: int, numbers: Iterable[float], rows: bool) -> Stage:
    """What is done in one kind of steps: a strand for every row of the batch, or, without a step of two samples, for every call.

    Args:
        phase: complete.
        twice: the same step with two samples; without one, samples are kept apart.
        T: where the scheduler's times end.
        numbers: that the pipeline was called with.
        rows: whether all rows that the scheduler is given are one sample.

    Raises:
        Unknown: where something else is done.
    """
    return _Learner(phase, twice, T, rows).stage(numbers)


class _Learner:
    def __init__(self, phase: Phase, twice: Step | None, T: int, rows: bool):
        self.phase, self.calls, self.rows = phase, phase.steps[-1].calls, rows
        self.steps = phase.steps[1:] + ([] if phase.late is None else [phase.late])
        self.inputs = Inputs(self.steps, phase.digits, T, twice is not None, rows)
        self.axes = None if twice is None else [_axes(*pair) for pair in zip(self.calls, twice.calls, strict=True)]
        self.feeds = [_feeds(self.calls, c) for c in range(len(self.calls))]
        feeding = {call for feeds in self.feeds for call, _ in feeds.values()}
        self.final = [c for c in range(len(self.calls)) if c not in feeding]

    def stage(self, numbers: Iterable[float]) -> Stage:
        """What the steps do, as strands."""
        found = learned_sum(self.phase, self.final, numbers, self.rows)
        listed = isinstance(first(self.calls[self.final[0]].output), list)
        answer = Answer(LISTED if listed else 0, found.index)
        parts = [(c, r) for c in self.final for r in range(len(rows_of(self.calls[c])))]
        strands = []
        for c, own in itertools.groupby(zip(parts, found.weights, strict=True), lambda pair: pair[0][0]):
            pairs = list(own)
            if self.axes is None:
                strands.append(self._strand(c, None, len(pairs), tuple(w for _, w in pairs), answer))
            else:
                strands += [self._strand(c, r, len(pairs), (w,), answer) for (_, r), w in pairs if w]
        if found.rescale is None:
            return Stage(0.0, tuple(_merged(strands)))
        if len(strands) != 2:
            raise Unknown("its guidance is rescaled, and its rows cannot be told apart")
        return Stage(0.0, tuple(strands), found.rescale)

    def _strand(self, c: int, part: int | None, parts: int, weights: tuple[float, ...], answer: Answer) -> Strand:
        needed = sorted({c, *_needed(self.feeds, c)})
        calls = tuple(self._call(k, needed, part, parts) for k in needed)
        return Strand(calls, weights, answer, single=part is None)

    def _call(self, c: int, needed: Sequence[int], part: int | None, parts: int) -> Call:
        """One part of a call of so many; all of it where there is none."""
        seen, found = self.calls[c], {} if self.axes is None else self.axes[c]
        own = len(rows_of(seen)) if c in self.final else _count(seen)
        part, parts = (0, 1) if part is None or own == 1 else (part, parts)

        def source(path: Path, value: Any) -> Source:
            axis = found.get(path)
            if path in self.feeds[c]:
                call, place = self.feeds[c][path]
                return Output(needed.index(call), place, axis)
            try:
                return self.inputs.source(
                    [rows(at(step.calls[c].inputs, path), axis, part, parts) for step in self.steps], axis
                )
            except ValueError as error:
                raise Unknown(f"the input {'.'.join(map(str, path))} of {type(seen.network).__name__} {error}") from None

        listed = {path: axis for path, axis in found.items() if axis == LISTED}
        return Call(seen.network, mapped(source, seen.inputs, stop=listed), switches=Switches.of(seen.network))


def _merged(strands: list[Strand]) -> list[Strand]:
    """Strands that are called alike are one: without a prompt, for example, a condition is its own null condition."""
    found: dict[str, Strand] = {}
    for strand in strands:
        key = digest(strand.described[1:], strand.kind)
        known = found.get(key)
        found[key] = strand if known is None else replace(known, weights=(known.weights[0] + strand.weights[0],))
    return list(found.values())


def _axes(one: Seen, two: Seen) -> dict[Path, int | None]:
    try:
        return axes(one.inputs, two.inputs)
    except ValueError as error:
        raise Unknown(f"{type(one.network).__name__} is called differently for two samples: {error}") from None


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
