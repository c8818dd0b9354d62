"""Compositions seen through noise: the detail level, the referee that nobody trained, and particles that go alone."""

import math

import diffusers
import pytest
import torch
from diffusers_models import exact_model, scheduler_of, sixteen_dimensions, three_rings, tight_rings
from fields import Fields
from oracles import GaussianMixture
from torch import nn

import sculpt
from sculpt.diffusion import solved
from sculpt.diffusion.detail import detail_level, is_heuristic, painters
from sculpt.diffusion.referee import Referee
from sculpt.diffusion.solved import Remembering
from sculpt.diffusion.together import denoise_all
from sculpt.formula import Mixture, Nested, Posterior, PowerMean, Product


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# A field of many numbers ------------------------------------------------------------------------------------------------------------

ONE, TWO = ([0.4, 0.4, 0.2, 1e-12], [0.1, 0.4, 1e-12, 0.5])


def shares_of(formula):
    """With patterns so far apart, all that the observers see is which one it is."""
    w = formula.value(torch.tensor([ONE, TWO], dtype=torch.float64).T.log()).exp()
    return w / w.sum()


@pytest.mark.parametrize(("labels", "particles"), [((0, 1), 128), ((0, 0), 128), ((1, 0), 64)])
def test_proportions_in_three_thousand_dimensions_are_the_exact_ones(labels, particles):
    models = [Fields("one", ONE), Fields("two", TWO)]
    composition, want, n, found = sculpt.posterior(models, labels), shares_of(Posterior(2, labels)), 0, torch.zeros(4)
    errors = []
    for seed in range(4):
        road = sculpt.Tracked(particles=particles, detail=2.0)
        samples = composition.sample(particles, road, steps=20, generator=generator(seed), progress=False)
        found += torch.bincount(models[0].which(samples.x), minlength=4)
        n += samples.diagnostics.families
        errors.append(samples.log_z)
    # As many independent draws as families; a chain settles on a pattern early, so its descendants are copies.
    allowed = 4 * (want * (1 - want) / n).sqrt() + 0.03
    assert ((found / found.sum() - want).abs() < allowed).all(), (found / found.sum(), want)


def test_the_level_is_found_from_the_models_and_is_where_their_ratio_begins_to_spread():
    models = [Fields("one", ONE), Fields("two", TWO)]
    level = detail_level(models)
    assert 0.3 < level < 8 and level == detail_level(models[::-1])
    # Models that hardly differ, and those of few dimensions, are seen as they are.
    assert detail_level([Fields("a", ONE), Fields("b", [0.4, 0.4, 0.1999, 1e-4])]) == 0
    assert detail_level([exact_model(mixture, name=name) for mixture, name in zip(three_rings(), "pqr", strict=True)]) == 0


class Apart(Fields):
    """White fields around means whose log-ratio spreads by ``rate(s)`` nats in an e-fold of noise."""

    def __init__(self, name, rate, sign):
        super().__init__(name, [1, 1e-300, 1e-300, 1e-300])
        self.rate, self.sign = rate, sign

    def denoise(self, z, s):
        return super().denoise(z, s) + self.sign * float(s) * math.sqrt(self.rate(float(s)) / z[0].numel()) / 2


@pytest.mark.parametrize(
    ("rate", "level"),
    [
        (lambda s: 12 * math.exp(-2 * math.log(s / 0.8) ** 2), 0.8 * math.exp(-math.sqrt(math.log(12 / 0.3) / 2))),
        (lambda s: 3 / s, 1.0),
        (lambda s: 1.5, 0.0),
    ],
    ids=["prompts of one network agree on details", "what was trained apart differs by them", "hardly different"],
)
def test_the_level_is_where_the_models_no_longer_differ_or_else_where_they_begin_to(rate, level):
    models = [Apart(f"{name} of {level}", rate, sign) for name, sign in (("one", 1), ("two", -1))]
    assert detail_level(models) == pytest.approx(level, rel=0.1)


def test_what_is_finer_is_painted_by_the_anchor_alone_and_by_survivors_only():
    one, two = Fields("one", ONE), Fields("two", TWO)
    (one & two).sample(8, sculpt.Tracked(particles=64, detail=2.0), steps=30, generator=generator(), progress=False)
    above, calls = 21, one.calls
    assert two.calls == calls - 9 * 8  # the rest of the steps
    assert two.calls >= 64 * above


