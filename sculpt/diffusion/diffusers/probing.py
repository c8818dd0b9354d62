"""Probing: a pipeline's networks are answered for, and its samples chosen, so that what goes where can be read off.

Every number of a sample says in a few steps, in digits of base 256, which one it is: these are exact in any dtype. What a network
is called with, and what the scheduler is given, then tells where each of its numbers comes from.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sculpt.diffusion.diffusers.trees import entries, first, mapped
from sculpt.diffusion.diffusers.watch import Lead, Seen, Step

__all__ = ["BASE", "Border", "Clean", "Phase", "Probe", "Still", "Twice"]

BASE = 256


def digits(numel: int) -> int:
    """How many digits tell so many numbers apart."""
    return max(1, math.ceil(math.log(max(2, numel), BASE) - 1e-9))


def numbers(shape: torch.Size, d: int, like: Tensor) -> Tensor:
    """The d-th digit of every place."""
    place = torch.arange(shape.numel(), device=like.device) // BASE**d % BASE
    return place.to(like.dtype).reshape(shape)


@dataclass
class Phase:
    """Steps of one kind: the same networks are called, with inputs of the same shapes."""

    key: Any
    steps: list[Step] = field(default_factory=list)
    digits: int = 1
    """of the largest of what is traced"""
    times: list[float] = field(default_factory=list)
    late: Step | None = None
    """its last step: what is learned has to hold there too"""

    @property
    def random(self) -> tuple[int, int]:
        """Which two of its steps are filled with noise."""
        return 3 + self.digits, 4 + self.digits

    @property
    def length(self) -> int:
        return 6 + self.digits

    @property
    def complete(self) -> bool:
        return len(self.steps) >= self.length

    def filled(self, like: Tensor, shape: torch.Size, generator: torch.Generator) -> Tensor:
        """What the next step is filled with: ones, digits, noise. The first step of a phase is left aside."""
        k = len(self.steps)
        if k in (1, 2):
            return torch.ones(shape, dtype=like.dtype, device=like.device)
        if 3 <= k < 3 + self.digits:
            return numbers(shape, k - 3, like)
        return torch.randn(shape, generator=generator).to(like)


class Probe(Lead):
    """The lead of a run that is learned from. Networks answer themselves when they are called for the first time, and once more for the check."""

    def __init__(self) -> None:
        self.phases: list[Phase] = []
        self.steps = 0
        self.known: dict[Any, Any] = {}
        """for every kind of call an output, without its numbers"""
        self.rows = 0
        """of the pipeline's samples"""
        self.has_noised = False
        """whether the scheduler noised something before all steps"""
        self.codes: list[Any] = []
        """what the pipeline's encoding methods gave"""
        self.changed = self.again = False
        self._phase: Phase | None = None
        self._given: Tensor | None = None
        self._generator = torch.Generator().manual_seed(0)
        self._now: list[Any] = []

    def answer(self, seen: Seen, real: Callable[[], Any]) -> Any:
        kind = kind_of(seen)
        self._now.append(kind)
        phase = self._phase
        if kind not in self.known or phase is None or len(phase.steps) == phase.length - 1:
            out = real()
            self.known[kind] = mapped(lambda _, v: Blank.of(v) if isinstance(v, Tensor) else v, out)
            return out
        out, listed = self.known[kind], is_listed(self.known[kind])
        return mapped(lambda _, v: v.filled(phase, self._generator, listed) if isinstance(v, Blank) else v, out)

    def after(self, step: Step) -> Tensor:
        key, self._now = tuple(self._now), []
        self.steps += 1
        self.again |= not step.calls
        self.rows = len(step.x)
        # Some pipelines keep samples in the networks' precision.
        if self._given is not None:
            self.changed |= not _kept(self._given.to(step.x), step.x)
        self._phase = next((phase for phase in self.phases if phase.key == key), None)
        if self._phase is None:
            self.phases.append(Phase(key))
            self._phase = self.phases[-1]
        phase = self._phase
        phase.times.append(step.t)
        if phase.complete:
            phase.late = step
        else:
            phase.steps.append(step)
        if len(phase.steps) == 1:
            outs = [v for seen in step.calls for _, v in entries(seen.output) if isinstance(v, Tensor) and v.ndim]
            phase.digits = digits(max(step.x.numel(), *(v[:1].numel() for v in outs)))
        self._given = self._sample(phase, step.x)
        return self._given.clone()

    def _sample(self, phase: Phase, x: Tensor) -> Tensor:
        if len(phase.steps) == 1:
            return torch.zeros_like(x)
        return phase.filled(x, x.shape, self._generator)

    def noised(self, clean: Tensor, t: float, real: Callable[[], Tensor]) -> Tensor:
        self.has_noised |= self.steps == 0
        return real()

    def encoded(self, name: str, real: Callable[[], Any]) -> Any:
        self.codes.append(real())
        return self.codes[-1]


