"""Factors of samples that are written action by action: what they say of children, and of what has been written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from sculpt.actions.states import distinct
from sculpt.factor import Factor
from sculpt.formula import Formula

if TYPE_CHECKING:
    from sculpt.actions.model import ActionModel

__all__ = ["Factors", "Filled"]

FORBIDDEN = 10.0
"""Nats under the likeliest child that a forbidden unfinished sample counts: it may yet turn out well."""


class Factors:
    """The factors of one run, asked once about every state.

    Args:
        factors: these.
        model: whose states they are asked about.
    """

    def __init__(self, factors: Sequence[Factor], model: ActionModel):
        self.factors, self.model = tuple(factors), model

    def __len__(self) -> int:
        return len(self.factors)

    def final(self, x: Shaped[Tensor, "b *s"]) -> Float[Tensor, "b f"]:
        """What they say of finished samples."""
        return self._each(x, [factor.__call__ for factor in self.factors])

    def ahead(self, states: Shaped[Tensor, "u *s"], allowed: Bool[Tensor, "u a"]) -> Float[Tensor, "u a f"]:
        """What they say of every allowed child, and of a state itself where it may end; nothing without an estimate for unfinished ones."""
        out = torch.zeros(*allowed.shape, len(self), dtype=torch.float64, device=states.device)
        for j, factor in enumerate(self.factors):
            if not factor.value:
                continue
            rows, actions, children = self.model.children(states, allowed)
            if len(rows):
                said = self._each(children, [factor.guess])[:, 0]
                finite = said.isfinite()
                out[rows, actions, j] = torch.where(finite, said, said[finite].max() - FORBIDDEN if finite.any() else 0.0)
            if (stop := allowed[:, -1]).any():
                out[stop, -1, j] = self._each(states[stop], [factor.__call__])[:, 0]
        return out

    def _each(self, states: Shaped[Tensor, "b *s"], asked: Sequence[Callable[..., Tensor]]) -> Float[Tensor, "b f"]:
        unique, rows = distinct(states)
        told = self.model.told(unique)
        return torch.stack([ask(told, len(unique)).to(states.device) for ask in asked], dim=1)[rows]


class Filled(Formula):
    """A formula of the models' log-densities alone, at samples of which it is known what the factors say.

    Args:
        formula: of both.
        said: what the factors say of each sample.
    """

    def __init__(self, formula: Formula, said: Float[Tensor, "b f"]):
        self.formula, self.said, self.m = formula, said, formula.m - said.shape[1]

    @property
    def degree(self) -> float:
        return self.formula.degree

    def value(self, ell):
        return self.formula.value(torch.cat([ell, self.said.expand(*ell.shape[:-1], -1)], dim=-1))

    def gradient(self, ell):
        return self.formula.gradient(torch.cat([ell, self.said.expand(*ell.shape[:-1], -1)], dim=-1))[..., : self.m]

    def hessian(self, ell):
        return self.formula.hessian(torch.cat([ell, self.said.expand(*ell.shape[:-1], -1)], dim=-1))[..., : self.m, : self.m]

    def write(self, names):
        return self.formula.write([*names, *("f" for _ in range(self.said.shape[1]))])
