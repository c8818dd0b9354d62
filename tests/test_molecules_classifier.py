"""Classifiers of molecule policies, on trees few enough to enumerate."""

import pytest
import torch

import sculpt
from sculpt.formula import label_sets
from sculpt.gflownet import exact
from sculpt.gflownet.estimators import NetworkPolicy
from sculpt.gflownet.model import GFlowNet
from sculpt.molecules.network import FragmentFeatures, FragmentNetwork
from sculpt.molecules.trees import FragmentTrees

VOCABULARY = [["C", [0, 0]], ["N", [0, 0, 0]], ["c1ccccc1", [0, 1, 3, 4]]]
SIZES = {"width": 32, "depth": 2, "heads": 2}


def policies(env, apart):
    models = []
    for i in range(2):
        torch.manual_seed(i)
        network = FragmentNetwork(env.vocabulary, env.slots, **SIZES)
        for parameter in network.parameters():
            parameter.data += apart * torch.randn_like(parameter)
        policy = NetworkPolicy(network.eval().requires_grad_(False), env.n_actions)
        models.append(GFlowNet(env, policy, condition={"beta": 32.0}, name="pq"[i]))
    return models


@pytest.fixture(scope="module")
def fitted():
    """Two policies that disagree by factors, and a classifier of them with odds."""
    env = FragmentTrees(VOCABULARY, 3)
    models = policies(env, 0.15)
    network = FragmentFeatures(env.vocabulary, env.slots, **SIZES)
    settings = {"steps": 500, "batch_size": 64, "samples": 4000, "children": True, "progress": False}
    classifier = sculpt.fit(models, odds=True, network=network, **settings)
    return env, models, classifier


def test_all_children_are_scored_in_one_pass_over_the_state(fitted):
    env, models, classifier = fitted
    assert classifier.n_children == env.n_actions
    seen = []
    hook = classifier.network.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    (models[0] & models[1]).guided(classifier).log_pf(models[0].start(1))
    hook.remove()
    assert seen == [1]


def test_guided_trees_follow_the_composition(fitted):
    env, models, classifier = fitted
    p = [exact.terminal_distribution(model) for model in models]
    assert exact.l1(p[0], p[1]) > 0.4
    errors = {}
    for labels in label_sets(2, 2):
        for alpha in (0.1, 0.5, 0.9):
            composition = sculpt.posterior(models, labels, [alpha, 1 - alpha])
            q = exact.terminal_distribution(composition.guided(classifier))
            errors[labels, alpha] = exact.l1(q, exact.target(composition.formula, p))
    assert max(errors.values()) < 0.1 and sum(errors.values()) / len(errors) < 0.05, errors


def test_the_roads_agree_with_the_enumerated_composition(fitted):
    env, models, classifier = fitted
    composition, n = models[0] & models[1], 20_000
    target = exact.target(composition.formula, [exact.terminal_distribution(model) for model in models])
    noise = float((target * (1 - target) * 2 / (torch.pi * n)).sqrt().sum())
    options = {"generator": torch.Generator().manual_seed(0), "progress": False}
    roads = {
        "tracked": composition.sample(n, **options),
        "rejection": composition.sample(n, sculpt.Rejection(), **options),
    }
    for road, samples in roads.items():
        assert exact.l1(exact.histogram(env, samples.x), target) < 2.5 * noise, road
    corrected = composition.sample(n, sculpt.Guided(classifier, correct=True), **options)
    judged = exact.l1(exact.histogram(env, corrected.x), target)
    by_head = composition.sample(n, sculpt.Rejection(classifier), **options)  # the terminal head's own error, and nothing else
    assert judged < exact.l1(exact.histogram(env, by_head.x), target) + 2.5 * noise


def test_densities_of_whole_paths_are_those_of_the_policy(fitted):
    env, models, classifier = fitted
    guided = (models[0] & models[1]).guided(classifier)
    graph = exact.dag(env)
    x = graph.states[graph.allowed[:, -1]]
    log_q = models[0].log_ratios([*models, guided], x)
    for column, model in zip(log_q.T, [*models, guided], strict=True):
        q = exact.terminal_distribution(model)[graph.allowed[:, -1]]
        assert (column.exp() - q).abs().max() < 1e-6


@pytest.mark.slow
def test_trajectories_of_compositions_teach_what_two_models_hardly_share():
    env = FragmentTrees(VOCABULARY, 3)
    models = policies(env, 0.4)
    p = [exact.terminal_distribution(model) for model in models]
    both, errors = models[0] & models[1], {False: [], True: []}
    target = exact.target(both.formula, p)
    assert both.formula.value(torch.stack(p, -1).log()).exp().sum() < 0.005
    # Trainings differ by their seeds: the middle one of three.
    for composed, seed in ((False, 0), (True, 0), (True, 1), (True, 2)):
        torch.manual_seed(seed)
        network = FragmentFeatures(env.vocabulary, env.slots, **SIZES)
        options = {"batch_size": 32, "samples": 2000, "children": True, "composed": composed, "progress": False}
        classifier = sculpt.fit(models, network=network, steps=300, seed=seed, **options)
        errors[composed].append(exact.l1(exact.terminal_distribution(both.guided(classifier)), target))
    assert sorted(errors[True])[1] < 0.2 < 0.8 < errors[False][0], errors


def test_a_composed_training_balances_label_sets_of_fewer_observations_too(fitted):
    env, models, _ = fitted
    network = FragmentFeatures(env.vocabulary, env.slots, **SIZES)
    options = {"batch_size": 16, "samples": 500, "children": True, "composed": True, "progress": False}
    classifier = sculpt.fit(models, 3, network=network, steps=200, **options)
    p = [exact.terminal_distribution(model) for model in models]
    for labels in [s for n in (2, 3) for s in label_sets(2, n)]:
        composition = sculpt.posterior(models, labels)
        q = exact.terminal_distribution(composition.guided(classifier))
        assert exact.l1(q, exact.target(composition.formula, p)) < 0.2, labels
