r"""Sampling diffusion models and their compositions.

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

import itertools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from einops import einsum, reduce
from jaxtyping import Float
from torch import Tensor, nn

from sculpt.base import BaseModel, operand_names, randn
from sculpt.classifier import Guide
from sculpt.diffusion.fade import fade
from sculpt.diffusion.identity import digest, weights
from sculpt.diffusion.model import Denoiser
from sculpt.formula import Formula, Posterior
from sculpt.particles import Diagnostics, Population, Samples

__all__ = ["Guided", "guide", "sample", "track", "path_ratios", "noise_levels", "noise_range", "spread"]

WIDEST = 80.0
"""Where sampling starts at most: the base models' start N(0, s²) then misses their mean by a thousandth of a standard deviation."""

KNEE = 0.5
"""The noise level around which half of the steps lie: that of data scaled to about one, where its structure appears."""

GUIDED_NOTE = (
    "classifier-free guidance is sampled as it is: a guided score has no marginal of its own, so no road is exact for it"
)


# ---------------------------------------------------------------------------------------------------------------- the clock


def noise_range(models: Sequence[BaseModel]) -> tuple[float, float]:
    """The noise levels that all of the models cover."""
    models = [leaf for model in models for leaf in model.leaves]
    low, high = max(models, key=lambda model: model.s_min), min(models, key=lambda model: model.s_max)
    if low.s_min >= high.s_max:
        raise ValueError(
            f"The base models share no noise level: {low} starts at s={low.s_min:.3g}, {high} ends at s={high.s_max:.3g}. "
            "Check the schedulers: each has to be the one its model was trained with."
        )
    return low.s_min, min(high.s_max, WIDEST)


def spread(u: Float[Tensor, "*b"], s_min: float, s_max: float, knee: float = KNEE) -> Float[Tensor, "*b"]:
    """Noise levels at shares u of the way from ``s_max`` (0) to ``s_min`` (1).

    Half of the way is even in log s, half in arctan(s / knee): around the knee structure appears, and samplers err most.
    """
    log_s = torch.linspace(math.log(s_max), math.log(s_min), 4096, dtype=torch.float64, device=u.device)
    angle = (log_s.exp() / knee).atan()
    way = sum((part - part[0]) / (part[-1] - part[0]) / 2 for part in (log_s, angle))
    i = torch.searchsorted(way, u.double()).clamp(1, len(way) - 1)
    return torch.lerp(log_s[i - 1], log_s[i], (u.double() - way[i - 1]) / (way[i] - way[i - 1])).exp()


def noise_levels(models: Sequence[BaseModel], steps: int, device: torch.device | str = "cpu") -> Float[Tensor, "steps"]:
    """The levels of a run: ``steps`` network calls, the last of which denoises."""
    if steps < 2:
        raise ValueError(f"Sampling needs at least 2 steps, got {steps}.")
    s_min, s_max = noise_range(models)
    return spread(torch.linspace(0, 1, steps, dtype=torch.float64, device=device), s_min, s_max)


# ----------------------------------------------------------------------------------------------------------------- guidance