class Clean(Lead):
    """The lead of a run that adds no noise to what it starts from: its first sample is then that, in the form that the networks see."""

    def __init__(self, known: dict[Any, Any]):
        self.known, self.clean, self.first, self.t = known, [], None, None  # type: ignore[var-annotated]

    def answer(self, seen: Seen, real: Callable[[], Any]) -> Any:
        return blank(self.known.get(kind_of(seen)), real)

    def after(self, step: Step) -> Tensor:
        if self.first is None:
            self.first, self.t = step.x, step.t
        return step.x

    def noised(self, clean: Tensor, t: float, real: Callable[[], Tensor]) -> Tensor:
        self.clean.append(clean)
        return clean

    @property
    def start(self) -> Tensor | None:
        """The first sample, where it is what was to be noised, perhaps in another order."""
        for clean in self.clean:
            if self.first is not None and clean.numel() == self.first.numel():
                ordered = (x.to(self.first).flatten().sort()[0] for x in (clean, self.first))
                return self.first if torch.equal(*ordered) else None
        return None


class Twice(Lead):
    """The lead of a run with two samples, which tells the axes that count them. Networks are hardly called."""

    def __init__(self, known: dict[Any, Any]):
        self.known = {kind[0]: out for kind, out in known.items()}
        self.whole: dict[int, Any] = {}
        self.steps: list[Step] = []

    def answer(self, seen: Seen, real: Callable[[], Any]) -> Any:
        out = self.known.get(id(seen.network))
        if out is None:
            return real()
        if is_listed(out):  # with an entry for every sample, or for every block of the network: it knows
            if id(seen.network) not in self.whole:
                self.whole[id(seen.network)] = mapped(lambda _, v: Blank.of(v) if isinstance(v, Tensor) else v, real())
            return mapped(lambda _, v: v.zeros() if isinstance(v, Blank) else v, self.whole[id(seen.network)])
        return mapped(lambda _, v: v.zeros(2) if isinstance(v, Blank) else v, out)

    def after(self, step: Step) -> Tensor:
        self.steps.append(step)
        return step.x


