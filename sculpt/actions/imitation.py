r"""What a student sees before it has anything to balance: the policy of tracked densities, every action's probability at every state.

Where states have one parent, :math:`\ell(s)` is a function of the state, and :math:`T(a|s) \propto e^{\Phi(\ell(s_a))}` is a policy. It asks
all base models and does not look ahead, but a table over all actions teaches in a hundred steps what takes densities of samples thousands.

Notation: ``b`` trajectories of at most ``t`` states, ``u`` different states, ``a`` actions with the exit last, ``m`` models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from sculpt.actions.paths import backward_paths
from sculpt.actions.states import NEG_INF, distinct

if TYPE_CHECKING:
    from sculpt.actions.model import ActionModel
    from sculpt.formula import Formula

__all__ = ["Way", "divergence"]


@dataclass(frozen=True)
class Way:
    """The one path to each of several samples."""

    states: Shaped[Tensor, "u *s"]
    place: Int[Tensor, "b t"]
    """which state each trajectory is in"""
    taken: Int[Tensor, "b t"]
    """the action there"""
    there: Bool[Tensor, "b t"]
    """whether it still goes on"""

    @classmethod
    def to(cls, model: ActionModel, x: Shaped[Tensor, "b *s"]) -> Way:
        """The path to each x."""
        _, parents, actions, owner = backward_paths(model, x)
        n = torch.bincount(owner, minlength=len(x))  # actions before the exit
        # Paths come from their ends, the last action of each first.
        order = owner.argsort(stable=True)
        back = torch.empty_like(owner)
        back[order] = torch.arange(len(owner), device=x.device) - (n.cumsum(0) - n)[owner[order]]
        at, each = n[owner] - 1 - back, torch.arange(len(x), device=x.device)
        unique, rows = distinct(torch.cat([x, parents]))
        place = torch.zeros(len(x), int(n.max()) + 1, dtype=torch.long, device=x.device)
        taken = torch.full_like(place, model.n_actions - 1)
        place[each, n], place[owner, at], taken[owner, at] = rows[: len(x)], rows[len(x) :], actions
        return cls(unique, place, taken, torch.arange(place.shape[1], device=x.device) <= n[:, None])


def divergence(formula: Formula, models: Sequence[ActionModel], student: ActionModel, x: Shaped[Tensor, "b *s"]) -> Tensor:
    r""":math:`\sum_s \operatorname{KL}(T(\cdot|s) \,\|\, \pi(\cdot|s))` over the states on the way to x, the mean over x.

    Args:
        formula: Φ.
        models: of the formula.
        student: π.
        x: finished samples.
    """
    way = Way.to(student, x)
    with torch.no_grad():
        log_T = tracked_policy(formula, models, way)
    apart = torch.where(log_T > NEG_INF, log_T.exp() * (log_T - student.log_pf(way.states)), 0.0).sum(-1)
    return apart[way.place[way.there]].sum() / len(x)


def tracked_policy(formula: Formula, models: Sequence[ActionModel], way: Way) -> Float[Tensor, "u a"]:
    r""":math:`\log T(a|s)`; nothing at all where the composition cannot become anything any more."""
    log_p = torch.stack([model.log_pf(way.states) for model in models], dim=-1)
    steps = torch.where(way.there[..., None], log_p[way.place, way.taken], 0.0)
    ell = log_p.new_zeros(len(way.states), len(models))
    ell[way.place[way.there]] = (steps.cumsum(1) - steps)[way.there]
    possible = (log_p > NEG_INF).any(-1)
    u, a = possible.nonzero(as_tuple=True)
    phi = torch.full_like(log_p[..., 0], NEG_INF)
    phi[u, a] = formula.value(ell[u] + log_p[u, a])
    return torch.log_softmax(phi, dim=-1).nan_to_num(nan=NEG_INF, neginf=NEG_INF)
