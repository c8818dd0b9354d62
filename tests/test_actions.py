"""Chains that write their samples action by action, alone, tracked and guided, against exact answers."""

import math

import pytest
import torch
from gflownet_models import ENVIRONMENTS, Stairs, arbitrary, correct, furthest, guide, network_policy, perfect, track, unchecked

import sculpt
from sculpt.actions.states import distinct, draw
from sculpt.chain import Settings
from sculpt.classifier.guide import Guide
from sculpt.formula import Mixture, Nested, Posterior, PowerMean, Product
from sculpt.gflownet import exact
from sculpt.gflownet.model import GFlowNet

environments = pytest.mark.parametrize("name", ENVIRONMENTS)
HARMONIC, CONTRAST = Posterior(2, (0, 1)), Posterior(2, (0, 0))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def error(samples, model, target):
    return exact.l1(exact.histogram(model, samples.x, samples.log_weights), target)


@environments
def test_rollouts_sample_the_terminal_distribution(name):
    (model,) = arbitrary(ENVIRONMENTS[name](), 1)
    samples = model.sample(20_000, generator=seeded())
    assert error(samples, model, exact.terminal_distribution(model)) < furthest(len(exact.dag(model).states), 20_000)


def test_trajectories_follow_the_rules_from_the_start_to_the_exit():
    (model,) = arbitrary(Stairs(), 1)
    chain, generator = model.chain(Settings()), seeded()
    state, log_w = chain.start(500, generator)
    assert (state.states == 0).all() and log_w is None
    while (going := ~chain.done(state)).any():
        before = state[going]
        after, _ = chain.step(before, torch.zeros(len(before)), generator)
        climbed = (after.states - before.states)[:, 0]
        actions = torch.where(after.going, climbed - 1, 3)
        assert torch.equal(climbed > 0, after.going)
        assert model.env.states_from_tensor(before.states).forward_masks.gather(1, actions[:, None]).all()
        state.write(going.nonzero()[:, 0], after)
    x, log_w = chain.end(state, torch.zeros(500), generator)
    assert (x >= 3).all() and len(x) == 500 and log_w is None


def test_the_same_seed_gives_the_same_samples_and_the_global_generator_is_left_alone():
    p, q = perfect(ENVIRONMENTS["sets"](), 2)
    classifier = exact.ExactClassifier([p, q])
    roads = [
        lambda generator: p.sample(300, generator=generator),
        lambda generator: p.sample(300, generator=generator, batch_size=77),
        lambda generator: (p & q).sample(300, generator=generator),
        lambda generator: (p & q).sample(300, classifier, generator=generator),
        lambda generator: (p & q).sample(300, sculpt.Guided(classifier, correct=True), generator=generator),
    ]
    state = torch.get_rng_state()
    for road in roads:
        assert torch.equal(road(seeded(3)).x, road(seeded(3)).x) and not torch.equal(road(seeded(3)).x, road(seeded(4)).x)
    assert torch.equal(torch.get_rng_state(), state)


def test_actions_of_probability_zero_are_never_drawn():
    log_p = torch.tensor([[0.0, 1.0, 0.0, 0.0], [0.5, 0.0, 0.5, 0.0]], dtype=torch.float64).log()
    actions = draw(log_p, torch.arange(2).repeat(5000), seeded()).view(-1, 2)
    assert (actions[:, 0] == 1).all() and set(actions[:, 1].tolist()) == {0, 2}


@pytest.mark.parametrize("states", [torch.randint(-2, 3, (400, 4)), torch.randint(0, 2, (400, 5)).float(), torch.randn(50, 2)])
def test_distinct_states_give_back_every_row(states):
    states = states[torch.randint(len(states), (1000,))]
    unique, rows = distinct(states)
    assert torch.equal(unique[rows], states) and len(unique) == len(torch.unique(states, dim=0))


# Tracked densities

