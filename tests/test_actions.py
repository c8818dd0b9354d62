"""Chains that write their samples action by action, alone, tracked and guided, against exact answers."""

import math

import pytest
import torch
from diffusers import DDPMScheduler
from gflownet_models import ENVIRONMENTS, Stairs, arbitrary, correct, furthest, guide, network_policy, perfect, track, unchecked

import sculpt
from sculpt.actions.chains import ActionChain
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
    before, log_w = chain.start(500, generator)
    assert (before.states == 0).all() and log_w is None
    ended = []
    while len(before):
        after, log_w = chain.step(before, torch.zeros(len(before)), generator)
        climbed, done = (after.states - before.states)[:, 0], chain.done(after)
        actions = torch.where(done, 3, climbed - 1)
        assert torch.equal(climbed == 0, done) and log_w is None
        assert model.env.states_from_tensor(before.states).forward_masks.gather(1, actions[:, None]).all()
        ended.append(chain.end(after[done], torch.zeros(int(done.sum())), generator)[0])
        before = after[~done]
    x = torch.cat(ended)
    assert (x >= 3).all() and len(x) == 500


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


@pytest.mark.parametrize("u", [0.0, 1 - 2.0**-53])
@pytest.mark.parametrize("total", [1.0, 0.9])
def test_a_draw_at_the_edge_of_its_range_is_an_action_with_probability(u, total, monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda *size, **options: torch.full(size, u, dtype=torch.float64))
    log_p = torch.tensor([[0.0, 0.3 * total, 0.7 * total, 0.0]], dtype=torch.float64).log()
    assert draw(log_p, torch.zeros(1, dtype=torch.long)).tolist() == [2 if u else 1]


@pytest.mark.parametrize("states", [torch.randint(-2, 3, (400, 4)), torch.randint(0, 2, (400, 5)).float(), torch.randn(50, 2)])
def test_distinct_states_give_back_every_row(states):
    states = states[torch.randint(len(states), (1000,))]
    unique, rows = distinct(states)
    assert torch.equal(unique[rows], states) and len(unique) == len(torch.unique(states, dim=0))


def test_distinct_states_are_distinct_whatever_their_hashes(monkeypatch):
    assert len(distinct(torch.tensor([[0.0, 1.0], [-0.0, 1.0]]))[0]) == 1
    monkeypatch.setattr("sculpt.actions.states.state_keys", lambda states: torch.zeros(len(states), dtype=torch.long))
    unique, rows = distinct(torch.tensor([[3], [1], [3]]))
    assert unique.tolist() == [[1], [3]] and rows.tolist() == [1, 0, 1]


@pytest.mark.slow
def test_no_more_trajectories_go_through_a_network_than_the_batch_size_says(monkeypatch):
    p, q = perfect(ENVIRONMENTS["grid-2d"](), 2)
    classifier, seen, step = exact.ExactClassifier([p, q]), [], ActionChain.step
    monkeypatch.setattr(ActionChain, "step", lambda self, state, *rest: seen.append(len(state)) or step(self, state, *rest))
    guided = [sculpt.Guided(classifier, correct=correct) for correct in (False, True, "densities")]
    for model, road in [(p, None), (p & q, None), *((p & q, road) for road in guided)]:
        seen.clear()
        assert len(model.sample(50, road, batch_size=7, generator=seeded())) == 50
        assert max(seen) == 7 and sum(seen) >= 50


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
    Nested(Product((0.5, 1.0)), [HARMONIC, Mixture([1.0])], [(0, 1), (1,)], [-1.5, 0.0]),
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
    exact_flows = perfect(ENVIRONMENTS["grid-2d"](), 2)
    assert track(HARMONIC, exact_flows, 100, generator=seeded()).diagnostics.notes == []
    graph, noise = exact.dag(ps[0]), 0.01 * torch.randn(36, 3, dtype=torch.float64, generator=seeded())
    nearly = exact.TablePolicy(graph, (exact_flows[0].log_pf(graph.states) + noise).log_softmax(-1))
    (note,) = track(
        HARMONIC, [GFlowNet(ps[0].env, nearly, name="nearly"), exact_flows[1]], 100, generator=seeded()
    ).diagnostics.notes
    assert "nearly 0.0" in note and "unconverged" not in note
    first_up = exact.TablePolicy(
        graph,
        torch.where(graph.allowed & ((graph.states[:, 1:] == 0) | (torch.arange(3) > 0)), 0.0, -torch.inf)
        .double()
        .log_softmax(-1),
    )
    (note,) = track(
        HARMONIC, [exact_flows[0], GFlowNet(ps[0].env, first_up, name="up")], 100, generator=seeded()
    ).diagnostics.notes
    assert "up inf" in note and "unconverged" in note  # most paths to a state are none of its own


