"""Factors: likelihoods that multiply models, on every road, in both families, against quadrature, counting and closed forms."""

import functools
import math

import pytest
import torch
from diffusers_models import exact_model, three_rings
from fields import Fields
from oracles import ExactGuide, Grid
from test_outsider import PLACE, WORDS
from test_outsider import P as WORD_P
from test_outsider import Q as WORD_Q
from token_models import recurrent_models

import sculpt
from sculpt import Factor
from sculpt.actions.factors import Filled
from sculpt.diffusion.denoiser import Denoiser
from sculpt.formula import Mixture, Nested, Posterior, Product, Tilted

RINGS = three_rings()
P, Q, _ = (exact_model(mixture, name=name) for mixture, name in zip(RINGS, "pqr", strict=True))
GRID = Grid(6.0)
N = 2000


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def line(x):  # one coordinate is known, up to .3
    return -0.5 * ((x[:, 0] - 0.8) / 0.3) ** 2


def ripples(x):
    return 2 * torch.sin(3 * x[:, 0]) * torch.cos(2 * x[:, 1])


def tilt(x):
    return 0.7 * x[:, 0] - 0.4 * x[:, 1]


def half(x):
    return torch.where(x[:, 0] + x[:, 1] > 1.5, 0.0, -math.inf)


LINE = {way: Factor(line, gradient=way, bound=0.0, name=f"line-{way}") for way in (False, True)}
RIPPLES = {way: Factor(ripples, gradient=way, bound=2.0, name=f"ripples-{way}") for way in (False, True)}

# The algebra ----------------------------------------------------------------------------------------------------------------------


def test_factors_multiply_in_any_order_and_print_as_written():
    f, g = Factor(line, power=2, name="f"), Factor(tilt, name="g")
    both = P * f * g
    assert str(both) == "p · f^2 · g" and str((P & Q) * f) == "(p ⊗ q) · f^2" and str(f * P) == "p · f^2"
    assert both.own == (f, g) and both.models == (P,) and both.formula == Tilted([2.0, 1.0])
    assert (P * f * f).formula == Tilted([4.0]) and ((P * f) & (Q * f)).factors == (f,)
    assert (P * f).key == (f * P).key != (P * g).key and (P * Factor(line)).key != (P * Factor(line)).key
    assert (P * f) & (P * f) != P and len(((P * f) & (P * f)).models) == 1  # equal models are recognised as one


def test_the_degree_counts_densities_and_the_gradient_says_what_factors_count():
    ell = torch.randn(5, 3, dtype=torch.float64, generator=generator())
    formula = Nested(Tilted([2.0]), [Product([1.0, 0.5]), Mixture([1.0])], [(0, 1), (2,)], [0.3, 0.0])
    assert formula.degree == 1.5 and formula.factors == (2,)
    torch.testing.assert_close(formula.value(ell), ell[:, 0] + 0.5 * ell[:, 1] - 0.3 + 2 * ell[:, 2])
    torch.testing.assert_close(formula.gradient(ell), torch.tensor([1.0, 0.5, 2.0], dtype=torch.float64).expand(5, 3))
    within = Nested(Posterior(2, (0, 1)), [Tilted([1.0]), Mixture([1.0])], [(0, 2), (1,)])
    torch.testing.assert_close(within.gradient(ell)[:, 2], within.gradient(ell)[:, 0])
    said = torch.randn(5, 1, dtype=torch.float64, generator=generator(1))
    filled = Filled(within, said)
    torch.testing.assert_close(filled.value(ell[:, :2]), within.value(torch.cat([ell[:, :2], said], 1)))
    assert Tilted([1.0]).value(torch.tensor([-math.inf, 3.0])) == -math.inf


# Diffusion in two dimensions, against quadrature ------------------------------------------------------------------------------------


def log_p(x):
    return [mixture.log_prob(x) for mixture in RINGS[:2]]


def normal(log):
    return log - (log + math.log(GRID.area)).logsumexp(0)


def meet(a, b):
    return a + b - torch.logaddexp(a, b)


