"""The roads on diffusion models: every one against the exact target, and against one another."""

import functools
import itertools
import math

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers_models import Exact, exact_model, scheduler_of, three_rings
from oracles import ExactGuide, GaussianMixture, Grid
from torch import nn

import sculpt
from sculpt import Classifier, Guided, Rejection, Tracked
from sculpt.diffusion.backbones import ImageNetwork, VectorNetwork
from sculpt.diffusion.clock import DATA_SCALE, noise_levels, spread
from sculpt.diffusion.denoiser import GuidedDenoiser
from sculpt.formula import Mixture, Nested, Posterior, Product

RINGS = three_rings()
P, Q, R = MODELS = [exact_model(mixture, name=name) for mixture, name in zip(RINGS, "pqr", strict=True)]
GRID = Grid(4.0, n=14, refine=14)
N = 2000


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def log_densities(x):
    return torch.stack([mixture.log_prob(x) for mixture in RINGS[:2]], -1)


@functools.cache
def exact_target(formula, mixtures, n):
    masses, log_z = GRID.exact(formula, mixtures[: formula.m])
    return masses, log_z, GRID.floor(masses, n)


def over_floor(formula, x, mixtures=RINGS):
    """Total variation from the exact target, over the mean one of as many draws from an exact sampler; and the exact log Z."""
    masses, log_z, floor = exact_target(formula, tuple(mixtures), len(x))
    return GRID.total_variation(x, masses) / floor, log_z


def nested(outer):
    """An outer formula over (p & q, r), normalised exactly."""
    inner = Posterior(2, (0, 1))
    return Nested(outer, [inner, Mixture([1.0])], [(0, 1), (2,)], [GRID.exact(inner, RINGS[:2])[1], 0.0])


class Wrong(ExactGuide):
    """Exact at the end and nowhere else: at twice the noise, tempered, and shifted."""

    def log_h(self, z, s, *, labels, odds=None):
        return 0.5 * super().log_h(z + 0.2, 2 * s, labels=labels, odds=odds) - 0.3

    def marginal(self, z, s):
        return super().marginal(z, 2 * s)


# Tracked densities --------------------------------------------------------------------------------------------------------------------


# An exact sampler's own error has a relative spread of about 5 % here; the bounds are about 1.2 times what several seeds measure.
@pytest.mark.parametrize(
    ("composition", "formula", "steps", "bound", "log_z_bound"),
    [
        (P | Q, Mixture([1, 1]), 64, 1.3, 1e-4),
        (sculpt.mixture(P, Q, weights=[1, 4]), Mixture([1, 4]), 64, 1.3, 1e-4),
        (P & Q, Posterior(2, (0, 1)), 64, 1.4, 0.08),
        (sculpt.harmonic_mean(P, Q, 0.8), Posterior(2, (0, 1), [0.8, 0.2]), 64, 1.4, 0.08),
        (P - Q, Posterior(2, (0, 0)), 128, 1.5, 0.08),
        (P & Q & R, Posterior(3, (0, 1, 2)), 128, 1.5, 0.08),
        (sculpt.posterior([P, Q, R], (0, 2, 2), [1, 2, 3]), Posterior(3, (0, 2, 2), [1, 2, 3]), 128, 1.5, 0.08),
        (sculpt.posterior([P, Q], (1,)), Posterior(2, (1,)), 64, 1.4, 0.08),
        ((P & Q) - R, nested(Posterior(2, (0, 0))), 128, 1.5, 0.12),
        ((P & Q) | R, nested(Mixture([1, 1])), 64, 1.4, 1e-4),
        (sculpt.power_mean([P, Q], -2), None, 128, 1.5, 0.08),
        (sculpt.power_mean([P, Q], 0.5), None, 128, 1.5, 0.08),
    ],
    ids=str,
)
def test_tracked_densities_sample_the_composition(composition, formula, steps, bound, log_z_bound):
    road = None if isinstance(composition.formula, Mixture) else Tracked(particles=N)
    samples = composition.sample(N, road, steps=steps, generator=generator(1), progress=False)
    ratio, log_z = over_floor(formula or composition.formula, samples.x)
    assert samples.x.shape == (N, 2) and samples.x.dtype == torch.float32
    assert ratio < bound
    assert abs(samples.log_z - log_z) < log_z_bound + 3 * samples.diagnostics.log_z_error


@pytest.mark.parametrize(
    "composition", [sculpt.product([P, Q], [1, 1]), sculpt.product([P], [1.5]), sculpt.product([P, Q], [1, -0.3])], ids=str
)
def test_tracked_densities_sample_products_too_with_an_honest_error_of_log_z(composition):
    samples = composition.sample(N, Tracked(particles=N), steps=192, generator=generator(1), progress=False)
    ratio, log_z = over_floor(composition.formula, samples.x)
    assert ratio < 1.9
    assert abs(samples.log_z - log_z) < 0.3 + 3 * samples.diagnostics.log_z_error


def test_the_other_composition_of_the_same_models_would_fail_these_bounds():
    x = (P - Q).sample(N, Tracked(particles=N), steps=64, generator=generator(), progress=False).x
    others = [
        Posterior(2, (0, 1)),
        Posterior(2, (0,)),
        Posterior(2, (1, 1)),
        Posterior(2, (0, 0), [1, 9]),
        Posterior(2, (0, 0, 0)),
    ]
    for wrong in others:
        assert over_floor(wrong, x)[0] > 1.55, wrong
    assert over_floor(Posterior(2, (0, 0)), x)[0] < 1.4


