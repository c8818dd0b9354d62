"""Networks over raw states ``(b, *s)`` of models that write action by action.

Such a network needs no preprocessor beside it, and knows the JSON arguments that build it again (``config``).
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

__all__ = ["GridNetwork"]


class GridNetwork(nn.Module):
    """Coordinates to logits or to features: each coordinate encoded on its own, then an MLP.

    Args:
        ndim: how many coordinates there are.
        height: how many values each of them takes.
        outputs: how many logits; ``None`` for features.
        width: of the layers.
        depth: how many layers there are before the outputs.
        encoding: ``"one-hot"`` tells cells apart, ``"thermometer"`` (is the coordinate at least k?) also says which are neighbours, and
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
        if min(ndim, height, width, 1 if outputs is None else outputs) < 1 or depth < 0:
            raise ValueError(
                f"Got ndim={ndim}, height={height}, outputs={outputs}, width={width} and depth={depth}: expected at least 1 of each, and "
                "a depth of at least 0."
            )
        self.ndim, self.height, self.encoding = ndim, height, encoding
        sizes: dict[str, Any] = {"ndim": ndim, "height": height, "outputs": outputs, "width": width, "depth": depth}
        self.config: dict[str, Any] = {**sizes, "encoding": encoding}
        self.width = width if outputs is None else outputs
        if encoding == "table":
            if ndim * math.log2(height) > 48:
                raise ValueError(f"A table of {height}^{ndim} states is none that fits into memory. Choose another encoding.")
            table = nn.Embedding(height**ndim, self.width)
            nn.init.zeros_(table.weight)
            self.layers: nn.Module = table
            return
        widths = itertools.chain([ndim * height], itertools.repeat(width, depth))
        hidden = [layer for i, o in itertools.pairwise(widths) for layer in (nn.Linear(i, o), nn.LeakyReLU())]
        last = width if depth else ndim * height
        self.layers = nn.Sequential(*hidden, *([] if outputs is None else [nn.Linear(last, outputs)]))

    def forward(self, states: Shaped[Tensor, "b d"]) -> Float[Tensor, "b o"]:
        if states.shape[-1] != self.ndim:
            raise ValueError(
                f"This network reads states of {self.ndim} coordinates, got {states.shape[-1]}. Pass those of its grid."
            )
        if self.encoding == "table":
            strides = self.height ** torch.arange(self.ndim - 1, -1, -1, device=states.device)
            return self.layers((states.long() * strides).sum(-1))
        k = torch.arange(self.height, device=states.device)
        on = states[..., None] >= k if self.encoding == "thermometer" else states[..., None] == k
        return self.layers(on.flatten(1).to(next(self.parameters()).dtype))
