"""Networks over raw states, and the torchgfn estimators that make policies of them.

A network takes the state tensor ``(b, *s)`` itself, so that a checkpoint needs no preprocessor beside it, and knows the
JSON arguments that build it again (``config``).
"""

from __future__ import annotations

import abc
import itertools
from typing import Any

import torch
from gfn.estimators import DiscretePolicyEstimator
from gfn.preprocessors import IdentityPreprocessor
from gfn.states import States
from jaxtyping import Float, Shaped
from torch import Tensor, nn

__all__ = ["GridNetwork", "LogProbPolicy", "NetworkPolicy"]


class GridNetwork(nn.Module):
    """Coordinates to logits or, with ``outputs=None``, to features: each coordinate encoded on its own, then an MLP.

    ``"one-hot"`` tells cells apart, ``"thermometer"`` (is the coordinate at least k?) also says which are neighbours, and
    ``"table"`` is one free row of outputs per state.
    """

    def __init__(
        self,
        ndim: int,
        height: int,
        outputs: int | None = None,
        *,
        width: int = 256,
        depth: int = 2,
        encoding: str = "thermometer",
    ):
        super().__init__()
        if encoding not in ("one-hot", "thermometer", "table"):
            raise ValueError(f"Got encoding={encoding!r}, expected 'one-hot', 'thermometer' or 'table'.")
        self.ndim, self.height, self.encoding = ndim, height, encoding
        self.config = {"ndim": ndim, "height": height, "outputs": outputs, "width": width, "depth": depth, "encoding": encoding}
        self.width = width if outputs is None else outputs
        if encoding == "table":
            self.layers: nn.Module = nn.Embedding(height**ndim, self.width)
            nn.init.zeros_(self.layers.weight)
            return
        sizes = [ndim * height] + [width] * depth
        hidden = [layer for i, o in itertools.pairwise(sizes) for layer in (nn.Linear(i, o), nn.LeakyReLU())]
        self.layers = nn.Sequential(*hidden, *([] if outputs is None else [nn.Linear(sizes[-1], outputs)]))

    def forward(self, states: Shaped[Tensor, "b d"]) -> Float[Tensor, "b o"]:
        if self.encoding == "table":
            strides = self.height ** torch.arange(self.ndim - 1, -1, -1, device=states.device)
            return self.layers((states.long() * strides).sum(-1))
        k = torch.arange(self.height, device=states.device)
        on = states[..., None] >= k if self.encoding == "thermometer" else states[..., None] == k
        return self.layers(on.flatten(1).to(next(self.parameters()).dtype))


class NetworkPolicy(DiscretePolicyEstimator):
    """A torchgfn policy whose module takes the raw state tensor, and the condition where there is one."""

    def __init__(self, network: nn.Module, n_actions: int, is_backward: bool = False):
        super().__init__(network, n_actions, IdentityPreprocessor(output_dim=None), is_backward=is_backward)

    def forward(self, states: States, conditions: Tensor | None = None) -> Tensor:
        return self.module(states.tensor) if conditions is None else self.module(states.tensor, conditions)


class LogProbPolicy(DiscretePolicyEstimator, abc.ABC):
    """A policy that is computed, not read off a network: it gives normalised log-probabilities in float64 itself."""

    def __init__(self, module: nn.Module, n_actions: int):
        super().__init__(module, n_actions, IdentityPreprocessor(output_dim=None))

    @abc.abstractmethod
    def log_pf(self, states: Shaped[Tensor, "b *s"]) -> Float[Tensor, "b a"]:
        """Normalised log-probabilities of the actions, minus infinity where an action is masked."""

    def forward(self, states: States, conditions: Any = None) -> Tensor:
        # torchgfn keeps estimator outputs in buffers of the default dtype.
        return self.log_pf(states.tensor).to(torch.get_default_dtype())
