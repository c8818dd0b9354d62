r"""The chains of diffusion models: one alone, and one steered by a classifier. Tracked densities: :mod:`sculpt.diffusion.tracked`.

Notation: noise levels :math:`s_0 > s_1 > \dots`, :math:`v = s^2`, a step goes from :math:`v` to :math:`v' = v - \delta`;
:math:`\xi` standard noise. ``N`` particles, ``*x`` one sample. Weights and clock are float64.

The base chain's kernel is the one of the second-order stochastic solver (SDE-DPM-Solver++ 2M), with
:math:`\kappa = 1 - v'/v` and h the step in log s:

.. math::
    z' = z + \kappa (\tilde D - z) + s' \sqrt{\kappa} \, \xi,
    \qquad \tilde D = D + \tfrac{h}{2 h_-} (D - D_-)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sculpt.chain import Chain, Settings
from sculpt.diffusion.clock import common_start, like, noise_levels
from sculpt.diffusion.kernels import check_finite, extrapolated, inner
from sculpt.diffusion.together import at_once
from sculpt.model import randn
from sculpt.state import State, in_parts

if TYPE_CHECKING:
    from sculpt.diffusion.denoiser import Denoiser, GuidedDenoiser

__all__ = ["DenoisingChain", "GuidedChain", "NoisyChain", "given_noise"]

EVERY = 8
"""Levels from one to the next at which a chain that does without h asks for it all the same."""
EXTRAPOLATED_NOTE = (
    "classifier-free guidance is sampled as it is: a guided score has no marginal of its own, so no road is exact for it"
)


class NoisyChain(Chain):
    """What all of them share: levels that the whole population walks down together."""

    whole = True

    def __init__(self, models: Sequence[Denoiser], settings: Settings, steps: int):
        first = models[0]
        self.models, self.shape, self.device = models, first.shape, first.device
        self.length = steps
        self.levels, self.latents = noise_levels(models, steps, first.device), settings.latents
        start = common_start(models)
        self.centre = 0.0 if start is None else start.to(first.device)
        """what sampling starts around"""
        self.batch_size = settings.batch_size or at_once(first.shape)

    def done(self, state):
        return state.k == self.length - 1

    def particles(self, n):
        return max(n, self.few if math.prod(self.shape) <= 64 else self.fewest)

    few, fewest = 1024, 128
    """The least population by default, in few dimensions and in many."""

    def notes(self, x, generator):
        return [EXTRAPOLATED_NOTE] * any(leaf.extrapolated for model in self.models for leaf in model.leaves)

    def first_noise(self, n: int, generator: torch.Generator | None, like: Tensor) -> Float[Tensor, "N *x"]:
        """What sampling starts from."""
        return self.noise(n, generator, like) if self.latents is None else given_noise(self.latents, n, self.shape, like)

    def noise(self, n: int, generator: torch.Generator | None, like: Tensor) -> Float[Tensor, "N *x"]:
        return randn((n, *self.shape), generator, like)


def given_noise(latents: Tensor, n: int, shape: Sequence[int], like: Tensor) -> Float[Tensor, "N *x"]:
    """The noise that a caller starts from, for n samples of this shape."""
    if not isinstance(latents, Tensor) or tuple(latents.shape) != (n, *shape):
        got = tuple(latents.shape) if isinstance(latents, Tensor) else repr(latents)[:60]
        raise ValueError(f"latents are standard normal numbers of shape {(n, *shape)}, one row for each sample; got {got}.")
    return latents.to(like.device, like.dtype)


# ------------------------------------------------------------------------------------------------------- one model alone


@dataclass
class Denoised(State):
    """Noisy samples, what the model makes of them here, and what it made of them one level before."""

    k: Int[Tensor, "N"]
    z: Float[Tensor, "N *x"]
    D: Float[Tensor, "N p *x"]
    """the denoised image in its parts, which add up: the base network's, and what guidance adds"""
    before: Float[Tensor, "N p *x"] | None
    log_h: Float[Tensor, "N"] | None


