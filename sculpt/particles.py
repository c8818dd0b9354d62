r"""Particles: a population of states with log-weights, and the samples that come out of it.

Weights are unnormalised, in log space and in float64. After K resamplings
:math:`\hat Z = \prod_k \tfrac1N \sum_j w_k^j` is an unbiased estimate of the target's normaliser.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["Population", "Samples", "Diagnostics", "effective_sample_size", "systematic"]


def effective_sample_size(log_w: Float[Tensor, "n"]) -> float:
    r""":math:`(\sum w)^2 / \sum w^2`"""
    if not (log_w > float("-inf")).any():
        return 0.0
    return float((2 * log_w.logsumexp(0) - (2 * log_w).logsumexp(0)).exp())


def systematic(log_w: Float[Tensor, "p"], n: int, generator: torch.Generator | None = None) -> Int[Tensor, "n"]:
    """Indices of n survivors: one uniform offset and n equal strides through the cumulated weights.

    Every particle survives ``floor(n w)`` or ``ceil(n w)`` times. The order is kept; shuffle before splitting.
    """
    w = torch.softmax(log_w.double().cpu(), dim=0)
    device = "cpu" if generator is None else generator.device
    u = torch.rand((), generator=generator, dtype=torch.float64, device=device).cpu()
    strides = (torch.arange(n, dtype=torch.float64) + u) / n
    # Rounding may leave the last cumulated weight a little under one: the last particle *with weight* takes the rest.
    last = int(w.nonzero()[-1])
    return torch.searchsorted(w.cumsum(0), strides, right=True).clamp_(max=last).to(log_w.device)


class Population:
    """Log-weights of N particles along the way, their ancestors at the start, and the estimate of log Z.

    ``reweight`` adds increments; ``resample`` returns the survivors' indices once the effective sample size falls under
    ``threshold`` × N, and ``None`` otherwise. Whoever holds states applies the same indices to all of them.
    """

    def __init__(
        self, n: int, *, threshold: float = 0.5, generator: torch.Generator | None = None, device: torch.device | str = "cpu"
    ):
        self.n, self.threshold, self.generator = n, threshold, generator
        self.log_w = torch.zeros(n, dtype=torch.float64, device=device)
        self.roots = torch.arange(n, device=device)
        self.resamplings = 0
        self.ess: list[float] = []
        self.lost = 0
        self._log_z = 0.0

    def reweight(self, increment: Float[Tensor, "n"]) -> None:
        """Multiply the weights. A particle whose weight is not a finite number gets weight zero, for good, and is counted once."""
        log_w = self.log_w + increment.detach().to(self.log_w)
        # Plus infinity, too: one such particle would win everything, and no finite population can stand for it.
        lost = log_w.isnan() | (log_w == float("inf"))
        self.lost += int((lost & (self.log_w > float("-inf"))).sum())
        self.log_w = torch.where(lost, float("-inf"), log_w)
        self.ess.append(effective_sample_size(self.log_w))
        if self.ess[-1] == 0.0:
            raise FloatingPointError(
                f"All {self.n} particles have weight zero ({self.lost} of them were not a finite number): none is left to go on from. "
                "The composition asks for a region that no particle reached: use more particles or steps, or check sculpt.overlap(models)."
            )

    def resample(self) -> Int[Tensor, "n"] | None:
        if self.ess[-1] >= self.threshold * self.n:
            return None
        index = systematic(self.log_w, self.n, self.generator)
        self._log_z += float(self.log_w.logsumexp(0)) - math.log(self.n)
        self.log_w = torch.zeros_like(self.log_w)
        self.roots = self.roots[index]
        self.resamplings += 1
        return index

    @property
    def log_z(self) -> float:
        return self._log_z + float(self.log_w.logsumexp(0)) - math.log(self.n)

    @property
    def log_z_error(self) -> float:
        """Standard error of log Z from this one run: the spread of weight over the particles' roots (Lee & Whiteley 2018).

        Theirs takes off what multinomial resampling adds at every resampling; the systematic one adds next to nothing, so
        only the 1/N of the start is taken off. A little wide after many resamplings. The steps' discretisation is not in it.
        """
        square = 1 / self.families
        variance = 1 - self.n / max(self.n - 1, 1) * (1 - square)
        # With few surviving roots the estimator saturates at one: it then means "at least".
        return math.sqrt(max(variance, 0.0))

    @property
    def families(self) -> float:
        """How many particles of the start the weight comes from, in the sense of an effective sample size.

        Most ancestors can have descendants while the weight is with those of a few.
        """
        share = torch.zeros(self.n, dtype=torch.float64, device=self.log_w.device)
        share.index_add_(0, self.roots, torch.softmax(self.log_w, 0))
        return 1 / float((share**2).sum())

    @property
    def ancestors(self) -> int:
        """How many particles of the start still have descendants with weight."""
        return int(self.roots[self.log_w > float("-inf")].unique().numel())

    def samples(
        self, x: Tensor, n: int, diagnostics: Diagnostics, result: Callable[..., Samples] | None = None, resample: bool = True
    ) -> Samples:
        """n equally weighted survivors of the particles x in random order, or all of them with their weights.

        ``result`` is that of the model: what it makes of samples, weights and diagnostics.
        """
        result = result or Samples
        if not resample:
            return result(x, torch.log_softmax(self.log_w, dim=0), diagnostics)
        index = systematic(self.log_w, n, self.generator)
        device = "cpu" if self.generator is None else self.generator.device
        order = torch.randperm(n, generator=self.generator, device=device).to(index.device)
        return result(x[index[order]], None, diagnostics)


@dataclass
class Diagnostics:
    """What one run tells about itself. ``print`` it; the verdict is the last line."""

    road: str
    formula: str = ""
    steps: int = 0
    particles: int | None = None
    ess: list[float] = field(default_factory=list)
    log_z: float | None = None
    log_z_error: float | None = None
    ancestors: int | None = None
    families: float | None = None
    doubt: str = ""
    """what the particles themselves cannot see, and the verdict has to say"""
    acceptance: float | None = None
    notes: list[str] = field(default_factory=list)

    def observe(self, population: Population, acceptance: float | None = None, *, selected: bool = True) -> None:
        """Take down what a population knows about itself, and whether its weights select the samples or are there to look at."""
        self.particles, self.ess = population.n, list(population.ess)
        if selected:
            self.ancestors, self.families = population.ancestors, population.families
        self.log_z, self.log_z_error, self.acceptance = population.log_z, population.log_z_error, acceptance

    @property
    def verdict(self) -> str:
        """One sentence: may the samples be trusted as draws from the target?"""
        if not (self.particles and self.ess):
            if self.acceptance is None:
                return "nothing unusual."
            return f"exact for the base samplers and the terminal head; {self.acceptance:.2g} of the draws were kept."
        least, last = min(self.ess) / self.particles, self.ess[-1] / self.particles
        if self.families is None:
            if last >= 0.5:
                return f"sound: guidance stays close to the exact chain (weights would keep {last:.0%})."
            return f"biased: guidance leaves the exact chain (weights would keep {last:.1%}). Pass correct=True, or train the classifier longer."
        if self.ancestors < max(2, min(10, 0.02 * self.particles)) or last < 0.01:
            worth = (
                f"descend from {self.ancestors} of the start"
                if self.ancestors < self.particles
                else f"are worth {self.families:.0f}"
            )
            return (
                f"COLLAPSED: the {self.particles} particles {worth} (least effective share {least:.1%}). "
                "Take the samples as near-copies; use a classifier, more particles, or a milder composition."
            )
        if self.doubt:
            return f"DOUBTFUL: {self.doubt}"
        few = f"the weight comes from {self.families:.0f} of {self.particles} starting particles"
        if self.families < max(0.05 * self.particles, min(10, 0.5 * self.particles)) or last < 0.1:
            return f"strained: {few}. More particles would help."
        return f"sound: {few}, least effective share {least:.0%}."

    def __str__(self) -> str:
        rows = [("road", self.road), ("formula", self.formula), ("steps", self.steps or None)]
        if self.particles and self.ess:
            rows.append(("particles", self.particles))
            rows.append(
                ("effective share", f"least {min(self.ess) / self.particles:.1%}, last {self.ess[-1] / self.particles:.1%}")
            )
            if self.families is not None:
                rows.append(("ancestors", f"{self.ancestors}, worth {self.families:.0f}"))
        if self.log_z is not None:
            error = "" if self.log_z_error is None else f" ± {self.log_z_error:.2g}"
            rows.append(("log Z", f"{self.log_z:.3f}{error}"))
        if self.acceptance is not None:
            rows.append(("acceptance", f"{self.acceptance:.3g}"))
        rows += [("note", note) for note in self.notes] + [("verdict", self.verdict)]
        return "\n".join(f"{name:>16}  {value}" for name, value in rows if value not in (None, ""))


@dataclass
class Samples:
    """n samples and what is known about them.

    ``x`` holds the samples first; ``log_weights`` is ``None`` for equally weighted samples (the default everywhere) and
    the particles' normalised log-weights with ``resample=False``.
    """

    x: Tensor
    log_weights: Tensor | None = None
    diagnostics: Diagnostics | None = None
    decoder: Callable[[Tensor], Tensor] | None = field(default=None, repr=False)

    def __post_init__(self):
        if self.diagnostics is None:
            self.diagnostics = Diagnostics(road="")

    @property
    def log_z(self) -> float | None:
        """The estimate of the target's log-normaliser, ``None`` on roads that give none."""
        return self.diagnostics.log_z

    def decode(self):
        """What a person looks at: images in [0, 1] for pixel models, decoded latents, molecules."""
        return self.x if self.decoder is None else self.decoder(self.x)

    def __len__(self) -> int:
        return len(self.x)

    def __repr__(self) -> str:
        weighted = "equally weighted" if self.log_weights is None else "weighted"
        return f"{type(self).__name__}({len(self)} × {tuple(self.x.shape[1:])}, {weighted})\n{self.diagnostics}"
