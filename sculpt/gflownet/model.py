r"""The adapter: a torchgfn environment and its estimators as a base model. torchgfn's conventions are converted here, once.

Notation: as in :mod:`sculpt.actions.model`.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from gfn.env import DiscreteEnv
from gfn.estimators import DiscretePolicyEstimator, RecurrentDiscretePolicyEstimator
from gfn.states import DiscreteStates
from gfn.utils.modules import UniformModule
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from sculpt.actions.guidance import Guidance
from sculpt.actions.model import ActionModel, GuidedActions
from sculpt.actions.paths import ONE_PARENT
from sculpt.actions.reading import Carry, Memory
from sculpt.actions.states import NEG_INF, distinct, draw, masked_log_softmax
from sculpt.composition import Composition
from sculpt.gflownet import checkpoint
from sculpt.gflownet.environments import describe, on_device, one_parent, rules, states_of, title
from sculpt.gflownet.estimators import (
    ComposedEstimator,
    LogProbPolicy,
    check_condition,
    check_one_parent,
    check_parts,
    evaluating,
)
from sculpt.gflownet.networks import network_for, policy_to_learn
from sculpt.identity import module_digest
from sculpt.model import BaseModel
from sculpt.samples import Samples
from sculpt.state import in_parts

if TYPE_CHECKING:
    from sculpt.classifier.guide import Guide
    from sculpt.formula import Formula
    from sculpt.roads import Guided

__all__ = ["GFlowNet", "GFlowNetComposition", "GuidedGFlowNet"]

AT_ONCE = 2048
"""Finished samples whose log-probabilities are computed at once."""


class GFlowNet(ActionModel):
    """A pretrained GFlowNet.

    Args:
        env: any torchgfn ``DiscreteEnv``.
        policy: its forward estimator.
        backward: its backward estimator; without one the backward policy is uniform over the parents.
        condition: fixes a conditional policy, e.g. ``{"beta": 32.0}``: another condition is another base model.
        fixed: whether the condition is a part of the model, so that its checkpoint has the values and nobody is asked for them.
        name: how formulas and messages call it.
        key: replaces the hash of weights and configuration where there is nothing to hash.

    Example:
        >>> sculpt.GFlowNet(one.env, one.policy, name="mine").sample(3, generator=seed).x.shape
        torch.Size([3, 2])
    """

    def __init__(
        self,
        env: DiscreteEnv,
        policy: DiscretePolicyEstimator,
        backward: DiscretePolicyEstimator | None = None,
        *,
        condition: dict[str, float] | None = None,
        fixed: bool = False,
        name: str | None = None,
        key: str | None = None,
    ):
        check_parts(env, policy, backward)
        if backward is not None and isinstance(backward.module, UniformModule):
            backward = None
        self.env, self.policy, self.backward = env, policy, backward
        self.condition = check_condition(condition or {}, policy, name or "this policy")
        self.fixed = fixed
        self._key, self._name = key, name
        self.n_actions, self.shape = env.n_actions, tuple(env.state_shape)
        self.samples_class = getattr(env, "samples_class", Samples)
        self._carry = None
        if isinstance(policy, RecurrentDiscretePolicyEstimator):
            check_one_parent(env, policy)
            self._carry = Carry(policy, self.device)

    # Identity

    @property
    def name(self) -> str:  # type: ignore[override]
        """As given, or made from the key."""
        return self._name or f"gflownet-{self.key[:6]}"

    @property
    def device(self) -> torch.device:
        """The environment's."""
        return self.env.s0.device

    @property
    def key(self) -> str:
        """As given, or a hash of the weights, the rules and the condition."""
        if self._key is not None:
            return self._key
        text = json.dumps([describe(self.env), self.rules, module_digest(self.policy), self.backward_key, self.condition])
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def backward_key(self) -> str:  # type: ignore[override]
        """Equal where two models surely share their backward policy."""
        if self._carry is not None:  # it is refused where a state has several parents
            return ONE_PARENT
        return "uniform" if self.backward is None else module_digest(self.backward) + json.dumps(self.condition)

    @property
    def one_parent(self) -> bool:
        return one_parent(self.env)

    @property
    def rules(self) -> str:
        return rules(self.env)

    @property
    def networks(self) -> tuple[nn.Module, ...]:  # type: ignore[override]
        """The forward estimator, and the backward one if there is one."""
        return (self.policy,) if self.backward is None else (self.policy, self.backward)

    def place(self, device: torch.device | None, dtype: torch.dtype | None) -> None:
        if device is not None and device != self.device:
            self.env = on_device(self.env, device)
        super().place(device, None if isinstance(self.policy, LogProbPolicy) else dtype)  # what is computed stays in float64

    def check_composable(self, other: BaseModel) -> None:
        if not isinstance(other, GFlowNet | GuidedGFlowNet):
            raise ValueError(f"{self.name} is a GFlowNet, {other.name} a {type(other).__name__}: they have no common states.")
        mine, its = self.env, other.env
        sides = [("environment", title(mine), title(its))] if describe(mine) != describe(its) else []
        sides += [("number of actions", mine.n_actions, its.n_actions), ("state shape", mine.state_shape, its.state_shape)]
        sides += [("rules (masks, order of the actions, or initial state)", self.rules, other.rules)]
        for what, p, q in sides:
            if p != q:
                raise ValueError(
                    f"{self.name} and {other.name} cannot be composed: {what} {p} on one side, {q} on the other. Base models need one environment with the same actions in the same order."
                )
        if self.device != other.device:
            raise ValueError(f"{self.name} is on {self.device} and {other.name} on {other.device}. Load both on one device.")

    # The chain

    def start(self, n: int) -> Shaped[Tensor, "n *s"]:
        return self.env.s0.expand(n, *self.env.state_shape).clone()

    def log_pf(self, states: Shaped[Tensor, "b *s"]) -> Float[Tensor, "b a"]:
        r""":math:`\log P(s'|s)` of every action in float64, minus infinity where masked."""
        if isinstance(self.policy, LogProbPolicy):
            return self.policy.log_pf(states)
        if self._carry is not None:
            return self._replayed(states)
        wrapped = states_of(self.env, states)
        return self._masked(states, wrapped, self._logits(self.policy, wrapped))

    def read(
        self, models: Sequence[ActionModel], states: Shaped[Tensor, "b *s"], memory: Memory | None
    ) -> tuple[Sequence[Float[Tensor, "b a"]], Memory | None]:
        if self._carry is None:
            return super().read(models, states, memory)
        log_p, kept = self._read_on(states, memory and memory.tensors)
        return [log_p], Memory(kept)

    def _read_on(
        self, states: Shaped[Tensor, "b *s"], kept: tuple[Tensor, ...] | None
    ) -> tuple[Float[Tensor, "b a"], tuple[Tensor, ...]]:
        """A step of a recurrent policy, as torchgfn's Sampler takes it."""
        assert self._carry is not None
        wrapped = states_of(self.env, states)
        with torch.no_grad(), evaluating(self.policy):
            out, carry = self.policy(wrapped, self._carry.given(kept, states))
        return self._masked(states, wrapped, out), self._carry.kept(carry)

    def _replayed(self, states: Shaped[Tensor, "b *s"]) -> Float[Tensor, "b a"]:
        """What a recurrent policy says of states: it has to go their ways again."""
        out = torch.empty(len(states), self.n_actions, dtype=torch.float64, device=states.device)
        depth = (states >= 0).flatten(1).sum(-1)  # as the estimator counts it
        for d in depth.unique().tolist():
            rows = (depth == d).nonzero()[:, 0]
            way, kept = [states[rows]], None
            for _ in range(d):
                way.append(self.backtrack(way[-1])[0])
            for before in reversed(way):
                out[rows], kept = self._read_on(before, kept)
        return out

    def _masked(self, states: Tensor, wrapped: DiscreteStates, logits: Tensor) -> Float[Tensor, "b a"]:
        log_p = masked_log_softmax(logits, wrapped.forward_masks)
        if (bad := log_p.isnan().any(-1) | (log_p == NEG_INF).all(-1)).any():
            mask = wrapped.forward_masks[bad][0]
            why = "the environment allows no action" if not mask.any() else "the policy's logits are not numbers"
            raise ValueError(f"{self.name}: no distribution over actions in state {states[bad][0].tolist()}: {why}.")
        return log_p

    def log_p(self, x: Shaped[Tensor, "b *s"]) -> Float[Tensor, "b"] | None:
        """Log-probabilities of finished samples, where the network has a shorter way to them than along their paths, its ``log_p``."""
        whole = getattr(self.policy.module, "log_p", None)
        if whole is None or not self.one_parent:
            return None
        values = torch.tensor(list(self.condition.values()), dtype=torch.get_default_dtype(), device=self.device)
        with evaluating(self.policy):
            return in_parts(lambda x: whole(x, *values[:, None].expand(-1, len(x))).double(), AT_ONCE, x)

    def log_pb(self, states: Shaped[Tensor, "b *s"]) -> Float[Tensor, "b p"]:
        r""":math:`\log P_B(s|s')` of s' = ``states``, per action that may have led there; the initial state has none."""
        wrapped = states_of(self.env, states)
        mask = wrapped.backward_masks
        if self.backward is None:
            return torch.where(mask, -mask.sum(-1, keepdim=True).double().log(), NEG_INF)
        log_p = masked_log_softmax(self._logits(self.backward, wrapped), mask)
        if (bad := log_p.isnan().any(-1)).any():
            raise ValueError(f"{self.name}: the backward policy's logits are not numbers in state {states[bad][0].tolist()}.")
        return log_p

    def _logits(self, estimator: DiscretePolicyEstimator, wrapped: DiscreteStates) -> Tensor:
        with evaluating(estimator):
            values = torch.tensor(list(self.condition.values()), dtype=torch.get_default_dtype(), device=self.device)
            out = estimator(wrapped, values.expand(len(wrapped), -1)) if self.condition else estimator(wrapped)
            if type(estimator).to_probability_distribution is not DiscretePolicyEstimator.to_probability_distribution:
                return estimator.to_probability_distribution(wrapped, out).logits
        return out

    def step(self, states: Shaped[Tensor, "b *s"], actions: Int[Tensor, "b"]) -> Shaped[Tensor, "b *s"]:
        """The children by these actions, none of them the exit."""
        # Some environments write into what they are given.
        wrapped = self.env.states_from_tensor(states.clone())
        return self.env.step(wrapped, self.env.actions_from_tensor(actions[:, None])).tensor

    def backtrack(
        self, states: Shaped[Tensor, "b *s"], generator: torch.Generator | None = None
    ) -> tuple[Shaped[Tensor, "b *s"], Int[Tensor, "b"]]:
        unique, rows = distinct(states)
        actions = draw(self.log_pb(unique), rows, generator)
        # Each different step once: some environments are slow at it.
        step, each = torch.unique(rows * self.n_actions + actions, return_inverse=True)
        wrapped = self.env.states_from_tensor(unique[step // self.n_actions].clone())
        before = self.env.backward_step(wrapped, self.env.actions_from_tensor(step[:, None] % self.n_actions)).tensor
        return before[each], actions

    # What the package asks of a base model

    @property
    def decoder(self) -> Callable[[Tensor], Any] | None:
        """The environment's own ``decode`` of terminal states, where it has one."""
        return getattr(self.env, "decode", None)

    def default_network(self) -> nn.Module:
        """A backbone for a classifier of such states: the environment's own ``classifier_network()``, one for grids, or one for vectors."""
        return self.env.classifier_network() if hasattr(self.env, "classifier_network") else network_for(self.env)

    # Distillation

    @property
    def module(self) -> nn.Module:
        return self.policy

    def with_module(self, module: nn.Module) -> GFlowNet:
        new = copy.copy(self)
        new.policy = module  # type: ignore[assignment]
        return new

    def learner(self, name: str, network: nn.Module | None = None) -> GFlowNet:
        policy, condition = policy_to_learn(self, network)
        return GFlowNet(self.env, policy, self.backward, condition=condition, fixed=True, name=name)

    def guided_by(self, guidance: Guidance) -> GuidedGFlowNet:
        return GuidedGFlowNet(guidance)

    def compose(self, formula: Formula, models: Sequence[BaseModel], *how: Any) -> GFlowNetComposition:
        return GFlowNetComposition(formula, models, *how)

    def as_estimator(self) -> DiscretePolicyEstimator:
        """The policy for torchgfn's ``Sampler``, trajectories and losses."""
        return self.policy

    if TYPE_CHECKING:

        def __or__(self, other: BaseModel) -> GFlowNetComposition: ...
        def __and__(self, other: BaseModel) -> GFlowNetComposition: ...
        def __sub__(self, other: BaseModel) -> GFlowNetComposition: ...

    # Files

    def save_pretrained(self, folder: str | Path) -> None:
        """``config.json`` and ``model.safetensors``."""
        checkpoint.save(self, Path(folder))

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        env: DiscreteEnv | None = None,
        policy: DiscretePolicyEstimator | None = None,
        backward: DiscretePolicyEstimator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **condition: float,
    ) -> GFlowNet:
        """Read :meth:`save_pretrained`'s folder; a conditional policy wants its condition, e.g. ``beta=32``.

        Environments and networks of torchgfn and sculpt are rebuilt by name. Pass your own as ``env``, ``policy`` and
        ``backward``; the weights are read into the latter two.
        """
        given = checkpoint.Given(env, policy, backward, device, dtype)
        return cls(**checkpoint.read(Path(folder), given, condition))


class GuidedGFlowNet(GuidedActions):
    """A posterior of GFlowNets with its classifier: a base model, and an estimator of torchgfn."""

    @property
    def env(self) -> DiscreteEnv:
        """The environment that all of the models share."""
        return self.anchor.env

    def as_estimator(self) -> ComposedEstimator:
        """The policy for torchgfn's ``Sampler``, trajectories and losses."""
        return ComposedEstimator(self.guidance)


class GFlowNetComposition(Composition):
    """A composition of GFlowNets."""

    def as_estimator(self, road: Guided | Guide) -> ComposedEstimator:
        """The guided composition as a torchgfn policy estimator.

        Args:
            road: a classifier, or ``Guided(classifier, ...)``.
        """
        guided = self.guided(road)
        assert isinstance(guided, GuidedGFlowNet)
        return guided.as_estimator()
