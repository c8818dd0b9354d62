r"""The log-density :math:`\Phi(\ell(x))` of a composition of models that write action by action, up to its normaliser."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from sculpt.actions.counting import Counted
from sculpt.actions.factors import Factors
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
        self.factors = Factors(getattr(composition, "factors", ()), self.models[0])
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
        a = self.formula.gradient(torch.zeros(self.formula.m, dtype=torch.float64))
        return int(a[: len(self.models)].argmax())

    @torch.no_grad()
    def __call__(self, x: Shaped[Tensor, "b *s"], generator: torch.Generator) -> Float[Tensor, "b"]:
        """log-densities up to the normaliser; ``generator`` draws paths where they are averaged."""
        if self.table is not None and not self.one_parent:
            return self._of(self.table(x), x)
        return self._of(path_ratios(self.models, x, generator, made_by=self.first, paths=1 if self.one_parent else None), x)

    def _of(self, ell: Float[Tensor, "b m"], x: Shaped[Tensor, "b *s"]) -> Float[Tensor, "b"]:
        """The formula of log-densities, and of what factors say of the samples."""
        return self.formula.value(torch.cat([ell, self.factors.final(x)], dim=1) if len(self.factors) else ell)

    def table_density(self) -> Float[Tensor, "S"]:
        """Of all samples, normalised, where they can be counted."""
        assert self.table is not None
        return torch.softmax(self._of(self.table.log_p, self.table.x), 0)


def _over_leaves(composition: BaseModel, generator: torch.Generator) -> Formula:
    """The formula over the pretrained models. Every inner composition is normalised by a run of its own."""
    if not composition.models:
        return Mixture([1.0])
    steps = Tracked().over_leaves(composition, Settings(generator=generator), {})  # type: ignore[arg-type]
    while True:
        try:
            next(steps)
        except StopIteration as done:
            return done.value
