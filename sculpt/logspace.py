"""Shares and sums of log-densities of any size, infinities included, without NaN."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from einops import einsum
from torch import Tensor

__all__ = ["covariance", "log_of", "log_softmax", "softmax"]


def log_of(weights: Sequence[float], ell: Tensor) -> Tensor:
    return torch.tensor(weights, dtype=torch.float64).log().to(ell)


def log_softmax(x: Tensor) -> Tensor:
    """``log_softmax`` that stays minus infinity where every entry is, with equal shares among entries at plus infinity."""
    top = x.amax(-1, keepdim=True)
    x = torch.where(top == float("inf"), torch.where(x == top, 0.0, -math.inf), x)
    total = torch.logsumexp(x, dim=-1, keepdim=True)
    return torch.where(top == -math.inf, -math.inf, x - torch.where(total.isfinite(), total, 0.0))


def softmax(x: Tensor) -> Tensor:
    """``softmax`` with the limits at infinity: equal shares among entries at plus infinity or, where all are, at minus infinity."""
    top = x.amax(-1, keepdim=True)
    edge = (x == top).to(x.dtype)
    limit = edge / edge.sum(-1, keepdim=True)
    return torch.where(top.isfinite(), torch.softmax(torch.where(top.isfinite(), x, 0.0), dim=-1), limit)


def covariance(r: Tensor) -> Tensor:
    r""":math:`\mathrm{diag}(r) - r r^\top`"""
    return torch.diag_embed(r) - einsum(r, r, "... i, ... j -> ... i j")
