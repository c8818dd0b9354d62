r"""The chains of diffusion models: one alone, one steered by a classifier, and several whose densities are tracked.

Notation: noise levels :math:`s_0 > s_1 > \dots`, :math:`v = s^2`, a step goes from :math:`v` to :math:`v' = v - \delta`;
:math:`S_i = (D_i - z) / v` is the score of base model i, :math:`\xi` standard noise, :math:`\ell_i = \log u_i` the tracked
log-density. ``N`` particles, ``m`` base models, ``*x`` one sample. Weights, clock and tracked densities are float64.

The base chain's kernel is the one of the second-order stochastic solver (SDE-DPM-Solver++ 2M), with
:math:`\kappa = 1 - v'/v` and h the step in log s:

.. math::
    z' = z + \kappa (\tilde D - z) + s' \sqrt{\kappa} \, \xi,
    \qquad \tilde D = D + \tfrac{h}{2 h_-} (D - D_-)
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from einops import einsum, reduce
from jaxtyping import Float, Int
from torch import Tensor

from sculpt.chain import Chain, Settings
from sculpt.diffusion.clock import like, noise_levels
from sculpt.diffusion.fade import fade
from sculpt.formula import Formula
from sculpt.model import randn
from sculpt.state import State, in_parts

if TYPE_CHECKING:
    from sculpt.diffusion.correctors import Corrector
    from sculpt.diffusion.denoiser import Denoiser, GuidedDenoiser

__all__ = ["DenoisingChain", "GuidedChain", "NoisyChain", "TrackedChain", "analytic_variance", "inner", "kernel_variance"]

TRACKED_STEPS = 128

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
        self.levels = noise_levels(models, steps, first.device)
        self.batch_size = settings.batch_size or max(1, 2**19 // math.prod(first.shape))

    def done(self, state):
        return state.k == self.length - 1

    def particles(self, n):
        return max(n, self.few if math.prod(self.shape) <= 64 else self.fewest)

    few, fewest = 1024, 128
    """The least population by default, in few dimensions and in many."""

    def notes(self, x, generator):
        return [EXTRAPOLATED_NOTE] * any(leaf.extrapolated for model in self.models for leaf in model.leaves)

    def noise(self, n: int, generator: torch.Generator | None, like: Tensor) -> Float[Tensor, "N *x"]:
        return randn((n, *self.shape), generator, like)


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
        z = self.levels[0].float() * self.noise(n, generator, torch.empty((), device=self.device))
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
        D = state.D
        if state.before is not None:
            h, h_before = (s / s_next).log(), (self.levels[k - 1] / s).log()
            D = D + (h / (2 * h_before)).to(D.dtype) * (D - state.before)
        kappa = 1 - (s_next / s) ** 2
        scale, xi = s_next * kappa.sqrt(), randn(state.z.shape, generator, state.z)
        z = state.z + kappa.float() * (D.sum(1) - state.z) + scale.float() * xi
        return self._at(z, k + 1, state.D), D, xi, kappa / scale


# ---------------------------------------------------------------------------------------------------------------- guided


class GuidedChain(DenoisingChain):
    r"""The anchor's chain steered by a classifier, with the weights of its path:

    .. math:: \log w \mathrel{+}= \log h(z') - \log h(z) + \log P_i(z' \mid z) - \log P(z' \mid z)

    They are a diagnostic or, ``corrected``, they select, and the terminal head has the last word: the result is then exact for the
    anchor's chain as it is stepped and the terminal head.
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

        def parts(z: Tensor) -> tuple[Tensor, Tensor]:
            log_h, added = model.guidance(z, s)
            return torch.stack([model.base(z, s), added], dim=1), log_h

        D, log_h = in_parts(parts, self.batch_size, z)
        check_finite(D[:, 0], f"{model.anchor} gave", k, s)
        check_finite(D[:, 1] + like(log_h, D[:, 1]), f"the classifier of {model} gave", k, s)
        return D, log_h.double()


# ----------------------------------------------------------------------------------------------------- tracked densities


@dataclass
class Tracked(State):
    """Noisy samples, and their log-density under each base model."""

    k: Int[Tensor, "N"]
    z: Float[Tensor, "N *x"]
    ell: Float[Tensor, "N m"]


class TrackedChain(NoisyChain):
    r"""A formula of the densities of several models, which every particle carries along:

    .. math::
        \ell_i' &= \ell_i + \log P_i(z' \mid z) - \log P_B(z \mid z') \\
        z' &= z + \delta \sum_i a_i S_i + \sqrt{\tau} \, \xi, \qquad a = \partial \Phi(\ell) \\
        \log w' &= \log w + \Phi'(\ell') - \Phi(\ell) + \log P_B(z \mid z') - \log P(z' \mid z)

    Base model i steps with the mean :math:`z + \delta S_i` and the Analytic-DPM variance :math:`\tau_i`, see
    :func:`analytic_variance`. Contrasts are faded in, :math:`\Phi'` is the formula at the next level: see :mod:`sculpt.diffusion.fade`.
    """

    road, threshold = "tracked densities", 0.9
    few, fewest = 10_000, 512

    def __init__(self, formula: Formula, models: Sequence[Denoiser], settings: Settings, corrector: Corrector | None = None):
        settings.refuse("tracked densities, which need a kernel of their own", "solver")
        super().__init__(models, settings, TRACKED_STEPS if settings.steps is None else settings.steps)
        self.degree, self.corrector, self.warned = formula.degree, corrector, False
        check_overshoot(self.degree, self.levels)
        if corrector is not None:
            corrector.reset()
        # The target of each level: what the formula pushes away from is faded in.
        self.targets = [fade(formula, (k / (self.length - 1)) ** 2) for k in range(self.length)]
        self.d = math.prod(self.shape)
        if self.d > 256:
            self.doubt = (
                f"the errors of tracked densities add up over {self.d} dimensions, which the effective share does not show. "
                "Use a classifier."
            )
            warnings.warn(
                f"Tracked densities in {self.d} dimensions: their errors add up, and the weights collapse onto a few particles or mean "
                "nothing. A classifier (sculpt.fit) scales to images.",
                stacklevel=2,
            )

    def start(self, n, generator):
        v0 = self.levels[0] ** 2
        # The base models start from N(0, v0), the product of densities of degree d from N(0, v0 / d).
        xi = self.noise(n, generator, self.levels)
        z = (v0 / self.degree).sqrt() * xi
        normal = 0.5 * self.d * torch.log(2 * math.pi * v0)
        ell = (-inner(z, z) / (2 * v0) - normal)[:, None].expand(n, len(self.models)).clone()
        log_w = self.targets[0].value(ell) + inner(xi, xi) / 2 + normal - 0.5 * self.d * math.log(self.degree)
        return Tracked(torch.zeros(n, dtype=torch.long, device=z.device), z, ell), log_w

    def step(self, state, log_w, generator):
        k, z, ell, D, bad = self._look(state, log_w, generator)
        v, v_next, d = self.levels[k] ** 2, self.levels[k + 1] ** 2, self.d
        delta, a = v - v_next, self.targets[k].gradient(ell)
        S = (D - z[:, None]) / v
        drift = einsum(a, S, "N m, N m ... -> N ...")
        c, c_composed = analytic_variance(z, D, a, torch.where(bad, -math.inf, log_w))
        tau, tau_composed = kernel_variance(c, v, delta), kernel_variance(c_composed, v, delta)
        xi = randn(z.shape, generator, z)
        step = delta * drift + tau_composed.sqrt() * xi
        log_backward = -inner(step, step) / (2 * delta) - 0.5 * d * torch.log(2 * math.pi * delta)
        log_forward = -inner(xi, xi) / 2 - 0.5 * d * torch.log(2 * math.pi * tau_composed)
        miss = step[:, None] - delta * S
        log_base = -reduce(miss**2, "N m ... -> N m", "sum") / (2 * tau) - 0.5 * d * torch.log(2 * math.pi * tau)
        ell_next = ell + log_base - log_backward[:, None]
        increment = self.targets[k + 1].value(ell_next) - self.targets[k].value(ell) + log_backward - log_forward
        return Tracked(state.k + 1, z + step, ell_next), torch.where(bad, math.nan, increment)

    def end(self, state, log_w, generator):
        # One unweighted composed denoising: weights stop at the least noise level.
        k, z, ell, D, bad = self._look(state, log_w, generator)
        x = z + einsum(self.targets[k].gradient(ell), D - z[:, None], "N m, N m ... -> N ...")
        return x.float(), torch.where(bad, math.nan, 0.0) if bad.any() else None

    def notes(self, x, generator):
        return super().notes(x, generator) + ([] if self.corrector is None else [self.corrector.note])

    def _look(
        self, state: Tracked, log_w: Tensor, generator: torch.Generator | None
    ) -> tuple[int, Tensor, Tensor, Tensor, Tensor]:
        """Where the particles are once they are corrected, all models' denoised images there, and for which some are not finite."""
        k, z, ell = int(state.k[0]), state.z, state.ell
        s = self.levels[k]
        if self.corrector is not None:
            z, ell = self.corrector(z, ell, s, self.targets[k], self.models, self.batch_size, generator)
        D = torch.stack([in_parts(lambda z, p=p: p.denoise(z, s), self.batch_size, z) for p in self.models], dim=1)
        finite = reduce((D - z[:, None]).isfinite(), "N m ... -> N m", "all")
        bad = ~finite.all(1) | ell.isnan().any(1)
        if bad.any():
            self._tell_lost(D, ~finite, log_w > -math.inf, k)
            # Nothing of them is left: zero times NaN would be NaN in the means over all particles.
            z, ell, D = (torch.where(bad.reshape(-1, *[1] * (part.ndim - 1)), 0.0, part) for part in (z, ell, D))
        return k, z, ell, D, bad

    def _tell_lost(self, D: Tensor, bad: Tensor, alive: Tensor, k: int) -> None:
        """Warn once, naming the models; a note of the result counts all that are lost. Raise where nobody is left."""
        s = self.levels[k]
        broken = [str(model) for model, column in zip(self.models, bad.unbind(1), strict=True) if (column & alive).any()]
        if broken and not (alive & ~bad.any(1)).any():
            check_finite(D, f"{' and '.join(broken)} gave", k, s)
        if broken and not self.warned:
            self.warned = True
            warnings.warn(
                f"{' and '.join(broken)} gave numbers that are not finite for {int((bad.any(1) & alive).sum())} of {int(alive.sum())} "
                f"particles at step {k} (s={float(s):.3g}); these particles lose their weight.",
                stacklevel=2,
            )


def check_overshoot(degree: float, levels: Float[Tensor, "steps"]) -> None:
    r"""Raise where the steps would multiply wide noise, by :math:`1 - \text{degree} \, \delta / v` each, out of all bounds."""
    shares = 1 - (levels[1:] / levels[:-1]) ** 2
    if float((degree * shares - 1).clamp(min=1).log().sum()) > math.log(1000):
        steps = 1 + math.ceil(len(shares) * math.log1p(-float(shares.max())) / math.log1p(-2 / degree))
        raise ValueError(
            f"Powers that sum to {degree:g} overshoot in {len(levels)} steps, farther with every step. Take steps={steps} or more, or "
            "smaller powers."
        )


def analytic_variance(
    z: Float[Tensor, "N *x"], D: Float[Tensor, "N m *x"], a: Float[Tensor, "N m"], log_w: Float[Tensor, "N"]
) -> tuple[Float[Tensor, "m"], Float[Tensor, ""]]:
    r"""The c of the Analytic-DPM variance :math:`\tau = v'\delta/v + (\delta/v)^2 c`, for each base model and for the composition.

    :math:`c = v \, E[\nabla \cdot D] / d` is the variance per dimension that a denoised image leaves open, on average where
    the particles are. By Stein's identity for the target, whose score is :math:`(\sum_j a_j D_j - \deg z)/v`, no derivative is needed:

    .. math:: c_i = \tfrac1d E \langle D_i - E D_i, \; \deg z - \sum_j a_j D_j \rangle
    """
    w = torch.softmax(log_w, dim=0)
    composed = einsum(a, D, "N m, N m ... -> N ...")
    # The degree where the particle is: it varies in nested formulas whose parts differ in theirs.
    pull = like(a.sum(1), z) * z - composed
    every = torch.cat([D, composed[:, None]], dim=1)
    # Taking the mean off changes nothing on average and keeps large noise from drowning the estimate.
    every = every - einsum(w, every, "N, N ... -> ...")
    c = einsum(w, reduce(every * pull[:, None], "N m ... -> N m", "sum"), "N, N m -> m") / pull[0].numel()
    return c[:-1], c[-1]


def kernel_variance(c: Tensor, v: Tensor, delta: Tensor) -> Tensor:
    """The Analytic-DPM variance of a step from v to v - delta; an estimate of c outside its bounds is put back."""
    return (v - delta) * delta / v + (delta / v) ** 2 * c.clamp(min=0).clamp(max=v)


def check_finite(D: Tensor, what: str, k: int, s: Tensor | float, name: str = "s") -> None:
    """Raise where a network's output has entries that are not finite, saying whose, when and for how many samples."""
    if not D.isfinite().all():
        rows = int((~D.isfinite().flatten(1).all(1)).sum())
        raise FloatingPointError(
            f"{what} numbers that are not finite for {rows} of {len(D)} samples at step {k} ({name}={float(s):.3g}). "
            "Check the network's weights and dtype (float16 overflows early), and that its scheduler is the one it was trained with."
        )


def inner(x: Float[Tensor, "N *x"], y: Float[Tensor, "N *x"]) -> Float[Tensor, "N"]:
    """The inner product, sample by sample."""
    return (x * y).flatten(1).sum(1)
