r"""SuperDiff (Skreta et al., ICLR 2025): scores weighed by densities that the Itô estimator tracks along the path.

OR weighs them by :math:`\kappa = \mathrm{softmax}(\ell)`, which is the mixture's score. AND seeks samples that are as likely under every
model: in each step it solves for the :math:`\kappa`, :math:`\sum_i \kappa_i = 1`, with which all log-densities change alike,

.. math:: \langle S_i, \, \delta \sum_j \kappa_j S_j + \sqrt{\tau} \, \xi \rangle - \tfrac{\delta}{2} \|S_i\|^2 = \text{the same for all } i.

This is no distribution that is named by the models' densities: it is where they are equal.
"""

from collections.abc import Sequence

import torch
from bench.rivals.walk import Walk
from einops import einsum
from torch import Tensor

from sculpt.diffusion.denoiser import Denoiser

__all__ = ["superdiff_and", "superdiff_or"]


def superdiff_or(
    models: Sequence[Denoiser], n: int, *, steps: int, generator: torch.Generator | None, temperature: float = 1.0
) -> Tensor:
    r"""Samples of any of the models.

    Args:
        models: two or more.
        n: how many samples.
        steps: evaluations of each model for each sample.
        generator: of all noise.
        temperature: what multiplies the log-densities in :math:`\kappa`.
    """
    walk = Walk(models, n, steps, generator)
    for _ in walk:
        walk.step(torch.softmax(temperature * walk.ell, dim=-1))
    return walk.z


def superdiff_and(models: Sequence[Denoiser], n: int, *, steps: int, generator: torch.Generator | None) -> Tensor:
    """Samples that are as likely under every model, as far as the estimator can tell.

    Args:
        models: two or more.
        n: how many samples.
        steps: evaluations of each model for each sample.
        generator: of all noise.
    """
    walk = Walk(models, n, steps, generator)
    for _ in walk:
        walk.step(equalising(walk))
    return walk.z


def equalising(walk: Walk) -> Tensor:
    r"""The :math:`\kappa` of this step, ``(N, m)``. Where scores are equal, every :math:`\kappa` will do, and they share alike."""
    S = walk.S.flatten(2)
    G = einsum(S, S, "N i x, N j x -> N i j")
    wanted = G.diagonal(dim1=1, dim2=2) / 2 - walk.tau.sqrt() / walk.delta * einsum(S, walk.xi.flatten(1), "N i x, N x -> N i")
    kappa = torch.full_like(wanted, 1 / len(walk.models))
    missing = wanted - einsum(G, kappa, "N i j, N j -> N i")
    # Rows against the first one, unknowns that sum to zero: the first takes what the others give.
    A = (G[:, 1:, 1:] - G[:, :1, 1:]) - (G[:, 1:, :1] - G[:, :1, :1])
    change = einsum(torch.linalg.pinv(A, rtol=1e-9), missing[:, 1:] - missing[:, :1], "N i j, N j -> N i")
    return kappa + torch.cat([-change.sum(1, keepdim=True), change], dim=1)
