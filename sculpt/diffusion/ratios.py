"""Log-densities at finished samples: tracked densities, read backwards."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from einops import reduce
from jaxtyping import Float
from torch import Tensor

from sculpt.diffusion.clock import noise_levels
from sculpt.diffusion.kernels import analytic_variance, check_finite, kernel_variance
from sculpt.diffusion.together import at_once, denoise_all
from sculpt.model import randn

if TYPE_CHECKING:
    from sculpt.diffusion.denoiser import Denoiser

__all__ = ["PATH", "path_ratios"]

PATH = 64
"""Steps of a path of destruction."""


@torch.no_grad()
def path_ratios(
    models: Sequence[Denoiser], x: Float[Tensor, "N *x"], generator: torch.Generator | None, made_by: int, steps: int = PATH
) -> Float[Tensor, "N m"]:
    r"""Log-densities of all models at samples x of model ``made_by``, up to a constant common to all.

    x is noised step by step, and :math:`\sum \log P_j(z' \mid z)` of the way back is added up.
    """
    levels = noise_levels(models, steps, x.device)
    z = x.double() + levels[-1] * randn(x.shape, generator, levels)
    ell = torch.zeros(len(x), len(models), dtype=torch.float64, device=x.device)
    a = torch.eye(len(models), dtype=torch.float64, device=x.device)[made_by].expand(len(x), -1)
    d = math.prod(x.shape[1:])
    for k, (s_next, s) in enumerate(itertools.pairwise(levels.flip(0))):
        v, delta = s**2, s**2 - s_next**2
        z_next, z = z, z + delta.sqrt() * randn(z.shape, generator, z)
        D = denoise_all(models, z, s, at_once(x.shape[1:]))
        check_finite(D, "a base model gave", k, s)
        c, _ = analytic_variance(z, D, a, ell.new_full((len(x),), 1 / len(x)), v)
        tau = kernel_variance(c, v, delta)
        miss = (z_next - z)[:, None] - delta / v * (D - z[:, None])
        ell -= reduce(miss**2, "N m ... -> N m", "sum") / (2 * tau) + 0.5 * d * tau.log()
    return ell