def test_weighted_particles_without_resampling_are_the_same_distribution():
    samples = (P & Q).sample(100, Tracked(particles=N, resample=False), steps=64, generator=generator(), progress=False)
    assert len(samples) == N and samples.log_weights.shape == (N,)
    masses, _ = GRID.exact(Posterior(2, (0, 1)), RINGS[:2])
    w = samples.log_weights.exp()
    assert float(w.sum()) == pytest.approx(1)
    cells = ((samples.x.double() + GRID.half_width) / (2 * GRID.half_width) * GRID.n).floor().long()
    shares = torch.zeros(GRID.n**2 + 1, dtype=torch.float64)
    inside = ((cells >= 0) & (cells < GRID.n)).all(-1)
    shares.index_add_(0, torch.where(inside, cells[:, 0] * GRID.n + cells[:, 1], GRID.n**2), w)
    effective = int(1 / (w**2).sum())
    assert 0.5 * float((shares[:-1] - masses).abs().sum() + shares[-1]) < 1.3 * GRID.floor(masses, effective)


# Guided: the exact h --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("composition", "options", "bound"),
    [
        (P & Q, {}, 1.3),
        (P & Q, {"form": "mixture"}, 1.3),
        (P & Q, {"anchor": 1}, 1.3),
        (P - Q, {}, 1.3),
        (P & Q & R, {}, 1.3),
        (P & Q & R, {"anchor": R}, 1.3),
        (P - Q - R, {}, 1.3),
        (sculpt.harmonic_mean(P, Q, 0.15), {}, 1.3),
        (sculpt.posterior([P, Q, R], (1, 0, 0), [3, 1, 2]), {"correct": True, "particles": N}, 1.5),
    ],
    ids=str,
)
def test_guided_by_the_exact_classifier_samples_the_composition(composition, options, bound):
    exact = ExactGuide(RINGS[: len(composition.models)], [model.key for model in MODELS[: len(composition.models)]])
    samples = composition.sample(N, Guided(exact, **options), steps=32, generator=generator(2), progress=False)
    ratio, log_z = over_floor(composition.formula, samples.x)
    assert ratio < bound
    if options.get("form") != "mixture":
        # h is a martingale of the exact chain: the weights stay even but for the discretisation, and their mean is Z.
        assert abs(samples.log_z - log_z) < 0.05 + 3 * samples.diagnostics.log_z_error
        assert samples.diagnostics.acceptance == pytest.approx(math.exp(samples.log_z), rel=1.0)
        assert samples.verdict.level == "sound"


@pytest.mark.parametrize("label", [0, 1, 2])
def test_log_z_does_not_depend_on_the_anchor(label):
    odds, mixtures = [5.0, 2.0, 1.0], RINGS
    composition = sculpt.posterior(MODELS, (0, 1, 2), odds)
    log_z = GRID.exact(composition.formula, mixtures)[1]
    guided = composition.sample(
        1000, Guided(ExactGuide(mixtures), anchor=label), steps=32, generator=generator(), progress=False
    )
    assert guided.log_z == pytest.approx(log_z, abs=0.05 + 3 * guided.diagnostics.log_z_error)
    terminal = lambda x: torch.stack([mixture.log_prob(x) for mixture in mixtures], -1)  # noqa: E731
    rejected = composition.sample(500, Rejection(terminal, anchor=label), generator=generator(), progress=False)
    assert rejected.log_z == pytest.approx(log_z, abs=0.05 + 4 * rejected.diagnostics.log_z_error)


@pytest.mark.parametrize(
    ("labels", "odds"), [((0, 1), None), ((0, 0), None), ((1, 0, 2), (0.2, 0.5, 0.3)), ((2, 2, 2, 0), None)]
)
@pytest.mark.parametrize("s", [0.02, 0.3, 2.0, 40.0])
def test_the_mixture_form_and_every_anchored_form_are_the_same_denoiser_for_the_exact_classifier(labels, odds, s):
    exact, z = ExactGuide(RINGS), RINGS[0].draw(50, generator(), v=s**2)
    s = torch.tensor(s, dtype=torch.float64)
    # The mixture form in the thesis is for equal odds of y1 as well: its prior is uniform in y1, and odds only rescale h.
    forms = [GuidedDenoiser(Posterior(3, order, odds), MODELS, exact) for order in set(itertools.permutations(labels))]
    forms += [GuidedDenoiser(Posterior(3, labels, odds), MODELS, exact, form="mixture")]
    D = [form.denoise(z, s) for form in forms]
    # and it is the score of the target's own marginal, from the martingale: D = z + v ∇ log (q_i h)
    y = z.clone().requires_grad_()
    log_target = RINGS[labels[0]].log_prob(y, s**2) + exact.log_h(y, s, labels=labels, odds=odds)
    (score,) = torch.autograd.grad(log_target.sum(), y)
    for other in D:
        torch.testing.assert_close(other, z + s**2 * score, rtol=1e-5, atol=1e-5)


# The thesis's general theorem ----------------------------------------------------------------------------------------------------------


class Path:
    r"""A Gaussian path in its own time: forward SDE dx = f x dt + g dw, with :math:`f = \dot\alpha/\alpha`, :math:`g^2 = \alpha^2 \dot{(s^2)}`."""

    def __init__(self, alpha, sigma):
        self.alpha, self.sigma = alpha, sigma

    def level(self, t):
        return self.sigma(t) / self.alpha(t)

    def fg(self, t):
        t = t.detach().requires_grad_()
        (f,) = torch.autograd.grad(self.alpha(t).log(), t)
        t = t.detach().requires_grad_()
        (dv,) = torch.autograd.grad((self.sigma(t) / self.alpha(t)) ** 2, t)
        return f, self.alpha(t.detach()) * dv.sqrt()

    def log_prob(self, mixture, x, t):
        alpha = self.alpha(t)
        return mixture.log_prob(x / alpha, (self.sigma(t) / alpha) ** 2) - mixture.d * alpha.log()

    def score(self, mixture, x, t):
        alpha = self.alpha(t)
        return mixture.score(x / alpha, (self.sigma(t) / alpha) ** 2) / alpha


