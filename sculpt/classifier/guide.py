r"""What guided sampling asks of a classifier, learned or exact.

.. math:: h(s) = p(y_2, \dots, y_n \mid s, y_1), \qquad p_v(i \mid x) = \frac{v_i \, p(i \mid x)}{\sum_j v_j \, p(j \mid x)}
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from sculpt.formula import Posterior

if TYPE_CHECKING:
    from sculpt.model import BaseModel

__all__ = ["Guide", "with_odds"]


class Guide(abc.ABC):
    """What guided sampling asks of a classifier, learned or exact. Labels count in the order of ``keys``."""

    m: int
    observations: int
    keys: tuple[str, ...] | None = None
    """The base models' keys in the order of the labels; ``None`` takes the models in whatever order they come."""

    takes_odds: bool = True
    """Whether odds of the observations may differ."""

    @property
    def field(self) -> Callable[..., Tensor] | None:
        """``(*state, labels=..., odds=...)``, what guidance adds to the anchor's denoised sample, where that was learned by itself. Without
        it guidance is the gradient of log h."""
        return None

    @abc.abstractmethod
    def marginal(self, *state: Tensor) -> Float[Tensor, "b m"]:
        r""":math:`\log p(y_1 = i \mid s)`"""

    @abc.abstractmethod
    def log_h(self, *state: Tensor, labels: Sequence[int], odds: Sequence[float] | None = None) -> Float[Tensor, "b"]:
        r""":math:`\log h(s) = \log p(y_2 = i_2, \dots, y_n = i_n \mid s, y_1 = i_1)`, the labels in this order"""

    @abc.abstractmethod
    def terminal(self, x: Tensor) -> Float[Tensor, "b m"]:
        r""":math:`\log p(y = i \mid x)`, without odds"""

    def log_h_terminal(self, x: Tensor, *, labels: Sequence[int], odds: Sequence[float] | None = None) -> Float[Tensor, "b"]:
        r""":math:`\sum_{k \ge 2} \log p_v(i_k \mid x)`: at the end the labels are independent"""
        log_p = with_odds(self.terminal(x), odds)
        return log_p[:, list(labels[1:])].sum(-1)

    def shares(self, models: Sequence[BaseModel], x: Tensor) -> Float[Tensor, "b m"]:
        r""":math:`\log p(y = i \mid x)` of these models, in this order."""
        self.align(Posterior(len(models), (0,)), models)
        log_p = self.terminal(x).double()
        return log_p if self.keys is None else log_p[:, [self.keys.index(model.key) for model in models]]

    def align(self, posterior: Posterior, models: Sequence[BaseModel]) -> tuple[Posterior, list[BaseModel]]:
        """The posterior and its models in this classifier's order; refuses models and labels it was not made for."""
        names = ", ".join(str(model) for model in models)
        if len(models) != self.m:
            raise ValueError(
                f"This classifier knows {self.m} base models, the composition has {len(models)} ({names}). "
                "Fit one for exactly these models, or write the composition as sculpt.posterior over all the classifier's models."
            )
        if len(posterior.labels) > self.observations:
            raise ValueError(
                f"Cannot condition on labels {posterior.labels}: this classifier was trained for {self.observations} observations "
                f"of {self.m} models (0 to {self.m - 1}). Fit one with observations={len(posterior.labels)}, "
                f"or pass {self.observations} labels."
            )
        if len(set(posterior.odds)) > 1 and not self.takes_odds:
            raise ValueError(
                f"Odds {tuple(round(v, 4) for v in posterior.odds)} need a classifier that takes them, this one does not: "
                "sculpt.fit(models, odds=True)."
            )
        if self.keys is None:
            return posterior, list(models)
        position = []
        for model in models:
            if model.key not in self.keys:
                raise ValueError(
                    f"The classifier was fitted for other base models: {model} (key {model.key[:12]}) is not among its keys "
                    f"{', '.join(key[:12] for key in self.keys)}. Weights, configuration or condition differ; "
                    "run sculpt.fit on these models. (A callable without weights needs the same name= as when it was fitted.)"
                )
            position.append(self.keys.index(model.key))
        order = sorted(range(self.m), key=position.__getitem__)
        aligned = Posterior(self.m, [position[i] for i in posterior.labels], [posterior.odds[i] for i in order])
        return aligned, [models[i] for i in order]


def with_odds(log_p: Float[Tensor, "b m"], odds: Sequence[float] | None) -> Float[Tensor, "b m"]:
    r""":math:`\log p_v(i \mid x)` from :math:`\log p(i \mid x)`"""
    if odds is None or len(set(odds)) == 1:
        return log_p
    return torch.log_softmax(log_p + torch.tensor(odds, dtype=torch.float64).log().to(log_p), dim=-1)
