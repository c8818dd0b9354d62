"""The composed policy as a torchgfn estimator."""

import pytest
import torch
from gflownet_models import (
    ENVIRONMENTS,
    arbitrary,
    correct,
    furthest,
    guide,
    network_policy,
    perfect,
    unchecked,
    uniform_backward,
)
from gfn.gflownet import TBGFlowNet
from gfn.gym import HyperGrid
from gfn.samplers import Sampler
from gfn.utils.prob_calculations import get_trajectory_pfs

import sculpt
from sculpt.actions.networks import GridNetwork
from sculpt.classifier.guide import Guide
from sculpt.classifier.heads import Classifier
from sculpt.formula import Posterior
from sculpt.gflownet import exact
from sculpt.gflownet.model import GFlowNet

HARMONIC = Posterior(2, (0, 1))


def random_classifier(models, **options):
    torch.manual_seed(0)
    network = GridNetwork(models[0].env.ndim, models[0].env.height, width=16)
    return Classifier(network, [model.key for model in models], **options).eval()


@pytest.mark.parametrize("form", ["anchored", "mixture"])
def test_torchgfns_sampler_takes_the_estimator_and_samples_the_target(form):
    env = ENVIRONMENTS["grid-2d"]()
    p, q = perfect(env, 2)
    estimator = (p & q).as_estimator(sculpt.Guided(exact.ExactClassifier([p, q]), form=form))
    torch.manual_seed(0)
    trajectories = Sampler(estimator).sample_trajectories(env, n=5000, save_logprobs=True, save_estimator_outputs=True)
    target = exact.target(HARMONIC, [exact.terminal_distribution(p), exact.terminal_distribution(q)])
    assert exact.l1(exact.histogram(env, trajectories.terminating_states.tensor), target) < furthest(36, 5000)
    again = get_trajectory_pfs(estimator, trajectories, recalculate_all_logprobs=True)
    torch.testing.assert_close(again, trajectories.log_probs.to(again), atol=2e-5, rtol=0)


def test_the_trajectory_balance_loss_of_an_exact_composition_vanishes_for_the_composed_reward():
    env = ENVIRONMENTS["grid-2d"]()
    p, q = perfect(env, 2)
    target = exact.target(HARMONIC, [exact.terminal_distribution(p), exact.terminal_distribution(q)])
    env.reward_fn = lambda states: target[exact.dag(env).index(states.reshape(-1, 2))].view(states.shape[:-1]).float()
    uniform = uniform_backward(env)
    gflownet = TBGFlowNet(pf=(p & q).as_estimator(exact.ExactClassifier([p, q])), pb=uniform, init_logZ=0.0)
    trajectories = gflownet.sample_trajectories(env, n=200, save_logprobs=False)
    assert gflownet.loss(env, trajectories, recalculate_all_logprobs=True) < 1e-8


def test_gradients_of_torchgfns_loss_reach_classifier_and_base_network():
    env = HyperGrid(ndim=2, height=8)
    p, q = (GFlowNet(env, network_policy(env, seed), name=str(seed)) for seed in range(2))
    classifier = random_classifier([p, q])
    gflownet = TBGFlowNet(pf=(p & q).as_estimator(classifier), pb=uniform_backward(env))
    assert set(classifier.parameters()) <= set(gflownet.pf_pb_parameters())
    trajectories = gflownet.sample_trajectories(env, n=20, save_logprobs=False)
    gflownet.loss(env, trajectories, recalculate_all_logprobs=True).backward()
    for network in (p.policy, classifier.set_head, classifier.terminal_head):
        assert max(float(weight.grad.abs().max()) for weight in network.parameters()) > 0


def test_a_head_over_children_scores_what_it_says_for_every_child():
    env = ENVIRONMENTS["grid-2d"]()
    models = [GFlowNet(env, network_policy(env, seed), name=str(seed)) for seed in range(3)]
    classifier = random_classifier(models, observations=3, odds=True, children=env.n_actions)
    guided = guide(Posterior(3, (2, 0, 1), (0.2, 0.3, 0.5)), models, classifier)
    states = exact.dag(env).states
    allowed = exact.dag(env).allowed
    scores = classifier.select(classifier.joint(states, odds=(0.2, 0.3, 0.5)), (2, 0, 1))[:, 1:]
    ends = classifier.log_h_terminal(states, labels=(2, 0, 1), odds=(0.2, 0.3, 0.5))
    expected = models[2].log_pf(states) + torch.cat([scores, ends[:, None]], -1).double()
    torch.testing.assert_close(guided.log_pf(states), torch.log_softmax(expected.masked_fill(~allowed, -torch.inf), -1))
    samples = correct(guided, 4000, particles=20_000, generator=torch.Generator().manual_seed(0))
    log_p = exact.terminal_distribution(models[2]).log() + ends
    assert exact.l1(exact.histogram(env, samples.x), log_p.softmax(0)) < furthest(36, 4000)


def test_what_a_head_says_about_forbidden_children_does_not_matter():
    env = ENVIRONMENTS["grid-2d"]()
    models = [GFlowNet(env, network_policy(env, seed), name=str(seed)) for seed in range(2)]
    classifier = random_classifier(models, children=env.n_actions)
    guided, graph, select = guide(HARMONIC, models, classifier), exact.dag(env), classifier.select
    plain = guided.guidance.scores(graph.states)
    here = torch.ones(len(graph.states), 1, dtype=torch.bool)
    known = torch.cat([here, graph.allowed[:, :-1]], -1)
    classifier.select = lambda *arguments: select(*arguments).masked_fill(~known, torch.nan)
    assert all(torch.equal(a, b) for a, b in zip(guided.guidance.scores(graph.states), plain, strict=True))


