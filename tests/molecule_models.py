"""Tiny molecule models with random weights."""

import torch

import sculpt
from sculpt.gflownet.estimators import NetworkPolicy
from sculpt.molecules import FragmentNetwork, FragmentTrees

TINY = [["C", [0, 0]], ["O", [0, 0]], ["C1CC1", [0, 1]], ["c1ccccc1", [0, 1, 3]], ["c1ccncc1", [0, 1]]]


def molecule_model(seed, name=None, beta=32.0, vocabulary=TINY, slots=4):
    torch.manual_seed(seed)
    env = FragmentTrees(vocabulary, slots=slots)
    network = FragmentNetwork(env.vocabulary, slots, width=16, depth=1, heads=2)
    for parameter in network.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    torch.nn.init.constant_(network.stop.bias, -1.0)
    policy = NetworkPolicy(network.eval(), env.n_actions)
    return sculpt.GFlowNet(env, policy, condition={"beta": beta}, name=name or f"policy-{seed}")


def molecule_classifier(*models, observations=2):
    """Untrained."""
    torch.manual_seed(0)
    network = models[0].default_network()
    return sculpt.Classifier(
        network, [model.key for model in models], observations, names=[str(model) for model in models]
    ).eval()
