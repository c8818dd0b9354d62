r"""The Gaussian kernels of tracked densities: how wide a step is, and how a target of any degree is walked down.

Notation: noise level :math:`v = s^2`, a step goes to :math:`v' = v - \delta`; :math:`S_i = (D_i - z) / v` is the score of base
model i, :math:`S = \sum_i a_i S_i` that of the target. ``N`` particles, ``m`` base models, ``*x`` one sample.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import einsum, reduce
from jaxtyping import Float
from torch import Tensor

from sculpt.diffusion.clock import like

__all__ = ["Walk", "analytic_variance", "check_finite", "extrapolated", "inner", "kernel_variance", "surprise"]

FEW = 16
"""Particles, from which on they can tell of each other."""


@dataclass(frozen=True)
class Walk:
    r"""One step of a target of degree d, and the way back:

    .. math::
        z' = z + \tfrac vd (1 - \alpha) \, S(z) + \sqrt{\tau} \, \xi, \qquad
        z = z' + \tfrac1d (v' - \alpha v) \, S'(z') + \sqrt{\beta} \, \xi, \qquad
        \alpha^2 = \tfrac{v'}{v} \bigl( 1 - d \tfrac{\delta}{v} \bigr)

    Wide noise of the densities' product has the variance v/d. Both kernels together keep it exactly there, and every Gaussian, so that
    weights are left with what is not Gaussian. At d = 1 this is the reverse process of the base models and their noising:
    :math:`\alpha = v'/v` and :math:`\beta = \delta`.
    """

    ahead: Float[Tensor, ""]
    """what multiplies S(z)"""
    back: Float[Tensor, ""]
    """what multiplies S'(z')"""
    tau: Float[Tensor, ""]
    beta: Float[Tensor, ""]

    @classmethod
    def of(cls, degree: float, c: Float[Tensor, ""], v: Float[Tensor, ""], v_next: Float[Tensor, ""]) -> Walk:
        """The walk of a target whose denoised images leave the variance c open, see :func:`analytic_variance`."""
        delta = v - v_next
        # Where noise of variance δ is too much for the level below, nothing of z is kept.
        alpha = (v_next / v * (1 - degree * delta / v).clamp(min=0)).sqrt()
        # The Gaussian of this c at this level, times the degree: its variance below is smaller by δ.
        V = v / (1 - (c / degree / v).clamp(min=0, max=1 - 1e-9))
        lost = (1 - alpha) * v
        rest = (V * (2 * lost - delta) - lost**2) / degree
        return cls(lost / degree, (v_next - alpha * v) / degree, rest / V, rest / (V - delta))


def analytic_variance(
    z: Float[Tensor, "N *x"],
    D: Float[Tensor, "N m *x"],
    a: Float[Tensor, "N m"],
    w: Float[Tensor, "N"],
    v: Float[Tensor, ""],
) -> tuple[Float[Tensor, "m"], Float[Tensor, ""]]:
    r"""The c of the Analytic-DPM variance :math:`\tau = v'\delta/v + (\delta/v)^2 c`, for each base model and for the composition.

    :math:`c = v \, E[\nabla \cdot D] / d` is the variance per dimension that a denoised image leaves open, on average where
    the particles are. By Stein's identity for the target, whose score is :math:`(\sum_j a_j D_j - \deg z)/v`, no derivative is needed, and
    the same identity for z itself, whose divergence is known, takes most of the noise off; of Gaussians it takes all:

    .. math:: c_i = v \, \frac{E \langle D_i - E D_i, g \rangle}{E \langle z - E z, g \rangle}, \qquad g = \deg z - \sum_j a_j D_j
    """
    composed = einsum(a, D, "N m, N m ... -> N ...")
    # The degree where the particle is: it varies in nested formulas whose parts differ in theirs.
    pull = like(a.sum(1), z) * z - composed
    every = torch.cat([D, composed[:, None], z[:, None]], dim=1)
    if len(z) > 1:  # one particle of many dimensions is average enough
        every = every - einsum(w, every, "N, N ... -> ...")
    g = einsum(w, reduce(every * pull[:, None], "N m ... -> N m", "sum"), "N, N m -> m")
    c = v * g[:-1] / g[-1].clamp(min=torch.finfo(g.dtype).tiny)
    return c[:-1], c[-1]


def extrapolated(D: Tensor, before: Tensor | None, levels: Float[Tensor, "steps"], k: int) -> Tensor:
    """What a model makes of z at level k, carried on by half a step of the second-order solver from what it was one level before."""
    if before is None:
        return D
    h, h_before = (levels[k] / levels[k + 1]).log(), (levels[k - 1] / levels[k]).log()
    return D + (h / (2 * h_before)).to(D.dtype) * (D - before)


def kernel_variance(c: Tensor, v: Tensor, delta: Tensor) -> Tensor:
    """The Analytic-DPM variance of a base model's step from v to v - delta; an estimate of c outside its bounds is put back."""
    return (v - delta) * delta / v + (delta / v) ** 2 * c.clamp(min=0).clamp(max=v)


def surprise(
    ratio: Float[Tensor, "N m"],
    z: Float[Tensor, "N *x"],
    step: Float[Tensor, "N *x"],
    S: Float[Tensor, "N m *x"],
    S_next: Float[Tensor, "N m *x"],
    clock: tuple[Float[Tensor, ""], Float[Tensor, ""]],
    w: Float[Tensor, "N"],
) -> Float[Tensor, "N m"]:
    r"""How far the kernels' log-ratios of one step are from what the scores at both of its ends say, in nats.

    The trapezoid of :math:`d \log q = \langle S, dz \rangle + \tfrac12 (\nabla \cdot S + \|S\|^2) \, dv` with the average of the divergence. What
    is left when all that a Gaussian would explain is taken off estimates the noise of a step of tracked densities.
    """
    if len(z) < FEW:
        return torch.zeros_like(ratio)
    v, v_next = clock
    along = reduce((S + S_next) * step[:, None], "N m ... -> N m", "sum") / 2
    squares = v * reduce(S**2, "N m ... -> N m", "sum") + v_next * reduce(S_next**2, "N m ... -> N m", "sum")
    r = ratio - along + torch.log(v / v_next) / 4 * squares
    X = torch.stack([inner(z, z), inner(z, step), inner(step, step)], dim=1)
    X, r = (part - w @ part for part in (X, r))
    X = X / (w @ X**2).sqrt().clamp(min=torch.finfo(X.dtype).tiny)
    G = einsum(w, X, X, "N, N i, N j -> i j") + 1e-9 * torch.eye(3, dtype=X.dtype, device=X.device)
    return r - X @ torch.linalg.solve(G, einsum(w, X, r, "N, N i, N m -> i m"))


def check_finite(D: Tensor, what: str, k: int, s: Tensor | float, name: str = "s") -> None:
    """Raise where a network's output has entries that are not finite, saying whose, when and for how many samples."""
    if not D.isfinite().all():
        rows = int((~D.isfinite().flatten(1).all(1)).sum())
        raise FloatingPointError(
            f"{what} numbers that are not finite for {rows} of {len(D)} samples at step {k} ({name}={float(s):.3g}). "
            "Check the network's weights and dtype (float16 overflows early), and that its scheduler is the one it was trained with."
        )


def inner(x: Float[Tensor, "N *x"], y: Float[Tensor, "N *x"]) -> Float[Tensor, "N"]:
    """The inner product, sample by sample."""
    return (x * y).flatten(1).sum(1)
