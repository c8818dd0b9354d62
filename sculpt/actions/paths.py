r"""Paths back from finished samples, and the log-densities along them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from sculpt.actions.states import NEG_INF, distinct

if TYPE_CHECKING:
    from sculpt.actions.model import ActionModel

__all__ = ["backward_paths", "children_log_pb", "disagreement", "path_ratios"]


@torch.no_grad()
def path_ratios(
    models: Sequence[ActionModel], x: Shaped[Tensor, "b *s"], generator: torch.Generator | None = None, *, made_by: int = 0
) -> Float[Tensor, "b m"]:
    r""":math:`\log u_i(x) = \sum \log P_i(s'|s) - \log P_B^i(s|s')` along one backward path from each x, drawn by the :math:`P_B` of the model that made it.

    The terminal log-probabilities of base models whose flows balance; otherwise they depend on the path.
    """
    paths_at_once = max(1, 8 * models[0].batch_size // 64)
    return torch.cat([_path_ratios(models, part, generator, models[made_by]) for part in x.split(paths_at_once)])


def _path_ratios(models, x, generator, first):
    children, parents, actions, owner = backward_paths(first, x, generator)
    ell = torch.zeros(len(x), len(models), dtype=torch.float64, device=x.device)
    if len(owner):
        unique, rows = distinct(children)
        ell.index_add_(0, owner, -torch.stack([model.log_pb(unique)[rows, actions] for model in models], dim=-1))
    # All states at once: a policy that reads a whole path in one pass does.
    unique, rows = distinct(torch.cat([x, parents]))
    actions = torch.cat([torch.full((len(x),), first.n_actions - 1, device=x.device), actions])
    log_pf = torch.stack([model.log_pf(unique)[rows, actions] for model in models], dim=-1)
    return ell.index_add(0, torch.cat([torch.arange(len(x), device=x.device), owner]), log_pf)


def backward_paths(
    model: ActionModel, x: Shaped[Tensor, "b *s"], generator: torch.Generator | None = None
) -> tuple[Shaped[Tensor, "l *s"], Shaped[Tensor, "l *s"], Int[Tensor, "l"], Int[Tensor, "l"]]:
    """One path back from each x by the model's backward policy: child, parent, the action between them, and the row of x."""
    s0 = model.start(1)
    index, states = torch.arange(len(x), device=x.device), x
    steps = [(states[:0], states[:0], index[:0], index[:0])]
    while True:
        inside = (states != s0).flatten(1).any(-1)
        index, states = index[inside], states[inside]
        if not len(index):
            return tuple(torch.cat(column) for column in zip(*steps, strict=True))
        parents, actions = model.backtrack(states, generator)
        steps.append((states, parents, actions, index))
        states = parents


def disagreement(models: Sequence[ActionModel], x: Tensor, generator: torch.Generator | None, paths: int = 4) -> str | None:
    """How far the ratios of several paths to one state are apart: zero for converged base models."""
    try:
        ell = torch.stack([path_ratios(models, x, generator) for _ in range(paths)])
    except NotImplementedError:
        return None  # the model cannot walk backwards
    # Where all paths agree that a model does not come to a state, both are minus infinity, and nothing is apart.
    apart = torch.where((ell == ell[:1]).all(0), 0.0, ell.std(0).nan_to_num(nan=math.inf))
    spread = apart.mean(0).tolist()
    if max(spread) < 1e-9:
        return None
    parts = ", ".join(f"{model} {s:.2g}" for model, s in zip(models, spread, strict=True))
    verdict = "" if max(spread) < 0.2 else " An unconverged base model: expect an error of this size in the log-density."
    return f"path ratios to one state differ by (standard deviation, nats): {parts}.{verdict}"


def children_log_pb(model: ActionModel, states: Tensor, log_p: Tensor) -> Float[Tensor, "b a"]:
    """log P_B(s|s') per action; zero for the exit, which nothing else leads to."""
    out = torch.zeros_like(log_p[..., 0])
    rows, actions, children = model.children(states, (log_p > NEG_INF).any(-1))
    if len(rows):
        unique, index = distinct(children)
        out[rows, actions] = model.log_pb(unique)[index, actions]
    return out
