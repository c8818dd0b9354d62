"""GFlowNet checkpoints: ``config.json`` and ``model.safetensors``. Nothing in them is executed.

The environment is included by name and arguments and rebuilt; a fingerprint of its rules tells when the installed one is
another. Classes come from ``gfn.gym`` and ``sculpt`` only; anything else has to be passed to ``from_pretrained``.
Every entry is checked, and the shapes of the weights against what it describes, before anything is built.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from gfn.env import DiscreteEnv
from gfn.estimators import DiscretePolicyEstimator
from torch import nn

from sculpt.blueprint import build, check, fill
from sculpt.contents import arguments, find
from sculpt.entries import Entries
from sculpt.files import open_folder, save_folder
from sculpt.gflownet.environments import describe, fingerprint, make, title
from sculpt.gflownet.estimators import LogProbPolicy, NetworkPolicy, check_condition
from sculpt.weights import Weights

if TYPE_CHECKING:
    from sculpt.gflownet.model import GFlowNet

__all__ = ["Given", "read", "save"]


def save(model: GFlowNet, folder: Path) -> None:
    """Write a model's networks and what builds them and its environment again."""
    if isinstance(model.policy, LogProbPolicy):
        raise ValueError(f"{model.name} is computed, it has no network to save. Save its parts and compose or solve again.")
    environment = describe(model.env)
    if environment is None:
        raise ValueError(
            f"{type(model.env).__name__} cannot be written by name: it is not one of torchgfn's whose arguments sculpt knows. Give it a "
            "property `arguments`, the dict of JSON values its constructor takes, and pass env= to from_pretrained."
        )
    estimators = {"policy": model.policy} | ({"backward": model.backward} if model.backward is not None else {})
    tensors = {f"{side}.{key}": value for side, part in estimators.items() for key, value in part.state_dict().items()}
    config = {
        "kind": "gflownet",
        "name": model._name,
        "environment": environment | {"rules": model.rules, "torchgfn": version("torchgfn")},
        **{side: _describe_network(part) for side, part in estimators.items()},
        "condition": [] if model.fixed else list(model.condition),
    } | ({"fixed": model.condition} if model.fixed else {})
    save_folder(folder, config, tensors)


@dataclass(frozen=True)
class Given:
    """What the caller has of a checkpoint's parts, and where they are to go."""

    env: DiscreteEnv | None = None
    policy: DiscretePolicyEstimator | None = None
    backward: DiscretePolicyEstimator | None = None
    device: torch.device | str | None = None
    dtype: torch.dtype | None = None


def read(folder: Path, given: Given, condition: dict[str, float]) -> dict[str, Any]:
    """The arguments of a GFlowNet, from what :func:`save` wrote."""
    with open_folder(folder, kind="gflownet") as (config, weights):
        names = config.texts("condition", most=100, distinct=True)
        if max(map(len, names), default=1) > 100:
            raise config.refuse("condition", "names of at most 100 characters")
        if sorted(condition) != sorted(names):
            raise ValueError(
                f"The policy in {folder} is conditional on {names or 'nothing'}, got values for {sorted(condition) or 'nothing'}. "
                f"Call load({str(folder)!r}{''.join(f', {name}=…' for name in names)})."
            )
        fixed = (
            {}
            if "fixed" not in config
            else {entry: config.inside("fixed").number(entry) for entry in config.inside("fixed").found}
        )
        name = config.optional("name", config.text, most=1000) or folder.resolve().name
        parts = {
            side: _part(config, side, getattr(given, side), weights)
            for side in ("policy", "backward")
            if side in ("policy", *config.found)
        }
        env = _environment(config.inside("environment"), given, folder)
        _check_names(weights, parts)
        tensors = weights.read()
    sides = {"policy": given.policy, "backward": given.backward}
    for side, part in parts.items():
        is_given = part is sides[side]
        fill(part, tensors, weights, f"{side}." if is_given else f"{side}.module.")
        estimator = part if is_given else NetworkPolicy(part, env.n_actions, is_backward=side == "backward")
        sides[side] = estimator.eval().requires_grad_(False).to(device=env.device, dtype=given.dtype)
    asked = check_condition({name: condition[name] for name in names}, sides["policy"], str(folder))
    ordered = check_condition(fixed, sides["policy"], str(folder)) | asked
    for side, part in parts.items():
        if part is not sides[side]:
            _try(sides[side], env, ordered, folder)
    if asked:
        name += f"[{', '.join(f'{k}={v:g}' for k, v in asked.items())}]"
    return {"env": env, **sides, "condition": ordered, "fixed": bool(fixed), "name": name}


