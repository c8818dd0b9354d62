r"""Particles: log-weights of a population, their selection, and the estimate of log Z.

Weights are unnormalised, in log space and in float64. After K selections
:math:`\hat Z = \prod_k \tfrac1N \sum_j w_k^j` is an unbiased estimate of the target's normaliser.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["Population", "effective_sample_size", "systematic"]


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
        self,
        n: int,
        *,
        threshold: float = 0.5,
        generator: torch.Generator | None = None,
        device: torch.device | str = "cpu",
        of: str = "The composition",
    ):
        self.n, self.threshold, self.generator, self.of = n, threshold, generator, of
        self.log_w = torch.zeros(n, dtype=torch.float64, device=device)
        self.roots = torch.arange(n, device=device)
        self.resamplings = 0
        self.ess: list[float] = []
        self.lost = 0
        self._log_z = 0.0
        self._known: tuple[float, Tensor] | None = None

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
                f"All {self.n} particles have weight zero at step {len(self.ess) - 1} ({self.lost} of them were not a finite number): none is "
                f"left to go on from. {self.of} asks for a region that no particle reached: use more particles or steps, or check "
                "sculpt.overlap(models). Where all were not finite, look at its networks and powers."
            )

    def settle(self) -> None:
        """What the weights stand for is a distribution from here on: log Z and its error count what it is multiplied with."""
        self._known = self.log_z, self._shares()

    def resample(self) -> Int[Tensor, "n"] | None:
        if self.ess[-1] >= self.threshold * self.n:
            return None
        index = systematic(self.log_w, self.n, self.generator)
        self._log_z += float(self.log_w.logsumexp(0)) - math.log(self.n)
        self.log_w = torch.zeros_like(self.log_w)
        self.roots = self.roots[index]
        self.resamplings += 1
        return index

    def survivors(self, n: int) -> Int[Tensor, "n"]:
        """n of the particles, each as often as its weight says, in random order."""
        index = systematic(self.log_w, n, self.generator)
        device = "cpu" if self.generator is None else self.generator.device
        return index[torch.randperm(n, generator=self.generator, device=device).to(index.device)]

    @property
    def effective(self) -> float | None:
        """The effective share of the particles, once they have weights."""
        return self.ess[-1] / self.n if self.ess else None

    @property
    def log_z(self) -> float:
        known = 0.0 if self._known is None else self._known[0]
        return self._log_z + float(self.log_w.logsumexp(0)) - math.log(self.n) - known

    @property
    def log_z_error(self) -> float:
        """Standard error of log Z from this one run: the spread of weight over the particles' roots (Lee & Whiteley 2018).

        Theirs takes off what multinomial resampling adds at every resampling; the systematic one adds next to nothing, so
        only the 1/N of the start is taken off. A little wide after many resamplings. The steps' discretisation is not in it.
        """
        if self._known is not None:
            return float((self._shares() - self._known[1]).norm())
        square = 1 / self.families
        variance = 1 - self.n / max(self.n - 1, 1) * (1 - square)
        # With few surviving roots the estimator saturates at one: it then means "at least".
        return math.sqrt(max(variance, 0.0))

    @property
    def families(self) -> float:
        """How many particles of the start the weight comes from, in the sense of an effective sample size.

        Most ancestors can have descendants while the weight is with those of a few.
        """
        return 1 / float((self._shares() ** 2).sum())

    def _shares(self) -> Float[Tensor, "n"]:
        """Of the weight, by the particle of the start that it comes from."""
        share = torch.zeros(self.n, dtype=torch.float64, device=self.log_w.device)
        return share.index_add_(0, self.roots, torch.softmax(self.log_w, 0))

    @property
    def ancestors(self) -> int:
        """How many particles of the start still have descendants with weight."""
        return int(self.roots[self.log_w > float("-inf")].unique().numel())