class Guided(Denoiser):
    r"""A posterior of base models as a denoiser, steered by a classifier: itself a base model again.

    .. math::
        \text{anchored:}\quad & D = D_{i_1} + v \, \nabla \log p(y_2 \dots y_n \mid z, y_1 = i_1) \\
        \text{mixture:}\quad & D = \sum_i p(y_1 = i \mid z) \, D_i + v \, \nabla \log p(y_1 \dots y_n \mid z)

    The anchored form runs one base network, and its chain can be corrected to be exact. ``strength`` multiplies the gradient.
    """

    def __init__(
        self,
        posterior: Posterior,
        models: Sequence[BaseModel],
        classifier: Guide,
        form: str = "anchored",
        strength: float | int = 1.0,
    ):
        if form not in ("anchored", "mixture"):
            raise ValueError(f"form is 'anchored' or 'mixture', got {form!r}.")
        if not 0 <= strength < math.inf:
            raise ValueError(
                f"strength multiplies the guidance, 1 leaves it as it is; expected a number from 0, got {strength}."
            )
        self.posterior, self.models, self.classifier, self.form = posterior, list(models), classifier, form
        self.strength = float(strength)
        self.anchor = self.models[posterior.labels[0]]
        stepped = [self.anchor] if form == "anchored" else self.models
        if unbound := [str(model) for model in stepped if not isinstance(model, Denoiser)]:
            raise ValueError(
                f"{', '.join(unbound)}: a composition without a classifier of its own, which cannot be stepped. "
                "Anchor on a base model (anchor=), or bind the inner classifier: inner.guided(its_classifier)."
            )
        self.s_min, self.s_max = noise_range(self.models)
        self.shape, self.dtype, self.autoencoder = self.anchor.shape, self.anchor.dtype, self.anchor.autoencoder
        self.guided = any(leaf.guided for model in models for leaf in model.leaves)
        self.name = posterior.write(operand_names(models))

    @property
    def device(self) -> torch.device:
        return self.anchor.device

    @property
    def key(self) -> str:
        classifier = weights(self.classifier) if isinstance(self.classifier, nn.Module) else type(self.classifier).__qualname__
        stronger = [self.strength] if self.strength != 1 else []
        return digest("guided", self.posterior.identity, [model.key for model in self.models], classifier, self.form, *stronger)

    def log_h(self, z: Float[Tensor, "N *x"], s: Tensor) -> tuple[Float[Tensor, "N"], Float[Tensor, "N *x"]]:
        r""":math:`\log h(z)` of the anchored form, or :math:`\log p(y_1 \dots y_n \mid z)`, and its gradient."""
        with torch.enable_grad():
            z = z.detach().requires_grad_(True)
            value = self._log_h(z, s.expand(len(z)))
            (gradient,) = torch.autograd.grad(value.sum(), z)
        return value.detach(), gradient

    def _log_h(self, z, s):
        labels, odds = self.posterior.labels, self.posterior.odds
        log_h = self.classifier.log_h(z, s, labels=labels, odds=odds)
        # The joint as marginal times conditional: any split of it is the same where the classifier is exact.
        return log_h if self.form == "anchored" else log_h + self.classifier.marginal(z, s)[:, labels[0]]

    def base(self, z: Float[Tensor, "N *x"], s: Tensor) -> Float[Tensor, "N *x"]:
        """The denoised image before guidance."""
        if self.form == "anchored":
            return self.anchor.denoise(z, s)
        p = self.classifier.marginal(z, s.expand(len(z))).exp().to(z)
        return sum(p[:, i].reshape(-1, *[1] * (z.ndim - 1)) * model.denoise(z, s) for i, model in enumerate(self.models))

    def guidance(self, z: Float[Tensor, "N *x"], s: Tensor) -> tuple[Float[Tensor, "N"], Float[Tensor, "N *x"]]:
        """Log h, and what is added to the denoised image."""
        log_h, gradient = self.log_h(z, s)
        return log_h, _per_sample(self.strength * s**2, z) * gradient.to(z.dtype)

    @torch.no_grad()
    def denoise(self, z, s):
        s = torch.as_tensor(s, dtype=torch.float64, device=z.device)
        return self.base(z, s) + self.guidance(z, s)[1]


def guide(
    posterior: Posterior,
    models: Sequence[BaseModel],
    classifier: Guide,
    *,
    form: str = "anchored",
    strength: float | int = 1.0,
) -> Guided:
    """The composed base model; the first label is the anchor."""
    return Guided(posterior, models, classifier, form, strength)


# ----------------------------------------------------------------------------------------------------------------- sampling


