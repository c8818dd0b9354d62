"""Who paints below the detail level: what a formula comes to where its observers see nothing more."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from sculpt.formula import Formula, Mixture, Nested, Posterior, PowerMean, Tilted

__all__ = ["is_heuristic", "painters"]


def painters(
    formula: Formula, ell: Float[Tensor, "N m"], generator: torch.Generator | None | bool = False
) -> Float[Tensor, "N m"]:
    """Who paints below the detail level: a posterior's first label; one part of a mixture, by its shares; of others all, as their gradient says.

    Args:
        formula: at its end, nothing faded.
        ell: the log-densities at the detail level.
        generator: draws the parts of mixtures. Without one there are shares in their place.
    """
    if (first := _first(formula)) is not None:
        return torch.eye(formula.m, dtype=ell.dtype, device=ell.device)[first].expand_as(ell)
    if isinstance(formula, Mixture):
        shares = formula.gradient(ell)
        if generator is False:
            return shares
        device = ell.device if generator is None else generator.device
        drawn = torch.multinomial(shares.to(device), 1, generator=generator)[:, 0].to(ell.device)
        return torch.eye(formula.m, dtype=ell.dtype, device=ell.device)[drawn]
    if not isinstance(formula, Nested):
        return formula.gradient(ell)
    values = [
        part.value(ell[:, list(index)]) - z
        for part, index, z in zip(formula.parts, formula.indices, formula.log_z, strict=True)
    ]
    outer, a = painters(formula.outer, torch.stack(values, dim=-1), generator), torch.zeros_like(ell)
    for k, (part, index) in enumerate(zip(formula.parts, formula.indices, strict=True)):
        a[:, list(index)] += outer[:, k, None] * painters(part, ell[:, list(index)], generator)
    return a


def is_heuristic(formula: Formula) -> bool:
    """Whether several models paint one sample together, which no target is behind."""
    if isinstance(formula, Nested):
        if isinstance(formula.outer, Tilted):
            return is_heuristic(formula.parts[0])
        first = _first(formula.outer)
        return is_heuristic(formula.outer) or any(map(is_heuristic, formula.parts if first is None else [formula.parts[first]]))
    return not (isinstance(formula, Mixture | Tilted) or _first(formula) is not None or formula.m == 1)


def _first(formula: Formula) -> int | None:
    """The operand that paints, where that is always the same one."""
    if isinstance(formula, Posterior):
        return formula.labels[0]
    # Of two models the power mean of -1 is their posterior.
    return 0 if isinstance(formula, PowerMean) and formula.exponent == -1 and formula.m == 2 else None