def test_an_overlap_of_images_is_told_by_denoising_errors():
    models = [Fields("one", ONE), Fields("two", TWO)]
    data = [model.draw(100, generator(i)) for i, model in enumerate(models)]
    found = sculpt.overlap(models, data=data, generator=generator())
    assert "denoising errors, seen through noise of s_d=" in found.source
    p = torch.tensor([ONE, TWO], dtype=torch.float64)
    exact = float((p * (p / p.mean(0)).log()).sum()) / 2
    assert found.js == pytest.approx(exact, abs=0.08)


def test_the_anchor_can_be_chosen_and_is_told():
    one, two = Fields("one", ONE), Fields("two", TWO)
    road = sculpt.Tracked(particles=16, detail=2.0, anchor=two)
    samples = (one & two).sample(4, road, steps=12, generator=generator(), progress=False)
    assert two.calls > one.calls
    assert any("s_d=2" in note and "two paints alone" in note for note in samples.diagnostics.notes)


@pytest.mark.parametrize("level", [100.0, 0.001])
def test_a_level_that_no_model_covers_is_refused(level):
    with pytest.raises(ValueError, match="is a noise level that all models cover, between 0.01 and 80"):
        (Fields("one", ONE) & Fields("two", TWO)).sample(1, sculpt.Tracked(particles=16, detail=level), progress=False)


def test_families_without_noise_levels_have_no_detail(perfect_pair):
    with pytest.raises(ValueError, match="detail: .* has no noise levels to look through"):
        perfect_pair.sample(1, sculpt.Tracked(detail=1.0), progress=False)


@pytest.fixture
def perfect_pair():
    from gflownet_models import ENVIRONMENTS, network_policy

    env = ENVIRONMENTS["grid-2d"]()
    p, q = (sculpt.GFlowNet(env, network_policy(env, seed), name=name) for seed, name in enumerate("pq"))
    return p & q


# Who paints ---------------------------------------------------------------------------------------------------------------------

ELL = torch.tensor([[0.0, -1.0, -3.0], [-2.0, 0.5, 0.0]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("formula", "rows"),
    [
        (Posterior(3, (1, 0, 2)), [[0, 1, 0]] * 2),
        (Nested(Posterior(2, (1, 0)), [Mixture([1.0]), Posterior(2, (1, 0))], [[0], [1, 2]]), [[0, 0, 1]] * 2),
        (Nested(Posterior(2, (0, 1)), [Mixture([1, 1]), Mixture([1.0])], [[0, 1], [2]]), None),
        (Product([1.0, 0.5, -0.25]), [[1, 0.5, -0.25]] * 2),
    ],
    ids=repr,
)
def test_the_first_label_paints_one_part_of_a_mixture_and_all_of_a_product(formula, rows):
    want = torch.cat([torch.softmax(ELL[:, :2], -1), torch.zeros(2, 1)], -1) if rows is None else torch.tensor(rows)
    torch.testing.assert_close(painters(formula, ELL), want.double())
    drawn = torch.stack([painters(formula, ELL, generator(seed)) for seed in range(400)])
    if rows is None:
        assert ((drawn == 0) | (drawn == 1)).all() and (drawn.sum(-1) == 1).all()
    torch.testing.assert_close(drawn.mean(0), want.double(), atol=0.1, rtol=0)
    assert is_heuristic(formula) == isinstance(formula, Product)


def test_a_power_mean_of_minus_one_of_two_models_is_their_posterior():
    ell = ELL[:, :2]
    torch.testing.assert_close(painters(PowerMean(-1, [1, 1]), ell), painters(Posterior(2, (0, 1)), ell))
    assert not is_heuristic(PowerMean(-1, [1, 1])) and is_heuristic(PowerMean(-2, [1, 1]))


# The referee ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mixtures", "s"), [(three_rings(), 0.3), (three_rings(), 1.0), (tight_rings(), 0.3), (sixteen_dimensions(), 0.3)]
)
def test_the_referee_knows_log_ratios_as_well_as_it_says(mixtures, s):
    models = [exact_model(mixture, name=str(i)) for i, mixture in enumerate(mixtures)]
    z = mixtures[0].draw(300, generator(1), s**2)
    exact = torch.stack([mixture.log_prob(z, s**2) for mixture in mixtures], -1)
    referee = Referee(models, s, 4096, error=0.15)
    error = (referee(z, generator(2)) - (exact - exact[:, :1]))[:, 1:]
    assert error.square().mean().sqrt() < 1.5 * referee.reached
    assert error.mean().abs() < 0.05 and referee.calls <= 256


