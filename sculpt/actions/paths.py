r"""Paths back from finished samples, and the log-densities along them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from sculpt.actions.states import NEG_INF, distinct

if TYPE_CHECKING:
    from sculpt.actions.model import ActionModel
    from sculpt.formula import Formula

__all__ = ["ONE_PARENT", "Disagreement", "backward_paths", "children_log_pb", "disagreement", "path_ratios"]

ERROR, FEW, MOST = 0.1, 64, 64
"""The standard error of an averaged log-density, in nats, that is good enough; samples that tell how many paths it takes, and paths at most."""
UNCONVERGED = 0.2
"""Nats between paths, from which on a model is called so."""
PATHS = 16
"""Paths to a state, that tell how far they disagree."""
ONE_PARENT = "one parent"
"""The backward key of models whose states have one parent each: there is one path, and nothing to disagree about."""


@torch.no_grad()
def path_ratios(
    models: Sequence[ActionModel],
    x: Shaped[Tensor, "b *s"],
    generator: torch.Generator | None = None,
    *,
    made_by: int = 0,
    paths: int | None = 1,
) -> Float[Tensor, "b m"]:
    r"""Terminal log-probabilities by backward paths from each x, drawn by the :math:`P_B` of the model that made it.

    One path: :math:`\log u_i(x) = \sum \log P_i(s'|s) - \log P_B^i(s|s')`, which depends on the path unless the base models' flows balance.
    Several: the mean of :math:`\prod P_i(s'|s) / P_B(s|s')`, whose expectation is :math:`p_i(x)` whatever the models.

    Args:
        models: all of them.
        x: finished samples.
        generator: draws the paths.
        made_by: whose backward policy they follow.
        paths: how many for each sample; ``None`` says as many as their spread asks for.
    """
    known = [model.log_p(x) for model in models]
    if all(log_p is not None for log_p in known):
        return torch.stack(known, dim=-1)  # type: ignore[arg-type]
    if paths is None and all(model.backward_key == ONE_PARENT for model in models):
        paths = 1
    if paths is None:
        paths = _enough(torch.stack([_told(models, x[:FEW], generator, made_by)[0] for _ in range(4)]))
    if paths == 1:
        return _told(models, x, generator, made_by)[0]
    return _mean(torch.stack([_told(models, x, generator, made_by)[1] for _ in range(paths)]))


def _mean(log: Float[Tensor, "k *b"]) -> Float[Tensor, "*b"]:
    """The logarithm of the mean."""
    return log.logsumexp(0) - math.log(len(log))


def _enough(ell: Float[Tensor, "k b m"]) -> int:
    """How many paths it takes, by what a few say of a few samples."""
    s = min(float(_spread(ell).max()), 5.0) if ell.numel() else 0.0
    return max(1, min(MOST, math.ceil(math.expm1(s**2) / ERROR**2)))


def _spread(ell: Float[Tensor, "k b m"]) -> Float[Tensor, "m"]:
    """The standard deviation between paths to one state, its root mean square over states."""
    # Where all paths agree that a model does not come to a state, both are minus infinity, and nothing is apart.
    apart = torch.where((ell == ell[:1]).all(0), 0.0, ell.std(0).nan_to_num(nan=math.inf))
    return apart.square().mean(0).sqrt()


def _told(
    models: Sequence[ActionModel], x: Shaped[Tensor, "b *s"], generator: torch.Generator | None, made_by: int
) -> tuple[Float[Tensor, "b m"], Float[Tensor, "b m"]]:
    """What one path says of each x: divided by each model's own backward policy, and by the one that drew it."""
    at_once = max(1, 8 * models[0].batch_size // 64)
    parts = [_along(models, part, generator, models[made_by]) for part in x.split(at_once)]
    ahead, back = (torch.cat(column) for column in zip(*parts, strict=True))
    return ahead - back, ahead - back[:, made_by, None]


def _along(
    models: Sequence[ActionModel], x: Shaped[Tensor, "b *s"], generator: torch.Generator | None, drawn_by: ActionModel
) -> tuple[Float[Tensor, "b m"], Float[Tensor, "b m"]]:
    """One path back from each x: its log-probability from the start, and from x, by every model."""
    children, parents, actions, owner = backward_paths(drawn_by, x, generator)
    back = torch.zeros(len(x), len(models), dtype=torch.float64, device=x.device)
    if len(owner):
        unique, rows = distinct(children)
        back.index_add_(0, owner, torch.stack([model.log_pb(unique)[rows, actions] for model in models], dim=-1))
    # All states at once: a policy that reads a whole path in one pass does.
    unique, rows = distinct(torch.cat([x, parents]))
    actions = torch.cat([torch.full((len(x),), drawn_by.n_actions - 1, device=x.device), actions])
    log_pf = torch.stack([model.log_pf(unique)[rows, actions] for model in models], dim=-1)
    ahead = torch.zeros_like(back).index_add(0, torch.cat([torch.arange(len(x), device=x.device), owner]), log_pf)
    return ahead, back


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


@dataclass(frozen=True)
class Disagreement:
    """What tracked densities are off by where paths to one state disagree: nothing for converged base models."""

    apart: float = 0.0
    """of a state's log-weight, standard deviation over states, in nats"""
    shift: float = 0.0
    """the mean of it"""
    said: str = ""


def disagreement(
    formula: Formula, models: Sequence[ActionModel], x: Tensor, generator: torch.Generator | None, first: int = 0
) -> Disagreement:
    r"""Tracked densities give a state the mean of :math:`e^{\Phi(\ell)}` over its paths; it is due :math:`e^{\Phi(\log p(x))}`.

    Args:
        formula: of the models.
        models: all of them.
        x: finished samples.
        generator: draws the paths.
        first: whose backward policy they follow.
    """
    if all(model.backward_key == ONE_PARENT for model in models):
        return Disagreement()
    try:
        own, drawn = zip(*(_told(models, x, generator, first) for _ in range(PATHS)), strict=True)
    except NotImplementedError:
        return Disagreement()  # the model cannot walk backwards
    ell = torch.stack(own)
    spread = _spread(ell).tolist()
    if max(spread) < 1e-9:
        return Disagreement()
    off = (_mean(formula.value(ell)) - formula.value(_mean(torch.stack(drawn)))).nan_to_num(nan=0.0, posinf=math.inf)
    parts = ", ".join(f"{model} {s:.2g}" for model, s in zip(models, spread, strict=True))
    said = f"path ratios to one state differ by (standard deviation, nats): {parts}"
    if max(spread) >= UNCONVERGED:
        said += ". An unconverged base model: what that does to weights is in the verdict"
    return Disagreement(float(off.std(correction=0)), abs(float(off.mean())), said)


def children_log_pb(model: ActionModel, states: Tensor, log_p: Tensor) -> Float[Tensor, "b a"]:
    """log P_B(s|s') per action; zero for the exit, which nothing else leads to."""
    out = torch.zeros_like(log_p[..., 0])
    rows, actions, children = model.children(states, (log_p > NEG_INF).any(-1))
    if len(rows):
        unique, index = distinct(children)
        out[rows, actions] = model.log_pb(unique)[index, actions]
    return out