@torch.no_grad()
def sample(
    model: Denoiser,
    n: int,
    *,
    steps: int | None = None,
    solver: Any | None = None,
    correct: bool | str = False,
    particles: int | None = None,
    threshold: float | None = None,
    resample: bool = True,
    batch_size: int | None = None,
    generator: torch.Generator | None = None,
    progress: bool = True,
) -> Samples:
    r"""n samples of a denoiser.

    ``solver`` is any diffusers scheduler, run through its own ``step``; without one it is the second-order stochastic solver.
    A guided denoiser keeps the weights of its path against its anchor's chain,

    .. math:: \log w \mathrel{+}= \log h(z') - \log h(z) + \log P_i(z' \mid z) - \log P(z' \mid z),

    as a diagnostic; with ``correct`` they select, the terminal head has the last word, and the result is exact for the base
    chain as it is stepped and the terminal head.
    """
    check_count(n)
    steps = 32 if steps is None else steps
    diagnostics = Diagnostics(
        road="base model" if not isinstance(model, Guided) else f"classifier, {model.form} form", steps=steps
    )
    diagnostics.notes += [GUIDED_NOTE] * model.guided
    if correct not in (False, True):
        raise ValueError(f"correct is True or False for diffusion, whose densities no road knows exactly, got {correct!r}.")
    weighted = isinstance(model, Guided) and model.form == "anchored" and solver is None
    if correct and not weighted:
        _refuse_correction(model, solver)
    if not correct and (particles is not None or threshold is not None or not resample):
        raise ValueError(
            "particles, threshold and resample=False belong to a population with weights: add correct=True, or leave the classifier out."
        )
    if solver is not None:
        x = _through(solver, model, n, steps, batch_size, generator, progress)
        return model.result(x, None, diagnostics)

    N = n if not correct else population_size(n, particles, model.shape, small=1024, large=128)
    levels = noise_levels([model], steps, model.device)
    z = levels[0].float() * randn((N, *model.shape), generator, torch.empty((), device=model.device))
    population = Population(
        N, threshold=(0.5 if threshold is None else threshold) if correct else 0.0, generator=generator, device=z.device
    )
    extrapolate = Extrapolation()
    log_h, ratio = torch.zeros(2, N, dtype=torch.float64, device=z.device)
    for k, (s, s_next) in enumerate(track_progress(levels, f"sampling {model}", progress)):
        if weighted:
            # Axis 1: the base chain's denoised image, and what guidance adds to it.
            D, log_h_new = chunked(lambda z, s=s: _guided_parts(model, z, s), z, batch_size)
            check_finite(D[:, 0], f"{model.anchor} gave", k, f"s={float(s):.3g}")
            check_finite(D[:, 1] + _per_sample(log_h_new, D[:, 1]), f"the classifier of {model} gave", k, f"s={float(s):.3g}")
            # The state's log h, known only now, completes the weight of the step that led to it.
            population.reweight(log_h_new.double() - log_h + ratio)
            log_h = log_h_new.double()
            if correct and (index := population.resample()) is not None:
                z, D, log_h = z[index], D[index], log_h[index]
                extrapolate.select(index)
        else:
            D = chunked(lambda z, s=s: model.denoise(z, s)[:, None], z, batch_size)
            check_finite(D, f"{model} gave", k, f"s={float(s):.3g}")
        if s_next is None:
            break
        parts = extrapolate(D, s, s_next)
        kappa = 1 - (s_next / s) ** 2
        noise, xi = s_next * kappa.sqrt(), randn(z.shape, generator, z)
        z = z + kappa.float() * (parts.sum(1) - z) + noise.float() * xi
        if weighted:
            # log P_i(z'|z) - log P(z'|z) of two Gaussians whose means are e standard deviations apart
            e = (kappa / noise) * parts[:, 1].double()
            ratio = -inner(e, e) / 2 - inner(e, xi.double())
    if not correct:
        if weighted:
            diagnostics.observe(population, acceptance=math.exp(min(0.0, population.log_z)), selected=False)
        return model.result(D.sum(1), None, diagnostics)
    # The last step is the base chain's own denoising, and what it ends in is judged by the terminal head.
    x, labels, odds = D[:, 0], model.posterior.labels, model.posterior.odds
    final = chunked(lambda x: model.classifier.log_h_terminal(x, labels=labels, odds=odds), x, batch_size)
    population.reweight(final.double() - log_h)
    diagnostics.road += ", corrected"
    diagnostics.observe(population, acceptance=math.exp(min(0.0, population.log_z)))
    return population.samples(x, n, diagnostics, model.result, resample)


class Extrapolation:
    """The second-order solver's memory: the last denoised images and the last step in log s."""

    def __init__(self):
        self.D = self.h = None

    def __call__(self, D: Tensor, s: Tensor, s_next: Tensor) -> Tensor:
        h = (s / s_next).log()
        forward = D if self.D is None else D + (h / (2 * self.h)).to(D.dtype) * (D - self.D)
        self.D, self.h = D, h
        return forward

    def select(self, index: Tensor) -> None:
        self.D = None if self.D is None else self.D[index]


def _guided_parts(model: Guided, z: Tensor, s: Tensor) -> tuple[Float[Tensor, "N 2 *x"], Float[Tensor, "N"]]:
    log_h, added = model.guidance(z, s)
    return torch.stack([model.base(z, s), added], dim=1), log_h


# --------------------------------------------------------------------------------------------------------- tracked densities


