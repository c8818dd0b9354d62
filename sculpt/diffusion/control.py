r"""A drift that takes variance out of the weights of tracked densities, without a call of a network.

The weights of a path are right whatever the two kernels are, so both may have a further drift, there and back:

.. math:: u(z) = \sum_j \theta_j \, g_j(z), \qquad g_j \in \{ S_i, \; a_i S_i \}

In the limit of small steps a particle's log-weight then grows by :math:`\theta_j h_j`, :math:`h_j = \nabla \cdot g_j + \langle g_j, \nabla \Phi \rangle`, more
(Ren et al., *DriftLite*, 2025), and with the noise that the step has had anyway a finite step shows :math:`h_j` without derivatives.
So :math:`\theta` of the next step is the least squares fit of this one's increments.
"""

from __future__ import annotations

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

__all__ = ["Control"]

RIDGE = 0.1
"""of the mean variance of what is fitted with"""
MOST = 1.0
"""The coefficients at most."""
PARTICLES = 16
"""for each coefficient, at least"""


class Control:
    """The coefficients of one run.

    Args:
        m: how many base models there are.
        n: particles. Too few of them tell nothing, and there is no drift.
        like: of the particles' type, where they live.
    """

    def __init__(self, m: int, n: int, like: Tensor):
        self.theta, self.learns = like.new_zeros(2 * m, dtype=torch.float64), n >= PARTICLES * 2 * m

    def features(self, a: Float[Tensor, "N m"], S: Float[Tensor, "N m *x"]) -> Float[Tensor, "N j *x"]:
        """The g of particles, from their scores."""
        return torch.cat([S, einsum(a, S, "N m, N m ... -> N m ...")], dim=1)

    def drift(self, g: Float[Tensor, "N j *x"]) -> Float[Tensor, "N *x"]:
        return einsum(self.theta.to(g.dtype), g, "j, N j ... -> N ...")

    def learn(
        self,
        increment: Float[Tensor, "N"],
        g: Float[Tensor, "N j *x"],
        g_next: Float[Tensor, "N j *x"],
        back: Float[Tensor, "N *x"],
        pull: Float[Tensor, "N *x"],
        w: Float[Tensor, "N"],
    ) -> None:
        """From one step of everyone.

        Args:
            increment: of the log-weights.
            g: where the step began.
            g_next: where it ended.
            back: the way back that is left when the kernel's own drift is taken off, over its variance.
            pull: the composed score at the end.
            w: the particles' weights.
        """
        if not self.learns:
            return
        h = einsum(pull, g, "N ..., N j ... -> N j") - einsum(back, g - g_next, "N ..., N j ... -> N j")
        known = h.isfinite().all(1) & increment.isfinite()
        w = torch.where(known, w, 0.0)
        w = w / w.sum().clamp(min=torch.finfo(w.dtype).tiny)
        h, missed = torch.where(known[:, None], h, 0.0), torch.where(known, increment, 0.0)
        h, missed = h - w @ h, missed - w @ missed
        G = einsum(w, h, h, "N, N i, N j -> i j")
        G = G + (RIDGE * G.diagonal().mean() + torch.finfo(G.dtype).eps) * torch.eye(len(G), dtype=G.dtype, device=G.device)
        change = torch.linalg.solve(G, einsum(w, h, missed, "N, N j, N -> j"))
        self.theta = (self.theta - change).clamp(-MOST, MOST)
