"""Several models at once: those that share a network are one call of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from sculpt.state import in_parts

if TYPE_CHECKING:
    from sculpt.diffusion.clock import Level
    from sculpt.diffusion.denoiser import Denoiser

__all__ = ["at_once", "denoise_all"]


def at_once(shape: Sequence[int]) -> int:
    """How many samples of this shape go through a network at once where the caller does not say."""
    return max(1, 2**19 // math.prod(shape))


def denoise_all(models: Sequence[Denoiser], z: Float[Tensor, "N *x"], s: Level, batch_size: int) -> Float[Tensor, "N m *x"]:
    """What all models make of these samples, so many at a time in a network."""
    groups: dict[object, list[int]] = {}
    for i, model in enumerate(models):
        groups.setdefault(i if model.together is None else model.together, []).append(i)
    columns: dict[int, Tensor] = {}
    for group in groups.values():
        members = [models[i] for i in group]
        D = in_parts(lambda z, p=members: p[0].denoise_together(p, z, s), max(1, batch_size // len(group)), z)
        columns.update(zip(group, D.unbind(1), strict=True))
    return torch.stack([columns[i] for i in range(len(models))], dim=1)