def leaves(env, **supports):
    """Models that are uniform over these leaves of a tree."""
    inside = {name: torch.tensor(leaves) for name, leaves in supports.items()}
    return [
        exact.solve(env, lambda s, i=i: torch.where(torch.isin(s[:, 0], i), 0.0, -torch.inf), name=n) for n, i in inside.items()
    ]


def test_particles_stay_where_all_models_come_and_an_empty_composition_says_so():
    left, right, far = leaves(ENVIRONMENTS["tree"](), left=range(15, 27), right=range(23, 31), far=range(29, 31))
    samples = (left & right).sample(4000, generator=seeded())
    target = exact.target(HARMONIC, [exact.terminal_distribution(left), exact.terminal_distribution(right)])
    assert set(samples.x[:, 0].tolist()) == {23, 24, 25, 26} and error(samples, left, target) < furthest(4, 4000)
    with pytest.raises(FloatingPointError, match="weight zero"):
        (left & far).sample(100, generator=seeded())


def test_particles_that_are_led_to_a_dead_end_have_weight_zero():
    """Both models come to the parent of 23 and 24, and there they part."""
    weighted = {"threshold": 0.0, "resample": False}
    p, q = leaves(ENVIRONMENTS["tree"](), p=[23, 25], q=[24, 25])
    target = exact.target(HARMONIC, [exact.terminal_distribution(p), exact.terminal_distribution(q)])
    for road in (sculpt.Tracked(**weighted), sculpt.Guided(Gullible(), correct="densities", **weighted)):
        samples = (p & q).sample(2000, road, generator=seeded())
        assert error(samples, p, target) < 1e-12 and samples.diagnostics.notes == []
        assert (
            set(samples.x[:, 0].tolist()) >= {23, 25}
            and abs(samples.log_z - math.log(0.25)) < 5 * samples.diagnostics.log_z_error
        )


def test_a_mixture_goes_on_where_any_of_its_models_does():
    p, q = leaves(ENVIRONMENTS["tree"](), p=[15, 16], q=[29])
    target = exact.target(Mixture((0.3, 0.7)), [exact.terminal_distribution(p), exact.terminal_distribution(q)])
    samples = track(Mixture((0.3, 0.7)), [p, q], 4000, generator=seeded())
    assert error(samples, p, target) < furthest(3, 4000)


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


class Gullible(Guide):
    """All labels are possible everywhere."""

    m, observations = 2, 2

    def terminal(self, x):
        return torch.full((len(x), 2), math.log(0.5), dtype=torch.float64)

    marginal = terminal

    def log_h(self, *state, labels, odds=None):
        return self.terminal(state[0])[:, 0]


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


def test_a_correction_by_densities_selects_at_the_end_alone_unless_told_otherwise():
    ps = perfect(ENVIRONMENTS["grid-2d"](), 2)

    guided = guide(Posterior(2, (0, 1), (0.95, 0.05)), ps, Ignorant(ps))

    def ancestors(**threshold):
        samples = correct(guided, 1, "densities", particles=2000, resample=False, generator=seeded(), **threshold)
        assert min(samples.diagnostics.ess) < 1000
        return samples.diagnostics.ancestors

    assert ancestors() == 2000 and ancestors(threshold=0.5) < 2000


def test_densities_correct_models_with_backward_policies_of_their_own():
    env = ENVIRONMENTS["grid-2d"]()
    ps = perfect(env, 2, backwards=[network_policy(env, seed=i, is_backward=True, scale=3.0) for i in range(2)])
    target = exact.target(HARMONIC, [exact.terminal_distribution(p) for p in ps])
    samples = correct(guide(HARMONIC, ps, Ignorant(ps)), 1, "densities", particles=40_000, resample=False, generator=seeded())
    assert error(samples, env, target) < furthest(36, samples.diagnostics.ess[-1] / 3)


def test_densities_of_models_whose_flows_do_not_balance_say_so():
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


