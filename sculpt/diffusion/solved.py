r"""Particles that go alone, stepped by any scheduler of diffusers: a formula of several models as one denoiser that remembers.

Notation: :math:`S_i = (D_i - z) / v` is the score of base model i at the level :math:`v = s^2`, ``N`` particles, ``m`` base models.

A log-density has a differential that does not ask how z moves, so the log-densities follow any solver's path:

.. math:: d \log q_i = \langle S_i, dz \rangle + \tfrac12 \bigl( \nabla \cdot S_i + \|S_i\|^2 \bigr) \, dv
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from einops import einsum, reduce
from jaxtyping import Float
from torch import Tensor, nn

from sculpt.chain import Settings
from sculpt.diffusion.chains import EXTRAPOLATED_NOTE
from sculpt.diffusion.clock import common_start, level, noise_range
from sculpt.diffusion.diffusers.solver import SolverChain
from sculpt.diffusion.kernels import analytic_variance, check_finite
from sculpt.diffusion.together import at_once, denoise_all
from sculpt.diffusion.tracked import MORE
from sculpt.formula import Formula
from sculpt.identity import digest

if TYPE_CHECKING:
    from sculpt.diffusion.clock import Level
    from sculpt.diffusion.denoiser import Denoiser

__all__ = ["Remembering", "SolvedChain"]


class Remembering:
    """What a formula makes of samples, from the log-densities that it carries along from one call to the next.

    Args:
        formula: of the models' densities.
        models: the base models.
        batch_size: how many samples go through a network at once.
    """

    road, default_steps = "tracked densities", MORE

    def __init__(self, formula: Formula, models: Sequence[Denoiser], batch_size: int):
        self.formula, self.operands, self.batch_size = formula, models, batch_size
        self.first = first = models[0]
        self.shape, self.autoencoder = first.shape, first.autoencoder
        (self.s_min, self.s_max), self.start = noise_range(models), common_start(models)
        self.name = formula.write([str(model) for model in models])
        self.k, self.d = 0, math.prod(self.shape)
        self.before: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] | None = None

    def __str__(self) -> str:
        return self.name

    @property
    def key(self) -> str:
        return digest("remembering", self.formula.identity, [model.key for model in self.operands])

    @property
    def device(self) -> torch.device:
        return self.first.device

    @property
    def dtype(self) -> torch.dtype:
        return self.first.dtype

    @property
    def networks(self) -> tuple[nn.Module, ...]:
        return tuple(network for model in self.operands for network in model.networks)

    def denoise(self, z: Float[Tensor, "N *x"], s: Level) -> Float[Tensor, "N *x"]:
        """The composed denoised images. The same particles come with every call, in the same order."""
        s, exact = level(s, z.device), z.double()
        if s.ndim:
            raise ValueError(f"{self} follows samples along one path of noise levels, got {len(s)} of them at once.")
        D, v = denoise_all(self.operands, exact, s, self.batch_size), s**2
        check_finite(D, "a base model gave", self.k, s)
        ell, S = self._followed(exact, v, D)
        a = self.formula.gradient(ell)
        # Particles that go alone have no weights between each other.
        w = torch.full((len(z),), 1 / len(z), dtype=torch.float64, device=z.device)
        c, _ = analytic_variance(exact, D, a, w, v)
        c = c.clamp(min=0).clamp(max=v)  # an estimate outside its bounds is put back
        self.before, self.k = (exact, v, ell, S, self.d * (c / v - 1) / v), self.k + 1
        return (exact + einsum(a, D - exact[:, None], "N m, N m ... -> N ...")).to(z.dtype)

    def _followed(self, z: Tensor, v: Tensor, D: Tensor) -> tuple[Float[Tensor, "N m"], Float[Tensor, "N m *x"]]:
        """The log-densities here, by the trapezoid from where they were known last."""
        S = (D - z[:, None]) / v
        if self.before is None:
            return torch.zeros(len(z), len(self.operands), dtype=torch.float64, device=z.device), S
        z_before, v_before, ell, S_before, divergence = self.before
        along = reduce((S + S_before) * (z - z_before)[:, None], "N m ... -> N m", "sum") / 2
        squares = (_square(S) + _square(S_before)) / 2
        return ell + along + (divergence + squares) * (v - v_before) / 2, S


def _square(S: Float[Tensor, "N m *x"]) -> Float[Tensor, "N m"]:
    return reduce(S**2, "N m ... -> N m", "sum")


class SolvedChain(SolverChain):
    """Particles that go alone, by a solver of the caller's."""

    alone = True

    def __init__(self, formula: Formula, models: Sequence[Denoiser], settings: Settings):
        self.composed = Remembering(formula, models, settings.batch_size or at_once(models[0].shape))
        super().__init__(self.composed, settings)  # type: ignore[arg-type]
        self.batch_size = 2**62  # all particles at once: the networks are called in parts further down

    def notes(self, x, generator):
        said = [f"steps of {type(self.solver.scheduler).__name__}"]
        return said + [EXTRAPOLATED_NOTE] * any(leaf.extrapolated for model in self.composed.operands for leaf in model.leaves)
