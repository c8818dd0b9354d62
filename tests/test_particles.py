"""Particles: resampling, weights, and the estimate of log Z, on populations whose answers are known."""

import functools
import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from sculpt.chain import Chain, Selection, Settings, run
from sculpt.particles import Population, effective_sample_size, systematic
from sculpt.samples import Diagnostics, Samples
from sculpt.state import State

NAN, INF = float("nan"), float("inf")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def log_weights(n, seed=0, scale=2.0):
    return scale * torch.randn(n, dtype=torch.float64, generator=generator(seed))


# Resampling -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 7, 50, 1000])
def test_every_particle_survives_its_share_rounded_down_or_up(n):
    log_w = log_weights(50)
    expected = n * log_w.softmax(0)
    for seed in range(20):
        counts = torch.bincount(systematic(log_w, n, generator(seed)), minlength=50)
        assert counts.sum() == n
        assert (counts >= expected.floor() - 1e-9).all() and (counts <= expected.ceil() + 1e-9).all()


def test_the_expected_number_of_survivors_is_the_weight():
    log_w, n, repeats = log_weights(6), 5, 4000
    counts = torch.stack([torch.bincount(systematic(log_w, n, generator(seed)), minlength=6) for seed in range(repeats)])
    # A survivor's count is floor or ceil: bounded in an interval of one, so Hoeffding bounds every mean at once.
    bound = math.sqrt(math.log(2 * 6 / 1e-6) / (2 * repeats))
    assert ((counts.double().mean(0) - n * log_w.softmax(0)).abs() < bound).all()


def test_equal_weights_survive_once_each():
    for n in (1, 10, 1000, 4096):
        for seed in range(5):
            assert torch.equal(systematic(torch.zeros(n), n, generator(seed)), torch.arange(n))


def test_survivors_do_not_depend_on_the_scale_of_the_weights_however_large():
    log_w = log_weights(100)
    for shift in (-1e6, -1e3, 1e3, 1e6):
        # A shift loses digits of the weights, so a stride on an edge may tip over: one survivor at most.
        moved = systematic((log_w.float().double() + shift), 100, generator(1))
        assert (moved - systematic(log_w.float().double(), 100, generator(1))).abs().max() <= 1


def test_a_particle_without_weight_is_never_chosen():
    for seed in range(200):
        log_w = log_weights(20, seed)
        dead = torch.rand(20, generator=generator(seed)) < 0.7
        dead[seed % 20] = False
        log_w[dead] = -INF
        assert not dead[systematic(log_w, 33, generator(seed))].any()


def test_the_last_particle_takes_what_rounding_leaves_only_if_it_has_weight():
    log_w = torch.full((1000,), math.log(1 / 3), dtype=torch.float64)
    log_w[-5:] = -INF
    for n in (1000, 999, 10_007):
        for seed in range(30):
            assert systematic(log_w, n, generator(seed)).max() <= 994


def test_the_effective_sample_size_counts_equal_weights():
    for k in (1, 3, 10):
        log_w = torch.full((10,), -INF, dtype=torch.float64)
        log_w[:k] = 123.0
        assert effective_sample_size(log_w) == pytest.approx(k)
    w = log_weights(30).exp()
    assert effective_sample_size(w.log() - 1e5) == pytest.approx(float(w.sum() ** 2 / (w**2).sum()), rel=1e-6)
    assert effective_sample_size(torch.full((3,), -INF)) == 0.0


# The population --------------------------------------------------------------------------------------------------------------------


def test_states_and_ancestors_stay_together():
    population, g = Population(200, threshold=0.9, generator=generator()), generator(1)
    start = torch.arange(200)
    state = start.clone()
    for _ in range(30):
        population.reweight(0.7 * torch.randn(200, generator=g, dtype=torch.float64))
        if (index := population.resample()) is not None:
            state = state[index]
    assert population.resamplings > 3
    assert torch.equal(population.roots, state)  # the state is its own ancestor
    assert population.ancestors == len(state.unique()) < 200


def test_resampling_waits_for_the_threshold_and_evens_the_weights_out():
    population = Population(100, threshold=0.5, generator=generator())
    population.reweight(torch.zeros(100))
    assert population.resample() is None
    half = torch.zeros(100)
    half[40:] = -50.0
    population.reweight(half)
    assert population.ess[-1] == pytest.approx(40)
    assert population.resample() is not None
    assert torch.equal(population.log_w, torch.zeros(100, dtype=torch.float64))
    never = Population(100, threshold=0.0)
    never.reweight(-1e3 * torch.rand(100, generator=generator()))
    assert never.resample() is None


