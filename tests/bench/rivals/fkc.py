r"""Feynman-Kac correctors (Skreta et al., ICML 2025) for products of powers: particles with weights, and selection.

The targets on the way are :math:`\pi_v \propto \prod_i q_i(z, v)^{\gamma_i}`. Simulated is :math:`dz = S \, \delta + \sqrt{\delta} \, \xi`
with :math:`S = \sum_i \gamma_i S_i`, and what it misses goes into the weights,

.. math:: \log w \mathrel{+}= \tfrac{\delta}{2} \Bigl( \|S\|^2 - \sum_i \gamma_i \|S_i\|^2 \Bigr),

which is :math:`\delta \langle S_1, S_2 \rangle` for a product of two, :math:`\tfrac{\delta}{2} \beta (\beta - 1) \|S_1\|^2` for one model
annealed by β, and classifier-free guidance's with the powers :math:`(1 - \beta, \beta)`. In these coordinates the drift of a schedule
has no part in it.
"""

from collections.abc import Sequence

import torch
from bench.rivals.walk import Walk, squares
from einops import einsum
from torch import Tensor

from sculpt.diffusion.denoiser import Denoiser
from sculpt.particles import effective_sample_size, systematic

__all__ = ["fkc"]


def fkc(
    models: Sequence[Denoiser],
    n: int,
    *,
    steps: int,
    generator: torch.Generator | None,
    powers: Sequence[float],
    particles: int | None = None,
    threshold: float = 0.5,
) -> Tensor:
    r"""Samples of a product of powers, of populations that select among themselves.

    Args:
        models: the factors.
        n: how many samples.
        steps: evaluations of each model for each sample.
        generator: of all noise.
        powers: :math:`\gamma`, one for each; their sum has to be positive.
        particles: of a population, of which there are as many as n takes; by default all are one.
        threshold: select when the effective sample size falls under this share of the particles.
    """
    sizes = [len(part) for part in torch.arange(n).split(particles or n)]
    return torch.cat([_population(models, size, steps, generator, powers, threshold) for size in sizes])


def _population(
    models: Sequence[Denoiser],
    n: int,
    steps: int,
    generator: torch.Generator | None,
    powers: Sequence[float],
    threshold: float,
) -> Tensor:
    walk = Walk(models, n, steps, generator, degree=sum(powers), euler=True)
    gamma, log_w = walk.levels.new_tensor(powers), walk.levels.new_zeros(n)
    for S in walk:
        together = einsum(gamma, S, "m, N m ... -> N ...")[:, None]
        increment = walk.delta / 2 * (squares(together)[:, 0] - squares(S) @ gamma)
        last = walk.tau == 0
        # The last step denoises and has no weight: it does not sample, so nothing is to be made up for.
        log_w = log_w if last else log_w + increment
        walk.step(gamma)
        if last or effective_sample_size(log_w) < threshold * n:
            walk.take(systematic(log_w, n, generator))
            log_w = torch.zeros_like(log_w)
    return walk.z
