"""GFlowNet checkpoints: ``config.json`` and ``model.safetensors``. Nothing in them is executed.

The environment is included by name and arguments and rebuilt; a fingerprint of its rules tells when the installed one is
another. Classes come from ``gfn.gym`` and ``sculpt`` only; anything else has to be passed to ``from_pretrained``.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from gfn.env import DiscreteEnv
from gfn.estimators import DiscretePolicyEstimator
from torch import Tensor, nn

from sculpt.contents import find
from sculpt.files import load_folder, save_folder
from sculpt.gflownet.environments import describe, fingerprint, title
from sculpt.gflownet.estimators import LogProbPolicy, NetworkPolicy, check_condition

if TYPE_CHECKING:
    from sculpt.gflownet.model import GFlowNet

__all__ = ["Given", "build_env", "read", "save"]


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
        "condition": list(model.condition),
    }
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
    config, weights = load_folder(folder, kind="gflownet")
    config = config.found
    if sorted(condition) != sorted(config["condition"]):
        raise ValueError(
            f"The policy in {folder} is conditional on {config['condition'] or 'nothing'}, got values for {sorted(condition) or 'nothing'}. "
            f"Call load({str(folder)!r}{''.join(f', {name}=…' for name in config['condition'])})."
        )
    saved = config["environment"]
    env = build_env(saved, given.device) if given.env is None else given.env
    _check_rules(env, saved, folder)
    sides = {"policy": given.policy, "backward": given.backward}
    for side, estimator in sides.items():
        if side in config:
            sides[side] = _estimator(config[side], estimator, weights, env, side, folder).to(
                device=env.device, dtype=given.dtype
            )
    ordered = check_condition({name: condition[name] for name in config["condition"]}, sides["policy"], str(folder))
    name = config["name"] or folder.resolve().name
    if ordered:
        name += f"[{', '.join(f'{k}={v:g}' for k, v in ordered.items())}]"
    return {"env": env, **sides, "condition": ordered, "name": name}


def _check_rules(env: DiscreteEnv, saved: dict[str, Any], folder: Path) -> None:
    if (rules := fingerprint(env)) != saved["rules"]:
        raise ValueError(
            f"{folder} was made for {saved['name']} {saved['arguments']} (rules {saved['rules']}, torchgfn {saved['torchgfn']}); here "
            f"{title(env)} has other rules ({rules}, torchgfn {version('torchgfn')}): masks, actions or states differ. "
            "Install the version it was made with, or pass the right env=."
        )
    if (spec := describe(env)) is not None and json.loads(json.dumps(spec)) != {key: saved[key] for key in spec}:
        raise ValueError(
            f"{folder} was made for {saved['name']} with other arguments than the env= that was passed, {title(env)}. The rules look "
            "alike, but an action means something else. Leave env= out to have the checkpoint's own."
        )


def _estimator(
    spec: dict[str, Any] | None,
    estimator: DiscretePolicyEstimator | None,
    weights: dict[str, Tensor],
    env: DiscreteEnv,
    side: str,
    folder: Path,
) -> DiscretePolicyEstimator:
    """The caller's estimator, or the one that the checkpoint describes, with the checkpoint's weights."""
    if estimator is None:
        estimator = _build_network(spec, env.n_actions, side, folder)
    state = {key.removeprefix(f"{side}."): value for key, value in weights.items() if key.startswith(f"{side}.")}
    try:
        estimator.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(
            f"The weights in {folder} do not fit the {side} network {spec or type(estimator.module).__name__}: {error}"
        ) from None
    return estimator.eval().requires_grad_(False)


def build_env(spec: dict[str, Any], device: torch.device | str | None = None) -> DiscreteEnv:
    """The environment of a checkpoint, by name and arguments. Its reward is not restored: composing needs none."""
    cls = _import(spec["name"], DiscreteEnv, "env=")
    device = "cpu" if device is None else str(device)
    fixed = {
        "HyperGrid": {"validate_modes": False},
        "SetAddition": {"reward_fn": None},
        "PerfectBinaryTree": {"reward_fn": None},
    }
    where = "device_str" if "BitSequence" in cls.__name__ else "device"
    try:
        return cls(**spec["arguments"], **fixed.get(cls.__name__, {}), **{where: device})
    except TypeError as error:
        raise ValueError(f"{spec['name']} does not take the arguments {spec['arguments']} of the checkpoint: {error}") from None


def _import(path: str, kind: type, instead: str) -> type:
    """A class of torchgfn's environments or of sculpt's table. A config file must not name arbitrary code to run."""
    module, _, name = path.partition(":")
    if module != "gfn.gym":
        try:
            return find(path, kind)
        except ValueError:
            raise ValueError(
                f"{path} is not a {kind.__name__} of gfn.gym or sculpt. Pass your own with {instead}, or update sculpt where a newer one has it."
            ) from None
    start_method = multiprocessing.get_start_method(allow_none=True)
    try:
        cls = getattr(importlib.import_module(module), name, None)
    finally:
        # Importing gfn.gym decides the start method of the whole process, which is not ours to decide.
        multiprocessing.set_start_method(start_method, force=True)
    if isinstance(cls, type) and issubclass(cls, kind):
        return cls
    raise ValueError(
        f"This torchgfn has no {kind.__name__} {name!r} in gfn.gym. Install the version that made the checkpoint, or pass {instead}."
    )


def _describe_network(estimator: DiscretePolicyEstimator) -> dict[str, Any] | None:
    """``None`` for networks that cannot be rebuilt: ``from_pretrained`` then wants the estimator."""
    config = getattr(estimator.module, "config", None)
    if not (isinstance(estimator, NetworkPolicy) and isinstance(config, dict)):
        return None
    return {"class": f"{type(estimator.module).__module__}:{type(estimator.module).__qualname__}", "arguments": config}


def _build_network(spec: dict[str, Any] | None, n_actions: int, side: str, folder: Path) -> NetworkPolicy:
    if spec is None:
        raise ValueError(
            f"{folder} has weights of an estimator of your own. Build it as when it was trained and pass {side}=estimator."
        )
    network = _import(spec["class"], nn.Module, f"{side}=")(**spec["arguments"])
    return NetworkPolicy(network, n_actions, is_backward=side == "backward")