@pytest.mark.parametrize("children", [1, 3])
def test_the_mixture_form_asks_every_child_for_its_marginal(children):
    env = ENVIRONMENTS["grid-2d"]()
    models = [GFlowNet(env, network_policy(env, seed), name=str(seed)) for seed in range(2)]
    classifier = random_classifier(models, children=children)
    states, labels = torch.tensor([[2, 3]]), (0, 1)
    log_p = torch.logsumexp(
        torch.stack([p.log_pf(states) for p in models], 1) + classifier.marginal(states).double()[..., None], 1
    )
    following = torch.tensor([[3, 3], [2, 4]])
    log_h = classifier.log_h(following, labels=labels) + classifier.marginal(following)[:, 0]
    end = classifier.log_h_terminal(states, labels=labels) + classifier.terminal(states)[:, 0]
    expected = (log_p + torch.cat([log_h, end])).log_softmax(-1)
    torch.testing.assert_close(guide(HARMONIC, models, classifier, form="mixture").log_pf(states), expected)


@pytest.mark.parametrize("children", [1, 3])
def test_one_label_gives_back_its_base_model(children):
    env = ENVIRONMENTS["grid-2d"]()
    models = [GFlowNet(env, network_policy(env, seed), name=str(seed)) for seed in range(2)]
    guided = guide(Posterior(2, (1,)), models, random_classifier(models, children=children))
    states = exact.dag(env).states
    torch.testing.assert_close(guided.log_pf(states), models[1].log_pf(states))


def test_chunks_of_children_change_nothing():
    ps = arbitrary(ENVIRONMENTS["ebm"](), 2)
    guided = guide(HARMONIC, ps, exact.ExactClassifier(ps))
    states = exact.dag(ps[0]).states
    whole = guided.log_pf(states)
    guided.guidance.chunk = 1
    assert torch.equal(guided.log_pf(states), whole)


def test_the_backward_policy_of_a_composition_is_its_anchors():
    env = ENVIRONMENTS["grid-2d"]()
    p, q = perfect(env, 2, backwards=[network_policy(env, i, is_backward=True) for i in range(2)])
    guided = guide(Posterior(2, (1, 0)), [p, q], exact.ExactClassifier([p, q]))
    u, P = exact.marginals(guided), guided.log_pf(exact.dag(env).states).exp()
    graph = exact.dag(env)
    flow = u[graph.source] * P[graph.source, graph.action] / u[graph.target]
    torch.testing.assert_close(flow, q.log_pb(graph.states).exp()[graph.target, graph.action])
    assert torch.equal(guided.log_pb(graph.states), q.log_pb(graph.states)) and guided.backward_key == q.backward_key


@pytest.mark.parametrize("where", ["at the start", "on the way", "at the end"])
def test_a_classifier_that_is_not_a_number_is_named(where):
    class Broken(Guide):
        m, observations = 2, 2

        def marginal(self, *state):
            return torch.zeros(len(state[0]), 2)

        def terminal(self, x):
            return torch.full((len(x), 2), torch.nan if where == "at the end" else -1.0)

        def log_h(self, *state, labels, odds=None):
            begun = (state[0] != p.start(1)).any(-1)
            bad = {"at the start": ~begun, "on the way": begun, "at the end": begun & ~begun}[where]
            return torch.full((len(begun),), -1.0).masked_fill(bad, torch.nan)

    p, q = arbitrary(ENVIRONMENTS["sets"](), 2)
    with pytest.raises(ValueError, match="p0, p1 with labels.*the classifier's output is not a number, state"):
        guide(HARMONIC, [p, q], Broken()).sample(5)


def test_wrong_forms_and_anchors_are_refused():
    p, q, r = perfect(ENVIRONMENTS["grid-2d"](), 3)
    classifier = exact.ExactClassifier([p, q])
    with pytest.raises(ValueError, match="form is 'anchored' or 'mixture', got 'Mixture'"):
        unchecked(sculpt.Guided, classifier, form="Mixture")
    nested = (p & q) - r
    outer = exact.ExactClassifier([(p & q).guided(classifier), r])
    outer.keys = None
    with pytest.raises(ValueError, match="composition without a classifier of its own"):
        nested.sample(3, outer)


def test_equal_guidance_has_equal_keys_and_other_guidance_others():
    env = ENVIRONMENTS["grid-2d"]()
    p, q = (GFlowNet(env, network_policy(env, seed), name=str(seed)) for seed in range(2))
    twins = [random_classifier([p, q]) for _ in range(2)]
    assert (p & q).guided(twins[0]).key == (p & q).guided(twins[1]).key
    with torch.no_grad():
        twins[1].set_head.out.bias += 1
    assert (p & q).guided(twins[0]).key != (p & q).guided(twins[1]).key
    of_odds, exact_ones = random_classifier([p, q], odds=True), [exact.ExactClassifier(models) for models in ((p, q), (q, p))]
    keys = [composition.guided(twins[0]).key for composition in (p & q, p - q, q & p)]
    keys += [(p & q).guided(sculpt.Guided(twins[0], form="mixture")).key]
    keys += [composition.guided(of_odds).key for composition in (p & q, sculpt.harmonic_mean(p, q, odds=0.3))]
    keys += [guide(HARMONIC, [p, q], classifier).key for classifier in exact_ones]
    exact_ones[0].keys = None
    keys += [guide(HARMONIC, models, exact_ones[0]).key for models in ([p, q], [q, p])]
    assert len(set(keys)) == len(keys)
