"""Numbers: those that make no sense are refused, and what comes out is finite or an error that says whose it is not."""

import contextlib
import gc
import itertools
import math
import warnings
import weakref
from pathlib import Path

import jaxtyping
import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler
from diffusers_models import exact_model, scheduler_of, three_rings
from gflownet_models import ENVIRONMENTS, perfect
from molecule_models import molecule_classifier, molecule_model
from oracles import ExactGuide, GaussianMixture
from test_outsider import Words
from torch import nn

import sculpt
from sculpt import HMC, MALA, ULA, Guided, Rejection, Tracked
from sculpt.chain import Progress, Selection, Settings
from sculpt.diagnostics import Diagnostics
from sculpt.diffusion.backbones import VectorNetwork
from sculpt.formula import Mixture, Posterior, PowerMean, Product
from sculpt.gflownet.exact import ExactClassifier
from sculpt.model import BaseModel

NAN, INF = math.nan, math.inf
RINGS = three_rings()
P, Q, R = (exact_model(mixture, name=name) for mixture, name in zip(RINGS, "pqr", strict=True))
GUIDE = ExactGuide(RINGS[:2])


@pytest.fixture(autouse=True)
def as_users_have_it():
    """Without the type checker of the tests, which would speak first."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# Numbers that are given ----------------------------------------------------------------------------------------------------------

NO_COUNTS = [1.5, "3", b"3", True, NAN, INF, np.float64(3), [3], torch.tensor(3), 1j, -1, 10**30]
NO_NUMBERS = [NAN, INF, -INF, "1", b"1", True, [1.0], 1j, 10**400, object()]
COUNTS = {
    "n": lambda v: P.run(v),
    "n of particles": lambda v: (P & Q).run(v),
    "particles": lambda v: Tracked(particles=v),
    "particles of Guided": lambda v: Guided(GUIDE, correct=True, particles=v),
    "batch_size": lambda v: P.run(1, batch_size=v),
    "steps": lambda v: P.run(1, steps=v),
    "max_draws": lambda v: Rejection(GUIDE, max_draws=v),
    "anchor": lambda v: (P & Q).run(1, Guided(GUIDE, anchor=v)),
    "anchor of Rejection": lambda v: (P & Q).run(1, Rejection(GUIDE, anchor=v)),
    "label": lambda v: sculpt.posterior([P, Q], [v]),
    "ULA": lambda v: ULA(steps=v),
    "nodes": lambda v: MALA(nodes=v),
    "leapfrog": lambda v: HMC(leapfrog=v),
}
NUMBERS = {
    "threshold": lambda v: Tracked(threshold=v),
    "threshold of Guided": lambda v: Guided(GUIDE, correct=True, threshold=v),
    "strength": lambda v: Guided(GUIDE, strength=v),
    "step": lambda v: MALA(step=v),
    "damping": lambda v: HMC(damping=v),
    "odds": lambda v: sculpt.harmonic_mean(P, Q, v),
    "one of the odds": lambda v: sculpt.contrast(P, Q, [1, v]),
    "weight": lambda v: sculpt.mixture(P, Q, weights=[1, v]),
    "power": lambda v: sculpt.product([P, Q], [1, v]),
    "exponent": lambda v: sculpt.power_mean([P, Q], v),
    "weight of a power mean": lambda v: sculpt.power_mean([P, Q], 2, [v, 1]),
    "Posterior": lambda v: Posterior(2, (0, 1), [v, 1]),
    "Product": lambda v: Product([v]),
    "PowerMean": lambda v: PowerMean(v, [1, 1]),
    "Mixture": lambda v: Mixture([v]),
}


@pytest.mark.parametrize("name", COUNTS)
def test_what_counts_is_a_whole_number(name):
    for value in NO_COUNTS:
        with pytest.raises(
            (TypeError, ValueError), match="whole number|has to be at|is not an observed label|indices of base models"
        ):
            list(COUNTS[name](value) or ())


@pytest.mark.parametrize("name", NUMBERS)
def test_what_is_a_number_is_a_finite_one(name):
    for value in NO_NUMBERS:
        with pytest.raises((TypeError, ValueError), match=r"number|between|finite"):
            NUMBERS[name](value)
    with contextlib.suppress(ValueError):  # some of them have to be smaller
        NUMBERS[name](np.float32(0.5))
        NUMBERS[name](torch.tensor(0.5))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Tracked(threshold=-0.1), "between 0 .* and 1; got -0.1"),
        (lambda: Tracked(threshold=1.1), "between 0 .* and 1; got 1.1"),
        (lambda: Settings(generator=3), "generator is a torch.Generator, .* got 3"),
        (lambda: sculpt.product(P, [1]), "models has to be a list of base models, got Diffusion"),
        (lambda: sculpt.product([P], 1.5), "powers has to be a list of numbers, got 1.5"),
        (lambda: sculpt.posterior([P, Q], 1), "labels has to be a list of indices of base models, got 1"),
        (lambda: sculpt.mixture(P, Q, weights="12"), "weights has to be a list of numbers, got '12'"),
        (lambda: sculpt.mixture(P, Q, weights=[1e300, 1e-320]), "weights have to be positive numbers"),
        (lambda: sculpt.mixture(P, Q, weights=[1e308, 1e308]), "weights have to be positive numbers"),
        (lambda: HMC(damping=1), "from 0 to less than 1; got 1"),
        (lambda: ULA(step=0), "has to be positive, got 0"),
    ],
)
def test_other_slips_are_named(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call()


def test_whole_numbers_of_numpy_are_as_good_as_those_of_python(tmp_path):
    three, one = np.int64(3), np.int32(1)
    road = Guided(ExactGuide(RINGS[:2], [P.key, Q.key]), correct=True, particles=three, anchor=one)
    assert road.identity["particles"] == 3 and type(road.identity["anchor"]) is int and "particles=3" in repr(road)
    samples = (P & Q).sample(three, road, steps=np.int16(4), batch_size=three, progress=False)
    P.sample(three, steps=three, progress=False).save(tmp_path / "x.safetensors")
    assert len(samples) == 3 and sculpt.posterior([P, Q], np.array([0, 1])) is not None


# Powers --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "powers", [[1e6, 1], [1e6, 1e6], [1e-300, 0], [1, 1e-300], [1e6, 1 - 1e6], [0.3, -0.3 + 1e-9], [0.1 + 0.2, -0.3]]
)
def test_powers_that_overflow_are_refused_when_they_are_written(powers):
    with pytest.raises(ValueError, match="(between 1e-06 and 100000 in size|a positive sum)"):
        sculpt.product([P, Q], powers)


def test_powers_that_are_too_large_for_so_many_steps_are_refused_with_the_number_that_they_take():
    tempered = sculpt.product([P, Q], [30, 2])
    with pytest.raises(
        ValueError, match=r"Powers that sum to 32 are too much for 128 steps.* Take steps=(\d+) or more"
    ) as refused:
        tempered.sample(4, Tracked(particles=16), progress=False)
    steps = int(str(refused.value).partition("steps=")[2].split()[0])
    with pytest.raises(ValueError, match="too much for"):
        tempered.sample(4, Tracked(particles=16), steps=steps // 2, progress=False)
    assert steps == 128 + 1 or steps < 1000
    samples = tempered.sample(4, Tracked(particles=16), steps=steps, generator=generator(), progress=False)
    assert samples.x.abs().max() < 3 and abs(samples.log_z) < 1000


@pytest.mark.parametrize("exponent", [1e30, -1e30, 1e6, 1e-300, 0.0])
def test_power_means_of_any_exponent_have_their_limits(exponent):
    ell = torch.tensor([[-3.0, 2.0], [700.0, -700.0], [-INF, -INF], [-INF, 1.0]], dtype=torch.float64)
    ell = ell[:3] if 0 < exponent < 1 else ell  # very little is not yet nothing
    formula = PowerMean(exponent, [1, 3])
    value, gradient = formula.value(ell), formula.gradient(ell)
    limit = (
        ell.amax(-1)
        if exponent > 1
        else ell.amin(-1)
        if exponent < -1
        else ell @ torch.tensor([0.25, 0.75], dtype=torch.float64)
    )
    torch.testing.assert_close(value, limit, rtol=1e-6, atol=2e-6)
    assert (gradient.sum(-1) - 1).abs().max() < 1e-12
    if abs(exponent) > 1:
        assert torch.equal(gradient[0], torch.tensor([0.0, 1.0] if exponent > 0 else [1.0, 0.0], dtype=torch.float64))
    with pytest.raises(ValueError, match=r"at most 1e\+30 in size, got 1e\+31"):
        PowerMean(1e31, [1, 1])


# What networks answer ------------------------------------------------------------------------------------------------------------


def at(t):
    return torch.as_tensor(t).reshape(-1)[:1]


WHERE = {
    "everywhere": lambda x, t: torch.ones(len(x), dtype=torch.bool),
    "late": lambda x, t: at(t) < 300,
    "early": lambda x, t: at(t) > 900,
    "at the end": lambda x, t: at(t) < 1,
    "for some": lambda x, t: x[:, 0] > 0,
    "for a few, late": lambda x, t: (x[:, 0] > 1.2) & (at(t) < 50),
}
VALUES = {"NaN": NAN, "Inf": INF, "minus Inf": -INF, "more than float32": 1e38}


def broken(where, value):
    """The exact network of p, with this value where ``where(x, t)`` holds."""
    exact = exact_model(RINGS[0]).model

    def network(x, t):
        out = exact(x, t)
        return torch.where(where(x, t).expand(len(x))[:, None], value, out)

    return sculpt.Diffusion(network, DDPMScheduler(clip_sample=False), (2,), name="broken")


def densities(x):
    return torch.stack([mixture.log_prob(x) for mixture in RINGS[:2]], -1)


ROADS = {
    "base": lambda p: (p, None),
    "mixture": lambda p: (p | Q, None),
    "tracked": lambda p: (p & Q, Tracked(particles=64)),
    "all particles": lambda p: (p - Q, Tracked(particles=64, resample=False)),
    "product": lambda p: (sculpt.product([p, Q], [1, -0.5]), Tracked(particles=64)),
    "nested": lambda p: ((p & Q) - R, Tracked(particles=64)),
    "ULA": lambda p: (p & Q, Tracked(particles=64, corrector=ULA())),
    "MALA": lambda p: (p & Q, Tracked(particles=64, corrector=MALA())),
    "HMC": lambda p: (p & Q, Tracked(particles=64, corrector=HMC())),
    "guided": lambda p: (p & Q, GUIDE),
    "the other anchor": lambda p: (p & Q, Guided(GUIDE, anchor=1)),
    "corrected": lambda p: (p & Q, Guided(GUIDE, correct=True, particles=64)),
    "all corrected": lambda p: (p & Q, Guided(GUIDE, correct=True, particles=64, resample=False)),
    "mixture form": lambda p: (p & Q, Guided(GUIDE, form="mixture")),
    "rejection": lambda p: (p & Q, Rejection(densities)),
}


def finite_or_named(model, road, named, **options):
    """Sample; nothing that comes out is NaN or infinite, and an error names the model and the step or the state."""
    try:
        with warnings.catch_warnings(record=True):
            warnings.simplefilter("always")
            samples = model.sample(16, road, progress=False, generator=generator(), **options)
    except (FloatingPointError, ValueError) as error:
        assert any(name in str(error) for name in named), error
        assert "step" in str(error) or "state" in str(error) or "draws" in str(error) or "log-densities" in str(error), error
        return None
    assert samples.x.double().isfinite().all()
    assert samples.log_weights is None or not samples.log_weights.isnan().any()
    assert samples.log_z is None or math.isfinite(samples.log_z)
    return samples


QUICK = {"everywhere", "for a few, late"}
ANSWERS = [
    pytest.param(where, value, road, marks=() if value == "NaN" and where in QUICK else pytest.mark.slow)
    for where, value, road in itertools.product(WHERE, VALUES, ROADS)
]


@pytest.mark.parametrize(("where", "value", "road"), ANSWERS)
def test_a_network_that_gives_no_numbers_is_named_or_what_it_spoilt_is_lost(where, value, road):
    model, road = ROADS[road](broken(WHERE[where], VALUES[value]))
    samples = finite_or_named(model, road, ["broken"], steps=12)
    if where == "everywhere" and value == "NaN" and not (isinstance(road, Guided) and road.anchor == 1):
        assert samples is None


def test_a_solver_and_a_bound_composition_raise_too():
    for value in (NAN, INF):
        p = broken(WHERE["late"], value)
        solver = DPMSolverMultistepScheduler()
        assert finite_or_named(p, None, ["broken"], steps=12, solver=solver) is None
        assert finite_or_named((p & Q).guided(GUIDE), None, ["broken"], steps=12) is None


@pytest.mark.parametrize("what", ["log_h", "terminal", "marginal"])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_a_classifier_that_gives_no_numbers_is_named(what, value):
    class Bad(ExactGuide):
        def log_h(self, z, s, *, labels, odds=None):
            h = super().log_h(z, s, labels=labels, odds=odds)
            return torch.where(z[:, 0] > 0, value, h) if what == "log_h" else h

        def terminal(self, x):
            log_p = super().terminal(x)
            return torch.where(x[:, :1] > 0, value, log_p) if what == "terminal" else log_p

        def marginal(self, z, s):
            log_p = super().marginal(z, s)
            return torch.where(z[:, :1] > 0, value, log_p) if what == "marginal" else log_p

    guide = Bad(RINGS[:2])
    for road in (guide, Guided(guide, correct=True, particles=32), Guided(guide, form="mixture"), Rejection(guide)):
        finite_or_named(P & Q, road, ["p ⊗ q", "p, q"], steps=8)


def test_float16_that_overflows_names_the_model():
    network = VectorNetwork(2, width=8)
    for parameter in network.parameters():
        nn.init.constant_(parameter, 100.0)

    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(2, 64), nn.Linear(64, 2)).half()
            for parameter in self.parameters():
                nn.init.constant_(parameter, 100.0)

        def forward(self, x, t):
            return self.layers(x.half())

    half = sculpt.Diffusion(Half(), scheduler_of("linear"), (2,), name="half")
    for model, road in ((half, None), (half & Q, Tracked(particles=16)), (half & Q, GUIDE)):
        with pytest.raises(
            FloatingPointError, match=r"half gave numbers that are not finite .* at step \d+ .*float16 overflows early"
        ):
            model.sample(4, road, steps=8, progress=False)


def test_one_particle_that_is_lost_takes_no_other_along():
    # An energy that is flat but for one place, where the gradient is infinite: whoever comes there is lost, the others are right.
    def energy(z, s):
        wall = torch.where(z[:, 0] > 60.0, INF, 0.0) * z[:, 0]
        return (z**2).sum(-1) / (2 * (1 + s**2)) + torch.where(wall.isnan(), 0.0, wall)

    p = sculpt.EnergyModel(energy, (2,), name="p")
    q = sculpt.EnergyModel(lambda z, s: ((z - 1) ** 2).sum(-1) / (2 * (1 + s**2)), (2,), name="q")
    with pytest.warns(UserWarning, match="p gave numbers that are not finite for .* these particles lose their weight"):
        samples = (p & q).sample(200, Tracked(particles=1000), generator=generator(), progress=False)
    lost = next(note for note in samples.diagnostics.notes if "lost" in note)
    assert 100 < int(lost.split()[0]) < 500 and samples.x.isfinite().all()
    assert (samples.x.mean(0) - 0.5).abs().max() < 0.2 and samples.x.std() < 1.3


# Other families ------------------------------------------------------------------------------------------------------------------


class Wrong(Words):
    """Words whose table says NaN, or nothing at all, once there are two letters."""

    rules = Words.__qualname__

    def __init__(self, name, seed, value):
        super().__init__(name, seed)
        self.value = value

    def log_pf(self, states):
        long = (states > 0).sum(-1) > 1
        return torch.where(long[:, None], self.value, super().log_pf(states))


@pytest.mark.parametrize("value", [NAN, -INF, INF])
def test_a_chain_of_actions_without_a_distribution_is_named(value):
    p, q = Wrong("broken", 1, value), Words("q", 5)
    for model, road in ((p, None), (p & q, None), (p - q, Tracked(particles=64)), (p | q, None), (p & q, Rejection())):
        with pytest.raises(
            FloatingPointError, match=r"broken gave no distribution over its actions for \d+ of \d+ states, first for \["
        ):
            model.sample(64, road, generator=generator(), progress=False)


def test_densities_of_both_infinities_lose_particles_and_draw_no_forbidden_action():
    class Backwards(Words):
        """Says that its words cannot have come from where they came from."""

        rules = Words.__qualname__
        backward_key = "none"

        def log_pb(self, states):
            return torch.full((len(states), self.n_actions - 1), -INF, dtype=torch.float64)

    p, q = Backwards("p", 1), Words("q", 5)
    for formula in (p & q, p - q, q - p, sculpt.product([p, q], [2, -1])):
        finite_or_named(formula, Tracked(particles=64), ["p", "q"])


class Finished(BaseModel):
    """Finished samples, some of them NaN."""

    name, key, shape, device = "finished", "finished", (2,), torch.device("cpu")

    def stream(self, n, road, settings):
        x = torch.full((n, 2), NAN).where(torch.arange(n)[:, None] < 3, 0.0)
        yield Progress("", samples=self.result(x, None, Diagnostics("finished", str(self))))

    def check_composable(self, other):
        pass


def test_finished_samples_of_others_are_looked_at_too():
    for model in (Finished(), Finished() | P):
        with pytest.raises(FloatingPointError, match="3 of .* samples of finished are not finite numbers"):
            model.sample(64, progress=False)


def test_models_with_no_sample_in_common_are_told_before_ten_million_draws():
    with pytest.raises(RuntimeError, match=r"Rejection kept 0 of \d{5} draws from p, 8 were asked for"):
        apart = Rejection(lambda x: torch.tensor([0.0, -INF], dtype=torch.float64).expand(len(x), 2), anchor=0)
        (P & Q).sample(8, apart, steps=2, progress=False)


@pytest.mark.parametrize("value", [NAN, INF])
def test_log_densities_that_are_no_numbers_are_named(value):
    with pytest.raises(
        FloatingPointError, match="the given densities of p, q gave log-densities that are no numbers for .* of p ⊗ q"
    ):
        (P & Q).sample(8, Rejection(lambda x: torch.where(x[:, :1] > 0, value, densities(x))), steps=4, progress=False)
    with pytest.raises(ValueError, match="Got log-densities of shape list for"):
        (P & Q).sample(8, Rejection(lambda x: [1, 2]), steps=4, progress=False)


# Steps ---------------------------------------------------------------------------------------------------------------------------

GAUSSIANS = [GaussianMixture([[0.5, 0.0]], 1.0), GaussianMixture([[-0.5, 0.0]], 0.7)]
G, H = (exact_model(mixture, name=name) for mixture, name in zip(GAUSSIANS, "gh", strict=True))
NARROW = ExactGuide(GAUSSIANS)


@pytest.mark.parametrize("steps", [1, 2, pytest.param(10_000, marks=pytest.mark.slow)])
def test_any_number_of_steps_is_refused_or_right(steps):
    for model, road in (
        (G, None), (G & H, Tracked(particles=256)), (G & H, NARROW), (G & H, Guided(NARROW, correct=True, particles=256)),
        (G - H, Tracked(particles=256)), (sculpt.product([G, H], [1, 1]), Tracked(particles=256)), (G | H, None),
    ):  # fmt: skip
        if steps == 1:
            with pytest.raises(ValueError, match="Sampling needs at least 2 steps, got 1"):
                model.sample(4, road, steps=steps, progress=False)
            continue
        x = model.sample(128, road, steps=steps, generator=generator(), progress=False).x
        assert x.isfinite().all()
        if steps > 100:
            assert x.mean(0).abs().max() < 1 and 0.4 < x.std() < 1.6


# Names ---------------------------------------------------------------------------------------------------------------------------

ODD_NAMES = [
    "",
    "x" * 10_000,
    "⊗◑·",
    "a & b",
    "a|b",
    "p^2",
    "q\"uo'te",
    "new\nline",
    "tab\t",
    "$x$",
    r"$\frac{",
    "%s {}",
    "\u202eevil",
    "\0",
]
ODD_NAMES += ["\ud800", "a/b\\c", "<b>&amp;", "🙂", "(p)", "None", "verdict  sound"]


@pytest.mark.parametrize("name", ODD_NAMES, ids=[f"{name!r:.20}" for name in ODD_NAMES])
def test_whatever_a_model_is_called_formulas_reports_and_files_stay_whole(name, tmp_path):
    p = exact_model(RINGS[0], name="p")
    p.name = name
    assert str(p).isprintable() and 0 < len(str(p)) <= 1000 and str(p & Q) != str(Q & p)
    for model, road in ((p, None), (p & Q, Tracked(particles=8)), ((p & Q) - R, Tracked(particles=8))):
        samples = model.sample(4, road, steps=4, progress=False)
        said = samples.diagnostics
        assert said.formula == str(model) and str(said).count("\n") == len(said.rows())
        assert len(str(model)) < 1000
        samples.save(tmp_path / "x.safetensors")
        assert sculpt.Samples.load(tmp_path / "x.safetensors").diagnostics.formula == str(model)
    samples.save(tmp_path / "x.png")
    with pytest.raises(ValueError, match="not among its keys") as refused:
        (p & Q).sample(4, Guided(ExactGuide(RINGS[:2], ["other", "keys"])), progress=False)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 2000


# Memory --------------------------------------------------------------------------------------------------------------------------


def calls():
    """Each road of each family, with tiny models."""
    classifier = sculpt.Classifier(VectorNetwork(2, width=8), [P.key, Q.key], 2).eval().requires_grad_(False)
    grid = perfect(ENVIRONMENTS["grid-2d"](), 2)
    molecules = [molecule_model(seed, name) for seed, name in enumerate(("seh", "sa"))]
    families = {
        "2-D": (P, Q, classifier, 4, {"steps": 5}),
        "grid": (*grid, ExactClassifier(grid), 4, {}),
        "molecules": (*molecules, molecule_classifier(*molecules), 2, {}),
    }
    for family, (a, b, judge, n, options) in families.items():
        weighted = {
            "base": (a, None), "guided": (a & b, judge), "corrected": (a & b, Guided(judge, correct=True, particles=4 * n)),
            "tracked": (a - b, Tracked(particles=4 * n)), "rejection": (a & b, Rejection(judge)), "mixture": (a | b, None),
            "nested": ((a & b) - a, Tracked(particles=4 * n)),
        }  # fmt: skip
        for road, (model, way) in weighted.items():
            yield (
                f"{family}, {road}",
                lambda model=model, way=way, n=n, options=options: model.sample(n, way, progress=False, **options).decode(),
            )


def kept():
    """Bytes of memory in use, and how many objects there are."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1]) if Path("/proc/self/statm").exists() else 0
    return pages * 4096, len(gc.get_objects())


