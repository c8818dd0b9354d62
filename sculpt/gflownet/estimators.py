"""Estimators of torchgfn: of networks over raw states, and of policies that are computed.

A network takes the state tensor ``(b, *s)`` itself, so that a checkpoint needs no preprocessor beside it, and knows the
JSON arguments that build it again (``config``).
"""

from __future__ import annotations

import abc
import contextlib
import math
import numbers
from collections.abc import Iterator
from typing import Any

import torch
from gfn.env import DiscreteEnv, Env, GraphEnv
from gfn.estimators import DiscretePolicyEstimator
from gfn.preprocessors import IdentityPreprocessor
from gfn.states import States
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from sculpt.actions.guidance import Guidance
from sculpt.gflownet.environments import one_parent, rules, title
from sculpt.model import Steppable

__all__ = [
    "ComposedEstimator",
    "LogProbPolicy",
    "NetworkPolicy",
    "check_condition",
    "check_one_parent",
    "check_parts",
    "evaluating",
]


class NetworkPolicy(DiscretePolicyEstimator):
    """A torchgfn policy whose module takes the raw state tensor, and the condition where there is one."""

    def __init__(self, network: nn.Module, n_actions: int, is_backward: bool = False):
        super().__init__(network, n_actions, IdentityPreprocessor(output_dim=None), is_backward=is_backward)

    def forward(self, states: States, conditions: Tensor | None = None) -> Tensor:
        return self.module(states.tensor) if conditions is None else self.module(states.tensor, conditions)


class LogProbPolicy(DiscretePolicyEstimator, abc.ABC):
    """A policy that is computed, not read off a network: it gives normalised log-probabilities in float64 itself."""

    def __init__(self, module: nn.Module, n_actions: int):
        super().__init__(module, n_actions, IdentityPreprocessor(output_dim=None))

    @abc.abstractmethod
    def log_pf(self, states: Shaped[Tensor, "b *s"]) -> Float[Tensor, "b a"]:
        """Normalised log-probabilities of the actions, minus infinity where an action is masked."""

    def forward(self, states: States, conditions: Any = None) -> Tensor:
        # torchgfn keeps estimator outputs in buffers of the default dtype.
        return self.log_pf(states.tensor).to(torch.get_default_dtype())


class ComposedEstimator(LogProbPolicy):
    """A guided composition as an estimator. The networks of its models and its classifier are its modules."""

    def __init__(self, guidance: Guidance):
        parts = [model.as_estimator() for model in guidance.models if isinstance(model, Steppable)]
        parts += [guidance.classifier] if isinstance(guidance.classifier, nn.Module) else []
        super().__init__(nn.ModuleList(parts), guidance.anchor.n_actions)
        self.guidance = guidance

    def log_pf(self, states):
        return self.guidance.log_pf(states)


def check_condition(condition: dict[str, float], policy: DiscretePolicyEstimator, who: str) -> dict[str, float]:
    """Numbers, and where the network says in ``ranges`` what it was trained for, within that: outside it knows nothing."""
    ranges = getattr(policy.module, "ranges", {})
    for key, value in condition.items():
        low, high = ranges.get(key, (-math.inf, math.inf))
        if isinstance(value, bool) or not isinstance(value, numbers.Real) or not low <= value <= high:
            trained = f" from {low:g} to {high:g}, the range that it was trained for" if key in ranges else ""
            raise ValueError(f"{key}={value!r} for {who}: expected a number{trained}.")
    return {key: float(value) for key, value in condition.items()}


def check_parts(env: Any, policy: Any, backward: Any) -> None:
    """Raise where these are no environment with its estimators, and say what would be."""
    if isinstance(env, GraphEnv):
        raise TypeError(
            f"{type(env).__name__} is discrete, but its states are graphs and not tensors of one shape, and its actions have five parts. Write "
            "such a policy as a sculpt.ActionModel of your own, states as tensors: the page on policies of other libraries has an example."
        )
    if isinstance(env, Env) and not isinstance(env, DiscreteEnv):
        raise TypeError(
            f"{type(env).__name__} has continuous actions: a composed policy weighs all children of a state, and here they cannot be listed. "
            "Finished samples of such policies compose by rejection: the page on policies of other libraries says how."
        )
    if not isinstance(env, DiscreteEnv):
        raise TypeError(f"GFlowNet composes discrete environments (gfn.env.DiscreteEnv), got {_kind(env)}.")
    try:
        rules(env)
    except Exception as error:  # whatever an environment says where it cannot step a batch
        raise ValueError(
            f"{type(env).__name__} cannot walk from its own initial state: {type(error).__name__}: {error!s:.200}. Its step and masks have to take "
            "several states at once."
        ) from None
    if int(env.exit_action) != (last := env.n_actions - 1):
        raise ValueError(
            f"The exit action of {type(env).__name__} is {int(env.exit_action)}; torchgfn expects the last, {last}."
        )
    for side, estimator, outputs in (("policy", policy, env.n_actions), ("backward", backward, last)):
        if side == "backward" and estimator is None:
            continue
        if not isinstance(estimator, DiscretePolicyEstimator):
            raise TypeError(
                f"{side} is an estimator of torchgfn (gfn.estimators.DiscretePolicyEstimator), got {_kind(estimator)}.{_way(side, estimator)}"
            )
        if estimator.is_backward != (side == "backward") or estimator.expected_output_dim != outputs:
            way = "backward" if estimator.is_backward else "forward"
            raise ValueError(
                f"{side} has to be a {side.replace('policy', 'forward')} estimator over the {outputs} actions of "
                f"{type(env).__name__}, got a {way} estimator over {estimator.expected_output_dim}."
            )


def _kind(thing: Any) -> str:
    return (
        "None" if thing is None else f"the class {thing.__name__}" if isinstance(thing, type) else f"a {type(thing).__name__}"
    )


def _way(side: str, thing: Any) -> str:
    """What to pass instead."""
    own = "pb" if side == "backward" else "pf"
    if hasattr(thing, own):
        return f" Its estimator is .{own}: pass that."
    if isinstance(thing, nn.Module) or callable(thing):
        return f" Wrap a network of raw states: sculpt.gflownet.estimators.NetworkPolicy(network, n_actions{', is_backward=True' * (own == 'pb')})."
    return ""


def check_one_parent(env: DiscreteEnv, policy: DiscretePolicyEstimator) -> None:
    """Raise where a recurrent policy is none of the state: where several ways lead to one."""
    if not one_parent(env):
        raise ValueError(
            f"{type(policy).__name__} remembers the way to a state, and in {title(env)} several ways lead to one: what it says is no function of "
            "the state, so it has no density to compose. Recurrent policies compose where every state has one parent, as in BitSequence."
        )


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode for as long as we call somebody's module."""
    training = _in_training(module)
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True


def _in_training(module: nn.Module) -> list[nn.Module]:
    # Every step asks this, and ``module.modules()`` would cost a twentieth of a step on a small grid.
    found = [module] if module.training else []
    for part in module._modules.values():
        if part is not None:
            found += _in_training(part)
    return found
