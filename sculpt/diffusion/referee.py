r"""The referee that nobody trained: log-ratios of diffusion models by their denoising errors above a noise level.

Notation: z at the level :math:`s_d`, :math:`z' = z + \sqrt w \, \varepsilon` at the level :math:`s^2 = s_d^2 + w`, the share
:math:`u = w / s^2`, :math:`D_i = D_i(z', s)`. ``N`` samples, ``m`` base models, ``*x`` one sample.

.. math::
    \log \frac{u_i(z)}{u_j(z)} = \int_0^1 E_\varepsilon \Bigl[ \frac{\|z - D_j\|^2 - \|z - D_i\|^2}{2 s_d^2}
        - \frac{\langle \varepsilon, D_i - D_j \rangle}{\sqrt w} \Bigr] \, du

It is the I-MMSE relation with all that is common to the models left out: one noise serves all of them, and comes with both signs, which
takes away what is odd in it. Nothing adds up along a path, and no model is preferred that made it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from einops import einsum
from jaxtyping import Bool, Float
from torch import Tensor

from sculpt.diffusion.clock import noise_range, spread
from sculpt.diffusion.together import denoise_all
from sculpt.model import randn

if TYPE_CHECKING:
    from sculpt.diffusion.denoiser import Denoiser

__all__ = ["Referee"]

NODES = 1.6
"""Levels of the integral, for every e-fold of noise."""
ERROR = 0.3
"""The standard error of a log-ratio, in nats, that is good enough."""
MOST = 256
"""Calls of each model for a sample, at most."""
FIRST = 16
"""Samples that tell which levels need more noises than others."""

Doubt = Callable[[Float[Tensor, "N m"]], Float[Tensor, "N"]]
"""From log-ratios to what an error of one nat in them would change, for every sample."""


@dataclass
class Referee:
    """Log-ratios of models at noisy samples, with as many draws as their standard error asks for.

    Args:
        models: the base models.
        s: the level :math:`s_d` of the samples.
        batch_size: how many samples go through a network at once.
        error: the standard error that is good enough.
        most: calls of each model for a sample, at most.
    """

    models: Sequence[Denoiser]
    s: float
    batch_size: int
    error: float = ERROR
    most: int = MOST
    calls: float = field(default=0.0, init=False)
    """of each model for a sample, on average over the samples of the last ruling"""
    reached: float = field(default=math.nan, init=False)
    """the standard error of a log-ratio for which nothing was spared in the last ruling"""

    @torch.no_grad()
    def __call__(
        self, z: Float[Tensor, "N *x"], generator: torch.Generator | None = None, doubt: Doubt | None = None
    ) -> Float[Tensor, "N m"]:
        """Log-densities at z of all models against that of the first.

        Args:
            z: the samples.
            generator: of the noises.
            doubt: what an error would change; samples for which it is too little are not looked at again.
        """
        nodes = [_Node(u, width, z, len(self.models)) for u, width in self._nodes()]
        everyone, few = torch.ones(len(z), dtype=torch.bool, device=z.device), torch.arange(len(z), device=z.device) < FIRST
        for node in nodes:
            self._draw(node, z, everyone, generator)
            self._draw(node, z, few, generator)
        while True:
            ratios = sum(node.mean for node in nodes)
            open_, drawn = everyone, sum(node.drawn for node in nodes)
            error = math.sqrt(sum(node.variance / float(node.count.min()) for node in nodes))
            if doubt is not None:
                spread_ = torch.stack([node.variance / node.count for node in nodes]).sum(0).sqrt()
                open_ = doubt(ratios) * spread_ > self.error
            if not open_.any() or (doubt is None and error <= self.error) or 2 * (drawn + 1) > self.most:
                break
            self._draw(max(nodes, key=lambda node: node.gain), z, open_, generator)
        self.calls, self.reached = 2 * float(sum(node.count for node in nodes).mean()), error
        return ratios

    def _nodes(self) -> list[tuple[float, float]]:
        """The shares u at which the integrand is looked at, and their weights: Gauss and Legendre's along the levels."""
        _, most = noise_range(self.models)
        t, weights = (
            torch.from_numpy(part) for part in np.polynomial.legendre.leggauss(math.ceil(NODES * math.log(most / self.s)))
        )
        t = (1 - t) / 2
        levels, u = (lambda t: spread(t, self.s, most, scale=2 * self.s)), (lambda s: 1 - (self.s / s) ** 2)
        h = 1e-4
        slope = (u(levels(t - h)) - u(levels(t + h))) / (2 * h)
        weights = weights / 2 * slope
        weights *= u(most) / weights.sum()
        weights[-1] += 1 - u(most)  # beyond the largest level all stays as it is there
        return list(zip(u(levels(t)).tolist(), weights.tolist(), strict=True))

    def _draw(self, node: _Node, z: Tensor, which: Bool[Tensor, "N"], generator: torch.Generator | None) -> None:
        """One noise, of both signs, for these samples."""
        z = z[which]
        w = self.s**2 * node.u / (1 - node.u)
        s, epsilon = torch.tensor(math.sqrt(self.s**2 + w), dtype=torch.float64), randn(z.shape, generator, z)
        value = z.new_zeros(len(z), len(self.models))
        for sign in (1, -1):
            D = denoise_all(self.models, z + sign * math.sqrt(w) * epsilon, s, self.batch_size)
            change, both = D - D[:, :1], D + D[:, :1]
            towards = einsum(change, 2 * z[:, None] - both, "N m ..., N m ... -> N m") / (2 * self.s**2)
            value += (towards - sign * einsum(change, epsilon, "N m ..., N ... -> N m") / math.sqrt(w)) / 2
        node.add(which, node.width * value)


class _Node:
    """One level: what its noises add to the log-ratios of each sample."""

    def __init__(self, u: float, width: float, z: Tensor, m: int):
        self.u, self.width = u, width
        self.count = torch.zeros(len(z), dtype=torch.float64, device=z.device)
        self.total, self.squares = (torch.zeros(len(z), m, dtype=torch.float64, device=z.device) for _ in range(2))

    def add(self, which: Bool[Tensor, "N"], value: Float[Tensor, "n m"]) -> None:
        self.count[which] += 1
        self.total[which] += value.double()
        self.squares[which] += value.double() ** 2

    @property
    def mean(self) -> Float[Tensor, "N m"]:
        return self.total / self.count[:, None]

    @property
    def drawn(self) -> int:
        """Noises of the sample that has most of them."""
        return int(self.count.max())

    @property
    def variance(self) -> float:
        """Of one noise, the mean over samples and models; of those that have two or more."""
        several = self.count > 1
        if self.total.shape[1] == 1 or not several.any():
            return 0.0
        n = self.count[several, None]
        within = (self.squares[several] - self.total[several] ** 2 / n)[:, 1:].clamp(min=0)
        return float(within.sum() / ((n - 1).sum() * within.shape[1]))

    @property
    def gain(self) -> float:
        """How much of the variance one more noise takes away."""
        return self.variance / (self.drawn * (self.drawn + 1))
