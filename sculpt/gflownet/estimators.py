"""Estimators of torchgfn: of networks over raw states, and of policies that are computed.

A network takes the state tensor ``(b, *s)`` itself, so that a checkpoint needs no preprocessor beside it, and knows the
JSON arguments that build it again (``config``).
"""

from __future__ import annotations

import abc
import math
import numbers
from typing import Any

import torch
from gfn.estimators import DiscretePolicyEstimator
from gfn.preprocessors import IdentityPreprocessor
from gfn.states import States
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from sculpt.actions.guidance import Guidance
from sculpt.model import Steppable

__all__ = ["ComposedEstimator", "LogProbPolicy", "NetworkPolicy", "check_condition"]


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
