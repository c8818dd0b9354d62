"""The driver: one loop for every chain, on chains whose answers are known."""

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from sculpt.chain import Chain, Progress, Selection, Settings, run
from sculpt.progress import watch
from sculpt.state import State, in_parts


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@dataclass
class Inner(State):
    a: Tensor


@dataclass
class Outer(State):
    x: Tensor
    caches: tuple
    inner: Inner
    nothing: Tensor | None = None


def outer(n):
    x = torch.arange(n)
    return Outer(x, (x.double()[:, None] * 2, (x * 3,)), Inner(x * 4))


def equal(a, b):
    return (
        torch.equal(a.x, b.x)
        and torch.equal(a.caches[0], b.caches[0])
        and torch.equal(a.caches[1][0], b.caches[1][0])
        and torch.equal(a.inner.a, b.inner.a)
    )


# States ---------------------------------------------------------------------------------------------------------------


def test_a_state_is_indexed_and_joined_as_a_whole():
    state, index = outer(6), torch.tensor([4, 0, 0, 5])
    part = state[index]
    assert isinstance(part, Outer) and isinstance(part.inner, Inner) and len(part) == 4 and part.nothing is None
    for tensor, factor in ((part.x, 1), (part.caches[0][:, 0], 2), (part.caches[1][0], 3), (part.inner.a, 4)):
        assert torch.equal(tensor.long(), index * factor)
    assert equal(State.cat([state[:2], state[2:]]), state)


def test_parts_of_a_state_that_disagree_in_length_are_named():
    with pytest.raises(ValueError, match="parts of a Outer disagree in length: x 3, caches 3, inner 2. .*along its first axis"):
        Outer(torch.zeros(3), (torch.zeros(3),), Inner(torch.zeros(2)))


def test_a_function_in_parts_is_the_function():
    x = torch.randn(23, 3, generator=generator())
    assert torch.equal(in_parts(lambda x: x * 2, 5, x), x * 2)
    both = in_parts(lambda x, y: (x + y, x.sum(1)), 7, x, 2 * x)
    assert torch.equal(both[0], 3 * x) and torch.equal(both[1], x.sum(1))


# The driver -----------------------------------------------------------------------------------------------------------


@dataclass
class Walk(State):
    start: Tensor
    """which particle of the start this one descends from"""
    left: Tensor
    at: Tensor


def steps(n, generator):
    return 2 * torch.rand(n, generator=generator, dtype=torch.float64) - 1


class Walking(Chain):
    """Particle i makes i % 3 + 1 steps of U(-1, 1) and then stands still. Its weight doubles with each step to the right."""

    road, device, batch_size = "walk", torch.device("cpu"), 1000
    weighted, calls = True, 0

    def start(self, n, generator):
        i = torch.arange(n)
        return Walk(i, i % 3 + 1, torch.zeros(n, dtype=torch.float64)), torch.zeros(
            n, dtype=torch.float64
        ) if self.weighted else None

    def step(self, state, log_w, generator):
        self.calls += 1
        assert (state.left > 0).all() and len(log_w) == len(state) and len(state) <= self.batch_size
        move = steps(len(state), generator)
        increment = math.log(2) * (move > 0) if self.weighted else None
        return Walk(state.start, state.left - 1, state.at + move), increment

    def done(self, state):
        return state.left == 0

    def end(self, state, log_w, generator):
        return torch.stack([state.start.double(), state.at], -1), None


def ended(chain, n, selection=None, seed=0):
    *way, last = run(chain, n, "w", Settings(generator=generator(seed)), selection=selection)
    return way, last.samples


def test_particles_end_when_they_are_done_and_keep_their_place():
    chain = Walking()
    chain.weighted = False
    way, samples = ended(chain, 99)
    assert torch.equal(samples.x[:, 0], torch.arange(99.0, dtype=torch.float64)) and samples.log_weights is None
    assert [progress.ended for progress in way] == [0, 0, 33, 66, 99] and chain.calls == 3
    # In the first step all draw, in the second those that are left.
    g = generator()
    first, second = steps(99, g), steps(66, g)
    expected = first.clone()
    expected[torch.arange(99) % 3 > 0] += second
    assert torch.equal(samples.x[::3, 1], first[::3]) and torch.equal(samples.x[1::3, 1], expected[1::3])
    assert samples.diagnostics.particles is None and samples.verdict.level == "sound"


def test_a_batch_size_cuts_a_step_into_parts_and_leaves_the_population_one():
    whole, parts = Walking(), Walking()
    parts.batch_size = 7
    samples = [ended(chain, 50, Selection(particles=50, threshold=0.0, resample=False))[1] for chain in (whole, parts)]
    assert parts.calls > 3 and samples[0].diagnostics.particles == samples[1].diagnostics.particles == 50
    # Parts draw one after another from one generator: as the whole does, as long as all walk.
    assert torch.equal(samples[0].x[::3], samples[1].x[::3])


def test_weights_without_a_selection_are_there_to_look_at():
    samples = ended(Walking(), 300)[1]
    assert len(samples) == 300 and samples.log_weights is None and samples.diagnostics.ancestors is None
    assert samples.log_z == pytest.approx(math.log((1.5 + 1.5**2 + 1.5**3) / 3), abs=0.1)
    assert samples.verdict.level in ("sound", "biased")