@functools.cache
def masses(name):
    """Of a target's cells, and log Z."""
    x = GRID.points
    p, q = log_p(x)
    log = {
        "p tilted": lambda: p + tilt(x),
        "p line": lambda: p + line(x),
        "p ripples": lambda: p + ripples(x),
        "p half": lambda: p + half(x),
        "(p | q) line": lambda: torch.logaddexp(p, q) - math.log(2) + line(x),
        "(p & q) line": lambda: normal(meet(p, q)) + line(x),
        "(p line) & q": lambda: meet(normal(p + line(x)), q),
        "p - (q line)": lambda: 2 * p - torch.logaddexp(p, normal(q + line(x))),
        "(p q) tilted": lambda: normal(p + q) + tilt(x),
        "((p line) & q) ripples": lambda: normal(meet(normal(p + line(x)), q)) + ripples(x),
    }[name]() + math.log(GRID.area)
    log_z = float(log.logsumexp(0))
    n, r = GRID.n, GRID.refine
    return (log - log_z).exp().view(n, r, n, r).sum((1, 3)).flatten(), log_z


def check(name, composition, road=None, most=1.3, steps=64, seeds=3):
    """Every run's distance over exact draws' is near one, and log Z is covered."""
    target, log_z = masses(name)
    floor, runs = GRID.floor(target, N), []
    for seed in range(seeds):
        got = composition.sample(N, road, steps=steps, generator=generator(seed), progress=False)
        runs.append((GRID.total_variation(got.x, target) / floor, (got.log_z - log_z) / got.diagnostics.log_z_error))
    assert sum(error for error, _ in runs) / seeds < most, runs
    assert sum(abs(off) > 2 for _, off in runs) <= 1, runs


ONE = {"p tilted": lambda way: Factor(tilt, gradient=way), "p line": LINE.get, "p ripples": RIPPLES.get}


@pytest.mark.parametrize("way", [False, True])
@pytest.mark.parametrize("name", ONE)
def test_a_model_times_a_factor_is_the_tilted_model(name, way):
    check(name, P * ONE[name](way), steps=32)


def test_what_a_factor_forbids_is_not_sampled():
    got = (P * Factor(half)).sample(N, steps=32, generator=generator(), progress=False)
    assert got.x.sum(1).min() > 1.5
    check("p half", P * Factor(half), sculpt.Tracked(particles=20_000), steps=32)


NESTED = {
    "(p & q) line": lambda f, g: (P & Q) * f,
    "(p line) & q": lambda f, g: (P * f) & Q,
    "p - (q line)": lambda f, g: P - (Q * f),
    "((p line) & q) ripples": lambda f, g: ((P * f) & Q) * g,
    "(p q) tilted": lambda f, g: sculpt.product([P, Q], [1, 1]) * Factor(tilt, gradient=bool(f.gradient)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NESTED)
def test_factors_nest_with_everything_else(name):
    check(name, NESTED[name](LINE[True], RIPPLES[False]), seeds=2)


REJECTED = {
    "p line": lambda f: P * f,
    "(p | q) line": lambda f: (P | Q) * f,
    "(p & q) line": lambda f: (P & Q) * f,
    "(p line) & q": lambda f: (P * f) & Q,
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] if "&" in name else []) for name in REJECTED])
def test_rejection_keeps_by_a_bounded_factor(name):
    road = sculpt.Rejection(lambda x: torch.stack(log_p(x), -1)) if "&" in name else sculpt.Rejection()
    check(name, REJECTED[name](LINE[False]), road, seeds=2 if "&" in name else 6)


@pytest.mark.slow
def test_a_guided_chain_is_weighed_by_factors_too():
    check("(p & q) line", (P & Q) * LINE[True], ExactGuide(RINGS[:2], [P.key, Q.key]), steps=32, seeds=2)


@pytest.mark.slow
def test_a_corrected_chain_is_weighed_in_the_end():
    guide = sculpt.Guided(ExactGuide(RINGS[:2], [P.key, Q.key]), correct=True, particles=20_000)
    check("(p & q) line", (P & Q) * LINE[True], guide, steps=32, seeds=2)


