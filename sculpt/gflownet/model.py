r"""The adapter: a torchgfn environment and its estimators as a base model.

Notation: states s as raw tensors ``(b, *s)``, actions a with the exit last, ``log_pf`` = :math:`\log P(s'|s)` per action and
``log_pb`` = :math:`\log P_B(s|s')` per action that led to s'. torchgfn's conventions are converted here, once.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import numbers
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from gfn.env import DiscreteEnv
from gfn.estimators import DiscretePolicyEstimator
from gfn.states import DiscreteStates
from gfn.utils.modules import UniformModule
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from sculpt.base import BaseModel
from sculpt.gflownet.network import GridNetwork, LogProbPolicy
from sculpt.particles import Diagnostics, Samples
from sculpt.training import Replay

__all__ = ["GFlowNet", "check_condition", "describe", "digest", "distinct", "fingerprint", "state_keys"]

NEG_INF = float("-inf")


class GFlowNet(BaseModel):
    """A pretrained GFlowNet: any torchgfn ``DiscreteEnv`` with a forward and, if it has one, a backward estimator.

    Without ``backward`` the backward policy is uniform over the parents. A conditional policy is fixed at
    ``condition``, e.g. ``{"beta": 32.0}``: another condition is another base model. ``key`` replaces the hash of weights and
    configuration where there is nothing to hash.
    """

    family = "gflownet"

    def __init__(
        self,
        env: DiscreteEnv,
        policy: DiscretePolicyEstimator,
        backward: DiscretePolicyEstimator | None = None,
        *,
        condition: dict[str, float] | None = None,
        name: str | None = None,
        key: str | None = None,
    ):
        if not isinstance(env, DiscreteEnv):
            raise TypeError(f"GFlowNet composes discrete environments (gfn.env.DiscreteEnv), got {type(env).__name__}.")
        last = env.n_actions - 1
        if int(env.exit_action) != last:
            raise ValueError(
                f"The exit action of {type(env).__name__} is {int(env.exit_action)}; torchgfn expects the last, {last}."
            )
        for side, estimator, outputs in (("policy", policy, env.n_actions), ("backward", backward, last)):
            if estimator is None:
                continue
            if estimator.is_backward != (side == "backward") or estimator.expected_output_dim != outputs:
                way = "backward" if estimator.is_backward else "forward"
                raise ValueError(
                    f"{side} has to be a {side.replace('policy', 'forward')} estimator over the {outputs} actions of "
                    f"{type(env).__name__}, got a {way} estimator over {estimator.expected_output_dim}."
                )
        if backward is not None and isinstance(backward.module, UniformModule):
            backward = None
        self.env, self.policy, self.backward = env, policy, backward
        self.condition = check_condition(condition or {}, policy, name or "this policy")
        self._key = key
        self._name = name

    # Identity

    @property
    def name(self) -> str:
        """As given, or made from the key."""
        return self._name or f"gflownet-{self.key[:6]}"

    @property
    def device(self) -> torch.device:
        return self.env.s0.device

    @property
    def key(self) -> str:
        if self._key is not None:
            return self._key
        text = json.dumps([describe(self.env), self.rules, digest(self.policy), self.backward_key, self.condition])
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def backward_key(self) -> str:
        """Equal where two models surely share their backward policy."""
        return "uniform" if self.backward is None else digest(self.backward) + json.dumps(self.condition)

    @property
    def rules(self) -> str:
        """The environment's rules: :func:`fingerprint`, computed once."""
        if self.env not in _RULES:
            _RULES[self.env] = fingerprint(self.env)
        return _RULES[self.env]

    def check_composable(self, other: BaseModel) -> None:
        if not isinstance(other, GFlowNet):
            raise ValueError(f"{self.name} is a GFlowNet and {other.name} a {other.family} model: they have no common states.")
        mine, its = self.env, other.env
        sides = [("environment", _title(mine), _title(its))] if describe(mine) != describe(its) else []
        sides += [("number of actions", mine.n_actions, its.n_actions), ("state shape", mine.state_shape, its.state_shape)]
        sides += [("rules (masks, order of the actions, or initial state)", self.rules, other.rules)]
        for what, p, q in sides:
            if p != q:
                raise ValueError(
                    f"{self.name} and {other.name} cannot be composed: {what} {p} on one side, {q} on the other. "
                    "Base models need one environment with the same actions in the same order."
                )
        if self.device != other.device:
            raise ValueError(f"{self.name} is on {self.device} and {other.name} on {other.device}. Load both on one device.")

    # The chain

    def log_pf(self, states: Shaped[Tensor, "b *s"]) -> Float[Tensor, "b a"]:
        r""":math:`\log P(s'|s)` of every action in float64, minus infinity where masked."""
        if isinstance(self.policy, LogProbPolicy):
            return self.policy.log_pf(states)
        wrapped = self.env.states_from_tensor(states)
        log_p = _log_softmax(self._logits(self.policy, wrapped), wrapped.forward_masks)
        if (bad := log_p.isnan().any(-1) | (log_p == NEG_INF).all(-1)).any():
            mask = wrapped.forward_masks[bad][0]
            why = "the environment allows no action" if not mask.any() else "the policy's logits are not numbers"
            raise ValueError(f"{self.name}: no distribution over actions in state {states[bad][0].tolist()}: {why}.")
        return log_p

    def log_pb(self, states: Shaped[Tensor, "b *s"]) -> Float[Tensor, "b p"]:
        r""":math:`\log P_B(s|s')` of s' = ``states``, per action that may have led there; the initial state has none."""
        wrapped = self.env.states_from_tensor(states)
        mask = wrapped.backward_masks
        if self.backward is None:
            return torch.where(mask, -mask.sum(-1, keepdim=True).double().log(), NEG_INF)
        log_p = _log_softmax(self._logits(self.backward, wrapped), mask)
        if (bad := log_p.isnan().any(-1)).any():
            raise ValueError(f"{self.name}: the backward policy's logits are not numbers in state {states[bad][0].tolist()}.")
        return log_p

    def _logits(self, estimator: DiscretePolicyEstimator, wrapped: DiscreteStates) -> Tensor:
        with _evaluating(estimator):
            if self.condition:
                values = torch.tensor(list(self.condition.values()), dtype=torch.get_default_dtype(), device=self.device)
                out = estimator(wrapped, values.expand(len(wrapped), -1))
            else:
                out = estimator(wrapped)
            if type(estimator).to_probability_distribution is not DiscretePolicyEstimator.to_probability_distribution:
                return estimator.to_probability_distribution(wrapped, out).logits
        return out

    def step(self, states: Shaped[Tensor, "b *s"], actions: Int[Tensor, "b"]) -> Shaped[Tensor, "b *s"]:
        """The children by these actions, none of them the exit."""
        # Some environments write into what they are given.
        wrapped = self.env.states_from_tensor(states.clone())
        return self.env.step(wrapped, self.env.actions_from_tensor(actions[:, None])).tensor

    def children(
        self, states: Shaped[Tensor, "b *s"], allowed: Bool[Tensor, "b a"]
    ) -> tuple[Int[Tensor, "c"], Int[Tensor, "c"], Shaped[Tensor, "c *s"]]:
        """Row, action and state of every allowed child; the exit has none."""
        rows, actions = allowed[:, :-1].nonzero(as_tuple=True)
        return rows, actions, self.step(states[rows], actions) if len(rows) else states[rows]

    # What the package asks of a base model

    def sample(
        self,
        n: int,
        *,
        correct: bool | str = False,
        particles: int | None = None,
        threshold: float | None = None,
        resample: bool = True,
        batch_size: int | None = None,
        generator: torch.Generator | None = None,
        progress: bool = True,
    ) -> Samples:
        """n terminal states. What belongs to weights is for guided compositions: see :func:`sculpt.gflownet.sampler.sample`."""
        from sculpt.gflownet.sampler import sample

        weights = {"correct": correct, "particles": particles, "threshold": threshold, "resample": resample}
        return sample(self, n, **weights, batch_size=batch_size, generator=generator, progress=progress)

    def decode(self, x: Tensor) -> Any:
        """What the environment makes of terminal states, where it has a method ``decode``; else the states themselves."""
        return self.env.decode(x) if hasattr(self.env, "decode") else x

    def result(self, x: Tensor, log_weights: Tensor | None = None, diagnostics: Diagnostics | None = None) -> Samples:
        """An environment says in ``samples_class`` what its samples can do beyond :class:`Samples`, as molecules do."""
        return getattr(self.env, "samples_class", Samples)(x, log_weights, diagnostics, self.decode)

    def default_network(self) -> nn.Module:
        """A backbone for a classifier of such states: the environment's own ``classifier_network()``, or one for grids."""
        if hasattr(self.env, "classifier_network"):
            return self.env.classifier_network()
        if describe(self.env) is None or not {"ndim", "height"} <= describe(self.env)["arguments"].keys():
            raise ValueError(
                f"No default classifier network for {_title(self.env)}. Pass network=, a module from states to features."
            )
        return GridNetwork(self.env.ndim, self.env.height, encoding="one-hot")

    def replay(self, models: Sequence[BaseModel], **options: Any) -> Replay:
        from sculpt.gflownet.replay import GFlowNetReplay

        return GFlowNetReplay(models, **options)

    def as_estimator(self) -> DiscretePolicyEstimator:
        """The policy for torchgfn's ``Sampler``, trajectories and losses."""
        return self.policy

    # Files

    def save_pretrained(self, folder: str | Path) -> None:
        """``config.json`` and ``model.safetensors``."""
        from sculpt.gflownet.checkpoint import save

        save(self, Path(folder))

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
        from sculpt.gflownet.checkpoint import load

        return load(Path(folder), env=env, policy=policy, backward=backward, device=device, dtype=dtype, condition=condition)


