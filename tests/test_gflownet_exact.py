"""Exact answers, and what guided policies do when their classifier is exact."""

import pytest
import torch
from gflownet_models import ENVIRONMENTS, Stairs, arbitrary, guide, network_policy, perfect

from sculpt.formula import Posterior
from sculpt.gflownet import exact

environments = pytest.mark.parametrize("name", ENVIRONMENTS)
POSTERIORS = [
    Posterior(3, (1,)),
    Posterior(3, (0, 1)),
    Posterior(3, (0, 0), (0.05, 0.15, 0.8)),
    Posterior(3, (2, 0, 2), (0.5, 0.3, 0.2)),
]


@environments
def test_every_state_is_found_once_and_reached_by_edges_from_earlier_layers(name):
    graph = exact.dag(ENVIRONMENTS[name]())
    assert len(torch.unique(graph.states, dim=0)) == len(graph.states)
    layer = torch.cat([torch.full((len(states),), k) for k, (states, _) in enumerate(graph.layers)])
    layer = torch.empty_like(layer).scatter_(0, torch.cat([states for states, _ in graph.layers]), layer)
    assert (layer[graph.source] < layer[graph.target]).all()
    assert torch.equal(graph.index(graph.states), torch.arange(len(graph.states)))


def test_the_number_of_states_is_the_known_one():
    sizes = {name: len(exact.dag(make()).states) for name, make in ENVIRONMENTS.items()}
    assert (
        sizes["grid-2d"] == 36
        and sizes["grid-3d"] == 125
        and sizes["tree"] == 31
        and sizes["ebm"] == 81
        and sizes["stairs"] == 9
    )
    assert sizes["bits"] == sum(4**k for k in range(5)) and sizes["sets"] == 1 + 5 + 10 + 10


def test_states_are_in_lexicographic_order_so_that_a_grid_can_be_drawn():
    graph = exact.dag(ENVIRONMENTS["grid-2d"]())
    assert torch.equal(graph.states, torch.cartesian_prod(torch.arange(6), torch.arange(6)))