def test_the_referee_spends_calls_where_they_decide():
    mixtures = three_rings()[:2]
    models, z = [exact_model(mixture) for mixture in mixtures], mixtures[0].draw(200, generator(1), 0.09)
    referee = Referee(models, 0.3, 4096, error=0.1)
    referee(z, generator(2))
    everywhere = referee.calls
    referee(z, generator(2), lambda ratios: (torch.arange(len(ratios)) < 50).double())
    assert referee.calls < 0.6 * everywhere


def test_rejection_decides_by_denoising_errors_where_nothing_else_is_known():
    models = [Fields("one", ONE, d=768), Fields("two", TWO, d=768)]
    samples = (models[0] & models[1]).sample(
        100, sculpt.Rejection(anchor=0, detail=2.0), steps=12, generator=generator(), progress=False
    )
    want = shares_of(Posterior(2, (0, 1)))
    found = torch.bincount(models[0].which(samples.x), minlength=4) / 100
    assert (found - want).abs().max() < 0.15
    assert any("denoising errors" in note for note in samples.diagnostics.notes)


# One particle -----------------------------------------------------------------------------------------------------------------------


class Conditional(nn.Module):
    """A network of one shape and many conditions, which counts its calls and what goes through it."""

    def __init__(self):
        super().__init__()
        self.weight, self.calls, self.rows = nn.Parameter(torch.tensor(0.1)), 0, 0

    def forward(self, x, t, c):
        self.calls, self.rows = self.calls + 1, self.rows + len(x)
        return self.weight * (x - c[:, :, None, None])


def prompts(k=2, shape=(4, 16, 16), **options):
    network = Conditional()
    condition = [{"c": torch.full((1, 4), float(i))} for i in range(k)]
    first = sculpt.Diffusion(network, scheduler_of("linear"), shape, condition=condition[0], name="p0", **options)
    models = [first] + [first.with_condition(name=f"p{i}", **condition[i]) for i in range(1, k)]
    network.calls = network.rows = 0
    return network, models


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_models_that_share_a_network_are_one_call(scale):
    null = None if scale == 1 else {"c": torch.zeros(1, 4)}
    network, models = prompts(3, null_condition=null, guidance_scale=scale)
    z, s = torch.randn(5, 4, 16, 16), torch.tensor(2.0, dtype=torch.float64)
    D = denoise_all(models, z, s, 1000)
    assert network.calls == 1
    alone = torch.stack([model.denoise(z, s) for model in models], 1)
    torch.testing.assert_close(D, alone)


def test_one_particle_is_as_many_evaluations_as_models_and_half_as_many_calls(recwarn):
    network, models = prompts(2)
    samples = (models[0] & models[1]).sample(1, sculpt.Tracked(particles=1), steps=50, generator=generator(), progress=False)
    assert (network.calls, network.rows) == (50, 100)
    assert samples.verdict.level == "steered" and samples.x.shape == (1, 4, 16, 16)
    assert samples.log_weights is None and samples.log_z is None


def test_latents_go_alone_by_default_and_in_populations_where_they_are_asked_to():
    network, models = prompts(2, shape=(4, 72, 72))
    assert models[0].alone
    samples = (models[0] & models[1]).sample(3, steps=4, generator=generator(), progress=False)
    assert network.rows == 3 * 2 * 4 and samples.verdict.level == "steered" and len(samples) == 3
    samples = (models[0] & models[1]).sample(
        2, sculpt.Tracked(particles=16, detail=0.0), steps=4, generator=generator(), progress=False
    )
    assert samples.diagnostics.particles == 16