@torch.no_grad()
def track(
    formula: Formula,
    models: Sequence[BaseModel],
    n: int,
    *,
    steps: int | None = None,
    particles: int | None = None,
    threshold: float = 0.9,
    resample: bool = True,
    corrector: Any | None = None,
    batch_size: int | None = None,
    generator: torch.Generator | None = None,
    progress: bool = True,
) -> Samples:
    r"""n samples of :math:`\exp \Phi`, without training: every particle carries its log-density under each base model.

    .. math::
        \ell_i' &= \ell_i + \log P_i(z' \mid z) - \log P_B(z \mid z') \\
        z' &= z + \delta \sum_i a_i S_i + \sqrt{\tau} \, \xi, \qquad a = \partial \Phi(\ell) \\
        \log w' &= \log w + \Phi'(\ell') - \Phi(\ell) + \log P_B(z \mid z') - \log P(z' \mid z)

    Base model i steps with the mean :math:`z + \delta S_i` and the Analytic-DPM variance :math:`\tau_i`, see
    :func:`analytic_variance`. Contrasts are faded in, :math:`\Phi'` is the formula at the next level: see :mod:`sculpt.diffusion.fade`.
    ``corrector`` is an MCMC kernel of :mod:`sculpt.diffusion.mcmc`, run at every noise level.
    """
    check_count(n)
    steps = 128 if steps is None else steps
    shape, device, degree, m = models[0].shape, models[0].device, formula.degree, len(models)
    d = math.prod(shape)
    N = population_size(n, particles, shape, small=10_000, large=512)
    diagnostics = Diagnostics(road="tracked densities", steps=steps)
    diagnostics.notes += [GUIDED_NOTE] * any(model.guided for model in models)
    if d > 256:
        warnings.warn(
            f"Tracked densities in {d} dimensions: their errors add up, and the weights collapse onto a few particles or mean nothing. "
            "A classifier (sculpt.fit) scales to images.",
            stacklevel=3,
        )
        diagnostics.doubt = f"the errors of tracked densities add up over {d} dimensions, which the effective share does not show. Use a classifier."
    levels = noise_levels(models, steps, device)
    v0 = levels[0] ** 2
    # The base models start from N(0, v0), the product of densities of degree d from N(0, v0 / d).
    xi = randn((N, *shape), generator, levels)
    z = (v0 / degree).sqrt() * xi
    normal = 0.5 * d * torch.log(2 * math.pi * v0)
    ell = (-inner(z, z) / (2 * v0) - normal)[:, None].expand(N, m).clone()
    population = Population(N, threshold=threshold, generator=generator, device=device)
    # The target of each level: what the formula pushes away from is faded in.
    targets = [fade(formula, (k / (steps - 1)) ** 2) for k in range(steps)]
    population.reweight(targets[0].value(ell) + inner(xi, xi) / 2 + normal - 0.5 * d * math.log(degree))

    if corrector is not None:
        corrector.reset()
    for k, (s, s_next) in enumerate(track_progress(levels, "tracking densities", progress)):
        if corrector is not None:
            z, ell = corrector(z, ell, s, targets[k], models, batch_size, generator)
        D = _denoised(models, z, s, k, batch_size, population)
        a = targets[k].gradient(ell)
        if s_next is None:
            break
        v, v_next = s**2, s_next**2
        delta = v - v_next
        S = (D - z[:, None]) / v
        drift = einsum(a, S, "N m, N m ... -> N ...")
        c, c_composed = analytic_variance(z, D, a, population.log_w)
        tau, tau_composed = kernel_variance(c, v, delta), kernel_variance(c_composed, v, delta)
        xi = randn(z.shape, generator, z)
        step = delta * drift + tau_composed.sqrt() * xi
        log_backward = -inner(step, step) / (2 * delta) - 0.5 * d * torch.log(2 * math.pi * delta)
        log_forward = -inner(xi, xi) / 2 - 0.5 * d * torch.log(2 * math.pi * tau_composed)
        miss = step[:, None] - delta * S
        log_base = -reduce(miss**2, "N m ... -> N m", "sum") / (2 * tau) - 0.5 * d * torch.log(2 * math.pi * tau)
        ell_next = ell + log_base - log_backward[:, None]
        population.reweight(targets[k + 1].value(ell_next) - targets[k].value(ell) + log_backward - log_forward)
        z, ell = z + step, ell_next
        if (index := population.resample()) is not None:
            z, ell = z[index], ell[index]
    # One unweighted composed denoising: weights stop at the least noise level.
    x = z + einsum(a, D - z[:, None], "N m, N m ... -> N ...")
    if population.lost:
        diagnostics.notes.append(f"{population.lost} particles were lost to numbers that are not finite")
    if corrector is not None:
        diagnostics.notes.append(corrector.note)
    diagnostics.observe(population)
    return population.samples(x.float(), n, diagnostics, models[0].result, resample)


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
    pull = _per_sample(a.sum(1), z) * z - composed
    every = torch.cat([D, composed[:, None]], dim=1)
    # Taking the mean off changes nothing on average and keeps large noise from drowning the estimate.
    every = every - einsum(w, every, "N, N ... -> ...")
    c = einsum(w, reduce(every * pull[:, None], "N m ... -> N m", "sum"), "N, N m -> m") / pull[0].numel()
    return c[:-1], c[-1]


