r"""Chains, and the one loop that runs them.

A chain is a process that samples: a model alone, steered by a classifier, or tracked. It knows how a population starts, steps and ends,
and what each step multiplies the weights with. :func:`run` does everything else: population, weights, selection, parts, progress, verdict.
"""

from __future__ import annotations

import abc
import math
import numbers
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sculpt.diagnostics import Diagnostics
from sculpt.particles import Population, systematic
from sculpt.samples import Samples

__all__ = ["Chain", "Progress", "Selection", "Settings", "State", "check_count", "in_parts", "run", "watch"]

S = TypeVar("S", bound="State")


class State:
    """What a chain knows of its particles. A subclass is a dataclass of tensors, particles first; tuples of tensors, States and ``None`` may be among them.

    It is indexed and concatenated as a whole, so whatever a chain carries along is selected with its particle.
    """

    def __post_init__(self) -> None:
        lengths = {name: n for name, value in vars(self).items() for n in _lengths(value)}
        if len(set(lengths.values())) > 1:
            said = ", ".join(f"{name} {n}" for name, n in lengths.items())
            raise ValueError(
                f"The parts of a {type(self).__name__} disagree in length: {said}. Every tensor of a State has the particles along its "
                "first axis."
            )

    def __len__(self) -> int:
        return next(n for value in vars(self).values() for n in _lengths(value))

    def __getitem__(self: S, index: Any) -> S:
        return self._map(lambda part: part[index])

    @staticmethod
    def cat(states: Sequence[S]) -> S:
        """The particles of several states, one after another."""
        return states[0]._map(lambda *parts: torch.cat(parts), *states[1:])

    def _map(self: S, function: Callable[..., Tensor], *others: State) -> S:
        return type(self)(
            *(_over(function, *parts) for parts in zip(*(vars(state).values() for state in (self, *others)), strict=True))
        )


def _over(function: Callable[..., Tensor], value: Any, *others: Any) -> Any:
    if isinstance(value, State):
        return value._map(function, *others)
    if isinstance(value, tuple):
        return tuple(_over(function, *parts) for parts in zip(value, *others, strict=True))
    return None if value is None else function(value, *others)


def _lengths(value: Any) -> Iterator[int]:
    if isinstance(value, tuple):
        for part in value:
            yield from _lengths(part)
    elif value is not None:
        yield len(value)


@dataclass(frozen=True)
class Settings:
    """What every road is told beside its own options."""

    steps: int | None = None
    solver: Any = None
    batch_size: int | None = None
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(f"batch_size has to be at least 1, got {self.batch_size}.")

    def refuse(self, what: str, *names: str) -> None:
        """Raise where one of these is set and the model has no use for it."""
        if given := [name for name in names if getattr(self, name) is not None]:
            raise ValueError(f"{', '.join(given)}: not an option of {what}. Leave it out.")


@dataclass(frozen=True)
class Selection:
    """A population whose weights select: how many particles, when they are selected, and whether at the end."""

    particles: int | None = None
    threshold: float | None = None
    resample: bool = True

    def __post_init__(self) -> None:
        if self.particles is not None and self.particles < 1:
            raise ValueError(f"particles has to be at least 1, got {self.particles}.")
        if self.threshold is not None and not 0 <= self.threshold <= 1:
            raise ValueError(
                f"threshold is the effective share under which particles are selected, between 0 (never) and 1; got {self.threshold}."
            )


