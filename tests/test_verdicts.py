"""What a run knows about itself, and says: paths that disagree, bad terminal heads, inner log Z, negative powers, near-copies."""

import math

import pytest
import torch
from diffusers_models import exact_model, tight_rings
from gflownet_models import ENVIRONMENTS, network_policy, perfect
from gfn.gym import HyperGrid

import sculpt
from sculpt.actions.paths import disagreement, path_ratios
from sculpt.diagnostics import Diagnostics
from sculpt.formula import Posterior, Product
from sculpt.gflownet import exact


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def grid():
    return ENVIRONMENTS["grid-2d"]()


def pretending(scale=2.0, m=2):
    """Exact flows of backward policies that are not told: the paths to one state disagree."""
    env = grid()
    backwards = [network_policy(env, i, is_backward=True, scale=scale) for i in range(m)]
    return [sculpt.GFlowNet(env, model.policy, name=model.name) for model in perfect(env, m, backwards=backwards)]


def everywhere(models):
    """All finished samples, and their log-probabilities under all models."""
    graph = exact.dag(models[0])
    x = graph.states[graph.allowed[:, -1]]
    return x, torch.stack([exact.terminal_distribution(model) for model in models], -1)[graph.index(x)].log()


# Paths that disagree


def test_averages_over_paths_come_to_the_true_log_probabilities_and_one_path_does_not():
    models = pretending()
    x, log_p = everywhere(models)
    one, many = (path_ratios(models, x, generator(), paths=paths) for paths in (1, 400))
    assert (one - log_p).abs().mean() > 0.3
    assert (many - log_p).abs().mean() < 0.1


def test_as_many_paths_are_taken_as_their_spread_asks_for():
    models = pretending()
    x, log_p = everywhere(models)
    found = models[0].log_ratios(models, x, generator())
    assert (found - log_p).abs().mean() < 0.2
    converged = perfect(grid(), 2)
    x, log_p = everywhere(converged)
    torch.testing.assert_close(converged[0].log_ratios(converged, x, generator()), log_p)


def test_rejection_averages_over_paths_and_claims_what_it_has():
    models = pretending()
    p, q = models
    samples = (p & q).sample(2000, sculpt.Rejection(), generator=generator(), progress=False)
    target = exact.target(Posterior(2, (0, 1)), [exact.terminal_distribution(model) for model in models])
    found = torch.bincount(exact.dag(p).index(samples.x), minlength=len(target)).double() / 2000
    draws = torch.multinomial(target, 2000 * 50, True, generator=generator(1)).reshape(50, -1)
    floor = torch.stack([torch.bincount(row, minlength=len(target)) / 2000 - target for row in draws]).abs().sum(1)
    assert float((found - target).abs().sum()) < 1.5 * float(floor.mean())
    assert samples.verdict.level == "sound" and "Two looks at one sample differ" in samples.verdict.reason
    once = (p & q).sample(500, sculpt.Rejection(paths=1), generator=generator(), progress=False)
    assert once.verdict.level == "doubtful" and once.diagnostics.apart > 0.3


def test_rejection_of_converged_models_is_exact():
    p, q = perfect(grid(), 2)
    samples = (p & q).sample(200, sculpt.Rejection(), generator=generator(), progress=False)
    assert samples.verdict.level == "exact" and samples.diagnostics.apart < 1e-6


@pytest.mark.parametrize(("paths", "error"), [(0, "paths"), (1.5, "paths"), (-3, "paths")])
def test_numbers_of_paths_that_are_none_are_refused(paths, error):
    with pytest.raises((ValueError, TypeError), match=error):
        sculpt.Rejection(paths=paths)


def test_paths_and_a_classifier_are_one_too_many():
    with pytest.raises(ValueError, match="paths are averaged over where there is no classifier"):
        sculpt.Rejection(lambda x: x, paths=3)


def test_diffusion_models_have_no_paths_of_actions():
    p, q = (exact_model(mixture, name=name) for mixture, name in zip(tight_rings()[:2], "pq", strict=True))
    with pytest.raises(ValueError, match="paths: .* has no paths of actions"):
        p.log_ratios([p, q], torch.zeros(1, 2), paths=2)


def test_what_disagreement_says_is_what_tracked_densities_are_off_by():
    models = pretending()
    x, log_p = everywhere(models)
    formula = Posterior(2, (0, 1))
    ell = torch.stack([path_ratios(models, x, generator(seed)) for seed in range(400)])
    off = formula.value(ell).logsumexp(0) - math.log(400) - formula.value(log_p)
    p = exact.target(formula, [exact.terminal_distribution(model) for model in models])[exact.dag(models[0]).index(x)]
    chosen = torch.multinomial(p, 500, True, generator=generator(1))
    found = disagreement(formula, models, x[chosen], generator(2))
    assert found.apart == pytest.approx(float(off[chosen].std()), rel=0.35)
    assert found.shift == pytest.approx(abs(float(off[chosen].mean())), rel=0.35, abs=0.05)
    assert "path ratios to one state differ" in found.said
    converged = perfect(grid(), 2)
    assert disagreement(formula, converged, x, generator()).apart == 0


def test_tracked_densities_of_paths_that_disagree_are_doubted():
    p, q = pretending(4.0)
    samples = (p & q).sample(200, sculpt.Tracked(particles=400), generator=generator(), progress=False)
    assert samples.verdict.level == "doubtful" and "two looks at the log-densities" in samples.verdict.reason
    p, q = perfect(grid(), 2)
    assert (p & q).sample(200, sculpt.Tracked(particles=400), generator=generator(), progress=False).verdict.level == "sound"


# What weights cannot see