def kernel_variance(c: Tensor, v: Tensor, delta: Tensor) -> Tensor:
    """The Analytic-DPM variance of a step from v to v - delta; an estimate of c outside its bounds is put back."""
    return (v - delta) * delta / v + (delta / v) ** 2 * c.clamp(min=0).clamp(max=v)


@torch.no_grad()
def path_ratios(
    models: Sequence[BaseModel],
    x: Float[Tensor, "N *x"],
    generator: torch.Generator | None = None,
    *,
    made_by: int,
    steps: int = 64,
) -> Float[Tensor, "N m"]:
    r"""Log-densities of all models at samples x of model ``made_by``, up to a constant common to all.

    x is noised step by step, and :math:`\sum \log P_j(z' \mid z)` of the way back is added up: tracked densities, read backwards.
    """
    levels = noise_levels(models, steps, x.device)
    z = x.double() + levels[-1] * randn(x.shape, generator, levels)
    ell = torch.zeros(len(x), len(models), dtype=torch.float64, device=x.device)
    a = torch.eye(len(models), dtype=torch.float64, device=x.device)[made_by].expand(len(x), -1)
    for k, (s_next, s) in enumerate(itertools.pairwise(levels.flip(0))):
        v, delta = s**2, s**2 - s_next**2
        z_next, z = z, z + delta.sqrt() * randn(z.shape, generator, z)
        D = torch.stack([chunked(lambda z, model=model, s=s: model.denoise(z, s), z, None) for model in models], dim=1)
        check_finite(D, "a base model gave", k, f"s={float(s):.3g}")
        c, _ = analytic_variance(z, D, a, ell.new_zeros(len(x)))
        tau = kernel_variance(c, v, delta)
        miss = (z_next - z)[:, None] - delta / v * (D - z[:, None])
        ell -= reduce(miss**2, "N m ... -> N m", "sum") / (2 * tau) + 0.5 * math.prod(x.shape[1:]) * tau.log()
    return ell


def _denoised(models, z, s, k, batch_size, population) -> Float[Tensor, "N m *x"]:
    """All base models' denoised images. Particles for which one is not finite lose their weight, and the user is told."""
    D = torch.stack([chunked(lambda z, model=model: model.denoise(z, s), z, batch_size) for model in models], dim=1)
    bad = ~reduce(D.isfinite(), "N m ... -> N m", "all")
    if bad.any():
        alive = population.log_w > float("-inf")
        for model, column in zip(models, bad.unbind(1), strict=True):
            if (column & alive).any() and not population.lost:  # once: a note of the result counts them all
                warnings.warn(
                    f"{model} gave numbers that are not finite for {int((column & alive).sum())} of {int(alive.sum())} particles at "
                    f"step {k} (s={float(s):.3g}); these particles lose their weight.",
                    stacklevel=4,
                )
        lost = bad.any(1)
        if not (alive & ~lost).any():
            broken = " and ".join(str(model) for model, column in zip(models, bad.unbind(1), strict=True) if column.any())
            check_finite(D, f"{broken} gave", k, f"s={float(s):.3g}")
        population.reweight(torch.where(lost, float("nan"), 0.0))
        D = torch.where(bad.reshape(bad.shape + (1,) * (D.ndim - 2)), 0.0, D)
    return D


# ------------------------------------------------------------------------------------------------------------------- details


