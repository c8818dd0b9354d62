r"""CompLift (Yu and Gao, ICML 2025): candidates are accepted by differences of denoising errors.

.. math:: \mathrm{lift}(x | c) = E_{s, \varepsilon} \frac{\|x - D_0(x + s \varepsilon, s)\|^2 - \|x - D_c(x + s \varepsilon, s)\|^2}{s^2}

estimates :math:`\log p(x | c) / p(x)` up to how noise levels are weighed. AND asks for every lift to be positive, NOT for a
negative one. The candidates are those of :func:`~bench.rivals.averaged.composable`.
"""

from collections.abc import Sequence

import torch
from bench.rivals.averaged import composable
from einops import reduce
from torch import Tensor

from sculpt.diffusion.clock import level, noise_range, spread
from sculpt.diffusion.denoiser import Denoiser
from sculpt.diffusion.together import at_once, denoise_all
from sculpt.model import randn

__all__ = ["complift", "lifts"]


@torch.no_grad()
def lifts(models: Sequence[Denoiser], x: Tensor, looks: int, generator: torch.Generator | None) -> Tensor:
    """The lifts ``(N, m - 1)`` of samples x under the second and further models, against the first.

    Args:
        models: the unconditional one first, then the conditional ones.
        x: finished samples.
        looks: noise levels at which errors are compared, each with a noise of its own, the same for all models.
        generator: of all noise.
    """
    s_min, s_max = noise_range(models)
    shares = (torch.arange(looks, dtype=torch.float64, device=x.device) + 0.5) / looks
    total = x.new_zeros(len(x), len(models))
    for s in spread(shares, s_min, s_max):
        z = x + s * randn(x.shape, generator, x)
        error = x[:, None] - denoise_all(models, z, level(s, x.device), at_once(models[0].shape))
        total += reduce(error**2, "N m ... -> N m", "sum") / s**2 / looks
    return total[:, :1] - total[:, 1:]


def complift(
    models: Sequence[Denoiser],
    n: int,
    *,
    steps: int,
    generator: torch.Generator | None,
    weights: Sequence[float],
    looks: int = 32,
) -> Tensor:
    """Those of n candidates that are accepted; if none is, the one that is nearest to it.

    Args:
        models: the unconditional one first, then the conditional ones.
        n: how many candidates.
        steps: evaluations of each model for each candidate.
        generator: of all noise.
        weights: of Composable Diffusion, which draws the candidates; a negative one is NOT.
        looks: noise levels at which errors are compared.
    """
    x = composable(models, n, steps=steps, generator=generator, weights=weights)
    least = (lifts(models, x, looks, generator) * x.new_tensor(weights).sign()).amin(-1)
    return x[least > 0] if (least > 0).any() else x[least.argmax()][None]
