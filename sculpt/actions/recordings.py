r"""Whole trajectories, recorded: the way of every sample, and what each base model thinks of it.

Notation: trajectory :math:`\tau` from :math:`s_0` to x; ``n`` trajectories, ``l`` states of all of them end to end, ``m`` models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from sculpt.actions.paths import backward_paths
from sculpt.actions.states import NEG_INF, distinct, draw

if TYPE_CHECKING:
    from sculpt.actions.model import ActionModel

__all__ = ["Sizes", "Trajectories", "measure", "record", "retrace"]


@dataclass
class Trajectories:
    r"""Trajectories end to end, with what they say of their label.

    Replacing the label by its posterior given :math:`\tau` keeps the expected loss and removes variance (Rao–Blackwell).
    """

    x: Shaped[Tensor, "n *s"]
    """the finished samples"""
    p: Float[Tensor, "n m"]
    r""":math:`p(y_1 = i|\tau) = P_i(\tau) / \sum_j P_j(\tau)`"""
    last: Int[Tensor, "n"]
    """the row of each trajectory's last state"""
    states: Shaped[Tensor, "l *s"]
    actions: Int[Tensor, "l"]
    """the action taken in each state"""
    so_far: Float[Tensor, "l m"]
    """the label's posterior given the way to each state"""
    owner: Int[Tensor, "l"]
    """the trajectory of each state"""

    def pick(self, size: int, generator: torch.Generator) -> Trajectories:
        """``size`` of them at random, with replacement."""
        return self.select(torch.randint(len(self.x), (size,), generator=generator))

    def select(self, pick: Int[Tensor, "k"]) -> Trajectories:
        """These trajectories, in this order."""
        first = torch.cat([self.last.new_tensor([-1]), self.last])[pick] + 1
        length = self.last[pick] + 1 - first
        owner = torch.arange(len(pick)).repeat_interleave(length)
        ends = length.cumsum(0)
        row = torch.arange(len(owner)) + (first - ends + length)[owner]
        return Trajectories(self.x[pick], self.p[pick], ends - 1, self.states[row], self.actions[row], self.so_far[row], owner)

    def split(self, parts: int) -> list[Trajectories]:
        """So many parts, each with trajectories of all models."""
        each = torch.arange(len(self.x))
        return [self] if parts == 1 else [self.select(each[i::parts]) for i in range(parts)]

    @staticmethod
    def join(parts: Sequence[Trajectories]) -> Trajectories:
        """All of them, one after another."""
        columns = {
            name: torch.cat([getattr(part, name) for part in parts]) for name in ("x", "p", "states", "actions", "so_far")
        }
        owners = torch.cat([part.owner + sum(len(q.x) for q in parts[:i]) for i, part in enumerate(parts)])
        last = torch.cat([part.last + sum(len(q.states) for q in parts[:i]) for i, part in enumerate(parts)])
        return Trajectories(owner=owners, last=last, **columns)

    def to(self, device: torch.device) -> Trajectories:
        """The same on another device."""
        return Trajectories(**{name: value.to(device) for name, value in vars(self).items()})


@dataclass(frozen=True)
class Sizes:
    """How large trajectories are, on average over a few of each model."""

    few: Trajectories
    steps: float
    """of a trajectory"""
    different: float
    """the share of different states among theirs"""
    children: float
    """of a state; the exit leads to none"""
    bytes: float
    """of a recorded trajectory"""


@torch.no_grad()
def measure(models: Sequence[ActionModel], n: int, generator: torch.Generator) -> Sizes:
    """The sizes of trajectories, seen by n of each model."""
    few = Trajectories.join([record(model, models, n, generator) for model in models])
    states, _ = distinct(few.states)
    allowed = torch.stack([model.log_pf(states.to(model.device)) > NEG_INF for model in models]).any(0)
    size = sum(value.nbytes for value in vars(few).values()) / len(few.x)
    return Sizes(
        few, len(few.states) / len(few.x), len(states) / len(few.states), float(allowed[:, :-1].sum()) / len(states), size
    )


@torch.no_grad()
def record(model: ActionModel, models: Sequence[ActionModel], n: int, generator: torch.Generator) -> Trajectories:
    """n trajectories of a model, as all ``models`` see them."""
    columns = []
    # A loop of its own: a chain forgets the states that its particles have left.
    for chunk in torch.arange(n, device=model.device).split(model.batch_size):
        index, states = chunk, model.start(len(chunk))
        while len(index):
            unique, rows = distinct(states)
            actions = draw(model.log_pf(unique), rows, generator)
            columns.append((index, states, actions))
            go = actions != model.n_actions - 1
            index, states = index[go], model.step(states[go], actions[go])
    return _seen(models, *(torch.cat(column) for column in zip(*columns, strict=True)))


@torch.no_grad()
def retrace(models: Sequence[ActionModel], x: Shaped[Tensor, "b *s"], generator: torch.Generator) -> Trajectories:
    """Trajectories to these x by the first model's backward policy, as all models see them."""
    _, parents, actions, owner = backward_paths(models[0], x, generator)
    exits = torch.full((len(x),), models[0].n_actions - 1, device=x.device)
    parts = (torch.arange(len(x), device=x.device), owner), (x, parents), (exits, actions)
    return _seen(models, *(torch.cat(part).flip(0) for part in parts))


def _seen(models: Sequence[ActionModel], owner: Tensor, states: Tensor, actions: Tensor) -> Trajectories:
    """From states and actions, each trajectory's in order, to what the models think of them."""
    order = owner.argsort(stable=True)
    owner, states, actions = owner[order], states[order], actions[order]
    steps = []
    for part in torch.arange(len(states)).split(8 * models[0].batch_size):
        unique, rows = distinct(states[part])
        steps.append(torch.stack([model.log_pf(unique)[rows, actions[part]] for model in models], dim=-1))
    # A finite number for what a model thinks impossible: the sums of the trajectories after it stay numbers.
    log_p = torch.cat(steps).clamp(min=-1e5).cumsum(0).cpu()
    last = torch.bincount(owner).cumsum(0).cpu() - 1
    owner, states, actions = owner.cpu(), states.cpu(), actions.cpu()
    # The sum before each row, and before its trajectory.
    before = torch.cat([torch.zeros(1, len(models), dtype=log_p.dtype), log_p])
    start = before[torch.cat([last.new_zeros(1), last[:-1] + 1])]
    so_far = torch.softmax(before[:-1] - start[owner], dim=-1).float()
    p = torch.softmax(log_p[last] - start, dim=-1).float()
    return Trajectories(states[last], p, last, states, actions, so_far, owner)