# Inpainting a Gaussian field, against its posterior ---------------------------------------------------------------------------------


class Field(Denoiser):
    """Smooth Gaussian noise on a square: everything in closed form."""

    def __init__(self, side, length=2.0):
        self.name = self.key = "field"
        self.shape, self.s_min, self.s_max, self.device = (1, side, side), 0.01, 80.0, torch.device("cpu")
        places = torch.cartesian_prod(*[torch.arange(side, dtype=torch.float64)] * 2)
        self.C = torch.exp(-(torch.cdist(places, places) ** 2) / (2 * length**2)) + 1e-4 * torch.eye(side**2)
        self.e, self.U = torch.linalg.eigh(self.C)

    def denoise(self, z, s):
        y = (z.double().flatten(1) @ self.U) * (self.e / (self.e + float(s) ** 2))
        return (y @ self.U.T).reshape(z.shape).to(z.dtype)


def observed_field(side, share, noise):
    """A field of which a share is known up to some noise: the model, the factor, and the posterior's mean, variance and log Z."""
    field, g, d = Field(side), generator(5), side**2
    y = torch.linalg.cholesky(field.C) @ torch.randn(d, generator=g, dtype=torch.float64)
    mask = torch.rand(d, generator=g) < share
    y, o = y + noise * torch.randn(d, generator=g, dtype=torch.float64), mask.nonzero()[:, 0]
    S = field.C[o][:, o] + noise**2 * torch.eye(len(o), dtype=torch.float64)
    K = field.C[:, o] @ torch.linalg.inv(S)
    variance = (field.C - K @ field.C[o]).diagonal()
    log_z = float(-0.5 * (y[o] @ torch.linalg.solve(S, y[o]) + torch.logdet(S))) + len(o) * math.log(noise)
    known = torch.where(mask, y, 9.0).float().reshape(1, side, side)  # what is masked does not matter
    return field, Factor.observed(known, mask.reshape(1, side, side), noise), K @ y[o], variance, log_z


@pytest.fixture(scope="module")
def inpainting():
    return observed_field(8, 0.5, 0.3)


def off(samples, mean, variance):
    """Root mean square error of the mean over that of so many exact draws, and the mean ratio of variances."""
    x = samples.x.double().flatten(1)
    error = ((x.mean(0) - mean) / variance.sqrt()).square().mean().sqrt() * math.sqrt(len(x))
    return float(error), float((x.var(0) / variance).mean())


def test_inpainting_a_gaussian_field_gives_its_posterior(inpainting):
    field, known, mean, variance, log_z = inpainting
    got = (field * known).sample(250, sculpt.Tracked(particles=2000), steps=64, generator=generator(), progress=False)
    error, ratio = off(got, mean, variance)
    assert error < 1.3 and abs(ratio - 1) < 0.1 and abs(got.log_z - log_z) < 2 * got.diagnostics.log_z_error < 0.2
    base = field.sample(250, generator=generator(), progress=False)
    assert off(base, mean, variance)[0] > 5  # the prior is somewhere else


def test_one_particle_is_steered_by_a_gradient_and_refused_without(inpainting):
    field, known, mean, variance, _ = inpainting
    got = (field * known).sample(250, sculpt.Tracked(particles=1), steps=64, generator=generator(), progress=False)
    assert got.verdict.level == "steered" and got.log_weights is None
    assert off(got, mean, variance)[0] < 2
    with pytest.raises(ValueError, match="line-False has no gradient to steer by, and particles that go alone"):
        (P * LINE[False]).sample(3, sculpt.Tracked(particles=1))