@environments
def test_exact_flows_sample_their_reward(name):
    env = ENVIRONMENTS[name]()
    graph = exact.dag(env)
    log_R = torch.randn(len(graph.states), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    model = exact.solve(env, log_R)
    p = exact.terminal_distribution(model)
    assert exact.l1(p, log_R.masked_fill(~graph.allowed[:, -1], -torch.inf).softmax(0)) < 1e-14


def test_a_reward_of_zero_is_never_sampled():
    env = ENVIRONMENTS["grid-2d"]()
    model = exact.solve(env, lambda states: torch.where(states[:, 0] == 3, 0.0, -torch.inf))
    p = exact.terminal_distribution(model).view(6, 6)
    torch.testing.assert_close(p[3], torch.full((6,), 1 / 6, dtype=torch.float64))


@environments
@pytest.mark.parametrize("models", [perfect, arbitrary])
@pytest.mark.parametrize("posterior", POSTERIORS, ids=str)
def test_the_anchored_form_with_the_exact_classifier_is_exact_for_any_base_models(name, models, posterior):
    ps = models(ENVIRONMENTS[name](), 3)
    target = exact.target(posterior, [exact.terminal_distribution(p) for p in ps])
    guided = guide(posterior, ps, exact.ExactClassifier(ps, 3))
    assert exact.l1(exact.terminal_distribution(guided), target) < 1e-12


@environments
@pytest.mark.parametrize("posterior", POSTERIORS[1:], ids=str)
def test_the_mixture_form_with_the_exact_classifier_is_exact_for_exact_flows_of_one_backward_policy(name, posterior):
    ps = perfect(ENVIRONMENTS[name](), 3)
    target = exact.target(posterior, [exact.terminal_distribution(p) for p in ps])
    guided = guide(posterior, ps, exact.ExactClassifier(ps, 3), form="mixture")
    assert exact.l1(exact.terminal_distribution(guided), target) < 1e-12


def test_with_different_backward_policies_the_anchored_form_stays_exact_and_the_mixture_form_does_not():
    env = ENVIRONMENTS["grid-2d"]()
    backwards = [network_policy(env, seed=i, is_backward=True, scale=4.0) for i in range(2)]
    ps = perfect(env, 2, backwards=backwards)
    distributions = [exact.terminal_distribution(p) for p in ps]
    exact_classifier, posterior = exact.ExactClassifier(ps), Posterior(2, (0, 1))
    target = exact.target(posterior, distributions)
    assert exact.l1(exact.terminal_distribution(guide(posterior, ps, exact_classifier)), target) < 1e-12
    assert exact.l1(exact.terminal_distribution(guide(posterior, ps, exact_classifier, form="mixture")), target) > 0.02


@environments
def test_rows_of_a_composed_policy_sum_to_one_and_masked_actions_have_no_mass(name):
    ps = arbitrary(ENVIRONMENTS[name](), 2)
    graph = exact.dag(ps[0])
    for form in ("anchored", "mixture"):
        P = guide(Posterior(2, (0, 1)), ps, exact.ExactClassifier(ps), form=form).log_pf(graph.states).exp()
        torch.testing.assert_close(P.sum(-1), torch.ones(len(P), dtype=torch.float64))
        assert (P[~graph.allowed] == 0).all()


def test_exchanging_labels_and_the_anchor_with_them_does_not_change_the_distribution():
    ps = arbitrary(ENVIRONMENTS["sets"](), 3)
    classifier = exact.ExactClassifier(ps, 3)
    odds = (0.2, 0.3, 0.5)
    qs = [
        exact.terminal_distribution(guide(Posterior(3, labels, odds), ps, classifier))
        for labels in [(0, 1, 2), (2, 1, 0), (1, 0, 2)]
    ]
    assert exact.l1(qs[0], qs[1]) < 1e-12 and exact.l1(qs[0], qs[2]) < 1e-12


def test_a_composition_nests_as_a_base_model():
    ps = arbitrary(ENVIRONMENTS["grid-2d"](), 3)
    d = [exact.terminal_distribution(p) for p in ps]
    inner = guide(Posterior(2, (0, 1)), ps[:2], exact.ExactClassifier(ps[:2]))
    outer = guide(Posterior(2, (0, 0)), [inner, ps[2]], exact.ExactClassifier([inner, ps[2]]))
    target = exact.target(Posterior(2, (0, 0)), [exact.target(Posterior(2, (0, 1)), d[:2]), d[2]])
    assert exact.l1(exact.terminal_distribution(outer), target) < 1e-12


@pytest.mark.parametrize("name", [name for name in ENVIRONMENTS if name != "stairs"])
def test_path_ratios_of_exact_flows_are_the_terminal_log_probabilities_whatever_the_path(name):
    ps = perfect(ENVIRONMENTS[name](), 2)
    graph = exact.dag(ps[0])
    x = graph.states[graph.allowed[:, -1]]
    log_p = torch.stack([exact.terminal_distribution(p) for p in ps], -1)[graph.index(x)].log()
    torch.testing.assert_close(ps[0].log_ratios(ps, x, torch.Generator().manual_seed(0)), log_p)


def test_the_classifier_of_disjoint_models_knows_where_a_composition_is_empty():
    env = ENVIRONMENTS["tree"]()
    halves = [lambda s: torch.where(s[:, 0] < 23, 0.0, -torch.inf), lambda s: torch.where(s[:, 0] >= 23, 0.0, -torch.inf)]
    left, right = (exact.solve(env, half, name=name) for half, name in zip(halves, ("left", "right"), strict=True))
    classifier = exact.ExactClassifier([left, right])
    only = guide(Posterior(2, (0, 0)), [left, right], classifier)
    assert exact.l1(exact.terminal_distribution(only), exact.terminal_distribution(left)) < 1e-12
    with pytest.raises(ValueError, match=r"left, right.*no action leads to where all labels are possible"):
        guide(Posterior(2, (0, 1)), [left, right], classifier).log_pf(env.s0[None])


def test_distances_have_their_known_values():
    p, q = torch.tensor([1.0, 0.0], dtype=torch.float64), torch.tensor([0.0, 1.0], dtype=torch.float64)
    assert exact.l1(p, q) == 2.0 and exact.l1(p, p) == 0.0
    assert exact.js(p, q) == pytest.approx(0.6931471805599453) and exact.js(p, p) == 0.0


def test_an_environment_too_large_to_enumerate_says_its_size_and_the_limit():
    from gfn.gym import HyperGrid

    with pytest.raises(
        ValueError, match=r"HyperGrid\(ndim=6, height=20\) has 64000000 states; exact answers count at most 200000"
    ):
        exact.dag(HyperGrid(ndim=6, height=20, validate_modes=False))
    with pytest.raises(ValueError, match="more than 5 states.*at most 5"):
        exact.dag(Stairs(), limit=5)


def test_states_of_another_environment_are_refused():
    graph = exact.dag(ENVIRONMENTS["grid-2d"]())
    with pytest.raises(ValueError, match=r"\[7, 0\] cannot be reached"):
        graph.index(torch.tensor([[7, 0]]))
