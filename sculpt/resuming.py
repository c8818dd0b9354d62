"""The file of a training: what it says is checked, and that it fits, before any of its numbers are read."""

from __future__ import annotations

import collections
import copy
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from sculpt.blueprint import check, fill
from sculpt.entries import Entries, parse_json
from sculpt.weights import REAL, Shape, Weights

__all__ = ["FORMAT", "Kept", "fit_in", "note_of", "read_state", "saved_step", "state_path"]

FORMAT = 1
SIDES = (2, 3, 5, 7, 11, 13)


@runtime_checkable
class Kept(Protocol):
    """What belongs to the state of a training: modules, and everything else with these two methods."""

    def state_dict(self) -> Mapping[str, Any]:
        """Its tensors by name."""

    def load_state_dict(self, state_dict: Mapping[str, Any], /) -> Any:
        """Take them back."""


def state_path(folder: Path) -> Path:
    """The file."""
    return folder / "state.safetensors"


def read_state(folder: str | Path) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    """The note of a saved training (``identity``, ``step``, ``seconds``, ``curve``), and the tensors of its parts by name.

    Args:
        folder: of the training.
    """
    weights = Weights(state_path(Path(folder)))
    return note_of(weights), _parts(weights.read())


def saved_step(folder: str | Path) -> int | None:
    """The step that a training would continue from; ``None`` where it has saved no state.

    Args:
        folder: of the training.
    """
    path = state_path(Path(folder))
    return int(note_of(Weights(path))["step"]) if path.is_file() else None


def note_of(weights: Weights) -> dict[str, Any]:
    """What a file says beside its tensors, each entry of its kind."""
    where = f"{weights.path}: its note"
    try:
        note = Entries(parse_json(weights.metadata.get("training", ""), where), where)
    except ValueError:
        raise ValueError(
            f"{weights.path} is not the state of a training of sculpt. Give another folder, or delete it."
        ) from None
    if note.get("format") != FORMAT:
        raise ValueError(
            f"{weights.path} has format {note.get('format')!s:.80}, this sculpt reads format {FORMAT}. Update sculpt."
        )
    if note.optional("tensors", note.whole) not in (None, len(weights.shapes)):
        raise note.refuse("tensors", f"{len(weights.shapes)}, which are there")
    curve = note.each("curve", dict, "objects")
    for k, found in enumerate(curve):
        row = Entries(found, f"{where}: row {k} of the curve")
        for name, value in found.items():
            if not isinstance(value, (int, float)) or (isinstance(value, int) and abs(value) >= 2**63):
                raise row.refuse(name, "a number")
    about = {"step": note.whole("step"), "seconds": note.number("seconds", 0, 1e12), "curve": curve}
    return {"identity": note.inside("identity").found, **about}


def _parts(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    parts: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        part, _, name = key.partition("/")
        parts.setdefault(part, {})[name] = value
    return parts


def fit_in(weights: Weights, kept: Mapping[str, Kept], optimizer: torch.optim.Optimizer) -> None:
    """Load a state into the parts of a training and its optimiser, or raise where it is the state of others."""
    modules = {name: one for name, one in kept.items() if isinstance(one, nn.Module)}
    for name, module in modules.items():
        check(module, weights, f"the {name} of this training", f"{name}/")
    _check_moments(weights, kept, _moments(optimizer))
    tensors = weights.read()
    parts = _parts(tensors)
    for name, module in modules.items():
        fill(module, tensors, weights, f"{name}/")
    try:
        for name in kept.keys() - modules.keys():
            kept[name].load_state_dict(parts.get(name, {}))
        moments = {int(name.partition(".")[2]): part for name, part in parts.items() if name.startswith("optimizer.")}
        if not all(0 <= float(moment.get("step", 0)) < math.inf for moment in moments.values()):
            raise ValueError("the optimiser counts steps that are no number")
        if odd := {value.dtype for moment in moments.values() for value in moment.values()} - {*REAL, torch.int64}:
            raise ValueError(f"the optimiser has {odd.pop()}, expected real numbers")
        optimizer.load_state_dict(optimizer.state_dict() | {"state": moments})
    except Exception as error:  # whatever a class says about a state that it did not write
        raise _misfit(weights, f"{type(error).__name__}: {error!s:.300}") from None


def _moments(optimizer: torch.optim.Optimizer) -> list[dict[str, Shape]]:
    """What an optimiser keeps of each of its parameters: it takes a step with small ones, each side of which stands for one there."""
    twin = copy.copy(optimizer)
    twin.state = collections.defaultdict(dict)
    twin.param_groups = [
        dict(group, params=[torch.zeros(SIDES[: p.ndim]) for p in group["params"]]) for group in optimizer.param_groups
    ]
    small = [parameter for group in twin.param_groups for parameter in group["params"]]
    for parameter in small:
        parameter.grad = torch.ones_like(parameter)
    type(twin).step(twin)  # a scheduler may have put its own step into the optimiser
    moments = []
    for parameter, whole in zip(small, (p for group in optimizer.param_groups for p in group["params"]), strict=True):
        sides = dict(zip(SIDES, whole.shape, strict=False))
        shapes = {name: torch.as_tensor(value).shape for name, value in twin.state[parameter].items()}
        moments.append({name: tuple(sides.get(side, side) for side in shape) for name, shape in shapes.items()})
    return moments


def _check_moments(weights: Weights, kept: Mapping[str, Kept], moments: list[dict[str, Shape]]) -> None:
    """A parameter that got no gradient so far has none; nothing else may be missing, or be there beside them."""
    expected = {f"optimizer.{i}": moment for i, moment in enumerate(moments)}
    stored: dict[str, dict[str, Shape]] = {}
    for key, shape in weights.shapes.items():
        part, _, name = key.partition("/")
        stored.setdefault(part, {})[name] = shape
    for part, shapes in stored.items():
        if part not in kept and shapes != expected.get(part):
            raise _misfit(weights, f"{part:.80} has {shapes!s:.200}, expected {expected.get(part, 'no such part')!s:.200}")


def _misfit(weights: Weights, why: str) -> ValueError:
    return ValueError(f"{weights.path} does not fit this training: {why}. Give another folder.")