@pytest.mark.filterwarnings("ignore")
def test_one_particle_finds_where_both_models_are():
    """In a plane it is seen how good steering alone is: most of the way to the exact mean."""
    models = [exact_model(GaussianMixture([[x, 0.0]], 0.5), name=f"at {x}") for x in (-1.0, 1.0)]
    samples = (models[0] & models[1]).sample(400, sculpt.Tracked(particles=1), steps=40, generator=generator(), progress=False)
    assert samples.x[:, 0].mean().abs() < 0.15 and samples.verdict.level == "steered"
    assert math.isfinite(float(samples.x.std()))


# Solvers of diffusers, for particles that go alone


SOLVERS = ["DDIMScheduler", "DPMSolverMultistepScheduler", "HeunDiscreteScheduler", "FlowMatchEulerDiscreteScheduler"]


def near_fields():
    return [Fields("one", ONE, d=768, contrast=0.1), Fields("two", TWO, d=768, contrast=0.1)]


@pytest.mark.parametrize("name", [*SOLVERS, "EulerAncestralDiscreteScheduler"])
def test_particles_that_go_alone_take_any_solver_of_diffusers(name):
    one, two = near_fields()
    road = sculpt.Tracked(particles=1)
    shares = []
    for solver in (None, getattr(diffusers, name)()):
        samples = (one & two).sample(200, road, steps=50, solver=solver, generator=generator(), progress=False)
        shares.append(torch.bincount(one.which(samples.x), minlength=4).double() / 200)
        assert samples.verdict.level == "steered"
    assert samples.diagnostics.steps == 50 or name == "HeunDiscreteScheduler"
    assert f"steps of {name}" in samples.diagnostics.notes
    # Neither is exact. What both are steered to is the same, and it is not where the models' shares lie.
    assert (shares[0] - shares[1]).abs().max() < 0.15
    assert shares[1][2] + shares[1][3] < 0.15


@pytest.mark.parametrize("name", SOLVERS)
def test_log_densities_follow_the_path_of_a_solver(name, monkeypatch):
    off = []

    class Watched(Remembering):
        def _followed(self, z, v, D):
            ell, S = super()._followed(z, v, D)
            true = torch.stack([model.log_prob(z, float(v) ** 0.5) for model in self.operands], -1)
            off.append((ell[:, 0] - ell[:, 1]) - (true[:, 0] - true[:, 1]))
            return ell, S

    monkeypatch.setattr(solved, "Remembering", Watched)
    one, two = near_fields()
    solver = getattr(diffusers, name)()
    (one & two).sample(64, sculpt.Tracked(particles=1), steps=100, solver=solver, generator=generator(), progress=False)
    # The divergence is known on average over particles only, so the end is worse than the way.
    assert float(torch.stack(off).square().mean(1).sqrt().median()) < 0.8


def test_a_solver_costs_a_call_of_every_model_a_step():
    one, two = near_fields()
    road = sculpt.Tracked(particles=1)
    (one & two).sample(3, road, steps=20, solver=diffusers.DDIMScheduler(), generator=generator(), progress=False)
    assert one.calls == two.calls == 60


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"particles": 16}, "solver: not an option of tracked densities, whose populations"),
        ({"particles": 1, "detail": 1.0}, "detail and corrector need the steps of tracked densities"),
        ({"particles": 1, "corrector": sculpt.ULA()}, "detail and corrector need the steps of tracked densities"),
    ],
)
def test_a_solver_does_not_go_with_what_needs_the_steps_of_tracked_densities(options, error):
    one, two = near_fields()
    with pytest.raises(ValueError, match=error):
        (one & two).sample(2, sculpt.Tracked(**options), steps=8, solver=diffusers.DDIMScheduler(), progress=False)


def test_what_a_long_run_will_cost_is_said_before_it_is_paid(monkeypatch):
    from sculpt.diffusion import tracked

    monkeypatch.setattr(tracked, "LONG", 0.0)
    one, two = near_fields()
    with pytest.warns(
        UserWarning, match=r"64 particles, 20 steps and 2 models take .* evaluations of networks, up to 256 of each"
    ):
        (one & two).sample(4, sculpt.Tracked(particles=64, detail=1.0), steps=20, generator=generator(), progress=False)
    with pytest.warns(
        UserWarning, match=r"2 particles, 20 steps and 2 models take 80 evaluations of networks: about 0 minutes"
    ):
        (one & two).sample(2, sculpt.Tracked(particles=1), steps=20, generator=generator(), progress=False)
