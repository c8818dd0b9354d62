"""Sources of randomness: one for all samples, or one for each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["Generators", "randn"]


class Generators(torch.Generator):
    """Several generators, one a sample: each sample is then what its own generator gives it, whatever the others are."""

    def __new__(cls, each: Sequence[torch.Generator]) -> Generators:
        return super().__new__(cls, device=each[0].device)

    def __init__(self, each: Sequence[torch.Generator]):
        self.each = list(each)


def randn(shape: Sequence[int], generator: torch.Generator | None, like: Tensor) -> Tensor:
    """Standard normal noise of the dtype and on the device of ``like``, drawn where the generator lives."""
    if isinstance(generator, Generators):
        if len(generator.each) != shape[0]:
            raise ValueError(f"Got {len(generator.each)} generators for {shape[0]} samples. Pass one for each, or one for all.")
        return torch.cat([randn((1, *shape[1:]), one, like) for one in generator.each])
    device = like.device if generator is None else generator.device
    return torch.randn(tuple(shape), generator=generator, device=device, dtype=like.dtype).to(like.device)
