"""Policies read states. What they keep of a state makes its children cheap to read: it travels with the particle and is selected with it.

``b`` particles, ``u`` different states among theirs, ``a`` actions with the exit last.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor
from torch.nn import functional as F

from sculpt.actions.states import distinct
from sculpt.state import State

if TYPE_CHECKING:
    from sculpt.actions.model import ActionModel

__all__ = ["Carry", "Memory", "Reading", "emptied", "policy", "read"]


@dataclass
class Memory(State):
    """What a policy keeps of the states that it has read: tensors, tuples of them or other memories, with a row for each particle.

    Where memories of longer and of shorter states meet, the shorter ones are padded: they belong to particles that have ended.
    """

    tensors: tuple[Any, ...]

    def _map(self, function: Callable[..., Tensor], *others: State) -> Memory:
        first, *rest = map(Memory, _padded([memory.tensors for memory in (self, *others)]))  # type: ignore[attr-defined]
        return State._map(first, function, *rest)


def _padded(parts: Sequence[Any]) -> list[Any]:
    """The same entry of several memories, all of one shape but for the number of rows."""
    if isinstance(parts[0], tuple):
        return list(zip(*(_padded(inner) for inner in zip(*parts, strict=True)), strict=True))
    if isinstance(parts[0], Memory):
        return list(map(Memory, _padded([part.tensors for part in parts])))
    if parts[0] is None:
        return list(parts)
    shapes = [part.shape[1:] for part in parts]
    if len(set(shapes)) == 1:
        return list(parts)
    largest = [max(sizes) for sizes in zip(*shapes, strict=True)]
    return [
        F.pad(
            part,
            [pad for size, most in zip(reversed(part.shape[1:]), reversed(largest), strict=True) for pad in (0, most - size)],
        )
        for part in parts
    ]


def emptied(memory: Any) -> Any:
    """Rows that take no memory, in the place of what is not needed any more."""
    if isinstance(memory, Memory):
        return Memory(emptied(memory.tensors))
    if isinstance(memory, tuple):
        return tuple(map(emptied, memory))
    return None if memory is None else memory.new_empty(len(memory), *[0] * (memory.ndim - 1))


class Carry:
    """The carry of torchgfn's recurrent networks, a dict of tensors with their rows along any axis, as a tuple with the rows first.

    Args:
        network: with ``init_carry(n, device)``.
        device: where it is now.
    """

    def __init__(self, network: Any, device: torch.device):
        self.network = network
        two, three = (network.init_carry(n, device) for n in (2, 3))
        self.axes = {
            name: next(i for i, (a, b) in enumerate(zip(two[name].shape, three[name].shape, strict=True)) if a != b)
            for name in two
        }

    def given(self, kept: tuple[Tensor, ...] | None, like: Tensor) -> dict[str, Tensor]:
        """What the network wants to be given for as many particles as these, where they are."""
        if kept is None:
            return dict(self.network.init_carry(len(like), like.device))
        return {name: part.movedim(0, axis).contiguous() for (name, axis), part in zip(self.axes.items(), kept, strict=True)}

    def kept(self, carry: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """What a particle keeps of the network's carry."""
        return tuple(carry[name].movedim(axis, 0) for name, axis in self.axes.items())


@dataclass(frozen=True)
class Reading:
    """The policies of several models at the states of a population."""

    states: Shaped[Tensor, "u *s"]
    """each different one once, as a rule"""
    rows: Int[Tensor, "b"]
    """which of them each particle is in"""
    log_p: tuple[Float[Tensor, "u a"], ...]
    """of each model"""
    memory: Any
    """of each particle, for the next reading; ``None`` where nothing is kept"""


def read(models: Sequence[ActionModel], states: Shaped[Tensor, "b *s"], memory: Any = None) -> Reading:
    """Ask all models for their policies. Those that share a network are asked in one call.

    Args:
        models: these.
        states: where the particles are.
        memory: of the reading before, one step back.
    """
    groups, (unique, rows) = _together(models), distinct(states)
    own = memory
    if memory is not None:
        if 2 * len(unique) <= len(states):
            some = rows.new_empty(len(unique)).scatter_(0, rows, torch.arange(len(rows), device=rows.device))
            own = _rows(memory, some)
        else:  # copies of what is kept cost more than they save
            unique, rows = states, torch.arange(len(states), device=states.device)
    own = own or (None,) * len(groups)
    log_p: list[Tensor] = [unique] * len(models)
    kept = []
    for group, part in zip(groups, own, strict=True):
        told, part = models[group[0]].read([models[i] for i in group], unique, part)
        for i, table in zip(group, told, strict=True):
            log_p[i] = _checked(models[i], unique, table)
        kept.append(part)
    if all(part is None for part in kept):
        return Reading(unique, rows, tuple(log_p), None)
    return Reading(unique, rows, tuple(log_p), tuple(kept) if unique is states else _rows(kept, rows))


def _rows(memory: Sequence[Memory | None], rows: Int[Tensor, "k"]) -> tuple[Memory | None, ...]:
    return tuple(None if part is None else part[rows] for part in memory)


def policy(model: ActionModel, states: Shaped[Tensor, "u *s"]) -> Float[Tensor, "u a"]:
    """The log-probabilities of a model's actions; raise where they are none."""
    return _checked(model, states, model.log_pf(states))


def _together(models: Sequence[ActionModel]) -> list[list[int]]:
    """The models in groups that are read in one call."""
    groups: list[list[int]] = []
    for i, model in enumerate(models):
        own = next((g for g in groups if model.together is not None and models[g[0]].together == model.together), None)
        if own is None:
            groups.append([i])
        else:
            own.append(i)
    return groups


def _checked(model: ActionModel, states: Shaped[Tensor, "u *s"], log_p: Float[Tensor, "u a"]) -> Float[Tensor, "u a"]:
    top = log_p.amax(-1)
    if not math.isfinite(top.detach().sum()):  # one number to look at: this is done at every step
        bad = ~top.isfinite()
        raise FloatingPointError(
            f"{model} gave no distribution over its actions for {int(bad.sum())} of {len(states)} states, first for "
            f"{states[bad][0].tolist()!s:.200}: expected log-probabilities, one of them more than minus infinity and none NaN."
        )
    return log_p
