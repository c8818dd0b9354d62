r"""The log-density :math:`\Phi(\ell(x))` of a composition of models that write action by action, up to its normaliser."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from sculpt.actions.counting import Counted
from sculpt.actions.paths import path_ratios
from sculpt.chain import Settings
from sculpt.formula import Formula, Mixture, Posterior
from sculpt.model import BaseModel
from sculpt.roads import Tracked

if TYPE_CHECKING:
    from sculpt.actions.model import ActionModel

__all__ = ["Target"]


class Target:
    r"""Exact where a state has one parent or all states can be counted; elsewhere by densities averaged over backward paths.

    Args:
        composition: of such models; inner compositions are normalised by runs of their own.
        generator: of those runs.
    """

    def __init__(self, composition: BaseModel, generator: torch.Generator):
        self.models: tuple[ActionModel, ...] = composition.leaves  # type: ignore[assignment]
        self.formula = _over_leaves(composition, generator)
        self.one_parent = all(model.one_parent for model in self.models)
        self.table = Counted.of(self.models)
        self.said = "log-densities averaged over backward paths, approximate"
        if self.table is not None or self.one_parent:
            self.said = "the composition's own log-density, exact"

    @property
    def first(self) -> int:
        """The model whose chain is nearest: the anchor of a posterior, or the one that counts most."""
        if isinstance(self.formula, Posterior):
            return self.formula.labels[0]
        return int(self.formula.gradient(torch.zeros(len(self.models), dtype=torch.float64)).argmax())

    @torch.no_grad()
    def __call__(self, x: Shaped[Tensor, "b *s"], generator: torch.Generator) -> Float[Tensor, "b"]:
        """log-densities up to the normaliser; ``generator`` draws paths where they are averaged."""
        if self.table is not None and not self.one_parent:
            return self.formula.value(self.table(x))
        ell = path_ratios(self.models, x, generator, made_by=self.first, paths=1 if self.one_parent else None)
        return self.formula.value(ell)

    def table_density(self) -> Float[Tensor, "S"]:
        """Of all samples, normalised, where they can be counted."""
        assert self.table is not None
        return torch.softmax(self.formula.value(self.table.log_p), 0)


def _over_leaves(composition: BaseModel, generator: torch.Generator) -> Formula:
    """The formula over the pretrained models. Every inner composition is normalised by a run of its own."""
    if not composition.models:
        return Mixture([1.0])
    steps = Tracked()._over_leaves(composition, Settings(generator=generator), {})  # type: ignore[arg-type]
    while True:
        try:
            next(steps)
        except StopIteration as done:
            return done.value