FORMULAS = [
    HARMONIC,
    Posterior(2, (0, 0), (0.05, 0.95)),
    Posterior(2, (0, 1, 1)),
    Product((0.5, 0.5)),
    Product((1.0, 1.0)),
    Product((2.0, -0.5)),
    PowerMean(-2.0, (0.3, 0.7)),
    Mixture((0.2, 0.8)),
    Nested(CONTRAST, [HARMONIC, Mixture([1.0])], [(0, 1), (1,)], [-0.7, 0.0]),
    Nested(HARMONIC, [Product((1.0, 1.0)), Mixture([1.0])], [(0, 1), (0,)], [-3.0, 0.0]),
]


@environments
@pytest.mark.parametrize("formula", FORMULAS, ids=str)
def test_tracked_densities_sample_any_formula_and_estimate_its_normaliser(name, formula):
    ps = perfect(ENVIRONMENTS[name](), 2, seed=1)
    phi = formula.value(torch.stack([exact.terminal_distribution(p) for p in ps], -1).log())
    samples = track(formula, ps, 1, particles=8000, resample=False, generator=seeded())
    n = samples.diagnostics.ess[-1]
    # Resampling and unequal weights cost some of the particles' worth: three times less is the allowance.
    assert error(samples, ps[0], phi.softmax(0)) < furthest(int((phi > -math.inf).sum()), n / 3)
    assert abs(samples.log_z - float(phi.logsumexp(0))) < 5 * samples.diagnostics.log_z_error + 1e-9


def test_tracked_densities_do_not_need_a_common_backward_policy():
    env = ENVIRONMENTS["grid-2d"]()
    ps = perfect(env, 2, backwards=[network_policy(env, seed=i, is_backward=True, scale=3.0) for i in range(2)])
    assert ps[0].backward_key != ps[1].backward_key
    for formula in (HARMONIC, Product((1.0, 1.0))):
        phi = formula.value(torch.stack([exact.terminal_distribution(p) for p in ps], -1).log())
        samples = track(formula, ps, 1, particles=20_000, resample=False, generator=seeded())
        assert error(samples, ps[0], phi.softmax(0)) < furthest(36, samples.diagnostics.ess[-1] / 3)
        assert abs(samples.log_z - float(phi.logsumexp(0))) < 5 * samples.diagnostics.log_z_error


def test_the_population_is_one_whatever_the_batch_size():
    ps = perfect(ENVIRONMENTS["sets"](), 2)
    target = exact.target(CONTRAST, [exact.terminal_distribution(p) for p in ps])
    samples = track(CONTRAST, ps, 20_000, batch_size=999, generator=seeded())
    assert samples.diagnostics.particles == 20_000 and samples.log_weights is None
    assert error(samples, ps[0], target) < furthest(len(target), 20_000 / 3)


def test_samples_are_fewer_than_particles_and_in_no_order():
    ps = perfect(ENVIRONMENTS["grid-2d"](), 2)
    samples = track(HARMONIC, ps, 500, particles=5000, generator=seeded())
    assert samples.x.shape == (500, 2) and samples.diagnostics.particles == 5000
    halves = [exact.histogram(ps[0], half) for half in samples.x.split(250)]
    assert exact.l1(*halves) < 2 * furthest(36, 250)


def test_base_models_whose_flows_do_not_balance_say_by_how_much():
    ps = arbitrary(ENVIRONMENTS["grid-2d"](), 2)
    (note,) = track(HARMONIC, ps, 100, generator=seeded()).diagnostics.notes
    assert "path ratios to one state differ" in note and "p0" in note and "unconverged base model" in note
    assert track(HARMONIC, perfect(ENVIRONMENTS["grid-2d"](), 2), 100, generator=seeded()).diagnostics.notes == []


def test_particles_stay_where_all_models_come_and_an_empty_composition_says_so():
    env = ENVIRONMENTS["tree"]()
    supports = {"left": lambda s: s < 27, "right": lambda s: s >= 23, "far": lambda s: s >= 29}
    left, right, far = (
        exact.solve(env, lambda s, inside=inside: torch.where(inside(s[:, 0]), 0.0, -torch.inf), name=name)
        for name, inside in supports.items()
    )
    samples = (left & right).sample(4000, generator=seeded())
    target = exact.target(HARMONIC, [exact.terminal_distribution(left), exact.terminal_distribution(right)])
    assert set(samples.x[:, 0].tolist()) == {23, 24, 25, 26} and error(samples, left, target) < furthest(4, 4000)
    with pytest.raises(FloatingPointError, match="weight zero"):
        (left & far).sample(100, generator=seeded())