@pytest.mark.parametrize("times", [4, pytest.param(1000, marks=pytest.mark.slow)])
def test_memory_stays_as_it_is_over_many_calls(times):
    for name, call in itertools.islice(calls(), None if times > 100 else 7):
        for _ in range(max(3, times)):  # the allocator takes its share once
            call()
        bytes_before, objects_before = kept()
        for _ in range(times):
            call()
        bytes_after, objects_after = kept()
        grown = bytes_after - bytes_before, objects_after - objects_before
        print(f"{name:22} {grown[0] / times:8.0f} bytes and {grown[1] / times:.2f} objects a call")
        assert grown[1] < 100, name
        assert times < 100 or grown[0] < 2**22, name


def test_what_is_not_used_any_more_is_let_go():
    def once(seed):
        p, q = (exact_model(mixture, name=f"{mixture}{seed}") for mixture in RINGS[:2])
        classifier = sculpt.fit([p, q], steps=2, samples=20, batch_size=4, progress=False)
        samples = [(p & q).sample(4, road, steps=4, progress=False) for road in (Tracked(particles=8), classifier)]
        env = ENVIRONMENTS["grid-2d"]()
        policies = perfect(env, 2, seed=seed)
        samples.append((policies[0] & policies[1]).sample(4, ExactClassifier(policies), progress=False))
        return [weakref.ref(one) for one in (p, q, classifier, env, *policies, *samples)]

    gone = once(0)
    gc.collect()
    assert not any(ref() for ref in gone)


def test_a_selection_keeps_numbers_of_python():
    selection = Selection(np.int64(8), np.float32(0.5))
    assert type(selection.particles) is int and type(selection.threshold) is float