# Images, seen through a detail level ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_below_a_detail_level_the_anchor_is_weighed_by_the_factor():
    p, q = Fields("p", [0.4, 0.3, 0.2, 0.1], d=192), Fields("q", [0.1, 0.2, 0.3, 0.4], d=192)
    direction = (p.means[1] - p.means[2]).float()
    scale = 2 / float(
        direction @ direction
    )  # f tells the second pattern from the third by a factor of e^2, as far as it is one of them

    def log_f(x):
        return scale * (x.flatten(1) @ direction)

    f = Factor(log_f, gradient=True)
    shares = meet(*(torch.tensor(s).double().log() for s in ([0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4])))
    # Of a white field around a pattern, E f is that at the pattern, times a constant.
    target = (shares + (p.means @ direction.double()) * scale).softmax(0)
    road, found = sculpt.Tracked(particles=512, detail=1.0), []
    for seed in range(4):
        got = ((p & q) * f).sample(256, road, steps=32, generator=generator(seed), progress=False)
        nearest = torch.cdist(got.x.double().flatten(1), p.means).argmin(1)
        found.append(torch.bincount(nearest, minlength=4) / 256)
    found = torch.stack(found)
    assert "paints alone" in str(got.diagnostics) and "weighed" not in got.diagnostics.road
    assert (found.mean(0) - target).abs().max() < 0.03 + 2 * float(found.std(0).max()) / 2
    assert (target - shares.softmax(0)).abs().max() > 0.15  # what it would be without the factor


# Models that write action by action, against counting -----------------------------------------------------------------------------


def letters(x):
    return 1.5 * (x == 2).sum(-1).double() - 0.8 * ((x > 0).sum(-1) - 1.5) ** 2


ELL = torch.stack([model.log_ratios([model], WORDS)[:, 0] for model in (WORD_P, WORD_Q)], -1)
UNIT = ELL - ELL.logsumexp(0)
F = letters(WORDS)


def unit(log):
    return log - log.logsumexp(0)


