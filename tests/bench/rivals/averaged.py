r"""Composable Diffusion (Liu et al., ECCV 2022): a condition pulls by how much its score differs from the unconditional one.

.. math:: S = S_0 + \sum_k w_k \, (S_k - S_0)

:math:`w_k = 1/m` averages the conditional scores, and the unconditional one drops out; :math:`w_k = 1` is the score of
:math:`p \prod_k p(x | c_k) / p` if noised densities multiplied as clean ones do; :math:`w_k < 0` is NOT.
"""

from collections.abc import Sequence

import torch
from bench.rivals.walk import Walk
from torch import Tensor

from sculpt.diffusion.denoiser import Denoiser

__all__ = ["averaged", "composable"]


def composable(
    models: Sequence[Denoiser], n: int, *, steps: int, generator: torch.Generator | None, weights: Sequence[float]
) -> Tensor:
    """Samples by the sum of differences of scores.

    Args:
        models: the unconditional one first, then the conditional ones.
        n: how many samples.
        steps: evaluations of each model for each sample.
        generator: of all noise.
        weights: w, one for each conditional model.
    """
    walk = Walk(models, n, steps, generator)
    for S in walk:
        w = S.new_tensor(weights)
        walk.step(torch.cat([1 - w.sum(0, keepdim=True), w]))
    return walk.z


def averaged(models: Sequence[Denoiser], n: int, *, steps: int, generator: torch.Generator | None) -> Tensor:
    """Samples by the average of the scores, of which the unconditional one has no part.

    Args:
        models: the conditional ones.
        n: how many samples.
        steps: evaluations of each model for each sample.
        generator: of all noise.
    """
    walk = Walk(models, n, steps, generator)
    for S in walk:
        walk.step(S.new_full((len(models),), 1 / len(models)))
    return walk.z