class Chain(abc.ABC):
    """A process that samples. Weights are increments of their logarithm; ``None`` stands for a chain or a step without.

    A chain serves one run. What it keeps of its particles belongs into their State.
    """

    road: str
    """How the diagnostics call it."""
    formula: str
    device: torch.device
    batch_size: int
    """How many particles at a time go through a network."""
    length: int | None = None
    """How many steps a run takes, where that is known before."""
    whole: ClassVar[bool] = False
    """Whether a step has to see the whole population. It then cuts its network calls into parts itself."""
    threshold: float = 0.5
    """The effective share under which particles are selected, unless the caller says otherwise."""
    log_scale: float | None = None
    """Of a chain that is steered from an anchor: log Z as the target is written, minus log Z as the share of the anchor's samples."""
    doubt: str = ""
    """What the particles themselves cannot see, and the verdict has to say."""

    @abc.abstractmethod
    def start(self, n: int, generator: torch.Generator | None) -> tuple[State, Float[Tensor, "n"] | None]:
        """n particles and their first log-weights."""

    @abc.abstractmethod
    def step(
        self, state: State, log_w: Float[Tensor, "n"], generator: torch.Generator | None
    ) -> tuple[State, Float[Tensor, "n"] | None]:
        """The next state of particles that are not done, and what is added to their log-weights."""

    @abc.abstractmethod
    def done(self, state: State) -> Bool[Tensor, "n"]:
        """Which particles have ended."""

    @abc.abstractmethod
    def end(
        self, state: State, log_w: Float[Tensor, "n"], generator: torch.Generator | None
    ) -> tuple[Tensor, Float[Tensor, "n"] | None]:
        """The finished samples, and the last increments."""

    def particles(self, n: int) -> int:
        """The population for n samples where the caller does not say: never so few that weights mean nothing."""
        return max(n, 2048)

    def notes(self, x: Tensor, generator: torch.Generator | None) -> list[str]:
        """What the diagnostics should say about this run, given its samples."""
        return []


@dataclass(frozen=True)
class Progress:
    """Where a run is. The last one of a run has its ``samples``."""

    title: str
    step: int = 0
    steps: int | None = None
    ended: int = 0
    n: int = 0
    """how many have to end"""
    effective: float | None = None
    """the effective share of the particles, where they have weights"""
    samples: Samples | None = field(default=None, repr=False)


def run(
    chain: Chain,
    n: int,
    selection: Selection | None,
    result: Callable[[Tensor, Tensor | None, Diagnostics], Samples],
    generator: torch.Generator | None,
) -> Iterator[Progress]:
    """Sample a chain, yielding after every step; the last progress has the samples.

    Without a selection every particle is a sample, and weights are there to look at.
    """
    N = n if selection is None else _population_size(chain, n, selection.particles)
    threshold = 0.0 if selection is None else chain.threshold if selection.threshold is None else selection.threshold
    population = Population(N, threshold=threshold, generator=generator, device=chain.device)
    seed = None if generator is None else generator.initial_seed()
    diagnostics = Diagnostics(chain.road, chain.formula, seed=seed, doubt=chain.doubt)
    title, step = f"sampling {chain.formula}", 0
    yield Progress(title, 0, chain.length, 0, N)
    with torch.no_grad():  # never around a yield: gradients would be off in the caller too
        state, increment = chain.start(N, generator)
    flock = _Flock(state, population.log_w.device)
    while True:
        if increment is not None:
            population.reweight(flock.spread(increment))
            if (index := population.resample()) is not None:
                flock.select(index)
        step, left = step + 1, flock.retire(chain)
        yield Progress(title, step, chain.length, N - left, N, population.effective)
        if not left:
            break
        with torch.no_grad():
            increment = flock.advance(chain, population.log_w, generator)
    with torch.no_grad():
        x, increment = chain.end(flock.everyone(), population.log_w, generator)
    if increment is not None:
        population.reweight(increment)
    if population.lost:
        diagnostics.notes.append(f"{population.lost} particles were lost to numbers that are not finite")
    diagnostics.steps = chain.length or step - 1
    log_weights = None
    if population.ess:
        kept = None if chain.log_scale is None else math.exp(min(0.0, population.log_z - chain.log_scale))
        diagnostics.observe(population, kept, selected=selection is not None)
    if selection is not None:
        x, log_weights = _select(population, x, n, selection.resample)
    samples = result(x, log_weights, diagnostics)
    diagnostics.notes += chain.notes(samples.x, generator)
    yield Progress(title, diagnostics.steps, chain.length, N, N, population.effective, samples)


