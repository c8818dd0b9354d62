"""States as raw tensors ``(b, *s)``, and tables over actions: what every model that writes action by action needs."""

from __future__ import annotations

import functools

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

__all__ = ["NEG_INF", "distinct", "draw", "masked_log_softmax", "state_keys"]

NEG_INF = float("-inf")


def distinct(states: Shaped[Tensor, "b *s"]) -> tuple[Shaped[Tensor, "u *s"], Int[Tensor, "b"]]:
    """The different states among these, and where each row is among them: ``states == unique[rows]``.

    Policies are functions of the state, so a batch costs as many evaluations as it has different states: on a grid,
    ten thousand trajectories visit at most a diagonal at a time.
    """
    keys, rows = torch.unique(state_keys(states), return_inverse=True)
    unique = states.new_empty(len(keys), *states.shape[1:]).index_copy_(0, rows, states)
    if not torch.equal(unique[rows], states):  # two states, one hash: about never
        unique, rows = torch.unique(states, dim=0, return_inverse=True)
    return unique, rows


def state_keys(states: Shaped[Tensor, "b *s"]) -> Int[Tensor, "b"]:
    """A 64-bit hash per state."""
    x = states.flatten(1)
    if x.is_floating_point():
        x = (x.double() + 0.0).view(torch.int64)  # minus zero is zero
        for shift, factor in ((33, -49064778989728563), (29, -4265267296055464877)):
            x = (x ^ (x >> shift)) * factor
    return (x.long() * _factors(x.shape[1], x.device)).sum(-1)


@functools.cache
def _factors(size: int, device: torch.device) -> Int[Tensor, "d"]:
    generator = torch.Generator().manual_seed(0)
    return (torch.randint(-(2**62), 2**62, (size,), generator=generator) * 2 + 1).to(device)


def masked_log_softmax(logits: Tensor, mask: Bool[Tensor, "b a"]) -> Float[Tensor, "b a"]:
    """Masked before anything else: what a network says about forbidden actions, NaN included, must not matter."""
    log_p = torch.log_softmax(torch.where(mask, logits.double(), NEG_INF), dim=-1)
    return torch.where(mask, log_p, NEG_INF)


def draw(log_p: Float[Tensor, "u a"], rows: Int[Tensor, "b"], generator: torch.Generator | None = None) -> Int[Tensor, "b"]:
    """One action for each of ``rows``, by inverse cdf. Actions of probability zero are never drawn."""
    cdf = log_p.exp().cumsum(-1)
    device = log_p.device if generator is None else generator.device
    u = torch.rand(len(rows), generator=generator, dtype=torch.float64, device=device).to(log_p.device)
    # A hair under the last value of the cdf, where rounding would leave the list of actions.
    u = u * cdf[rows, -1] * (1 - 2.0**-50)
    return (cdf[rows] <= u[:, None]).sum(-1)
