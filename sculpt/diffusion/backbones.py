r"""Classifier backbones for noisy samples :math:`z = x + s \varepsilon`; a finished sample is a state without noise.

All inputs are scaled to unit variance, and the noise level is told by sines and cosines of its logarithm.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["ImageNetwork", "VectorNetwork"]


class _NoisyNetwork(nn.Module):
    """The inputs that both backbones share, and the features of the noise level."""

    config: dict[str, Any]

    def __init__(self, mean: float, std: float, s_min: float, width: int):
        super().__init__()
        if not (math.isfinite(mean) and 0 < std < math.inf and 0 < s_min < math.inf and width > 0):
            raise ValueError(
                f"Got mean={mean}, std={std}, s_min={s_min} and width={width}: expected a finite mean, and the others finite and above 0."
            )
        self.mean, self.std, self.s_min, self.width = mean, std, s_min, width

    def inputs(self, z: Float[Tensor, "b *x"], s: Float[Tensor, "*b"] | None) -> tuple[Tensor, Tensor]:
        """The scaled states, and what tells their noise level."""
        # A finished sample counts as noised to half the least noise level: log s stays finite and the level is its own.
        s = torch.full((), self.s_min / 2, dtype=torch.float64) if s is None else s
        s = (s.to(z.device).float() / self.std).expand(len(z))
        scale = (1 + s**2).rsqrt().reshape(-1, *[1] * (z.ndim - 1))
        angles = (s.log() / 2)[:, None] * 2.0 ** torch.arange(-2, 4, device=z.device)
        dtype, scaled = next(self.parameters()).dtype, (z.float() - self.mean) / self.std * scale
        return scaled.to(dtype), torch.cat([angles.sin(), angles.cos()], dim=-1).to(dtype)


class VectorNetwork(_NoisyNetwork):
    """For samples of one axis: a perceptron over the coordinates, their sines and cosines, and the noise level.

    Args:
        d: how many coordinates there are.
        mean: of the data.
        std: of the data.
        s_min: the least noise level.
        width: of the features.
        depth: of the perceptron.
        told: how many numbers it is told beside each state.
    """

    frequencies: Tensor

    def __init__(
        self,
        d: int,
        mean: float = 0.0,
        std: float = 1.0,
        s_min: float = 0.01,
        width: int = 256,
        depth: int = 3,
        told: int = 0,
    ):
        super().__init__(mean, std, s_min, width)
        if min(d, depth) < 1 or told < 0:
            raise ValueError(f"Got d={d}, depth={depth} and told={told}, expected at least 1, 1 and 0.")
        self.config = {"d": d, "mean": mean, "std": std, "s_min": s_min, "width": width, "depth": depth}
        # The scaled coordinates crowd together at low noise: a few frequencies each tell close points apart.
        self.register_buffer("frequencies", math.pi / 4 * 2.0 ** torch.arange(4 if d <= 8 else 0), persistent=False)
        sizes = itertools.chain([d * (1 + 2 * len(self.frequencies)) + 12 + told], itertools.repeat(width, depth))
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in itertools.pairwise(sizes))

    def forward(
        self, z: Float[Tensor, "b d"], s: Float[Tensor, "*b"] | None = None, told: Float[Tensor, "b t"] | None = None
    ) -> Float[Tensor, "b w"]:
        z, level = self.inputs(z, s)
        angles = rearrange(z[:, :, None] * self.frequencies, "b d f -> b (d f)")
        known = [z, angles.sin(), angles.cos(), level] + ([] if told is None else [told.to(z)])
        h = F.silu(self.layers[0](torch.cat(known, dim=-1)))
        for layer in self.layers[1:]:
            h = h + F.silu(layer(h))
        return h


class ImageNetwork(_NoisyNetwork):
    """For images and latents: a residual convolutional pyramid. The noise level scales and shifts its channels.

    Args:
        shape: of one sample: channels, height, width.
        mean: of the data.
        std: of the data.
        s_min: the least noise level.
        channels: of the pyramid's levels.
        width: of the features.
    """

    def __init__(
        self,
        shape: Sequence[int],
        mean: float = 0.0,
        std: float = 1.0,
        s_min: float = 0.01,
        channels: Sequence[int] = (32, 64, 96, 128),
        width: int = 256,
    ):
        super().__init__(mean, std, s_min, width)
        if len(shape) != 3 or min(*shape, *channels, len(channels)) < 1 or any(c % 8 for c in channels):
            raise ValueError(
                f"Got shape={tuple(shape)} and channels={tuple(channels)}: expected three sizes, and multiples of 8 for at least one level."
            )
        self.config = {
            "shape": list(shape),
            "mean": mean,
            "std": std,
            "s_min": s_min,
            "channels": list(channels),
            "width": width,
        }
        self.stem = nn.Conv2d(shape[0], channels[0], 3, padding=1)
        self.level = nn.Sequential(nn.Linear(12, width), nn.SiLU())
        pairs = list(zip([channels[0], *channels[:-1]], channels, strict=True))
        self.blocks = nn.ModuleList(_Block(i, o, width) for i, o in pairs)
        self.out = nn.Linear(channels[-1] * 2, width)

    def forward(self, z: Float[Tensor, "b c h w"], s: Float[Tensor, "*b"] | None = None) -> Float[Tensor, "b w2"]:
        z, level = self.inputs(z, s)
        h, level = self.stem(z), self.level(level)
        for i, block in enumerate(self.blocks):
            h = block(F.avg_pool2d(h, 2) if i > 0 and min(h.shape[-2:]) > 1 else h, level)
        return F.silu(self.out(torch.cat([h.mean((2, 3)), h.amax((2, 3))], dim=-1)))


class _Block(nn.Module):
    def __init__(self, i: int, o: int, width: int):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(8, i), nn.GroupNorm(8, o)
        self.conv1, self.conv2 = nn.Conv2d(i, o, 3, padding=1), nn.Conv2d(o, o, 3, padding=1)
        self.skip = nn.Conv2d(i, o, 1) if i != o else nn.Identity()
        self.film = nn.Linear(width, 2 * o)

    def forward(self, h: Tensor, level: Tensor) -> Tensor:
        scale, shift = self.film(level)[:, :, None, None].chunk(2, dim=1)
        y = self.conv1(F.silu(self.norm1(h)))
        return self.skip(h) + self.conv2(F.silu(self.norm2(y) * (1 + scale) + shift))
