"""torchgfn's environments: what they are called, and a fingerprint of their rules."""

from __future__ import annotations

import hashlib
import weakref
from typing import Any

import torch
from gfn.env import DiscreteEnv

__all__ = ["describe", "fingerprint", "rules", "title"]

_GYM = {  # torchgfn's own: the constructor's argument -> where the environment keeps it. Rewards are no part of the rules.
    "HyperGrid": {"ndim": "ndim", "height": "height"},
    "BitSequence": {"word_size": "word_size", "seq_size": "seq_size", "n_modes": "n_modes"},
    "NonAutoregressiveBitSequence": {"word_size": "word_size", "seq_size": "seq_size", "n_modes": "n_modes_count"},
    "SetAddition": {"n_items": "n_items", "max_items": "max_traj_len", "fixed_length": "fixed_length"},
    "PerfectBinaryTree": {"depth": "depth"},
    "DiscreteEBM": {"ndim": "ndim"},
}


_RULES: weakref.WeakKeyDictionary[DiscreteEnv, str] = weakref.WeakKeyDictionary()


def rules(env: DiscreteEnv) -> str:
    """An environment's rules: :func:`fingerprint`, computed once."""
    if env not in _RULES:
        _RULES[env] = fingerprint(env)
    return _RULES[env]


def describe(env: DiscreteEnv) -> dict[str, Any] | None:
    """Name and JSON arguments of an environment, ``None`` where it has none.

    An environment of one's own says its constructor's arguments in a property ``arguments``.
    """
    if isinstance(getattr(env, "arguments", None), dict):
        # Checkpoints and keys go on knowing an environment that has moved by where it was.
        name = getattr(env, "known_as", f"{type(env).__module__}:{type(env).__qualname__}")
        return {"name": name, "arguments": env.arguments}
    for cls in type(env).__mro__:  # a subclass that only changes the reward has its parent's rules
        if cls.__module__.startswith("gfn.gym.") and cls.__name__ in _GYM:
            arguments = {key: getattr(env, attribute) for key, attribute in _GYM[cls.__name__].items()}
            return {"name": f"gfn.gym:{cls.__name__}", "arguments": arguments}
    return None


def title(env: DiscreteEnv) -> str:
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