PRESERVING = Path(lambda t: (-5 * t**2 - 0.05 * t).exp(), lambda t: (1 - (-10 * t**2 - 0.1 * t).exp()).sqrt())  # linear beta
FLOW = Path(lambda t: 1 - t, lambda t: t)


def test_the_general_theorem_is_the_continuity_equation_of_a_mixture_of_different_processes():
    # p_t = Σ ω_i p_i,t with base models on different paths moves with u = Σ p(y=i | x, t) (f_i x - ½ g_i² ∇ log p_i,t).
    mixtures = [GaussianMixture([[-1.0], [0.5]], 0.2), GaussianMixture([[1.2]], 0.3)]
    paths, omega = [PRESERVING, FLOW], torch.tensor([0.3, 0.7], dtype=torch.float64)
    x = torch.linspace(-3, 3, 41, dtype=torch.float64)[:, None]

    def density(x, t):
        return sum(w * path.log_prob(mixture, x, t).exp() for w, path, mixture in zip(omega, paths, mixtures, strict=True))

    def flux(x, t):
        total = 0
        for w, path, mixture in zip(omega, paths, mixtures, strict=True):
            f, g = path.fg(t)
            u = f * x - g**2 / 2 * path.score(mixture, x, t)
            total = total + w * path.log_prob(mixture, x, t).exp() * u[:, 0]  # p_t · p(y=i | x, t) = ω_i p_i,t
        return total

    for t in (0.1, 0.4, 0.8):
        t, h = torch.tensor(t, dtype=torch.float64), 1e-5
        change = (density(x, t + h) - density(x, t - h)) / (2 * h)
        divergence = (flux(x + h, t) - flux(x - h, t)) / (2 * h)
        torch.testing.assert_close(change, -divergence, rtol=0, atol=1e-6)


@pytest.mark.parametrize("first", [PRESERVING, FLOW])
@pytest.mark.parametrize("labels", [(0, 1), (0, 0)])
def test_the_general_theorem_in_any_models_own_coordinates_is_the_canonical_step(first, labels):
    # Bring model 2 to the first one's path: τ(t) with equal s, x' = c x with c = α₁(t)/α₂(τ). Its SDE is then
    # f' = ċ/c + τ̇ f₂, g' = c √τ̇ g₂, and the theorem's reverse drift Σ p(y₁=i|x) (f_i x - g_i² ∇log p_i) - g² ∇log p(y|x).
    second = FLOW if first is PRESERVING else PRESERVING
    exact, kinds = ExactGuide(RINGS[:2]), ("linear", "flow")
    models = [exact_model(mixture, kind, name=kind) for mixture, kind in zip(RINGS[:2], kinds, strict=True)]
    guided = GuidedDenoiser(Posterior(2, labels), models, exact)
    for t in (0.2, 0.5, 0.8):
        t = torch.tensor(t, dtype=torch.float64)
        low, high = torch.tensor([1e-6, 1 - 1e-9], dtype=torch.float64)

        def tau(t, low=low, high=high):
            for _ in range(200):
                middle = (low + high) / 2
                low, high = (middle, high) if second.level(middle) < first.level(t) else (low, middle)
            return (low + high) / 2

        h = 1e-6
        c = [first.alpha(u) / second.alpha(tau(u)) for u in (t - h, t, t + h)]
        tau_dot, log_c_dot = (tau(t + h) - tau(t - h)) / (2 * h), (c[2].log() - c[0].log()) / (2 * h)
        (f1, g1), (f2, g2) = first.fg(t), second.fg(tau(t))
        transformed = log_c_dot + tau_dot * f2, c[1] * tau_dot.sqrt() * g2
        torch.testing.assert_close(torch.stack(transformed), torch.stack([f1, g1]), rtol=1e-5, atol=1e-6)

        s = first.level(t)
        z = RINGS[0].draw(20, generator(), v=float(s) ** 2)
        x = (first.alpha(t) * z).requires_grad_()
        fs, gs = (f1, transformed[0]), (g1, transformed[1])
        scores = first.score(RINGS[0], x, t), second.score(RINGS[1], x / c[1], tau(t)) / c[1]
        p = exact.marginal(x / first.alpha(t), s).exp()
        log_y = exact.marginal(x / first.alpha(t), s)[:, labels[0]] + exact.log_h(x / first.alpha(t), s, labels=labels)
        (guidance,) = torch.autograd.grad(log_y.sum(), x, retain_graph=True)
        drift = sum(p[:, i : i + 1] * (fs[i] * x - gs[i] ** 2 * scores[i]) for i in range(2)) - g1**2 * guidance
        # The canonical step: dz = -S dv, S = (D - z)/v, and dx = (α̇/α) x dt + α dz.
        S = (guided.denoise(z, s) - z) / s**2
        canonical = f1 * x - first.alpha(t) * S * (g1 / first.alpha(t)) ** 2
        torch.testing.assert_close(drift.detach(), canonical.detach(), rtol=1e-4, atol=1e-4 * float(drift.detach().abs().max()))


