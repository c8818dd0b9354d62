r"""Chains, and the one loop that runs them.

A chain is a process that samples: a model alone, steered by a classifier, or tracked. It knows how a population starts, steps and ends,
and what each step multiplies the weights with. :func:`run` does everything else: population, weights, selection, parts, progress, verdict.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sculpt.checks import check_count, check_whole, real
from sculpt.diagnostics import Diagnostics
from sculpt.generators import Generators
from sculpt.particles import Population
from sculpt.progress import Progress
from sculpt.samples import Samples
from sculpt.state import State, finite, in_parts

__all__ = ["Chain", "Progress", "Selection", "Settings", "check_count", "check_whole", "run"]


@dataclass(frozen=True)
class Settings:
    """What every road is told beside its own options."""

    steps: int | None = None
    solver: Any = None
    batch_size: int | None = None
    generator: Any = None
    """one for all samples, or a list with one for each"""
    latents: Tensor | None = None
    """the noise that sampling starts from"""
    seed: int | None = field(init=False, default=None)
    """of the generator, where it is still at its beginning: the same seed then gives the same samples"""

    def __post_init__(self) -> None:
        object.__setattr__(self, "batch_size", check_whole("batch_size", self.batch_size))
        object.__setattr__(self, "steps", check_whole("steps", self.steps, least=0))
        if isinstance(self.generator, Sequence) and not isinstance(self.generator, str):
            self._check_each(self.generator)
            object.__setattr__(self, "generator", Generators(self.generator))
        elif (g := self.generator) is not None:
            if not isinstance(g, torch.Generator):
                raise TypeError(f"generator is a torch.Generator, e.g. torch.Generator().manual_seed(0); got {g!r:.60}.")
            fresh = torch.Generator(g.device).manual_seed(g.initial_seed())
            object.__setattr__(self, "seed", g.initial_seed() if torch.equal(fresh.get_state(), g.get_state()) else None)

    @staticmethod
    def _check_each(generators: Sequence[Any]) -> None:
        if not generators or not all(isinstance(g, torch.Generator) for g in generators):
            raise TypeError(f"A list of generators has a torch.Generator for each sample; got {list(generators)!r:.100}.")

    def refuse_each(self, what: str) -> None:
        """Raise where every sample has a generator or a beginning of its own, and these do not go through alone."""
        if isinstance(self.generator, Generators):
            raise ValueError(f"A list of generators has one for each sample, and {what}. Pass one generator.")
        self.refuse(f"samples that do not go alone: {what}", "latents")

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
        object.__setattr__(self, "particles", check_whole("particles", self.particles))
        if not isinstance(self.resample, bool):
            raise TypeError(f"resample is True or False, got {self.resample!r:.60}.")
        if self.threshold is None:
            return
        object.__setattr__(self, "threshold", real("threshold", self.threshold))
        if not 0 <= self.threshold <= 1:
            raise ValueError(
                f"threshold is the effective share under which particles are selected, between 0 (never) and 1; got {self.threshold}."
            )

    def check(self, n: int) -> None:
        """Raise where so many samples cannot come out of the population."""
        if self.particles is not None and self.particles < n:
            raise ValueError(
                f"A population of particles={self.particles} cannot give n={n} samples. Pass particles={n} or more."
            )

    def size(self, chain: Chain, n: int) -> int:
        """How many particles n samples take."""
        self.check(n)
        return chain.particles(n) if self.particles is None else self.particles


class Chain(abc.ABC):
    """A process that samples. A step gives increments of log-weights; a chain without weights gives ``None``.

    A chain serves one run. What it keeps of its particles belongs into their State.
    """

    road: str
    """How the diagnostics call it."""
    device: torch.device
    batch_size: int
    """How many particles at a time go through a network."""
    length: int | None = None
    """How many steps a run takes, where that is known before."""
    longest: int | None = None
    """How many actions or tokens a sample has at most, where it ends by itself."""
    whole: ClassVar[bool] = False
    """Whether a step has to see the whole population. It then cuts its network calls into parts itself."""
    threshold: float = 0.5
    """The effective share under which particles are selected, unless the caller says otherwise."""
    log_scale: float | None = None
    """Log Z of the target as written, minus log Z for the anchor's samples. Only chains that are steered from an anchor have it."""
    likelihood: Callable[[Tensor], Tensor] | None = None
    """What multiplies the chain's distribution in the end, in nats."""
    doubt: str = ""
    """A known error that the weights do not show. The verdict says it."""
    apart: float = 0.0
    """How far two looks at the log-ratios of one sample are apart, in nats; known with the slip."""
    alone: bool = False
    """Whether every particle is a run of its own: there are no weights between them, and nothing is selected."""

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

    def at_rest(self, state: State) -> State:
        """What is kept of particles that have ended."""
        return state

    def settled(self, state: State) -> bool:
        """Whether weights are complete here: as many are selected as samples are wanted, and only these go on."""
        return False

    def particles(self, n: int) -> int:
        """The population for n samples where the caller does not say. Weights mean little among a few particles."""
        return max(n, 2048)

    def slip(self, state: State, population: Population) -> float:
        """What the finite number of steps may have added to log Z, as far as the particles of one run can tell."""
        return 0.0

    def notes(self, x: Tensor, generator: torch.Generator | None) -> list[str]:
        """What the diagnostics should say about this run, given its samples."""
        return []