def check_condition(condition: dict[str, float], policy: DiscretePolicyEstimator, who: str) -> dict[str, float]:
    """Numbers, and where the network says in ``ranges`` what it was trained for, within that: outside it knows nothing."""
    ranges = getattr(policy.module, "ranges", {})
    for key, value in condition.items():
        low, high = ranges.get(key, (-math.inf, math.inf))
        if isinstance(value, bool) or not isinstance(value, numbers.Real) or not low <= value <= high:
            trained = f" from {low:g} to {high:g}, the range that it was trained for" if key in ranges else ""
            raise ValueError(f"{key}={value!r} for {who}: expected a number{trained}.")
    return {key: float(value) for key, value in condition.items()}


# Environments

_GYM = {  # torchgfn's own: the constructor's argument -> where the environment keeps it. Rewards are no part of the rules.
    "HyperGrid": {"ndim": "ndim", "height": "height"},
    "BitSequence": {"word_size": "word_size", "seq_size": "seq_size", "n_modes": "n_modes"},
    "NonAutoregressiveBitSequence": {"word_size": "word_size", "seq_size": "seq_size", "n_modes": "n_modes_count"},
    "SetAddition": {"n_items": "n_items", "max_items": "max_traj_len", "fixed_length": "fixed_length"},
    "PerfectBinaryTree": {"depth": "depth"},
    "DiscreteEBM": {"ndim": "ndim"},
}