# Correction -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("composition", [P & Q, P - Q], ids=str)
def test_corrected_guidance_is_exact_whatever_h_is_on_the_way(composition):
    formula, wrong = composition.formula, Wrong(RINGS[:2])
    options = {"steps": 32, "generator": generator(3), "progress": False}
    plain = composition.sample(N, wrong, **options)
    corrected = composition.sample(N, Guided(wrong, correct=True, particles=2 * N), **options)
    (biased, log_z), (ratio, _) = over_floor(formula, plain.x), over_floor(formula, corrected.x)
    assert biased > 1.6, "the wrong h is not wrong enough for this test"
    assert ratio < 1.5
    assert abs(corrected.log_z - log_z) < 0.05 + 3 * corrected.diagnostics.log_z_error


@pytest.mark.parametrize("strength", [0.5, 1.5])
def test_corrected_guidance_is_exact_at_any_strength(strength):
    formula, options = (P & Q).formula, {"steps": 32, "generator": generator(3), "progress": False}
    plain = (P & Q).sample(N, Guided(GUIDE, strength=strength), **options)
    corrected = (P & Q).sample(N, Guided(GUIDE, strength=strength, correct=True, particles=2 * N), **options)
    (biased, log_z), (ratio, _) = over_floor(formula, plain.x), over_floor(formula, corrected.x)
    assert biased > 1.6, "the strength distorts too little for this test"
    assert ratio < 1.5
    assert abs(corrected.log_z - log_z) < 0.05 + 3 * corrected.diagnostics.log_z_error


@pytest.mark.parametrize("form", ["anchored", "mixture"])
def test_strength_multiplies_what_guidance_adds(form):
    z, s = torch.randn(5, 2, generator=generator()), torch.tensor(0.8, dtype=torch.float64)
    none, plain, double = ((P & Q).guided(Guided(GUIDE, form=form, strength=g)) for g in (0, 1, 2))
    torch.testing.assert_close(double.denoise(z, s) - none.denoise(z, s), 2 * (plain.denoise(z, s) - none.denoise(z, s)))
    if form == "anchored":
        torch.testing.assert_close(none.denoise(z, s), P.denoise(z, s))
    assert plain.key == (P & Q).guided(Guided(GUIDE, form=form)).key != double.key
    unet = (P & Q).as_unet(Guided(GUIDE, form=form, strength=2), scheduler_of("linear"))
    assert unet.denoiser.key == double.key


def test_corrected_weights_without_resampling_average_to_z_and_the_target():
    wrong = Wrong(RINGS[:2])
    road = Guided(wrong, correct=True, particles=N, resample=False)
    samples = (P & Q).sample(10, road, steps=32, generator=generator(), progress=False)
    w = samples.log_weights.exp()
    mass, log_z = GRID.exact(Posterior(2, (0, 1)), RINGS[:2])
    log_p = Posterior(2, (0, 1)).value(log_densities(GRID.points)) + math.log(GRID.area) - log_z
    mean = log_p.exp() @ GRID.points
    spread = (w[:, None] ** 2 * (samples.x - mean) ** 2).sum(0).sqrt()
    assert (((w[:, None] * samples.x).sum(0) - mean).abs() < 4 * spread + 0.02).all()


# Rejection ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("composition", [P & Q, P - Q, sculpt.harmonic_mean(P, Q, 0.2), P | Q], ids=str)
@pytest.mark.parametrize("by", ["densities", "classifier"])
def test_rejection_is_the_floor(composition, by):
    referee = log_densities if by == "densities" else ExactGuide(RINGS[:2], [P.key, Q.key])
    samples = composition.sample(N, Rejection(referee), generator=generator(), progress=False, steps=64)
    ratio, log_z = over_floor(composition.formula, samples.x)
    assert len(samples) == N and ratio < 1.25
    assert abs(samples.log_z - log_z) < 0.03 + 4 * (samples.diagnostics.log_z_error or 0)


@pytest.mark.parametrize("by", ["densities", "classifier"])
@pytest.mark.parametrize("where", ["first", "second", "turned round", "to draw from"])
def test_rejection_of_nested_posteriors(where, by):
    inner, z = Posterior(2, (0, 1)), GRID.exact(Posterior(2, (0, 1)), RINGS[:2])[1]
    alone, indices = Mixture([1.0]), [(2,), (0, 1)]
    composition, formula = {
        "first": ((P & Q) - R, nested(Posterior(2, (0, 0)))),
        "second": (R - (P & Q), Nested(Posterior(2, (0, 0)), [alone, inner], indices, [0.0, z])),
        "turned round": (sculpt.harmonic_mean(R, Q & P), Nested(Posterior(2, (0, 1)), [alone, inner], indices, [0.0, z])),
        "to draw from": (sculpt.posterior([R, Q & P], (1, 0)), Nested(Posterior(2, (1, 0)), [alone, inner], indices, [0.0, z])),
    }[where]
    leaves = [{"p": RINGS[0], "q": RINGS[1], "r": RINGS[2]}[str(leaf)] for leaf in composition.leaves]
    # A classifier's labels have an order of their own.
    referee = ExactGuide(RINGS[::-1], [R.key, Q.key, P.key])
    if by == "densities":
        referee = lambda x: torch.stack([mixture.log_prob(x) for mixture in leaves], -1)  # noqa: E731
    samples = composition.sample(1000, Rejection(referee), generator=generator(1), progress=False, steps=48)
    ratio, log_z = over_floor(formula, samples.x)
    assert ratio < 1.35 and abs(samples.log_z - log_z) < 0.08