def run(
    chain: Chain,
    n: int,
    formula: str,
    settings: Settings,
    result: Callable[[Tensor, Tensor | None, Diagnostics], Samples] = Samples,
    selection: Selection | None = None,
) -> Iterator[Progress]:
    """Sample a chain, yielding after every step; the last progress has the samples.

    Args:
        chain: fresh; it serves this run.
        n: how many samples.
        formula: what they are samples of.
        settings: of the caller; the generator is what counts here.
        result: makes what the caller gets of samples, log-weights and diagnostics.
        selection: of a population with weights. Without one every particle is a sample, and weights are there to look at.
    """
    generator, N = settings.generator, n if selection is None else selection.size(chain, n)
    threshold = 0.0 if selection is None else chain.threshold if selection.threshold is None else selection.threshold
    population = Population(N, threshold=threshold, generator=generator, device=chain.device, of=formula)
    diagnostics = Diagnostics(chain.road, formula, samples=n, seed=settings.seed)
    title, step, steps = f"sampling {formula}", 0, chain.length
    yield Progress(title, 0, steps, 0, N, longest=chain.longest)
    with torch.no_grad():  # never around a yield: gradients would be off in the caller too
        state, increment = chain.start(N, generator)
    flock, chosen = _Flock(state, population.log_w.device), False
    while True:
        if increment is not None and not chosen:
            population.reweight(flock.spread(increment))
            if chosen := selection is not None and selection.resample and chain.settled(flock.state):
                _look(diagnostics, chain, population, flock.state)
                flock.select(population.survivors(n))
            elif (index := population.resample()) is not None:
                flock.select(index)
        step, left = step + 1, flock.retire(chain)
        yield Progress(title, step, steps, flock.n - left, flock.n, population.effective, None, flock.state, chain.longest)
        if not left:
            break
        with torch.no_grad():
            increment = flock.advance(chain, None if chosen else population.log_w, generator)
    with torch.no_grad():
        state = flock.everyone()
        x, increment = chain.end(state, population.log_w, generator)
    log_weights, diagnostics.steps = None, steps or step - 1
    if not chosen:
        if selection is not None:
            x, increment = _without_lost(x, increment)
        if increment is not None:
            population.reweight(increment)
        if chain.likelihood is not None:
            population.settle()
            population.reweight(chain.likelihood(x))
        _look(diagnostics, chain, population, state, selected=selection is not None)
        x, log_weights = _kept(population, x, n, selection)
    samples = result(x, log_weights, diagnostics)
    diagnostics.notes += chain.notes(samples.x, generator)
    yield Progress(title, step, steps, flock.n, flock.n, population.effective, samples, state, chain.longest)


def _without_lost(x: Tensor, increment: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Samples that are not finite lose their weight."""
    if (lost := ~finite(x)).any():
        increment = torch.where(lost, math.nan, 0.0 if increment is None else increment)
        x = torch.where(lost.reshape(-1, *[1] * (x.ndim - 1)), 0.0, x)
    return x, increment


@torch.no_grad()
def _look(diagnostics: Diagnostics, chain: Chain, population: Population, state: State, *, selected: bool = True) -> None:
    """Take down what the population knows about itself when its weights are complete."""
    if population.lost:
        diagnostics.notes.append(f"{population.lost} particles were lost to numbers that are not finite")
    if population.ess and not chain.alone:
        diagnostics.slip = chain.slip(state, population)
        anchored = chain.log_scale is not None and chain.likelihood is None
        kept = math.exp(min(0.0, population.log_z - chain.log_scale)) if anchored else None
        diagnostics.observe(population, kept, selected=selected)
    diagnostics.steered, diagnostics.apart, diagnostics.doubt = chain.alone, chain.apart, chain.doubt


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
        self.state, self.ended, self.n = self.everyone()[index], [], len(index)
        self.rows = torch.arange(self.n, device=self.device)

    def retire(self, chain: Chain) -> int:
        """Take those that are done out of the way; how many go on."""
        done = chain.done(self.state)
        (stop,), (go,) = done.nonzero(as_tuple=True), (~done).nonzero(as_tuple=True)
        if len(stop) and not chain.whole:
            self.ended.append((self.rows[stop], chain.at_rest(self.state[stop])))
            self.rows, self.state = self.rows[go], self.state[go]
        return len(go)

    def advance(self, chain: Chain, log_w: Float[Tensor, "n"] | None, generator: torch.Generator | None) -> Tensor | None:
        """One step of those that go on, in parts; what is added to their log-weights, which are equal where there are none."""
        log_w = torch.zeros(self.n, device=self.device) if log_w is None else log_w
        size, log_w = self.n if chain.whole else chain.batch_size, log_w[self.rows] if self.ended else log_w
        self.state, increment = in_parts(lambda state, log_w: chain.step(state, log_w, generator), size, self.state, log_w)
        return increment

    def spread(self, increment: Float[Tensor, "k"]) -> Float[Tensor, "n"]:
        """Increments of those that went on, and zero for the others."""
        if not self.ended:
            return increment
        return torch.zeros(self.n, dtype=torch.float64, device=self.device).index_copy(0, self.rows, increment.double())


def _kept(population: Population, x: Tensor, n: int, selection: Selection | None) -> tuple[Tensor, Tensor | None]:
    """n equally weighted survivors, or all with their weights; without a selection all, which have none."""
    if selection is None:
        return x, None
    return (x[population.survivors(n)], None) if selection.resample else (x, torch.log_softmax(population.log_w, dim=0))