def test_a_terminal_head_that_the_densities_contradict_is_doubted():
    models = perfect(grid(), 2)

    class Wrong(exact.ExactClassifier):
        def terminal(self, x):
            log_p = super().terminal(x)
            return torch.log_softmax(log_p + 2.0 * torch.randn(log_p.shape, generator=generator(3), dtype=log_p.dtype), -1)

        def log_h_terminal(self, x, labels, odds=None):
            return self.terminal(x)[:, list(labels[1:])].sum(-1)

    p, q = models
    good, bad = (
        (p & q).sample(200, sculpt.Guided(head(models), correct=True, particles=200), generator=generator(), progress=False)
        for head in (exact.ExactClassifier, Wrong)
    )
    assert good.verdict.level == "sound"
    assert bad.verdict.level == "doubtful" and "the terminal head differs by" in bad.verdict.reason


def test_what_is_composed_of_a_composition_is_no_more_trusted_than_that_is():
    p, q, r = pretending(4.0, 3)
    outer = ((p & q) - r).sample(100, sculpt.Tracked(particles=200), generator=generator(), progress=False)
    assert outer.verdict.level == "doubtful" and outer.verdict.reason.startswith("it rests on log Z of p0 ⊗ p1")
    p, q, r = perfect(grid(), 3)
    samples = ((p & q) - r).sample(100, sculpt.Tracked(particles=400), generator=generator(), progress=False)
    inner = (p & q).sample(1, sculpt.Tracked(particles=400), generator=generator(1), progress=False)
    assert samples.diagnostics.log_z_error > 0.5 * inner.diagnostics.log_z_error > 0


def test_mass_that_no_particle_came_to_is_missed_where_a_density_is_divided_by():
    env = HyperGrid(ndim=2, height=20, validate_modes=False)
    hills = [lambda s, c=c: -((s.double() - c) ** 2).sum(-1) / 20 for c in (3.0, 16.0)]
    p, q = (exact.solve(env, hill, name=name) for hill, name in zip(hills, "pq", strict=True))
    formula = Product((1.5, -0.5))
    d = [exact.terminal_distribution(model) for model in (p, q)]
    log_z = float(formula.value(torch.stack(d, -1).log()).logsumexp(0))
    for seed in range(2):
        samples = sculpt.product([p, q], [1.5, -0.5]).sample(
            200, sculpt.Tracked(particles=200), generator=generator(seed), progress=False
        )
        # All particles leave at once, with equal weights: only the second look sees the nats that are missing.
        assert log_z - samples.log_z > 1.5 and samples.diagnostics.ess[-1] > 199
        assert samples.verdict.level == "doubtful" and samples.diagnostics.log_z_error > 0.8 * (log_z - samples.log_z)


def test_negative_powers_are_looked_at_with_half_the_steps_too():
    p, q, _ = (exact_model(mixture, name=name) for mixture, name in zip(tight_rings(), "pqr", strict=True))
    composition = sculpt.product([p, q], [1, -0.5])
    few = composition.sample(100, sculpt.Tracked(particles=500), steps=24, generator=generator(), progress=False).diagnostics
    many = composition.sample(100, sculpt.Tracked(particles=500), steps=128, generator=generator(), progress=False).diagnostics
    assert few.slip > many.slip and few.log_z_error >= few.slip
    # Other formulas cost nothing more.
    plain = (p & q).sample(100, sculpt.Tracked(particles=500), steps=24, generator=generator(), progress=False).diagnostics
    assert plain.slip < few.slip


# The rules


def told(**known):
    usual = {"particles": 1000, "ess": [900.0], "ancestors": 800, "families": 500.0, "log_z": 0.0, "log_z_error": 0.1}
    return Diagnostics("test", **(usual | known)).verdict


@pytest.mark.parametrize(
    ("known", "level", "reason"),
    [
        ({}, "sound", "500 of 1000"),
        ({"samples": 2000}, "sound", "500 of 1000"),
        ({"samples": 3000}, "strained", "3000 samples were asked of them"),
        ({"lost": 5}, "sound", ""),
        ({"lost": 50}, "doubtful", "50 of 1000 particles were lost"),
        ({"slip": 0.5}, "sound", ""),
        ({"slip": 1.5}, "doubtful", "may have moved log Z by 1.5 nats"),
        ({"slip": math.nan}, "doubtful", "may have moved log Z"),
        ({"apart": 0.6}, "doubtful", "differ by 0.6 nats"),
        ({"apart": math.inf}, "doubtful", "differ by inf nats"),
        ({"families": 15.0, "ancestors": 30}, "strained", "15 of 1000"),
        ({"families": 1.0, "ancestors": 1}, "collapsed", "descend from 1"),
        ({"doubt": "of something"}, "doubtful", "of something"),
    ],
)
def test_the_verdict_follows_from_what_the_run_knows(known, level, reason):
    verdict = told(**known)
    assert verdict.level == level and reason in verdict.reason


def test_lost_particles_are_doubted():
    class Broken(torch.nn.Module):
        def __init__(self, network):
            super().__init__()
            self.network = network

        def forward(self, z, *time):
            out = self.network(z, *time)
            return torch.where(z[:, :1] > 1.0, torch.nan, out)

    p, q = (exact_model(mixture, name=name) for mixture, name in zip(tight_rings()[:2], "pq", strict=True))
    p = sculpt.Diffusion(Broken(p.model), p.scheduler, p.shape, name="p")
    with pytest.warns(UserWarning, match="not finite"):
        samples = (p & q).sample(50, sculpt.Tracked(particles=200), steps=16, generator=generator(), progress=False)
    assert samples.diagnostics.lost > 2 and samples.verdict.level in ("doubtful", "collapsed")
