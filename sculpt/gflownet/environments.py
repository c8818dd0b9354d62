"""torchgfn's environments: what they are called, how they are made again, and a fingerprint of their rules."""

from __future__ import annotations

import hashlib
import importlib
import json
import multiprocessing
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from gfn.env import DiscreteEnv
from gfn.states import DiscreteStates
from jaxtyping import Shaped
from torch import Tensor

from sculpt.contents import arguments, find
from sculpt.entries import LARGEST, Entries

__all__ = ["describe", "fingerprint", "make", "on_device", "one_parent", "rules", "states_of", "title", "walk"]

# torchgfn's own: the constructor's argument -> where the environment keeps it, and the largest that a file may ask for, so that making
# it and taking its fingerprint is a matter of a second; None is for flags. Rewards are no part of the rules.
_GYM: dict[str, dict[str, tuple[str, int | None]]] = {
    "HyperGrid": {"ndim": ("ndim", 2048), "height": ("height", LARGEST)},
    "BitSequencePlus": {"word_size": ("word_size", 11), "seq_size": ("seq_size", 2048), "n_modes": ("n_modes", 1024)},
    "BitSequence": {"word_size": ("word_size", 12), "seq_size": ("seq_size", 2048), "n_modes": ("n_modes", 1024)},
    "NonAutoregressiveBitSequence": {
        "word_size": ("word_size", 8),
        "seq_size": ("seq_size", 256),
        "n_modes": ("n_modes_count", 1024),
    },
    "SetAddition": {
        "n_items": ("n_items", 2048),
        "max_items": ("max_traj_len", LARGEST),
        "fixed_length": ("fixed_length", None),
    },
    "PerfectBinaryTree": {"depth": ("depth", 13)},
    "DiscreteEBM": {"ndim": ("ndim", 1024)},
}
_NO_REWARD: dict[str, dict[str, Any]] = {
    "HyperGrid": {"validate_modes": False},
    "SetAddition": {"reward_fn": None},
    "PerfectBinaryTree": {"reward_fn": None},
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
            values = {key: getattr(env, attribute) for key, (attribute, _) in _GYM[cls.__name__].items()}
            return {"name": f"gfn.gym:{cls.__name__}", "arguments": values}
    return None


def make(spec: Entries, device: torch.device | str | None = None) -> DiscreteEnv:
    """The environment that a file describes by name and arguments. Its reward is not restored: composing needs none."""
    name, told, device = spec.text("name", most=200), spec.inside("arguments"), "cpu" if device is None else str(device)
    short = name.removeprefix("gfn.gym:")
    if name.startswith("gfn.gym:") and short in _GYM:
        cls = _gym_class(short)
        where = "device_str" if "BitSequence" in short else "device"
        options = _gym_arguments(short, told) | _NO_REWARD.get(short, {}) | {where: device}
    else:
        try:
            cls = find(name, DiscreteEnv)
        except ValueError:
            raise ValueError(
                f"{name} is not a DiscreteEnv of gfn.gym or sculpt. Pass your own with env=, or update sculpt where a newer one has it."
            ) from None
        options = arguments(cls, told) | {"device": device}
    try:
        return cls(**options)
    except (TypeError, ValueError, AssertionError) as error:
        raise ValueError(f"{name} does not take the arguments in {told.where} ({told.found!s:.200}): {error!s:.300}") from None


def on_device(env: DiscreteEnv, device: torch.device) -> DiscreteEnv:
    """The same environment on another device; torchgfn's do not move."""
    if (spec := describe(env)) is None:
        raise ValueError(
            f"{type(env).__name__} cannot be made again on {device}: sculpt does not know its arguments. Make it there yourself, and the "
            "model with it."
        )
    return make(Entries(json.loads(json.dumps(spec)), type(env).__name__), device)  # as a file would have it


def _gym_class(name: str) -> type[DiscreteEnv]:
    start_method = multiprocessing.get_start_method(allow_none=True)
    try:
        found = getattr(importlib.import_module("gfn.gym"), name, None)
    finally:
        # Importing gfn.gym decides the start method of the whole process, which is not ours to decide.
        multiprocessing.set_start_method(start_method, force=True)
    if found is None:
        raise ValueError(
            f"This torchgfn has no environment {name!r} in gfn.gym. Install the version that made the checkpoint, or pass env=."
        )
    return found  # type: ignore[no-any-return]


def _gym_arguments(name: str, told: Entries) -> dict[str, Any]:
    for entry in told.found:
        if entry not in _GYM[name]:
            raise told.refuse(entry, f"no such argument: {name} takes {', '.join(_GYM[name])}")
    try:
        return {key: told.flag(key) if most is None else told.whole(key, 1, most) for key, (_, most) in _GYM[name].items()}
    except ValueError as error:
        raise ValueError(f"{error} If the environment is one that large, make it yourself and pass env=.") from None


_ONE_PARENT: weakref.WeakKeyDictionary[DiscreteEnv, bool] = weakref.WeakKeyDictionary()


def one_parent(env: DiscreteEnv) -> bool:
    """Whether one way leads to each state, as far as walks can tell; computed once."""
    if env not in _ONE_PARENT:
        _ONE_PARENT[env] = not any((states.backward_masks.sum(-1) > 1).any() for states in walk(env))
    return _ONE_PARENT[env]


def title(env: DiscreteEnv) -> str:
    spec = describe(env)
    if spec is None:
        return type(env).__name__
    return f"{spec['name'].split(':')[1]}({', '.join(f'{k}={v}' for k, v in spec['arguments'].items())})"


def states_of(env: DiscreteEnv, states: Shaped[Tensor, "b *s"]) -> DiscreteStates:
    """Raw states as torchgfn's, with the masks that some environments write into them."""
    wrapped = env.states_from_tensor(states)
    if hasattr(env, "update_masks"):
        env.update_masks(wrapped)
    return wrapped


def walk(env: DiscreteEnv, walks: int = 16, steps: int = 256) -> Iterator[DiscreteStates]:
    """States along fixed walks that stop as late as they can."""
    states = env.s0.expand(walks, *env.state_shape).clone()
    which = torch.arange(walks, device=states.device)
    for t in range(steps):
        wrapped = states_of(env, states.clone())
        yield wrapped
        inner = wrapped.forward_masks[:, :-1]
        go = inner.any(-1)
        if not go.any():
            break
        states, inner, which = states[go], inner[go], which[go]
        rank = (7919 * which + 104729 * t + which * t * t) % inner.sum(-1)
        actions = (inner.cumsum(-1) == rank[:, None] + 1).int().argmax(-1)
        states = env.step(states_of(env, states.clone()), env.actions_from_tensor(actions[:, None])).tensor


def fingerprint(env: DiscreteEnv) -> str:
    """A hash of the environment's rules: masks and states along fixed walks.

    It sees another order of actions, another mask, another version of the same name.
    """
    digest = hashlib.sha256(repr((env.n_actions, tuple(env.state_shape))).encode())
    for states in walk(env):
        for part in (states.tensor.double(), states.forward_masks, states.backward_masks):
            digest.update(part.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
