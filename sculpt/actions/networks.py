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

__all__ = ["GridNetwork", "StateNetwork"]


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


class StateNetwork(nn.Module):
    """Vectors to logits or to features: whole numbers of few values each by its value, others by their size and its waves; then an MLP.

    Args:
        size: how many numbers a state has.
        low: the least of them.
        high: the largest.
        whole: whether they are whole.
        width: of the layers.
        depth: how many layers there are before the outputs.
        outputs: how many logits; ``None`` for features.
    """

    VALUES, WAVES = 64, 6

    def __init__(
        self,
        size: int,
        low: float,
        high: float,
        whole: bool = True,
        *,
        width: int = 256,
        depth: int = 2,
        outputs: int | None = None,
    ):
        super().__init__()
        if min(size, width, depth, 1 if outputs is None else outputs) < 1 or not -1e9 <= low <= high <= 1e9:
            raise ValueError(
                f"Got size={size}, low={low}, high={high}, width={width} and depth={depth}: expected at least 1 number and layer, and a range."
            )
        self.size, self.low, self.high = size, float(low), float(high)
        self.width = width if outputs is None else outputs
        self.one_hot = whole and high - low < self.VALUES
        self.config: dict[str, Any] = {
            "size": size,
            "low": self.low,
            "high": self.high,
            "whole": whole,
            "width": width,
            "depth": depth,
        } | ({} if outputs is None else {"outputs": outputs})
        each = int(high - low) + 1 if self.one_hot else 1 + 2 * self.WAVES
        widths = itertools.chain([size * each], itertools.repeat(width, depth))
        hidden = [layer for i, o in itertools.pairwise(widths) for layer in (nn.Linear(i, o), nn.LeakyReLU())]
        self.layers = nn.Sequential(*hidden, *([] if outputs is None else [nn.Linear(width, outputs)]))

    def forward(self, states: Shaped[Tensor, "b *s"]) -> Float[Tensor, "b w"]:
        x, dtype = states.flatten(1), next(self.parameters()).dtype
        if x.shape[1] != self.size:
            raise ValueError(
                f"This network reads states of {self.size} numbers, got {x.shape[1]}. Pass those of its environment."
            )
        if self.one_hot:
            x = x.clamp(self.low, self.high)[..., None] == torch.arange(self.low, self.high + 1, device=x.device)
        else:
            x = (x - self.low) / max(self.high - self.low, 1e-12)
            waves = x[..., None] * (2.0 ** torch.arange(self.WAVES, device=x.device)) * math.pi
            x = torch.cat([2 * x[..., None] - 1, waves.sin(), waves.cos()], dim=-1)
        return self.layers(x.flatten(1).to(dtype))