def test_resampling_does_not_change_the_estimate_of_log_z():
    population = Population(64, threshold=1.1, generator=generator())
    population.reweight(log_weights(64))
    before = population.log_z
    assert population.resample() is not None
    assert population.log_z == pytest.approx(before, abs=1e-12)
    assert before == pytest.approx(float(log_weights(64).logsumexp(0)) - math.log(64))


def test_a_particle_whose_weight_is_no_number_never_wins_and_is_counted_once():
    population = Population(10, threshold=1.1, generator=generator())
    increment = torch.zeros(10)
    increment[3], increment[7] = NAN, -INF
    population.reweight(increment)
    population.reweight(increment)  # a broken particle stays broken until it is resampled away
    assert population.lost == 1
    assert population.log_w[3] == population.log_w[7] == -INF
    later = torch.zeros(10)
    later[3], later[7] = 1e3, 1e3
    population.reweight(later)
    index = population.resample()
    assert 3 not in index and 7 not in index
    assert population.log_z == pytest.approx(math.log(8 / 10))


def test_a_particle_of_infinite_weight_is_lost_like_one_of_no_number():
    # p^a q^-b where q vanishes: no finite population can represent it, and one such weight would win everything.
    population = Population(10, threshold=1.1, generator=generator())
    increment = torch.zeros(10)
    increment[3] = INF
    population.reweight(increment)
    assert population.lost == 1 and math.isfinite(population.log_z)
    assert 3 not in population.resample()


@pytest.mark.parametrize("value", [NAN, -INF])
def test_a_population_that_is_lost_altogether_says_so(value):
    population = Population(5)
    with pytest.raises(FloatingPointError, match="All 5 particles have weight zero .* use more particles or steps"):
        population.reweight(torch.full((5,), value))


def test_weights_are_kept_in_float64_whatever_comes_in():
    population = Population(4)
    for _ in range(1000):
        population.reweight(torch.full((4,), 1e-3, dtype=torch.float32))
    assert population.log_w.dtype == torch.float64
    assert population.log_z == pytest.approx(1000 * float(torch.tensor(1e-3)), abs=1e-10)


# log Z on a chain of Gaussians -------------------------------------------------------------------------------------------------------


def gaussian_chain(particles, seed, steps=8, threshold=0.5):
    """Sequential Monte Carlo from N(0, 1) through N(0, v_k) to exp(-x²/0.08), unnormalised: Z = 0.2. Moves mix half."""
    g = generator(seed)
    v = torch.linspace(0, math.log(0.04), steps + 1, dtype=torch.float64).exp()
    x = torch.randn(particles, dtype=torch.float64, generator=g)
    population = Population(particles, threshold=threshold, generator=g)
    for old, new in zip(v, v[1:], strict=False):
        population.reweight(-(x**2) / (2 * new) + x**2 / (2 * old))
        if (index := population.resample()) is not None:
            x = x[index]
        x = (x + new.sqrt() * torch.randn(particles, dtype=torch.float64, generator=g)) / math.sqrt(2)  # leaves N(0, new)
    return population, x


@functools.cache
def runs(threshold):
    return [gaussian_chain(200, seed, threshold=threshold)[0] for seed in range(300)]


@pytest.mark.parametrize("threshold", [0.0, 0.5, 0.9])
def test_the_estimate_of_z_is_unbiased(threshold):
    ratios = torch.tensor([math.exp(population.log_z) / 0.2 for population in runs(threshold)], dtype=torch.float64)
    assert abs(float(ratios.mean()) - 1) < 4 * float(ratios.std()) / math.sqrt(len(ratios))


@pytest.mark.parametrize("threshold", [0.0, 0.5, 0.9])
def test_the_error_bar_of_log_z_is_the_spread_over_repeated_runs(threshold):
    errors = torch.tensor([population.log_z - math.log(0.2) for population in runs(threshold)], dtype=torch.float64)
    bars = torch.tensor([population.log_z_error for population in runs(threshold)], dtype=torch.float64)
    assert (threshold == 0) == all(population.resamplings == 0 for population in runs(threshold))
    # 300 runs know their own spread to 8 % (two standard errors). After many resamplings bars are wide, never much too narrow.
    assert 0.85 < float(bars.square().mean().sqrt() / errors.square().mean().sqrt()) < 1.6
    # Two standard errors cover 95 %; Hoeffding's slack, at odds of one in ten thousand, is for the finite number of runs.
    covered = float((errors.abs() < 2 * bars).double().mean())
    assert covered > 0.954 - math.sqrt(math.log(1 / 1e-4) / (2 * len(errors)))