@pytest.mark.parametrize(
    ("labels", "odds", "best"),
    [
        ((0, 1), (1, 4, 2), 0),
        ((0, 1), (4, 1, 2), 1),
        ((0, 1, 2), (3, 2, 1), 2),
        ((2, 0, 0), (1, 5, 3), 0),
        ((1, 1, 2), (1, 5, 3), 2),
    ],
)
def test_rejection_draws_from_the_label_with_the_best_acceptance_which_goes_with_one_over_the_odds(labels, odds, best):
    models = [exact_model(mixture, name=name) for mixture, name in zip(RINGS, "pqr", strict=True)]
    composition = sculpt.posterior(models, labels, odds)
    log_densities = lambda x: torch.stack([mixture.log_prob(x) for mixture in RINGS], -1)  # noqa: E731
    n, rates = 600, {}
    for label in sorted(set(labels)):
        found = composition.sample(
            n, Rejection(log_densities, anchor=label), steps=24, generator=generator(label), progress=False
        )
        rates[label] = found.diagnostics.acceptance
        # Exactly: it is Z of the posterior that is written with this label first.
        exact = math.exp(GRID.exact(composition.anchored(label), RINGS)[1])
        assert rates[label] == pytest.approx(exact, rel=5 * math.sqrt(1 / n) + 0.02)
        assert exact * odds[label] == pytest.approx(math.exp(GRID.exact(composition.formula, RINGS)[1]) * odds[labels[0]])
    assert max(rates, key=rates.get) == best
    calls = [Calls(model.model) for model in models]
    composition.sample(n, Rejection(log_densities), steps=24, generator=generator(), progress=False)
    assert [call.forward > 0 for call in calls] == [i == best for i in range(3)]


def test_rejection_refuses_what_no_base_model_covers_and_gives_up_in_time():
    with pytest.raises(ValueError, match="Rejection needs a density .* is a product"):
        sculpt.product([P, Q], [1, 1]).sample(5, Rejection(log_densities))
    with pytest.raises(ValueError, match=r"Rejection needs a density .* M\[r=2\]\(p, q\) is a powermean"):
        (sculpt.power_mean([P, Q], 2) & R).sample(5, Rejection(log_densities))
    far = exact_model(GaussianMixture([[60.0, 0.0]], 0.1), name="far")

    def referee(x):
        return torch.stack([RINGS[0].log_prob(x), far.model.mixture.log_prob(x)], -1)

    with pytest.raises(RuntimeError, match="kept 0 of .* draws from .*, 5 were asked for"):
        (P & far).sample(5, Rejection(referee, max_draws=500), generator=generator(), progress=False, steps=8)


# Reproducible, in chunks, of any dtype --------------------------------------------------------------------------------------------------

GUIDE = ExactGuide(RINGS[:2], [P.key, Q.key])
ROADS = {
    "base": (P, None),
    "mixture": (P | Q, None),
    "guided": (P & Q, GUIDE),
    "mixture form": (P & Q, Guided(GUIDE, form="mixture")),
    "corrected": (P & Q, Guided(GUIDE, correct=True, particles=40)),
    "tracked": (P - Q, Tracked(particles=40)),
    "nested": ((P & Q) - R, Tracked(particles=40)),
    "solver": (P & Q, GUIDE),
    "rejection": (P & Q, Rejection(GUIDE)),
}


def sampled(road, generator, **options):
    model, way = ROADS[road]
    solver = scheduler_of("linear") if road == "solver" else None
    return model.sample(30, way, steps=8, solver=solver, generator=generator, progress=False, **options)


@pytest.mark.parametrize("road", ROADS)
def test_the_same_seed_gives_the_same_samples_and_another_others(road):
    one, two, three = (sampled(road, generator(seed)) for seed in (5, 5, 6))
    assert torch.equal(one.x, two.x) and not torch.equal(one.x, three.x) and one.log_z == two.log_z
    torch.manual_seed(3)
    four = sampled(road, None)
    torch.manual_seed(3)
    assert torch.equal(four.x, sampled(road, None).x)


@pytest.mark.parametrize("road", [road for road in ROADS if road != "rejection"])
def test_samples_do_not_depend_on_how_the_batch_is_cut(road):
    whole = sampled(road, generator(5))
    for batch_size in (11, 1000):
        parts = sampled(road, generator(5), batch_size=batch_size)
        torch.testing.assert_close(parts.x, whole.x, rtol=1e-4, atol=1e-5)
        assert parts.diagnostics.ess == pytest.approx(whole.diagnostics.ess, rel=1e-5)


def test_chunks_bound_what_goes_through_a_network_at_once():
    seen = []
    counted = exact_model(RINGS[0], name="p")
    counted.model.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    (counted - Q).sample(30, Tracked(particles=40), steps=4, batch_size=16, progress=False)
    (counted & Q).sample(30, GUIDE, steps=4, batch_size=16, progress=False)
    assert max(seen) == 16


