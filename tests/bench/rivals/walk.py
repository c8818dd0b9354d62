r"""What all rivals share: the reverse process of several models, of which each says only how it weighs their scores.

Notation: z at the noise level s, :math:`v = s^2`, the next level :math:`v' = v - \delta`; :math:`S_i = (D_i - z) / v` is the score of
model i, :math:`\xi` standard noise. ``N`` particles, ``m`` models, ``*x`` one sample. All of it float64 whatever the networks use.

.. math::
    z' &= z + \delta \sum_i a_i S_i + \sqrt{\tau} \, \xi \\
    \ell_i' &= \ell_i + \tfrac{\delta}{\tau} \Bigl( \langle S_i, z' - z \rangle - \tfrac{\delta}{2} \|S_i\|^2 \Bigr)

With :math:`\tau = \delta` the first is the Euler-Maruyama step of :math:`dz = S \delta + \sqrt{\delta} \, \xi`, to which every schedule's
reverse SDE comes down in these coordinates, and the second SuperDiff's Itô density estimator. The default, :math:`\tau = v' \delta / v`,
is the step of DDPM, which needs far fewer levels, and the second is still the log-ratio of its kernels. The last step goes to
:math:`v' = 0` without noise: there the composed image is what is denoised.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from einops import einsum, reduce
from torch import Tensor

from sculpt.diffusion.clock import noise_levels
from sculpt.diffusion.denoiser import Denoiser
from sculpt.diffusion.together import at_once, denoise_all
from sculpt.model import randn

__all__ = ["Evaluations", "Walk", "evaluations", "squares"]


class Walk:
    """Particles on their way down. Iterating shows the models' scores ``(N, m, *x)`` at each level; :meth:`step` goes on to the next.

    Args:
        models: whose scores are composed.
        n: how many particles.
        steps: evaluations of each model for each particle.
        generator: of all noise.
        degree: the power in which densities are scaled: the wide Gaussian of the start is that much narrower.
        euler: the noise of the Euler-Maruyama step instead of DDPM's.
    """

    def __init__(
        self,
        models: Sequence[Denoiser],
        n: int,
        steps: int,
        generator: torch.Generator | None,
        degree: float = 1.0,
        euler: bool = False,
    ):
        self.models, self.generator, self.euler = list(models), generator, euler
        self.levels = noise_levels(self.models, steps, self.models[0].device)
        self.z = self.levels[0] / math.sqrt(degree) * randn((n, *self.models[0].shape), generator, self.levels)
        self.ell = self.levels.new_zeros(n, len(self.models))
        """The tracked log-densities, up to one constant that the models have in common."""

    @torch.no_grad()
    def __iter__(self) -> Iterator[Tensor]:
        for s, s_next in itertools.pairwise([*self.levels, self.levels.new_zeros(())]):
            self.v, self.delta, last = s**2, s**2 - s_next**2, not s_next
            self.tau = self.delta * (self.euler and not last or (s_next / s) ** 2)
            self.S = (denoise_all(self.models, self.z, s, at_once(self.models[0].shape)) - self.z[:, None]) / self.v
            self.xi = torch.zeros_like(self.z) if last else randn(self.z.shape, self.generator, self.z)
            yield self.S

    def step(self, a: Tensor) -> None:
        """Go to the next level with the coefficients a, ``(N, m)`` or ``(m,)``."""
        move = self.delta * einsum(a.expand(len(self.z), -1), self.S, "N m, N m ... -> N ...") + self.tau.sqrt() * self.xi
        if self.tau > 0:
            along = reduce(self.S * move[:, None], "N m ... -> N m", "sum")
            self.ell = self.ell + self.delta / self.tau * (along - self.delta / 2 * squares(self.S))
        self.z = self.z + move

    def take(self, index: Tensor) -> None:
        """Keep these particles."""
        self.z, self.ell = self.z[index], self.ell[index]


def squares(S: Tensor) -> Tensor:
    """The squared lengths of vectors ``(N, m, *x)``."""
    return reduce(S**2, "N m ... -> N m", "sum")


@dataclass
class Evaluations:
    """How many samples went through networks."""

    count: int = 0

    def add(self, module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        """Count one call: the hook of a module."""
        self.count += len(args[0] if args else kwargs["sample"])


@contextlib.contextmanager
def evaluations(models: Sequence[Denoiser]) -> Iterator[Evaluations]:
    """Count what goes through the networks of these models, each network once, whoever calls them and in batches of whatever size."""
    told = Evaluations()
    networks = {id(model.model): model.model for model in models}
    hooks = [network.register_forward_pre_hook(told.add, with_kwargs=True) for network in networks.values()]
    try:
        yield told
    finally:
        for hook in hooks:
            hook.remove()