@pytest.mark.parametrize("correct", [False, True, "densities"])
def test_log_z_is_the_targets_as_it_is_written_whatever_the_anchor(correct):
    """With the exact classifier every trajectory has the same weight."""
    p, q = perfect(ENVIRONMENTS["grid-2d"](), 2)
    composition, classifier = sculpt.harmonic_mean(p, q, odds=0.1), exact.ExactClassifier([p, q])
    ell = torch.stack([exact.terminal_distribution(model) for model in (p, q)], -1).log()
    for anchor in (0, 1):
        road = sculpt.Guided(classifier, anchor=anchor, correct=correct)
        samples = composition.sample(50, road, generator=seeded())
        assert samples.log_z == pytest.approx(float(composition.formula.value(ell).logsumexp(0)), abs=1e-9)
        as_the_anchor_sees_it = composition.anchored(anchor).value(ell).exp().sum()
        assert samples.diagnostics.acceptance == pytest.approx(float(as_the_anchor_sees_it))


def test_the_mixture_form_is_sampled_without_weights():
    p, q = perfect(ENVIRONMENTS["grid-2d"](), 2)
    samples = (p & q).sample(50, sculpt.Guided(exact.ExactClassifier([p, q]), form="mixture"), generator=seeded())
    assert samples.diagnostics.road == "classifier, mixture form" and samples.diagnostics.particles is None


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
    with pytest.raises(ValueError, match="p0 has no noise levels to run MCMC at"):
        (p & q).sample(20, sculpt.Tracked(corrector=sculpt.MALA()))
    for wrong in ({"steps": 10}, {"solver": object()}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}: not an option of p0 ⊗ p1"):
            (p & q).sample(20, **wrong)


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


def test_the_path_back_from_a_sample_is_the_one_of_the_model_that_made_it():
    env = ENVIRONMENTS["grid-2d"]()
    backward = network_policy(env, is_backward=True, scale=3.0)
    p, q = (GFlowNet(env, network_policy(env, seed), b, name=str(seed)) for seed, b in enumerate([None, backward]))
    x = exact.dag(env).states
    by_p, by_q = (p.log_ratios([p, q], x, seeded(), made_by=i) for i in (0, 1))
    assert torch.equal(by_q, q.log_ratios([q, p], x, seeded()).flip(-1)) and not torch.equal(by_p, by_q)
    (stairs,) = arbitrary(Stairs(), 1)
    with pytest.raises(ValueError, match="samples of p0 cannot be traced back to their start: pass a classifier"):
        stairs.log_ratios([stairs], torch.tensor([[5]]))


def test_samples_decode_to_what_the_environment_makes_of_them():
    class Named(Stairs):
        def decode(self, x):
            return [f"stair {i}" for i in x[:, 0].tolist()]

    env = Named()
    model = GFlowNet(env, exact.solve(env, lambda s: -s[:, 0].double()).policy)
    assert all(word.startswith("stair ") for word in model.sample(5, generator=seeded()).decode())


class Dice(sculpt.ActionModel):
    """Up to two rolls of a fair die, each of which may be the last. States: the number of rolls, and the last one."""

    def __init__(self, name, faces=6, shape=(2,)):
        self.name = self.key = name
        self.n_actions, self.shape, self.device = faces + 1, shape, torch.device("cpu")

    def start(self, n):
        return torch.zeros(n, *self.shape, dtype=torch.long)

    def log_pf(self, states):
        allowed = torch.ones(len(states), self.n_actions, dtype=torch.bool)
        allowed[states[:, 0] == 2, :-1] = False
        return torch.where(allowed, 0.0, -torch.inf).double().log_softmax(-1)

    def step(self, states, actions):
        return torch.stack([states[:, 0] + 1, actions + 1], -1)


def test_chains_of_actions_compose_where_they_have_the_same_actions_and_states():
    class Loaded(Dice):
        rules = "loaded"

    p, elsewhere, scheduler = Dice("p"), Dice("q"), DDPMScheduler()
    elsewhere.device = torch.device("meta")
    assert len((p & Dice("q")).sample(10, generator=seeded())) == 10
    others = {
        "number of actions 7 on one side, 5 on the other": Dice("q", faces=4),
        r"state shape \(2,\) on one side, \(3,\)": Dice("q", shape=(3,)),
        "rules Dice on one side, loaded on the other": Loaded("q"),
        "rules Dice on one side": arbitrary(Stairs(), 1)[0],
        "device cpu on one side, meta on the other": elsewhere,
        "p writes its samples action by action and q does not": sculpt.Diffusion(lambda x, t: x, scheduler, (2,), name="q"),
    }
    for message, other in others.items():
        with pytest.raises(ValueError, match=message):
            p & other
    with pytest.raises(ValueError, match="No default classifier network for p. Pass network="):
        sculpt.fit([p, Dice("q")], steps=1, progress=False)
    with pytest.raises(ValueError, match="samples of p cannot be traced back to their start"):
        (p & Dice("q")).sample(3, sculpt.Rejection())