class Linear(nn.Module):
    """A small network with weights, so that it has a dtype."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.Sequential(nn.Linear(3, 16), nn.SiLU(), nn.Linear(16, 2))

    def forward(self, x, t):
        assert x.dtype == self.layers[0].weight.dtype
        return self.layers(torch.cat([x, (t / 1000).to(x.dtype).expand(len(x))[:, None]], -1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_networks_of_half_precision_are_stepped_in_float32(dtype):
    models = [sculpt.Diffusion(Linear(seed).to(dtype), DDPMScheduler(), (2,), name=f"net{seed}") for seed in (0, 1)]
    full = [sculpt.Diffusion(Linear(seed), DDPMScheduler(), (2,), name=f"net{seed}") for seed in (0, 1)]
    torch.manual_seed(0)
    classifier = Classifier(VectorNetwork(2, width=16), [model.key for model in models], 2).eval().requires_grad_(False)
    reference = Classifier(VectorNetwork(2, width=16), [model.key for model in full], 2).eval().requires_grad_(False)
    reference.load_state_dict(classifier.state_dict())
    for run in (
        lambda models, c: (models[0] & models[1]).sample(20, c, steps=8, generator=generator(), progress=False),
        lambda models, c: (models[0] | models[1]).sample(20, steps=8, generator=generator(), progress=False),
    ):
        half, whole = run(models, classifier), run(full, reference)
        assert half.x.dtype == torch.float32
        scale = whole.x.abs().max()  # untrained networks send samples far: compared in their own size
        torch.testing.assert_close(half.x / scale, whole.x / scale, rtol=0, atol=0.05)
    tracked = (models[0] & models[1]).sample(20, Tracked(particles=40), steps=8, generator=generator(), progress=False)
    assert tracked.x.dtype == torch.float32 and tracked.x.isfinite().all() and math.isfinite(tracked.log_z)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_classifier_of_half_precision_guides_too(dtype):
    torch.manual_seed(0)
    classifier = Classifier(VectorNetwork(2, width=16), [P.key, Q.key], 2).eval().requires_grad_(False)
    whole = (P & Q).sample(20, classifier, steps=8, generator=generator(), progress=False).x
    half = (P & Q).sample(20, classifier.to(dtype), steps=8, generator=generator(), progress=False).x
    torch.testing.assert_close(half, whole, rtol=0, atol=0.2)
    torch.manual_seed(0)
    images = ImageNetwork((1, 8, 8), channels=(8, 16), width=24).to(dtype)
    assert images(torch.randn(2, 1, 8, 8), torch.tensor(1.0, dtype=torch.float64)).isfinite().all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_generator_on_the_cpu_gives_the_same_samples_on_a_gpu():
    gpu = [
        sculpt.Diffusion(Exact(mixture.cuda(), scheduler_of("linear")).cuda(), scheduler_of("linear"), (2,), name=name)
        for mixture, name in zip(three_rings(), "pqr", strict=True)
    ]
    torch.manual_seed(0)
    classifier = Classifier(VectorNetwork(2, width=16), [P.key, Q.key], 2).eval().requires_grad_(False)
    on_gpu = Classifier(VectorNetwork(2, width=16), [gpu[0].key, gpu[1].key], 2).eval().requires_grad_(False)
    on_gpu.load_state_dict(classifier.state_dict())
    on_gpu.cuda()
    for cpu_run, gpu_run in (
        (lambda g: P.sample(40, steps=8, generator=g), lambda g: gpu[0].sample(40, steps=8, generator=g)),
        (
            lambda g: (P & Q).sample(40, Guided(classifier, correct=True, particles=40), steps=8, generator=g),
            lambda g: (gpu[0] & gpu[1]).sample(40, Guided(on_gpu, correct=True, particles=40), steps=8, generator=g),
        ),
        (
            lambda g: (P - Q).sample(40, Tracked(particles=40), steps=8, generator=g),
            lambda g: (gpu[0] - gpu[1]).sample(40, Tracked(particles=40), steps=8, generator=g),
        ),
        (lambda g: (P | Q).sample(40, steps=8, generator=g), lambda g: (gpu[0] | gpu[1]).sample(40, steps=8, generator=g)),
    ):
        one, other = cpu_run(generator(4)).x, gpu_run(generator(4)).x
        assert other.device.type == "cuda"
        # Rounding may tip one resampling stride over; all other samples agree.
        assert ((one - other.cpu()).abs().amax(-1) < 1e-2).double().mean() > 0.9
        assert gpu_run(torch.Generator("cuda").manual_seed(0)).x.isfinite().all()


# Any number of models and observations ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_five_models_and_four_observations_on_every_road():
    mixtures = [GaussianMixture([[0.5 * math.cos(i), 0.5 * math.sin(i)]], 0.3 + 0.05 * i) for i in range(5)]
    models = [exact_model(mixture, name=f"p{i}") for i, mixture in enumerate(mixtures)]
    composition = sculpt.posterior(models, (3, 0, 3, 4), [1, 2, 3, 4, 5])
    exact = ExactGuide(mixtures, [model.key for model in models])
    n, options = 1000, {"generator": generator(1), "progress": False}
    runs = {
        "guided": composition.sample(n, exact, steps=32, **options),
        "corrected": composition.sample(n, Guided(exact, correct=True, particles=n), steps=32, **options),
        "tracked": composition.sample(n, Tracked(particles=n), steps=64, **options),
        "rejection": composition.sample(n, Rejection(exact), steps=32, **options),
    }
    for name, samples in runs.items():
        ratio, log_z = over_floor(composition.formula, samples.x, mixtures)
        assert ratio < 1.5, name
        assert abs(samples.log_z - log_z) < 0.08 + 4 * samples.diagnostics.log_z_error, name


KINDS = ("linear", "cosine", "flow")
MIXED = [exact_model(mixture, kind, name=kind) for mixture, kind in zip(RINGS, KINDS, strict=True)]


def test_models_of_different_schedules_compose():
    guided = sculpt.posterior(MIXED, (2, 0)).sample(N, ExactGuide(RINGS), steps=32, generator=generator(), progress=False)
    assert over_floor(Posterior(3, (2, 0)), guided.x)[0] < 1.3
    tracked = sculpt.posterior(MIXED, (0, 1, 2)).sample(
        N, Tracked(particles=N), steps=64, generator=generator(), progress=False
    )
    assert over_floor(Posterior(3, (0, 1, 2)), tracked.x)[0] < 1.5


@pytest.mark.slow
def test_models_of_different_schedules_compose_with_the_error_of_one_schedule():
    formula = Posterior(3, (0, 1, 2))
    ratios = [
        sum(
            over_floor(
                formula,
                sculpt.posterior(models, (0, 1, 2))
                .sample(N, Tracked(particles=N), steps=64, generator=generator(k), progress=False)
                .x,
            )[0]
            for k in range(3)
        )
        / 3
        for models in (MODELS, MIXED)
    ]
    # Each mean of three errors knows itself to about 5 %.
    assert abs(ratios[0] - ratios[1]) < 0.2


# Solvers of diffusers ----------------------------------------------------------------------------------------------------------------------

LINEAR = scheduler_of("linear").config
SOLVERS = {
    "DPMSolverMultistep": lambda: diffusers.DPMSolverMultistepScheduler.from_config(LINEAR, use_karras_sigmas=True),
    "SDE-DPMSolver": lambda: diffusers.DPMSolverMultistepScheduler.from_config(
        LINEAR, algorithm_type="sde-dpmsolver++", use_karras_sigmas=True
    ),
    "DDIM": lambda: DDIMScheduler.from_config(LINEAR),
    "EulerDiscrete": lambda: diffusers.EulerDiscreteScheduler.from_config(LINEAR, use_karras_sigmas=True),
    "HeunDiscrete": lambda: diffusers.HeunDiscreteScheduler.from_config(LINEAR, use_karras_sigmas=True),
    "UniPCMultistep": lambda: diffusers.UniPCMultistepScheduler.from_config(LINEAR, use_karras_sigmas=True),
    "FlowMatchEuler": lambda: diffusers.FlowMatchEulerDiscreteScheduler(),
}


@pytest.mark.parametrize(
    ("solver", "steps", "bound"),
    [
        ("DPMSolverMultistep", 25, 1.4),
        ("SDE-DPMSolver", 25, 2.0),
        ("DDIM", 50, 2.0),
        ("EulerDiscrete", 50, 1.8),
        ("HeunDiscrete", 25, 1.4),
        ("UniPCMultistep", 25, 1.4),
        ("FlowMatchEuler", 50, 2.0),
    ],
)
def test_a_solver_of_diffusers_samples_the_guided_composition(solver, steps, bound):
    samples = (P & Q).sample(1000, GUIDE, solver=SOLVERS[solver](), steps=steps, generator=generator(), progress=False)
    assert over_floor(Posterior(2, (0, 1)), samples.x)[0] < bound


def test_a_solver_is_not_changed_by_a_run_and_may_serve_again():
    solver = SOLVERS["DPMSolverMultistep"]()
    before = dict(solver.config)
    runs = [(P & Q).sample(10, GUIDE, solver=solver, steps=8, generator=generator(), progress=False).x for _ in range(2)]
    assert torch.equal(*runs) and dict(solver.config) == before and solver.num_inference_steps is None


# Calls of the networks -----------------------------------------------------------------------------------------------------------------------


class Calls:
    """Counts forward passes of a module and backward passes through it."""

    def __init__(self, module):
        self.forward = self.backward = 0
        module.register_forward_hook(self._forward)

    def _forward(self, module, args, output):
        self.forward += 1
        if isinstance(output, torch.Tensor) and output.requires_grad:
            output.register_hook(lambda gradient: setattr(self, "backward", self.backward + 1))


@pytest.mark.parametrize("m", [2, 3, 5])
@pytest.mark.parametrize("correct", [False, True])
def test_an_anchored_step_calls_one_base_network_once_and_the_classifier_forward_and_backward(m, correct):
    models = [exact_model(GaussianMixture([[float(i), 0.0]], 1.0), name=f"p{i}") for i in range(m)]
    calls = [Calls(model.model) for model in models]
    torch.manual_seed(0)
    classifier = Classifier(VectorNetwork(2, width=8), [model.key for model in models], 2).eval().requires_grad_(False)
    backbone, steps = Calls(classifier.network), 9
    road = Guided(classifier, correct=correct, particles=16 if correct else None)
    sculpt.posterior(models, (1, 0)).sample(16, road, steps=steps, progress=False)
    assert [call.forward for call in calls] == [steps if i == 1 else 0 for i in range(m)]
    assert (backbone.forward, backbone.backward) == (steps + correct, steps)  # the terminal head has the last word


def test_a_tracked_step_calls_every_base_network_once():
    models = [exact_model(mixture, name=f"p{i}") for i, mixture in enumerate(RINGS)]
    calls = [Calls(model.model) for model in models]
    sculpt.posterior(models, (0, 1, 2)).sample(16, Tracked(particles=16), steps=9, progress=False)
    assert [call.forward for call in calls] == [9, 9, 9]


# As a UNet -------------------------------------------------------------------------------------------------------------------------------------


def test_as_unet_in_a_hand_written_loop_is_the_composition():
    scheduler = DDIMScheduler.from_config(LINEAR)
    scheduler.set_timesteps(50)
    unet = (P & Q).as_unet(GUIDE, scheduler)
    x = torch.randn(1000, 2, generator=generator())
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(unet(x, t).sample, t, x).prev_sample
    assert over_floor(Posterior(2, (0, 1)), x)[0] < 2.0
    through = (P & Q).sample(
        1000, GUIDE, solver=DDIMScheduler.from_config(LINEAR), steps=50, generator=generator(), progress=False
    )
    torch.testing.assert_close(x, through.x, rtol=1e-4, atol=1e-4)


def image_models():
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        unet = UNet2DModel(
            sample_size=8,
            in_channels=1,
            out_channels=1,
            block_out_channels=(8, 16),
            layers_per_block=1,
            norm_num_groups=4,
            **blocks,
        )
        models.append(sculpt.Diffusion(unet, DDPMScheduler(), name=f"unet{seed}"))
    torch.manual_seed(2)
    classifier = (
        Classifier(ImageNetwork((1, 8, 8), channels=(8, 16), width=24), [model.key for model in models], 2)
        .eval()
        .requires_grad_(False)
    )
    return models, classifier


def test_a_pipeline_of_diffusers_takes_the_composition_as_its_unet():
    (a, b), classifier = image_models()
    scheduler = DDPMScheduler()
    unet = (a & b).as_unet(classifier)
    images = DDPMPipeline(unet=unet, scheduler=scheduler)(
        batch_size=2, num_inference_steps=4, generator=generator(), output_type="np"
    ).images
    assert images.shape == (2, 8, 8, 1)
    g = generator()
    x = torch.randn(2, 1, 8, 8, generator=g)
    scheduler.set_timesteps(4)
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(unet(x, t).sample, t, x, generator=g).prev_sample
    torch.testing.assert_close(torch.from_numpy(images).permute(0, 3, 1, 2), (x / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-6)


def test_images_run_on_every_road_and_decode_to_zero_to_one():
    (a, b), classifier = image_models()
    for composition, road in (
        (a & b, classifier),
        (a - b, Guided(classifier, correct=True, particles=4)),
        (a & b, Tracked(particles=4)),
        (sculpt.product([a, b], [1, 0.5]), Tracked(particles=4)),
        (a & b, Rejection(classifier)),
    ):
        samples = composition.sample(2, road, steps=3, progress=False)
        image = samples.decode()
        assert samples.x.shape == (2, 1, 8, 8) and image.min() >= 0 and image.max() <= 1


# Nesting on the classifier road -------------------------------------------------------------------------------------------------------------------


def test_a_guided_composition_is_a_base_model_again():
    inner = (P & Q).guided(GUIDE)
    x = inner.sample(N, steps=32, generator=generator(), progress=False).x
    assert over_floor(Posterior(2, (0, 1)), x)[0] < 1.3
    assert str(inner - R) == "(p ⊗ q) ◑ r" and (inner - R).leaves == (inner, R)
    tracked = (inner - R).sample(1000, Tracked(particles=1000), steps=48, generator=generator(), progress=False)
    assert over_floor(nested(Posterior(2, (0, 0))), tracked.x)[0] < 1.6


def test_a_guided_composition_has_the_key_of_its_formula_models_and_classifier():
    torch.manual_seed(0)
    one, two = (Classifier(VectorNetwork(2, width=8), [P.key, Q.key], 2).eval() for _ in range(2))
    mixed = Guided(one, form="mixture")
    keys = [(P & Q).guided(one).key, (P & Q).guided(two).key, (P - Q).guided(one).key, (P & Q).guided(mixed).key]
    keys += [sculpt.harmonic_mean(P, Q, alpha).guided(GUIDE).key for alpha in (0.3, 0.3001)]
    assert len(set(keys)) == len(keys) and (P & Q).guided(one).key == keys[0]


@pytest.mark.slow
def test_a_second_classifier_over_samples_of_the_inner_composition_samples_the_nested_one():
    inner = (P & Q).guided(GUIDE)
    formula = nested(Posterior(2, (0, 1)))
    outer = sculpt.fit([inner, R], samples=10_000, sample_steps=32, steps=400, progress=False)
    plain = (inner & R).sample(N, outer, steps=32, generator=generator(), progress=False)
    exact = Guided(outer, correct=True, particles=2 * N)
    corrected = (inner & R).sample(N, exact, steps=32, generator=generator(), progress=False)
    assert over_floor(formula, plain.x)[0] < 2.5 and over_floor(formula, corrected.x)[0] < 1.8
    # The inner composition as it is, sampled by tracked densities for the training; anchored on r, which can be stepped.
    composition = sculpt.harmonic_mean(P & Q, R)
    second = sculpt.fit([P & Q, R], samples=10_000, sample_steps=64, steps=400, progress=False)
    anchored = composition.sample(N, Guided(second, anchor=R), steps=32, generator=generator(), progress=False)
    assert over_floor(formula, anchored.x)[0] < 2.5


# The clock ----------------------------------------------------------------------------------------------------------------------------------------


def test_noise_levels_fall_from_the_widest_to_the_least_common_level():
    mixed = [exact_model(RINGS[0], kind, name=kind) for kind in ("linear", "cosine", "flow")]
    levels = noise_levels(mixed, 40)
    assert len(levels) == 40 and (levels.diff() < 0).all()
    assert float(levels[0]) == pytest.approx(80.0) and float(levels[-1]) == pytest.approx(max(m.s_min for m in mixed))
    # Steps are shortest about the scale of the data.
    s = spread(torch.linspace(0, 1, 101, dtype=torch.float64), 0.01, 80.0)
    assert 0.6 * DATA_SCALE < float(s[s.log().diff().abs().argmin()]) < 1.6 * DATA_SCALE


def test_the_samplers_leave_no_gradient_and_no_training_mode_behind():
    torch.manual_seed(0)
    classifier = Classifier(VectorNetwork(2, width=8), [P.key, Q.key], 2)
    for parameter in classifier.parameters():
        assert parameter.grad is None
    samples = (P & Q).sample(4, classifier.eval(), steps=3, progress=False)
    assert not samples.x.requires_grad and all(parameter.grad is None for parameter in classifier.parameters())


def test_products_of_one_model_with_power_one_are_that_model():
    samples = sculpt.product([P], [1.0]).sample(N, Tracked(particles=N), steps=64, generator=generator(), progress=False)
    assert over_floor(Product([1.0]), samples.x)[0] < 1.3 and abs(samples.log_z) < 0.05
