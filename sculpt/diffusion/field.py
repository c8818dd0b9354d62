r"""Guidance as a vector field of its own, and not as the gradient of a number.

Notation: :math:`z = x + s \varepsilon`, anchor :math:`i_1`, the other labels :math:`y_2 \dots y_n`, odds v, and f what the terminal head
says of a finished sample, :math:`f(x) = \Pi_{k \ge 2} \, p_v(y_k \mid x)`.

The composed denoiser is the regression of x weighted with f. What it adds to the anchor's is

.. math:: c(s) \, G(z, s, i_1, \{y_2 \dots y_n\}, v), \qquad c(s) = \sigma \frac{s^2}{s^2 + \sigma^2},

with :math:`\sigma` the spread of the data: G is of order one at every noise level. One network is G for all anchors, label sets and odds.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from sculpt.diffusion.backbones import VectorNetwork
from sculpt.diffusion.clock import like

__all__ = ["Field", "VectorField", "nothing"]


class Field(nn.Module, abc.ABC):
    """c(s) G. A subclass says what G is, zero before it is trained.

    Args:
        m: base models.
        odds: whether log-odds are an input.
        std: the spread of the data.
    """

    config: dict[str, Any]

    def __init__(self, m: int, odds: bool, std: float):
        super().__init__()
        if m < 2 or not 0 < std < float("inf"):
            raise ValueError(f"Got m={m} and std={std}, expected two base models or more and a spread above 0.")
        self.m, self.odds, self.std = m, odds, std
        self.told = m * (3 if odds else 2)
        """How many numbers say which composition is meant."""

    @abc.abstractmethod
    def G(self, z: Float[Tensor, "b *x"], s: Float[Tensor, "b"], told: Float[Tensor, "b t"]) -> Float[Tensor, "b *x"]:
        """The network."""

    def forward(
        self, z: Float[Tensor, "b *x"], s: Float[Tensor, "*b"], *, labels: Sequence[int], odds: Sequence[float] | None = None
    ) -> Float[Tensor, "b *x"]:
        """What guidance to these labels, the anchor's first, adds to the anchor's denoised samples."""
        if len(labels) == 1:  # the anchor itself
            return torch.zeros_like(z)
        anchor, counts = torch.tensor(labels[:1]), torch.tensor([[float(list(labels[1:]).count(i)) for i in range(self.m)]])
        log_odds = torch.tensor([[1.0] * self.m if odds is None else list(odds)]).log()
        told = self.tell(anchor, counts, log_odds).to(z.device).expand(len(z), -1)
        return self.added(z, s.expand(len(z)), told)

    def added(self, z: Float[Tensor, "b *x"], s: Float[Tensor, "b"], told: Float[Tensor, "b t"]) -> Float[Tensor, "b *x"]:
        """The same for compositions of each sample's own."""
        v = s.double() ** 2
        return like(self.std * v / (v + self.std**2), z) * self.G(z, s, told).to(z.dtype)

    def tell(
        self, anchor: Int[Tensor, "b"], counts: Float[Tensor, "b m"], log_odds: Float[Tensor, "b m"] | None
    ) -> Float[Tensor, "b t"]:
        """Compositions in numbers: the anchor, how often each label is observed after it, and the log-odds.

        Args:
            anchor: its label.
            counts: of the labels that follow.
            log_odds: of the observations; ``None`` where they are equal.
        """
        parts = [F.one_hot(anchor, self.m), counts]
        if self.odds:
            parts.append(torch.zeros_like(counts) if log_odds is None else log_odds - log_odds.mean(-1, keepdim=True))
        return torch.cat([part.float() for part in parts], dim=-1)


class VectorField(Field):
    """For samples of one axis: a :class:`VectorNetwork` with an output for each coordinate.

    Args:
        m: base models.
        odds: whether log-odds are an input.
        d: how many coordinates there are.
        mean: of the data.
        std: of the data.
        s_min: the least noise level.
        width: of the network.
        depth: of the network.
    """

    def __init__(
        self, m: int, odds: bool, d: int, mean: float, std: float, s_min: float = 0.01, width: int = 256, depth: int = 4
    ):
        super().__init__(m, odds, std)
        sizes = {"d": d, "mean": mean, "std": std, "s_min": s_min, "width": width, "depth": depth}
        self.config = {"m": m, "odds": odds, **sizes}
        self.network = VectorNetwork(**sizes, told=self.told)  # type: ignore[arg-type]
        self.out = nothing(nn.Linear(width, d))

    def G(self, z, s, told):
        return self.out(self.network(z, s, told))


def nothing(layer: nn.Linear | nn.Conv2d) -> Any:
    """The layer, giving zero until it is trained."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
