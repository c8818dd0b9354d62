"""Networks for the states of an environment, where it does not bring its own."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from gfn.env import DiscreteEnv
from gfn.estimators import DiscretePolicyEstimator, RecurrentDiscretePolicyEstimator
from torch import nn

from sculpt.actions.networks import GridNetwork, StateNetwork
from sculpt.gflownet.environments import describe, walk
from sculpt.gflownet.estimators import LogProbPolicy, NetworkPolicy

if TYPE_CHECKING:
    from sculpt.gflownet.model import GFlowNet

__all__ = ["network_for", "policy_to_learn"]


def network_for(env: DiscreteEnv, outputs: int | None = None) -> nn.Module:
    """States to features, or to so many logits: one for grids, or one for vectors."""
    spec = describe(env)
    if spec is not None and {"ndim", "height"} <= spec["arguments"].keys():
        return GridNetwork(env.ndim, env.height, outputs, encoding="one-hot")
    seen = torch.cat([states.tensor.flatten(1) for states in walk(env)]).double()
    whole = bool((seen == seen.round()).all())
    return StateNetwork(seen.shape[1], float(seen.min()), float(seen.max()), whole, outputs=outputs)


def policy_to_learn(model: GFlowNet, network: nn.Module | None) -> tuple[DiscretePolicyEstimator, dict[str, float]]:
    """A policy with weights of its own and its condition: a copy of the model's, or a network without any.

    Args:
        model: whose policy is copied, if it is a network and a function of the state.
        network: in the place of a copy.
    """
    if network is None and not isinstance(model.policy, LogProbPolicy | RecurrentDiscretePolicyEstimator):
        return copy.deepcopy(model.policy).float().requires_grad_(True), model.condition
    network = network_for(model.env, model.n_actions) if network is None else _fitting(copy.deepcopy(network), model)
    return NetworkPolicy(network, model.n_actions).to(model.device).requires_grad_(True), {}


def _fitting(network: nn.Module, model: GFlowNet) -> nn.Module:
    """The network, if it answers as a policy of this model's states."""
    with torch.no_grad():
        got = tuple(network.to(model.device)(model.start(1)).shape)
    if got != (1, model.n_actions):
        raise ValueError(
            f"network={type(network).__name__} answers one state with shape {got}, expected {(1, model.n_actions)}: a logit for each action, "
            "the exit last."
        )
    return network