class Border(Lead):
    """The lead of a run that looks for the time at which one kind of steps gives way to another.

    A pipeline's loop takes its times out of the scheduler's tensor, one after another, so the next one is written into it.

    Args:
        known: outputs of the networks.
        above: the kind of step at the time ``high``.
        high: and from there on up.
        low: where another kind of step is known to be.
    """

    def __init__(self, known: dict[Any, Any], above: Any, high: float, low: float):
        self.known, self.above, self.high, self.low = known, above, high, low
        self.ends, self.left, self.consistent = (low, high), [low, high], True
        self.finest = 1e-4 * abs(high)
        self._now: list[Any] = []
        self._step = 0

    @property
    def found(self) -> float | None:
        """The time with the fewest digits that is in between, where the kind of step depends on nothing else."""
        if not self.consistent or self.left or self.high - self.low > self.finest:
            return None
        rounded = (math.ceil(self.low * 10**k + 1e-9) / 10**k for k in range(-3, 8))
        return next((t for t in rounded if self.low < t <= self.high), self.high)

    def answer(self, seen: Seen, real: Callable[[], Any]) -> Any:
        self._now.append(kind_of(seen))
        return blank(self.known.get(self._now[-1]), real)

    def after(self, step: Step) -> Tensor:
        above, self._now, self._step = tuple(self._now) == self.above, [], self._step + 1
        if self._step > 1:  # encoders are called before the first one
            self._learn(step.t, above)
        times, last = step.scheduler.timesteps, self._step >= len(step.scheduler.timesteps) - 2
        self.finest = max(self.finest, 0.0 if times.is_floating_point() else 1.0)
        # The two ends come at the beginning and again at the end: it is the time that decides, and not the number of the step.
        if self._step < len(times):
            if last and not self.left:
                self.left = list(self.ends)
            times[self._step] = self.left.pop() if self.left else (self.low + self.high) / 2
        return step.x

    def _learn(self, t: float, above: bool) -> None:
        if t <= self.ends[0] or t >= self.ends[1]:
            self.consistent &= above == (t >= self.ends[1])
        elif above:
            self.high = min(self.high, t)
        else:
            self.low = max(self.low, t)


class Still(Lead):
    """The lead of a run whose networks and scheduler stand still: it ends in given samples; in one, where its ``rows`` are the scheduler's."""

    def __init__(self, x: Tensor, asked: int, made: int, known: dict[Any, Any], codes: list[Any], rows: bool = False):
        self.x, self.asked, self.left, self.known, self.codes, self.rows = x, asked, made, known, list(codes), rows

    def answer(self, seen: Seen, real: Callable[[], Any]) -> Any:
        return blank(self.known.get(kind_of(seen)), real)

    def after(self, step: Step) -> Tensor:
        self.left -= 1
        if self.left:
            return step.x
        x = self.x.to(step.x)
        if self.rows:
            return x[0]
        return x if len(step.x) == 1 else x.repeat(len(step.x), *[1] * (x.ndim - 1))

    def encoded(self, name: str, real: Callable[[], Any]) -> Any:
        return self.codes.pop(0) if self.codes else real()


def kind_of(seen: Seen) -> Any:
    """Calls of one kind have outputs of the same shapes."""
    shapes = tuple((path, tuple(v.shape)) for path, v in entries(seen.inputs) if isinstance(v, Tensor))
    return id(seen.network), shapes


def _kept(given: Tensor, x: Tensor) -> bool:
    """Whether a sample is what was given; of several rows the first may stand for all."""
    if given.shape != x.shape:
        return False
    return any(torch.allclose(rows, x, rtol=1e-2, atol=1e-2) for rows in (given, given[:1].expand_as(given)))


def blank(out: Any, real: Callable[[], Any]) -> Any:
    """An output of zeros, where one is known."""
    return real() if out is None else mapped(lambda _, v: v.zeros() if isinstance(v, Blank) else v, out)


def is_listed(out: Any) -> bool:
    """Whether an output is a list with an entry for every sample, and not one tensor."""
    return isinstance(first(out), list)


@dataclass(frozen=True)
class Blank:
    """A tensor without its numbers."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, value: Tensor) -> Blank:
        return cls(value.shape, value.dtype, value.device)

    def zeros(self, times: int = 1) -> Tensor:
        """As many rows, or more."""
        shape = (times * self.shape[0], *self.shape[1:]) if self.shape else self.shape
        return torch.zeros(shape, dtype=self.dtype, device=self.device)

    def filled(self, phase: Phase, generator: torch.Generator, listed: bool) -> Tensor:
        """As the phase fills it: all rows alike, but for noise."""
        if not self.dtype.is_floating_point or not self.shape:
            return self.zeros()
        if listed or phase.complete or len(phase.steps) in phase.random:
            return phase.filled(self.zeros(), self.shape, generator)
        return phase.filled(self.zeros(), self.shape[1:], generator).expand(self.shape).clone()
