r"""A product of experts by its score at low noise, :math:`S = \sum_i \gamma_i S_i`, at every noise level.

The product of noised densities is not the noised product, so this samples something else: of two Gaussians of variance c it makes the
right mean and the variance c/3 instead of c/2.
"""

from collections.abc import Sequence

import torch
from bench.rivals.walk import Walk
from torch import Tensor

from sculpt.diffusion.denoiser import Denoiser

__all__ = ["experts"]


def experts(
    models: Sequence[Denoiser],
    n: int,
    *,
    steps: int,
    generator: torch.Generator | None,
    powers: Sequence[float] | None = None,
) -> Tensor:
    r"""Samples by added scores.

    Args:
        models: the experts.
        n: how many samples.
        steps: evaluations of each model for each sample.
        generator: of all noise.
        powers: :math:`\gamma`, by default 1 each.
    """
    walk = Walk(models, n, steps, generator)
    for S in walk:
        walk.step(S.new_tensor([1.0] * len(models) if powers is None else powers))
    return walk.z