WRITTEN = {
    "p f": (lambda f: WORD_P * f, UNIT[:, 0] + F),
    "(p & q) f": (lambda f: (WORD_P & WORD_Q) * f, unit(meet(*UNIT.T)) + F),
    "(p f) & q": (lambda f: (WORD_P * f) & WORD_Q, meet(unit(UNIT[:, 0] + F), UNIT[:, 1])),
    "(p f) - q": (
        lambda f: (WORD_P * f) - WORD_Q,
        2 * unit(UNIT[:, 0] + F) - torch.logaddexp(unit(UNIT[:, 0] + F), UNIT[:, 1]),
    ),
}
MOST = float(F.max())
WAYS = {
    "selected": (lambda: Factor(letters), lambda: sculpt.Tracked(particles=30_000)),
    "steered by itself": (lambda: Factor(letters, value=True), lambda: None),
    "steered by an estimate": (
        lambda: Factor(letters, value=lambda x: 0.5 * letters(x)),
        lambda: sculpt.Tracked(particles=30_000),
    ),
    "rejection": (lambda: Factor(letters, bound=MOST), lambda: sculpt.Rejection()),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", WRITTEN)
def test_words_times_a_factor_are_the_counted_target(name, way):
    (compose, log), (factor, road) = WRITTEN[name], WAYS[way]
    n, target, log_z, g = 4000, log.softmax(0), float(log.logsumexp(0)), generator(9)

    def distance(index):
        return float((torch.bincount(index, minlength=len(WORDS)) / n - target).abs().sum())

    floor = sum(distance(torch.multinomial(target, n, True, generator=g)) for _ in range(20)) / 20
    runs = []
    for seed in range(3):
        got = compose(factor()).sample(n, road(), generator=generator(seed), progress=False)
        index = torch.tensor([PLACE[tuple(x)] for x in got.x.tolist()])
        runs.append((distance(index) / floor, abs(got.log_z - log_z) / max(got.diagnostics.log_z_error, 1e-3)))
    assert sum(error for error, _ in runs) / 3 < 1.3, runs
    assert sum(z > 2 for _, z in runs) <= 1, runs


def test_a_poor_classifier_corrected_by_densities_is_weighed_in_the_end():
    classifier = sculpt.fit([WORD_P, WORD_Q], steps=20, samples=200, progress=False)
    _, log = WRITTEN["(p & q) f"]
    road = sculpt.Guided(classifier, correct="densities", particles=30_000)
    got = ((WORD_P & WORD_Q) * Factor(letters)).sample(4000, road, generator=generator(), progress=False)
    exact = torch.multinomial(log.softmax(0), 4000, True, generator=generator(9))
    index = torch.tensor([PLACE[tuple(x)] for x in got.x.tolist()])
    off, floor = (
        float((torch.bincount(rows, minlength=len(WORDS)) / 4000 - log.softmax(0)).abs().sum()) for rows in (index, exact)
    )
    assert off < 1.3 * floor
    assert abs(got.log_z - float(log.logsumexp(0))) < 3 * got.diagnostics.log_z_error
    assert "weighed in the end by letters" in got.diagnostics.road and got.diagnostics.acceptance is None


def test_factors_of_texts_are_given_texts():
    (model,) = recurrent_models(1)
    seen = []

    def log_f(texts):
        seen.extend(texts)
        return torch.tensor([-float(len(text)) for text in texts])

    got = (model * Factor(log_f, name="short")).sample(50, generator=generator(), progress=False)
    assert seen and all(isinstance(text, str) for text in seen) and set(got.text) <= set(seen)


# Bad input ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("unchecked")
def test_what_is_no_factor_is_refused():
    with pytest.raises(TypeError, match="log_f is a function of samples; got 3"):
        Factor(3)
    with pytest.raises(TypeError, match="gradient is a function of samples, True or False; got 'yes'"):
        Factor(line, gradient="yes")
    with pytest.raises(ValueError, match="power 0 changes nothing"):
        Factor(line, power=0)
    with pytest.raises(ValueError, match="bound has to be a finite number"):
        Factor(line, bound=math.inf)
    with pytest.raises(TypeError, match=r"models multiply by sculpt.product\(\[p, q\]"):
        P * Q
    with pytest.raises(TypeError, match="unsupported operand"):
        P * 3
    f = Factor(line, power=2)
    with pytest.raises(ValueError, match="cancel"):
        P * f * _opposite(f)
    with pytest.raises(ValueError, match="noise is a standard deviation over 0"):
        Factor.observed(torch.zeros(2), noise=0)
    with pytest.raises(ValueError, match="not finite. Mask them"):
        Factor.observed(torch.tensor([0.0, math.nan]))
    with pytest.raises(ValueError, match=r"What is known has the shape \(3,\), and samples are \(2,\)"):
        (P * Factor.observed(torch.zeros(3))).sample(8, progress=False)


def _opposite(f):
    other = Factor(line, power=-f.power)
    other.key = f.key
    return other


BAD = {
    "gave the shape (64, 2) for 64 samples": lambda x: x,
    "a log-likelihood that is NaN or plus infinity": lambda x: x[:, 0] * math.nan,
    "does not depend on the samples": lambda x: torch.zeros(len(x)),
}


@pytest.mark.parametrize("message", BAD)
def test_what_a_factor_gives_is_checked(message):
    factor = Factor(BAD[message], gradient="depend" in message, name="bad")
    with pytest.raises((ValueError, FloatingPointError), match="bad") as error:
        (P * factor).sample(8, sculpt.Tracked(particles=64), steps=8, progress=False)
    assert message.replace("(64, 2) for 64", "") in str(error.value) or message.split("(64")[0] in str(error.value)


def test_roads_that_cannot_take_a_factor_say_so():
    guide = ExactGuide(RINGS[:2], [P.key, Q.key])
    both = (P & Q) * LINE[True]
    with pytest.raises(ValueError, match="p is one model, which no classifier steers"):
        (P * LINE[True]).sample(5, guide)
    with pytest.raises(ValueError, match="whoever steps from outside does not show them"):
        both.as_unet()
    with pytest.raises(ValueError, match="corrector moves particles by the models' densities"):
        both.sample(5, sculpt.Tracked(corrector=sculpt.ULA()))
    with pytest.raises(ValueError, match="pass sculpt.Factor"):
        (P * Factor(line, name="loose")).sample(5, sculpt.Rejection())
    with pytest.raises(ValueError, match="bound=-1 of tight is none: a sample has log f ="):
        (P * Factor(line, bound=-1.0, name="tight")).sample(50, sculpt.Rejection(), progress=False)