class DenoisingChain(NoisyChain):
    """One denoiser, by the second-order stochastic solver."""

    def __init__(self, model: Denoiser, settings: Settings):
        super().__init__([model], settings, model.default_steps if settings.steps is None else settings.steps)
        self.model, self.road = model, model.road

    def start(self, n, generator):
        z = self.centre + self.levels[0].float() * self.first_noise(n, generator, torch.empty((), device=self.device))
        return self._at(z, 0, None), None

    def step(self, state, log_w, generator):
        return self._walk(state, generator)[0], None

    def end(self, state, log_w, generator):
        return state.D.sum(1), None

    def _at(self, z: Tensor, k: int, before: Tensor | None) -> Denoised:
        """The state at a level: this is where the networks are called."""
        D, log_h = self._parts(z, k)
        return Denoised(torch.full((len(z),), k, device=z.device), z, D, before, log_h)

    def _parts(self, z: Tensor, k: int) -> tuple[Float[Tensor, "N p *x"], Float[Tensor, "N"] | None]:
        D = in_parts(lambda z: self.model.denoise(z, self.levels[k])[:, None], self.batch_size, z)
        check_finite(D, f"{self.model} gave", k, self.levels[k])
        return D, None

    def _walk(self, state: Denoised, generator: torch.Generator | None) -> tuple[Denoised, Tensor, Tensor, Tensor]:
        """One step: the state, and from what it was made: the parts, the noise and its scale."""
        k = int(state.k[0])
        s, s_next = self.levels[k], self.levels[k + 1]
        D = extrapolated(state.D, state.before, self.levels, k)
        kappa = 1 - (s_next / s) ** 2
        scale, xi = s_next * kappa.sqrt(), randn(state.z.shape, generator, state.z)
        z = state.z + kappa.float() * (D.sum(1) - state.z) + scale.float() * xi
        return self._at(z, k + 1, state.D), D, xi, kappa / scale


# ---------------------------------------------------------------------------------------------------------------- guided


class GuidedChain(DenoisingChain):
    r"""The anchor's chain steered by a classifier, with the weights of its path:

    .. math:: \log w \mathrel{+}= \log h(z') - \log h(z) + \log P_i(z' \mid z) - \log P(z' \mid z)

    They are a diagnostic or, ``corrected``, they select, and the terminal head has the last word: the result is then exact for the
    anchor's chain as it is stepped and the terminal head. A field steers without h, which a diagnostic need not ask at every level:
    weights with the h of an earlier level have the same mean.
    """

    model: GuidedDenoiser

    def __init__(self, model: GuidedDenoiser, settings: Settings, corrected: bool = False):
        super().__init__(model, settings)
        self.corrected, self.log_scale = corrected, 0.0
        self.road += ", corrected" * corrected

    def start(self, n, generator):
        state, _ = super().start(n, generator)
        return state, state.log_h + self.log_scale

    def step(self, state, log_w, generator):
        new, D, xi, per_noise = self._walk(state, generator)
        if new.log_h is None:
            new = replace(new, log_h=state.log_h)
        # log P_i(z'|z) - log P(z'|z) of two Gaussians whose means are e standard deviations apart
        e = per_noise * D[:, 1].double()
        return new, new.log_h - state.log_h - inner(e, e) / 2 - inner(e, xi.double())

    def end(self, state, log_w, generator):
        if not self.corrected:
            return state.D.sum(1), None
        # The last step is the anchor's own denoising, and what it ends in is judged by the terminal head.
        x, guide, posterior = state.D[:, 0], self.model.classifier, self.model.posterior
        options = {"labels": posterior.labels, "odds": posterior.odds}
        final = in_parts(lambda x: guide.log_h_terminal(x, **options), self.batch_size, x)
        return x, final.double() - state.log_h

    def _parts(self, z, k):
        model, s = self.model, self.levels[k]

        asked = self.corrected or not model.guidance.field or k % EVERY == 0 or k == self.length - 1

        def parts(z: Tensor) -> tuple[Tensor, Tensor]:
            log_h, added = model.guidance(z, s) if asked else (z.new_zeros(len(z)), model.guidance.added(z, s))
            return torch.stack([model.base(z, s), added], dim=1), log_h

        D, log_h = in_parts(parts, self.batch_size, z)
        check_finite(D[:, 0], f"{model.anchor} gave", k, s)
        check_finite(D[:, 1] + like(log_h, D[:, 1]), f"the classifier of {model} gave", k, s)
        return D, log_h.double() if asked else None
