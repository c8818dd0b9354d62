r"""Exact densities of finished samples where all states can be counted: mass one is poured in at the start and pushed along the policy.

Notation: :math:`u_t(s)` the probability to be in s after t actions, :math:`p(x) = \sum_t u_t(x) \, P(\text{exit}|x)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from sculpt.actions.states import NEG_INF, distinct, state_keys

if TYPE_CHECKING:
    from sculpt.actions.model import ActionModel

__all__ = ["LIMIT", "Counted"]

LIMIT = 30_000
"""States, one that is reached after different numbers of actions counted as often, up to which they are counted."""


class Counted:
    """Log-densities of all samples that several models make, in a table.

    Args:
        x: the samples, each once.
        log_p: their log-densities under each model.
    """

    def __init__(self, x: Shaped[Tensor, "S *s"], log_p: Float[Tensor, "S m"]):
        self.x, self.log_p = x, log_p
        self._keys, self._places = state_keys(x).sort()

    @classmethod
    def of(cls, models: Sequence[ActionModel], limit: int = LIMIT) -> Counted | None:
        """The table of these models; ``None`` where there are more states than the limit."""
        parts = []
        for model in models:
            if (found := _pushed(model, limit)) is None:
                return None
            parts.append(found)
        x, place = distinct(torch.cat([x for x, _ in parts]))
        p = torch.zeros(len(x), len(models), dtype=torch.float64, device=x.device)
        for i, (rows, (_, mass)) in enumerate(zip(place.split([len(x) for x, _ in parts]), parts, strict=True)):
            p[:, i].index_add_(0, rows, mass)
        return cls(x, p.log())

    def __call__(self, x: Shaped[Tensor, "b *s"]) -> Float[Tensor, "b m"]:
        """The log-densities of these samples; minus infinity of what no model makes."""
        place = self._places[torch.searchsorted(self._keys, state_keys(x)).clamp_(max=len(self.x) - 1)]
        known = (self.x[place] == x).flatten(1).all(-1)
        return torch.where(known[:, None], self.log_p[place], NEG_INF)


@torch.no_grad()
def _pushed(model: ActionModel, limit: int) -> tuple[Shaped[Tensor, "S *s"], Float[Tensor, "S"]] | None:
    """All samples of a model and their probabilities, some of them in several parts."""
    states, u, seen, ends = model.start(1), torch.ones(1, dtype=torch.float64, device=model.device), 0, []
    while len(states):
        P = model.log_pf(states).exp()
        ends.append((states, u * P[:, -1]))
        seen += int((P[:, :-1] > 0).sum())
        if seen > limit * 8:  # children, most of which are met several times
            return None
        rows, actions, children = model.children(states, P > 0)
        if not len(rows):
            break
        states, place = distinct(children)
        u = _summed(u[rows] * P[rows, actions], place, len(states))
        if len(states) + sum(len(x) for x, _ in ends) > limit:
            return None
    return torch.cat([x for x, _ in ends]), torch.cat([p for _, p in ends])


def _summed(values: Float[Tensor, "c"], place: Int[Tensor, "c"], size: int) -> Float[Tensor, "u"]:
    return torch.zeros(size, dtype=values.dtype, device=values.device).index_add(0, place, values)