# Corrections


class Confused(Guide):
    """Right at the end of trajectories, wrong everywhere before."""

    def __init__(self, models):
        self.exact, self.m, self.observations, self.keys = exact.ExactClassifier(models), 2, 2, None

    def marginal(self, *state):
        return self.exact.marginal(*state)

    def terminal(self, x):
        return self.exact.terminal(x)

    def log_h(self, *state, labels, odds=None):
        return self.exact.log_h(*state, labels=labels, odds=odds) * 0.5 + 0.3 * torch.sin(3 * state[0].double().sum(-1))


@pytest.mark.parametrize("posterior", [HARMONIC, Posterior(2, (1, 1), (0.8, 0.2))], ids=str)
def test_a_correction_makes_a_confused_classifier_exact(posterior):
    ps = arbitrary(ENVIRONMENTS["grid-2d"](), 2)
    distributions = [exact.terminal_distribution(p) for p in ps]
    target = exact.target(posterior, distributions)
    guided = guide(posterior, ps, Confused(ps))
    assert exact.l1(exact.terminal_distribution(guided), target) > 0.1
    samples = correct(guided, 1, particles=40_000, resample=False, generator=seeded())
    assert error(samples, ps[0], target) < furthest(36, samples.diagnostics.ess[-1] / 3)
    log_z = posterior.value(torch.stack(distributions, -1).log()).logsumexp(0)
    # h sees the labels y2... with odds: Z is p(y2... | y1) of exactly these constants.
    assert abs(samples.log_z - float(log_z)) < 5 * samples.diagnostics.log_z_error


class Ignorant(Confused):
    """Wrong at the end of trajectories too."""

    def terminal(self, x):
        return torch.log_softmax(0.3 * self.exact.terminal(x) + torch.tensor([0.0, 1.0]), -1)


@pytest.mark.parametrize("name", ["grid-2d", "ebm", "sets"])
@pytest.mark.parametrize("posterior", [HARMONIC, Posterior(2, (1, 1), (0.8, 0.2)), Posterior(2, (1, 0, 1))], ids=str)
def test_the_models_densities_correct_an_ignorant_classifier(name, posterior):
    ps = perfect(ENVIRONMENTS[name](), 2)
    distributions = [exact.terminal_distribution(p) for p in ps]
    target = exact.target(posterior, distributions)
    guide_ = Ignorant(ps)
    guide_.observations = 3
    guided = guide(posterior, ps, guide_)
    options = {"particles": 40_000, "resample": False, "generator": seeded()}
    by_head = correct(guided, 1, **options)
    samples = correct(guided, 1, "densities", **options)
    allowed = furthest(len(target), samples.diagnostics.ess[-1] / 3)
    assert error(samples, ps[0], target) < allowed < error(by_head, ps[0], target)
    log_z = posterior.value(torch.stack(distributions, -1).log()).logsumexp(0)
    assert abs(samples.log_z - float(log_z)) < 5 * samples.diagnostics.log_z_error + 1e-9
    assert samples.diagnostics.road == "classifier, anchored form, corrected by densities"


def test_densities_of_models_with_backward_policies_of_their_own():
    ps = arbitrary(ENVIRONMENTS["ebm"](), 2)
    samples = correct(guide(HARMONIC, ps, Ignorant(ps)), 1, "densities", particles=20_000, generator=seeded())
    assert any(note.startswith("path ratios") for note in samples.diagnostics.notes)
    with pytest.raises(ValueError, match="True, False or 'densities', got 'density'"):
        unchecked(sculpt.Guided, Ignorant(ps), correct="density")
    p, q, r = perfect(ENVIRONMENTS["ebm"](), 3)
    with pytest.raises(ValueError, match="p1 ⊗ p2 is a composition without a classifier of its own, so its density"):
        sculpt.harmonic_mean(p, q & r).sample(3, sculpt.Guided(Ignorant([p, q]), correct="densities"))