def test_without_resampling_the_error_bar_is_that_of_a_mean():
    population = Population(500)
    w = log_weights(500, scale=0.5).exp()
    population.reweight(w.log())
    assert population.log_z_error == pytest.approx(float(w.std() / w.mean()) / math.sqrt(500), rel=1e-6)


# What comes out --------------------------------------------------------------------------------------------------------------------


@dataclass
class At(State):
    x: Tensor


class Given(Chain):
    """Particles that are where they are, with the weights that they have."""

    road, formula, device, batch_size = "given", "g", torch.device("cpu"), 1000

    def __init__(self, x, log_w):
        self.x, self.log_w = x, log_w

    def start(self, n, generator):
        return At(self.x), self.log_w

    def step(self, state, log_w, generator):
        raise AssertionError("They have ended.")

    def done(self, state):
        return torch.ones(len(state), dtype=torch.bool)

    def end(self, state, log_w, generator):
        return state.x, None


def ended(x, log_w, n, **selection):
    *_, last = run(Given(x, log_w), n, "given", Settings(generator=generator()), selection=Selection(len(x), **selection))
    return last.samples


@pytest.mark.parametrize("threshold", [0.0, 1.0])
def test_samples_are_the_particles_in_the_shares_of_their_weights(threshold):
    x = torch.randn(1000, 1, dtype=torch.float64, generator=generator(1))
    log_w = 0.8 * x[:, 0]  # N(0, 1) tilted: N(0.8, 1)
    w = log_w.softmax(0)
    samples = ended(x, log_w, 1000, threshold=threshold)
    counts = torch.stack([(samples.x == value).sum() for value in x])
    assert len(samples) == 1000 and samples.log_weights is None
    assert ((counts - 1000 * w).abs() < 1).all()
    assert samples.log_z == pytest.approx(float(log_w.logsumexp(0)) - math.log(1000))


def test_weighted_particles_are_all_of_them_as_they_were():
    x = torch.randn(1000, 1, dtype=torch.float64, generator=generator(1))
    weighted = ended(x, 0.8 * x[:, 0], 10, threshold=0.0, resample=False)
    assert len(weighted) == 1000 and torch.equal(weighted.x, x)
    torch.testing.assert_close(weighted.log_weights.exp(), (0.8 * x[:, 0]).softmax(0))
    assert float(weighted.log_weights.exp().sum()) == pytest.approx(1)


def test_samples_come_in_random_order():
    x = ended(torch.arange(1000.0), torch.zeros(1000), 1000).x
    assert torch.equal(x.sort().values, torch.arange(1000.0))
    # The first half of a random order holds half of the small numbers: hypergeometric, standard deviation 8.
    assert abs(int((x[:500] < 500).sum()) - 250) < 5 * 8


def test_the_verdict_tells_a_collapsed_population_from_a_sound_one():
    def verdict(log_w, roots=None, **known):
        population = Population(len(log_w))
        population.reweight(log_w)
        population.roots = population.roots if roots is None else roots
        diagnostics = Diagnostics(road="test")
        diagnostics.observe(population, **known)
        return str(diagnostics.verdict)

    n = 1000
    assert verdict(torch.zeros(n)).startswith("sound: the weight comes from 1000 of 1000")
    assert verdict(torch.zeros(n), torch.arange(n) % 3).startswith("COLLAPSED: the 1000 particles descend from 3")
    assert verdict(torch.zeros(n), torch.arange(n) % 18).startswith("strained: the weight comes from 18 of 1000")
    # Everyone has descendants, but most of the weight is with few families.
    heavy = torch.where(torch.arange(n) < 500, torch.arange(n), torch.arange(n) % 5)
    assert verdict(torch.zeros(n), heavy).startswith("strained: the weight comes from 19")
    assert verdict(20.0 * (torch.arange(n) == 0)).startswith("COLLAPSED: the 1000 particles are worth 1 ")
    assert verdict(20.0 * (torch.arange(n) == 0), selected=False).startswith("biased")
    assert verdict(3.0 * (torch.arange(n) < 100)).startswith("sound: the weight comes from 205")


def test_printing_a_result_shows_what_a_run_knows():
    population, _ = gaussian_chain(200, 0)
    diagnostics = Diagnostics(road="test", formula="p ⊗ q", steps=8, notes=["a note"])
    diagnostics.observe(population)
    text = repr(Samples(torch.zeros(3, 2), diagnostics=diagnostics))
    for part in (
        "3 × (2,)",
        "p ⊗ q",
        "effective share",
        "ancestors",
        f"{population.log_z:.3f} ±",
        "a note",
        "verdict",
        "sound",
    ):
        assert part in text, part