def test_selection_takes_everything_that_a_particle_carries_along():
    chain = Walking()
    samples = ended(chain, 5000, Selection(particles=20_000, threshold=1.0))[1]
    assert samples.diagnostics.log_z == pytest.approx(math.log((1.5 + 1.5**2 + 1.5**3) / 3), abs=0.05)
    start, at = samples.x.long()[:, 0], samples.x[:, 1]
    # The target of particles with k steps: steps to the right twice as likely. They end where their own number says.
    shares = torch.bincount(start % 3, minlength=3) / len(start)
    exact = torch.tensor([1.5, 1.5**2, 1.5**3])
    assert (shares - exact / exact.sum()).abs().max() < 0.03
    for k in range(3):
        own = at[start % 3 == k]
        # A step's mean is 2/3 · 1/2 - 1/3 · 1/2.
        assert float(own.mean()) == pytest.approx((k + 1) / 6, abs=5 * math.sqrt((k + 1) / 3 / len(own)))


@pytest.mark.parametrize(("threshold", "selected"), [(0.0, False), (0.5, False), (1.0, True)])
def test_particles_are_selected_under_the_threshold_that_the_caller_gives(threshold, selected):
    chain = Walking()
    chain.threshold = 0.9  # what the chain itself would take
    diagnostics = ended(chain, 50, Selection(particles=400, threshold=threshold))[1].diagnostics
    assert min(diagnostics.ess[:-1]) > 0.5 * 400 and (diagnostics.ancestors < 400) == selected
    assert ended(chain, 50, Selection(particles=400))[1].diagnostics.ancestors < 400


def test_weighted_particles_are_all_returned_with_weights_that_sum_to_one():
    samples = ended(Walking(), 10, Selection(particles=400, resample=False))[1]
    assert len(samples) == 400 and float(samples.log_weights.exp().sum()) == pytest.approx(1)


def test_the_population_is_by_default_large_enough_for_weights_to_mean_something():
    for n, N in ((10, 2048), (3000, 3000)):
        assert ended(Walking(), n, Selection())[1].diagnostics.particles == N
    with pytest.raises(ValueError, match="A population of particles=5 cannot give n=10"):
        ended(Walking(), 10, Selection(particles=5))


class Losing(Walking):
    def step(self, state, log_w, generator):
        state, increment = super().step(state, log_w, generator)
        return state, torch.where(state.start % 4 == 1, torch.nan, increment)


def test_lost_particles_never_win_and_are_counted_once():
    samples = ended(Losing(), 300, Selection(particles=400, threshold=0.0))[1]
    assert not (samples.x[:, 0] % 4 == 1).any()
    assert samples.diagnostics.notes == ["100 particles were lost to numbers that are not finite"]


class Judged(Walking):
    """The end has the last word."""

    def end(self, state, log_w, generator):
        x, _ = super().end(state, log_w, generator)
        return x, torch.where(state.start % 2 == 0, 0.0, -math.inf).double()


def test_the_end_weighs_too():
    samples = ended(Judged(), 100, Selection(particles=1000, threshold=0.0))[1]
    assert (samples.x[:, 0] % 2 == 0).all()
    assert samples.log_z == pytest.approx(math.log((1.5 + 1.5**2 + 1.5**3) / 6), abs=0.15)


class Started(Walking):
    def start(self, n, generator):
        state, log_w = super().start(n, generator)
        return state, log_w + math.log(5)


def test_the_first_weights_count():
    assert ended(Started(), 300)[1].log_z == pytest.approx(ended(Walking(), 300)[1].log_z + math.log(5))


def test_acceptance_is_z_as_the_anchor_sees_it():
    class Anchored(Walking):
        log_scale = 3.0

    found = ended(Anchored(), 300)[1].diagnostics
    assert (
        found.acceptance == pytest.approx(math.exp(found.log_z - 3.0))
        and ended(Walking(), 300)[1].diagnostics.acceptance is None
    )


def test_the_same_seed_gives_the_same_samples_and_is_written_down():
    options = (500, Selection(threshold=0.9))
    one, two, other = (ended(Walking(), *options, seed=seed)[1] for seed in (3, 3, 4))
    assert torch.equal(one.x, two.x) and not torch.equal(one.x, other.x)
    assert one.diagnostics.seed == 3 and other.diagnostics.seed == 4


def test_a_run_that_is_left_takes_no_further_step():
    chain = Walking()
    way = run(chain, 10, "w", Settings(generator=generator()))
    assert next(way) == Progress("sampling w", 0, None, 0, 10) and chain.calls == 0
    next(way)
    next(way)
    way.close()
    assert chain.calls == 1


def test_a_run_without_samples_at_its_end_is_refused():
    with pytest.raises(RuntimeError, match="ended without samples"):
        watch(iter([Progress("nothing")]), show=False)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Settings(batch_size=0), "batch_size has to be at least 1, got 0"),
        (lambda: Selection(particles=0), "particles has to be at least 1, got 0"),
        (lambda: Selection(threshold=1.5), "between 0 .* and 1; got 1.5"),
        (lambda: Settings(steps=3).refuse("p", "steps", "solver"), "steps: not an option of p"),
    ],
)
def test_wrong_options_fail_where_they_are_made(make, message):
    with pytest.raises(ValueError, match=message):
        make()