def test_the_exact_classifier_leaves_nothing_to_correct():
    ps = arbitrary(ENVIRONMENTS["ebm"](), 2)
    samples = correct(guide(HARMONIC, ps, exact.ExactClassifier(ps)), 200, resample=False, generator=seeded())
    torch.testing.assert_close(samples.log_weights, torch.full_like(samples.log_weights, -math.log(len(samples))))


def test_a_strength_of_guidance_is_for_gradients():
    p, q = arbitrary(ENVIRONMENTS["sets"](), 2)
    with pytest.raises(
        ValueError, match="strength multiplies a gradient, and p0 is steered by probabilities of actions; .* got 2"
    ):
        (p & q).sample(3, sculpt.Guided(exact.ExactClassifier([p, q]), strength=2))


def test_what_cannot_be_corrected_says_so():
    p, q = arbitrary(ENVIRONMENTS["sets"](), 2)
    classifier = exact.ExactClassifier([p, q])
    with pytest.raises(ValueError, match="p0 is one model, and roads lead to compositions"):
        p.sample(3, sculpt.Guided(classifier, correct=True))
    with pytest.raises(ValueError, match="Only the anchored form"):
        sculpt.Guided(classifier, form="mixture", correct=True)
    for option in ({"particles": 10}, {"threshold": 0.5}, {"resample": False}):
        with pytest.raises(ValueError, match="belong to a population with weights"):
            sculpt.Guided(classifier, **option)
    with pytest.raises(ValueError, match="particles=10 cannot give n=20"):
        (p & q).sample(20, sculpt.Tracked(particles=10))


# Through the algebra


def test_the_three_roads_meet():
    p, q = perfect(ENVIRONMENTS["grid-2d"](), 2)
    target = exact.target(HARMONIC, [exact.terminal_distribution(p), exact.terminal_distribution(q)])
    classifier, n = exact.ExactClassifier([p, q]), 20_000
    assert error((p & q).sample(n, classifier, generator=seeded()), p, target) < furthest(36, n)
    assert error((p & q).sample(n, generator=seeded()), p, target) < furthest(36, n / 3)
    assert error((p & q).sample(n, sculpt.Rejection(classifier), generator=seeded()), p, target) < furthest(36, n)


def test_a_nested_composition_by_tracked_densities_and_by_two_classifiers():
    p, q, r = perfect(ENVIRONMENTS["grid-2d"](), 3)
    d = [exact.terminal_distribution(model) for model in (p, q, r)]
    target = exact.target(CONTRAST, [exact.target(HARMONIC, d[:2]), d[2]])
    n = 20_000
    assert error(((p & q) - r).sample(n, generator=seeded()), p, target) < furthest(36, n / 3) + 0.02
    inner = (p & q).guided(exact.ExactClassifier([p, q]))
    outer = (inner - r).sample(n, exact.ExactClassifier([inner, r]), generator=seeded())
    assert error(outer, p, target) < furthest(36, n)


def test_a_mixture_picks_a_model_per_sample():
    p, q = perfect(ENVIRONMENTS["sets"](), 2)
    target = exact.target(Mixture((0.3, 0.7)), [exact.terminal_distribution(p), exact.terminal_distribution(q)])
    samples = sculpt.mixture(p, q, weights=(0.3, 0.7)).sample(20_000, generator=seeded())
    assert error(samples, p, target) < furthest(len(target), 20_000)


def test_samples_decode_to_what_the_environment_makes_of_them():
    class Named(Stairs):
        def decode(self, x):
            return [f"stair {i}" for i in x[:, 0].tolist()]

    env = Named()
    model = GFlowNet(env, exact.solve(env, lambda s: -s[:, 0].double()).policy)
    assert all(word.startswith("stair ") for word in model.sample(5, generator=seeded()).decode())
