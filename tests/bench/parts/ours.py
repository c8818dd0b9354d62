"""Our own ways to sample a composition, as methods of the benchmark."""

from __future__ import annotations

from collections.abc import Callable

import torch
from bench.parts.runs import Method
from torch import Tensor

import sculpt

__all__ = ["ours", "populations"]


def populations(
    composition: sculpt.Composition, particles: int, **options: object
) -> Callable[[int, int, torch.Generator], Tensor]:
    """Samples of as many populations of this size as it takes; of size 1 each goes alone.

    Args:
        composition: what is sampled.
        particles: of a population.
        options: of :class:`sculpt.Tracked`.
    """

    def draw(n: int, steps: int, generator: torch.Generator) -> Tensor:
        size = n if particles == 1 else min(particles, n)
        road = sculpt.Tracked(particles=1 if particles == 1 else size, **options)  # type: ignore[arg-type]
        sizes = [len(part) for part in torch.arange(n).split(size)]
        parts = [composition.sample(k, road, steps=steps, generator=generator, progress=False).x for k in sizes]
        return torch.cat(parts)

    return draw


def ours(composition: sculpt.Composition, *particles: int, **options: object) -> list[Method]:
    """Methods with these sizes of populations.

    Args:
        composition: what is sampled.
        particles: of each method's populations.
        options: of :class:`sculpt.Tracked`.
    """
    # Each sample of a mixture is one of its parts.
    parts = composition.models if composition.picks_models else [composition]
    width = max(len(part.leaves) for part in parts)
    return [
        Method(
            f"ours, {count:,} particle{'s' * (count > 1)}",
            populations(composition, count, **(options if count > 1 else {})),
            width,
            kind="ours",
            alone=count == 1,
            fixed=count > 1,
        )
        for count in particles
    ]