_RULES: weakref.WeakKeyDictionary[DiscreteEnv, str] = weakref.WeakKeyDictionary()


def describe(env: DiscreteEnv) -> dict[str, Any] | None:
    """Name and JSON arguments of an environment, ``None`` where it has none.

    An environment of one's own says its constructor's arguments in a property ``arguments``.
    """
    if isinstance(getattr(env, "arguments", None), dict):
        return {"name": f"{type(env).__module__}:{type(env).__qualname__}", "arguments": env.arguments}
    for cls in type(env).__mro__:  # a subclass that only changes the reward has its parent's rules
        if cls.__module__.startswith("gfn.gym.") and cls.__name__ in _GYM:
            arguments = {key: getattr(env, attribute) for key, attribute in _GYM[cls.__name__].items()}
            return {"name": f"gfn.gym:{cls.__name__}", "arguments": arguments}
    return None


def _title(env: DiscreteEnv) -> str:
    spec = describe(env)
    if spec is None:
        return type(env).__name__
    return f"{spec['name'].split(':')[1]}({', '.join(f'{k}={v}' for k, v in spec['arguments'].items())})"


def fingerprint(env: DiscreteEnv, walks: int = 16, steps: int = 256) -> str:
    """A hash of the environment's rules: masks and states along fixed walks that stop as late as they can.

    It sees another order of actions, another mask, another version of the same name.
    """
    digest = hashlib.sha256(repr((env.n_actions, tuple(env.state_shape))).encode())
    states = env.s0.expand(walks, *env.state_shape).clone()
    walk = torch.arange(walks, device=states.device)
    for t in range(steps):
        wrapped = env.states_from_tensor(states.clone())
        forward = wrapped.forward_masks
        for part in (states.double(), forward, wrapped.backward_masks):
            digest.update(part.cpu().contiguous().numpy().tobytes())
        inner = forward[:, :-1]
        go = inner.any(-1)
        if not go.any():
            break
        states, inner, walk = states[go], inner[go], walk[go]
        rank = (7919 * walk + 104729 * t + walk * t * t) % inner.sum(-1)
        actions = (inner.cumsum(-1) == rank[:, None] + 1).int().argmax(-1)
        states = env.step(env.states_from_tensor(states.clone()), env.actions_from_tensor(actions[:, None])).tensor
    return digest.hexdigest()[:16]