def _part(config: Entries, side: str, estimator: DiscretePolicyEstimator | None, weights: Weights) -> nn.Module:
    """The caller's estimator or else the network that the checkpoint describes, either of the shapes of the weights."""
    if estimator is not None:
        check(estimator, weights, f"the {side} network {type(estimator.module).__name__}", f"{side}.")
        return estimator
    if config.get(side) is None:
        raise ValueError(
            f"{weights.path.parent} has weights of an estimator of your own. Build it as when it was trained and pass {side}=estimator."
        )
    spec = config.inside(side)
    name = spec.text("class", most=200)
    try:
        cls = find(name, nn.Module)
    except ValueError:
        raise ValueError(
            f"{name} is not a network of sculpt. Pass your own estimator with {side}=, or update sculpt where a newer one has it."
        ) from None
    options = arguments(cls, spec.inside("arguments"))
    return build(lambda: cls(**options), weights, f"the {side} network", f"{side}.module.")


def _environment(saved: Entries, given: Given, folder: Path) -> DiscreteEnv:
    """The caller's environment or else the checkpoint's own, either with the checkpoint's rules."""
    env = make(saved, given.device) if given.env is None else given.env
    name, told = saved.text("name", most=200), saved.inside("arguments").found
    rules, torchgfn = saved.text("rules", most=100), saved.text("torchgfn", most=100)
    if (found := fingerprint(env)) != rules:
        raise ValueError(
            f"{folder} was made for {name} {told!s:.200} (rules {rules}, torchgfn {torchgfn}); here "
            f"{title(env)} has other rules ({found}, torchgfn {version('torchgfn')}): masks, actions or states differ. "
            "Install the version it was made with, or pass the right env=."
        )
    if (spec := describe(env)) is not None and json.loads(json.dumps(spec)) != {"name": name, "arguments": told}:
        raise ValueError(
            f"{folder} was made for {name} with other arguments than the env= that was passed, {title(env)}. The rules look "
            "alike, but an action means something else. Leave env= out to have the checkpoint's own."
        )
    return env


def _check_names(weights: Weights, parts: Iterable[str]) -> None:
    for name in weights.shapes:
        if name.partition(".")[0] not in parts:
            raise ValueError(
                f"{weights.path} has a tensor {name:.200}, which belongs to none of {', '.join(parts)}. Copy or download the folder again."
            )


def _try(estimator: NetworkPolicy, env: DiscreteEnv, condition: dict[str, float], folder: Path) -> None:
    """A network of the right shapes may still not be one for the environment: have it answer once."""
    start = env.states_from_tensor(env.s0.expand(1, *env.state_shape).clone())
    values = torch.tensor([list(condition.values())], dtype=torch.get_default_dtype(), device=env.device)
    got: Any
    try:
        got = tuple((estimator(start, values) if condition else estimator(start)).shape)
    except Exception as error:  # whatever a network says to states that it was not made for
        got = f"{type(error).__name__} ({error!s:.200})"
    if got != (expected := (1, env.n_actions - estimator.is_backward)):
        raise ValueError(
            f"{folder} describes a {type(estimator.module).__name__} that does not fit {title(env)}: to the initial state it answers with "
            f"{got}, expected {expected}. Copy or download the folder again."
        )


def _describe_network(estimator: DiscretePolicyEstimator) -> dict[str, Any] | None:
    """``None`` for networks that cannot be rebuilt: ``from_pretrained`` then wants the estimator."""
    config = getattr(estimator.module, "config", None)
    if not (isinstance(estimator, NetworkPolicy) and isinstance(config, dict)):
        return None
    return {"class": f"{type(estimator.module).__module__}:{type(estimator.module).__qualname__}", "arguments": config}