def _through(scheduler, model, n, steps, batch_size, generator, progress) -> Tensor:
    """A diffusers scheduler's own loop, in its own coordinates."""
    import inspect

    from sculpt.diffusion.unet import DenoiserUNet

    if not hasattr(scheduler, "set_timesteps"):
        raise TypeError(f"solver is a diffusers scheduler, e.g. DPMSolverMultistepScheduler(); got {scheduler!r}.")
    pixels = model.autoencoder is None and len(model.shape) == 3
    off = {} if pixels else {name: False for name in ("clip_sample", "thresholding") if name in scheduler.config}
    # A copy: multistep solvers carry state. Clipping to [-1, 1] is for pixels and would falsify anything else.
    scheduler = type(scheduler).from_config(scheduler.config, **off)
    scheduler.set_timesteps(steps, device=model.device)
    unet = DenoiserUNet(model, scheduler)
    x = randn((n, *model.shape), generator, torch.empty((), device=model.device)) * getattr(scheduler, "init_noise_sigma", 1.0)
    if hasattr(scheduler, "step_pred"):
        raise ValueError(
            f"{type(scheduler).__name__} has no plain step(); it can be the training scheduler but not the solver."
        )
    takes_generator = "generator" in inspect.signature(scheduler.step).parameters
    options = {"generator": generator} if takes_generator else {}
    for k, t in enumerate(track_progress(scheduler.timesteps, f"sampling {model}", progress, pairs=False)):
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        output = chunked(lambda part, t=t: unet(part, t).sample, scaled, batch_size)
        check_finite(output, f"{model} gave", k, f"t={float(t):.3g}")
        x = scheduler.step(output, t, x, **options).prev_sample
    return x


def chunked(function: Callable, z: Tensor, batch_size: int | None):
    """A network over a population in parts that fit; the population stays one."""
    batch_size = max(1, 2**19 // math.prod(z.shape[1:])) if batch_size is None else batch_size
    if batch_size < 1:
        raise ValueError(f"batch_size has to be at least 1, got {batch_size}.")
    parts = [function(part) for part in z.split(batch_size)]
    if isinstance(parts[0], tuple):
        return tuple(torch.cat(column) for column in zip(*parts, strict=True))
    return torch.cat(parts)


def track_progress(levels: Tensor, description: str, progress: bool, pairs: bool = True):
    """Each level with the next one, ``None`` after the last, and a bar once it takes longer than two seconds."""
    from tqdm.auto import tqdm

    steps = list(itertools.zip_longest(levels, levels[1:])) if pairs else list(levels)
    return tqdm(steps, desc=description, disable=not progress, delay=2, leave=False)


def population_size(n: int, particles: int | None, shape: Sequence[int], *, small: int, large: int) -> int:
    """The number of particles: the caller's, or at least ``small`` in few dimensions and ``large`` in many."""
    if particles is None:
        return max(n, small if math.prod(shape) <= 64 else large)
    if particles < n:
        raise ValueError(f"A population of particles={particles} cannot give n={n} samples. Pass particles of at least n.")
    return particles


def check_count(n: int) -> None:
    if n < 1:
        raise ValueError(f"The number of samples has to be at least 1, got n={n}.")


def check_finite(D: Tensor, what: str, k: int, where: str) -> None:
    if not D.isfinite().all():
        rows = int((~D.isfinite().flatten(1).all(1)).sum())
        raise FloatingPointError(
            f"{what} numbers that are not finite for {rows} of {len(D)} samples at step {k} ({where}). "
            "Check the network's weights and dtype (float16 overflows early), and that its scheduler is the one it was trained with."
        )


def inner(x: Float[Tensor, "N *x"], y: Float[Tensor, "N *x"]) -> Float[Tensor, "N"]:
    return (x * y).flatten(1).sum(1)


def _per_sample(c: Tensor, z: Tensor) -> Tensor:
    return c.to(z.dtype).reshape(c.shape + (1,) * (z.ndim - c.ndim)) if c.ndim else c.to(z.dtype)


def _refuse_correction(model: Denoiser, solver: Any) -> None:
    if not isinstance(model, Guided):
        raise ValueError("correct=True corrects guided sampling; this model has no classifier.")
    if solver is not None:
        raise ValueError(
            f"correct=True needs the solver's own Gaussian kernel, and {type(solver).__name__} gives none "
            "(a deterministic solver has no density at all). Leave solver out."
        )
    raise ValueError(
        "Only the anchored form can be corrected: the mixture form has no base chain to weigh against. Use form='anchored'."
    )