class _Flock:
    """The particles of a run: those that go on, in their places, and those that have ended."""

    def __init__(self, state: State, device: torch.device):
        self.state, self.n, self.device = state, len(state), device
        self.rows, self.ended = torch.arange(self.n, device=device), []  # type: ignore[var-annotated]

    def everyone(self) -> State:
        """All of them, each in its place."""
        if not self.ended:
            return self.state
        rows, states = zip(*self.ended, (self.rows, self.state), strict=True)
        return State.cat(states)[torch.cat(rows).argsort()]

    def select(self, index: Int[Tensor, "n"]) -> None:
        """Survivors take the places of all; some of those that had ended may be there several times."""
        self.state, self.ended, self.rows = self.everyone()[index], [], torch.arange(self.n, device=self.device)

    def retire(self, chain: Chain) -> int:
        """Take those that are done out of the way; how many go on."""
        done = chain.done(self.state)
        (stop,), (go,) = done.nonzero(as_tuple=True), (~done).nonzero(as_tuple=True)
        if len(stop) and not chain.whole:
            self.ended.append((self.rows[stop], self.state[stop]))
            self.rows, self.state = self.rows[go], self.state[go]
        return len(go)

    def advance(self, chain: Chain, log_w: Float[Tensor, "n"], generator: torch.Generator | None) -> Tensor | None:
        """One step of those that go on, in parts; what is added to their log-weights."""
        size, log_w = self.n if chain.whole else chain.batch_size, log_w[self.rows] if self.ended else log_w
        self.state, increment = in_parts(lambda state, log_w: chain.step(state, log_w, generator), size, self.state, log_w)
        return increment

    def spread(self, increment: Float[Tensor, "k"]) -> Float[Tensor, "n"]:
        """Increments of those that went on, and zero for the others."""
        if not self.ended:
            return increment
        return torch.zeros(self.n, dtype=torch.float64, device=self.device).index_copy(0, self.rows, increment.double())


def _select(population: Population, x: Tensor, n: int, resample: bool) -> tuple[Tensor, Tensor | None]:
    """n equally weighted survivors in random order, or all particles with their weights."""
    if not resample:
        return x, torch.log_softmax(population.log_w, dim=0)
    generator = population.generator
    index = systematic(population.log_w, n, generator)
    device = "cpu" if generator is None else generator.device
    order = torch.randperm(n, generator=generator, device=device).to(index.device)
    return x[index[order]], None


def _population_size(chain: Chain, n: int, particles: int | None) -> int:
    if particles is not None and particles < n:
        raise ValueError(f"A population of particles={particles} cannot give n={n} samples. Pass particles of at least n.")
    return chain.particles(n) if particles is None else particles


def in_parts(function: Callable[..., Any], batch_size: int, *values: Any) -> Any:
    """A function of tensors or States over a population, in parts that fit; what it gives, one of them or a tuple, is joined again."""
    n = len(values[0])
    if n <= batch_size:
        return function(*values)
    parts = [function(*(value[i : i + batch_size] for value in values)) for i in range(0, n, batch_size)]
    return tuple(map(_join, zip(*parts, strict=True))) if isinstance(parts[0], tuple) else _join(parts)


def _join(parts: Sequence[Any]) -> Any:
    first = parts[0]
    return State.cat(parts) if isinstance(first, State) else None if first is None else torch.cat(list(parts))


def watch(progress: Iterator[Progress], show: bool = True) -> Samples:
    """Run to the end, with a bar for what takes longer than two seconds, and return the samples."""
    from tqdm.auto import tqdm

    bar, now, title = None, None, None
    try:
        for now in progress:
            if bar is None or now.title != title:
                if bar is not None:
                    bar.close()
                title = now.title
                # Most trajectories end in the last few steps: how many have ended tells nothing of the time that is left.
                form = {} if now.steps else {"bar_format": "{desc}: {n_fmt} of {total_fmt} have ended{postfix} [{elapsed}]"}
                bar = tqdm(total=now.steps or now.n, desc=now.title, disable=not show, delay=2, leave=False, **form)
            if now.step and not now.steps:
                bar.set_postfix_str(f"step {now.step}", refresh=False)
            bar.update((now.step if now.steps else now.ended) - bar.n)
    finally:
        if bar is not None:
            bar.close()
    if now is None or now.samples is None:
        raise RuntimeError("A run ended without samples: the last progress of a run has to carry them.")
    return now.samples


def check_count(n: Any) -> None:
    """Raise where n is no number of samples."""
    if isinstance(n, bool) or not isinstance(n, numbers.Integral):
        raise TypeError(f"The number of samples is a whole number, got n={n!r}.")
    if n < 1:
        raise ValueError(f"The number of samples has to be at least 1, got n={n}.")