# Tensors


def distinct(states: Shaped[Tensor, "b *s"]) -> tuple[Shaped[Tensor, "u *s"], Int[Tensor, "b"]]:
    """The different states among these, and where each row is among them: ``states == unique[rows]``.

    Policies are functions of the state, so a batch costs as many evaluations as it has different states: on a grid,
    ten thousand trajectories visit at most a diagonal at a time.
    """
    keys, rows = torch.unique(state_keys(states), return_inverse=True)
    unique = states.new_empty(len(keys), *states.shape[1:]).index_copy_(0, rows, states)
    if not torch.equal(unique[rows], states):  # two states, one hash: about never
        unique, rows = torch.unique(states, dim=0, return_inverse=True)
    return unique, rows


def state_keys(states: Shaped[Tensor, "b *s"]) -> Int[Tensor, "b"]:
    """A 64-bit hash per state."""
    x = states.flatten(1)
    if x.is_floating_point():
        x = (x.double() + 0.0).view(torch.int64)  # minus zero is zero
        for shift, factor in ((33, -49064778989728563), (29, -4265267296055464877)):
            x = (x ^ (x >> shift)) * factor
    return (x.long() * _factors(x.shape[1], x.device)).sum(-1)


@functools.cache
def _factors(size: int, device: torch.device) -> Int[Tensor, "d"]:
    generator = torch.Generator().manual_seed(0)
    return (torch.randint(-(2**62), 2**62, (size,), generator=generator) * 2 + 1).to(device)


def _log_softmax(logits: Tensor, mask: Tensor) -> Tensor:
    """Masked before anything else: what a network says about forbidden actions, NaN included, must not matter."""
    log_p = torch.log_softmax(torch.where(mask, logits.double(), NEG_INF), dim=-1)
    return torch.where(mask, log_p, NEG_INF)


def digest(module: nn.Module) -> str:
    """A hash of weights, class names and configurations; where the classes live does not count."""
    parts = hashlib.sha256()
    for part in (*module.modules(), getattr(module, "preprocessor", None)):
        parts.update(f"{type(part).__qualname__} {getattr(part, 'config', '')}".encode())
    for name, value in module.state_dict().items():
        parts.update(f"{name} {value.dtype}".encode() + value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return parts.hexdigest()


@contextlib.contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode for as long as we call somebody's module."""
    training = [part for part in module.modules() if part.training]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True
