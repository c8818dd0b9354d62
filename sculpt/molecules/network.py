r"""Networks over fragment trees: policies, and backbones of classifiers.

A policy makes two choices in turn: the attachment point (or to stop), then the piece that goes there, :math:`P(j|s)` and
:math:`P(k|s, j)`. Both are read off a transformer (:mod:`sculpt.molecules.transformer`).

Notation: ``b`` batch, ``t`` tokens (a start, then one a slot), ``n`` slots, ``s`` numbers of a state, ``S`` points of a slot,
``j = n S`` points of the tree, ``k`` pieces, ``c`` choices, ``d`` width, h the transformer's output, :math:`\beta` the exponent that the
policy is conditioned on.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sculpt.actions.states import NEG_INF
from sculpt.molecules.transformer import FragmentTransformer

__all__ = ["BETA_MAX", "FragmentFeatures", "FragmentNetwork"]

BETA_MAX = 96.0


class FragmentFeatures(FragmentTransformer):
    """States to features: the backbone of a classifier."""

    def forward(self, states: Int[Tensor, "b s"]) -> Float[Tensor, "b d"]:
        read = self._read(states, self.start.new_zeros(len(states), self.width))
        waiting = (read.point >= 0).nonzero()[:, 0]
        return read.now.index_put((waiting,), self._waiting(read, waiting))


class FragmentNetwork(FragmentTransformer):
    """States ``(b, 2 slots)`` and exponents ``(b, 1)`` to log-probabilities of all actions.

    ``log_p`` scores finished trees and ``sample`` draws them; both are faster than one step after the other.

    Args:
        vocabulary: the fragments, ``[[smiles, [atom, …]], …]``.
        slots: fragments of a tree at most.
        hetero_bonds: whether N, O, S and halogens may be joined to each other.
        width: numbers a token.
        depth: how many blocks the transformer has.
        heads: of its attention.

    Example:
        >>> network = sculpt.molecules.FragmentNetwork([["c1ccccc1", [0, 3]], ["CO", [0]]], slots=3, width=16, depth=1)
        >>> network(torch.full((1, 6), -1), torch.tensor([[32.0]])).shape[0]
        1
    """

    ranges = {"beta": (0.0, BETA_MAX)}

    def __init__(
        self,
        vocabulary: Iterable[Sequence[Any]],
        slots: int = 9,
        hetero_bonds: bool = False,
        width: int = 128,
        depth: int = 4,
        heads: int = 4,
    ):
        super().__init__(vocabulary, slots, hetero_bonds, width, depth, heads)
        layout, d = self.layout, width
        self.condition = nn.Sequential(nn.Linear(16, d), nn.SiLU(), nn.Linear(d, d))
        self.root = nn.Linear(d, layout.F)
        self.query, self.stop = nn.Linear(d, d), nn.Linear(d, 1)
        self.key, self.point, self.slot_bias = nn.Linear(d, d), nn.Embedding(layout.F * layout.S, d), nn.Linear(d, layout.S)
        self.out = nn.Linear(d, layout.K)
        # An untrained policy is close to uniform.
        for last in (self.root, self.stop, self.point, self.slot_bias, self.query, self.out):
            nn.init.normal_(last.weight, std=0.02)
        # Nearly all trees are large ones.
        nn.init.constant_(self.stop.bias, -4.0)

    def _embed_condition(self, beta: Float[Tensor, "b"]) -> Float[Tensor, "b d"]:
        x = (beta / BETA_MAX)[:, None].to(self.start.dtype)
        waves = x * math.pi * torch.arange(1, 8, device=x.device)
        return self.condition(torch.cat([x, x.sqrt(), waves.sin(), waves.cos()], dim=-1))

    # The two choices

    def _points(
        self, now: Float[Tensor, "b t d"], slots: Float[Tensor, "b n d"], fragment: Int[Tensor, "b n"]
    ) -> tuple[Float[Tensor, "b t j"], Float[Tensor, "b t 1"]]:
        """Logits of the attachment points, and of stopping."""
        S, d = self.layout.S, now.shape[-1]
        points = fragment[..., None] * S + torch.arange(S, device=fragment.device)
        key = (self.key(slots)[:, :, None] + self.point(points)).flatten(1, 2)
        logits = self.query(now) @ key.transpose(1, 2) / math.sqrt(d)
        return logits + self.slot_bias(slots).flatten(1)[:, None], self.stop(now)

    def _pieces(self, now: Float[Tensor, "*b d"], slot: Float[Tensor, "*b d"], at: Int[Tensor, "*b"]) -> Float[Tensor, "*b k"]:
        """Logits of the pieces for a point, given as fragment · S + point."""
        return self.out(self._pending(now, slot, at))

    # One step

    def forward(self, states: Int[Tensor, "b s"], conditions: Float[Tensor, "b 1"]) -> Float[Tensor, "b a"]:
        """log P(a|s), minus infinity where an action is not allowed."""
        layout, allowed = self.layout, self.layout.allowed(states)
        alike = bool((conditions == conditions[:1]).all())
        read = self._read(states, self._embed_condition(conditions[:, 0]), alike)
        empty, waits = read.n == 0, read.point >= 0
        out = read.now.new_full((len(states), layout.n_actions), NEG_INF)
        rows = empty.nonzero()[:, 0]
        out[rows, : layout.F] = self.root(read.now[rows])
        rows = waits.nonzero()[:, 0]
        out[rows, layout.F + layout.J : -1] = self.out(self._waiting(read, rows))
        rows = (~empty & ~waits).nonzero()[:, 0]
        if len(rows):
            slots = min(read.slots.shape[1], layout.slots - 1)
            fragment = layout.fragment[read.piece[rows, :slots].clamp(min=0)]
            logits, stop = self._points(read.now[rows, None], read.slots[rows, :slots], fragment)
            out[rows, layout.F : layout.F + slots * layout.S] = logits[:, 0]
            out[rows, -1] = stop[:, 0, 0]
        return torch.log_softmax(out.masked_fill(~allowed, NEG_INF), dim=-1)

    # Whole trees

    def log_p(self, x: Int[Tensor, "b s"], beta: Float[Tensor, "b"]) -> Float[Tensor, "b"]:
        """The log-probability that a policy writes these trees and stops."""
        return self.trace(x, beta)[1].sum(-1)

    def trace(self, x: Int[Tensor, "b s"], beta: Float[Tensor, "b"]) -> tuple[Float[Tensor, "b t d"], Float[Tensor, "b t"]]:
        """The transformer's output at each state on the way to x, and the log-probability of the step from there; zero after the stop."""
        layout = self.layout
        piece, bond, n = layout.tree(x)
        longest = int(n.max())
        piece, bond = piece[:, :longest], bond[:, :longest]
        h = self._hidden(piece, bond, self._embed_condition(beta))[0]
        used = piece.clamp(min=0)
        fragment, filled = layout.fragment[used], piece >= 0
        log_root = torch.log_softmax(self.root(h[:, 0]), dim=-1).gather(1, used[:, :1])
        # At token t the t slots before it are there, and the point that was used last is that of slot t − 1.
        logits, stop = self._points(h[:, 1:], h[:, 1:], fragment)
        t = torch.arange(longest, device=x.device)
        points, j = torch.arange(layout.S, device=x.device), torch.arange(longest * layout.S, device=x.device)
        there = ((points < layout.points[fragment][..., None]) & (points != layout.own[used][..., None])).flatten(1)
        polar = layout.polar[fragment].flatten(1).long()
        there &= layout.fits_any[used[:, :1], polar]
        allowed = there[:, None] & (j // layout.S <= t[:, None]) & (j > bond[..., None]) & (t[:, None] < layout.slots - 1)
        log_j = torch.log_softmax(torch.cat([logits.masked_fill(~allowed, NEG_INF), stop], dim=-1), dim=-1)
        # Token t + 1 stops, or slot t + 1 goes to point bond[t + 1] and is piece[t + 1].
        steps = torch.where(t == n[:, None] - 1, log_j[..., -1], 0.0)
        b, c = filled[:, 1:].nonzero(as_tuple=True)
        j = bond[b, c + 1]
        parent = j // layout.S
        pieces = self._pieces(h[b, c + 1], h[b, 1 + parent], fragment[b, parent] * layout.S + j % layout.S)
        fits = layout.fits[piece[b, 0], polar[b, j]]
        log_k = torch.log_softmax(pieces.masked_fill(~fits, NEG_INF), dim=-1)
        chosen = log_k.gather(1, (piece[b, c + 1] - layout.F)[:, None])[:, 0]
        return h, torch.cat([log_root, steps.index_put((b, c), log_j[b, c, j] + chosen)], dim=-1)

    @torch.no_grad()
    def sample(
        self, beta: Float[Tensor, "b"], generator: torch.Generator | None = None, explore: float = 0.0
    ) -> Int[Tensor, "b s"]:
        """One tree for each exponent.

        Args:
            beta: the exponents.
            generator: source of randomness, on the device of the exponents.
            explore: the probability with which a choice is uniform.
        """
        layout, going = self.layout, torch.arange(len(beta), device=beta.device)
        states = layout.fragment.new_zeros(len(beta), 2 * layout.slots)
        condition = self._embed_condition(beta)
        h, caches = self._hidden(states[:, :0], states[:, :0], condition)
        states[:, 0] = _choose(self.root(h[:, 0]), generator, explore) + 1
        for t in range(1, layout.slots):
            s = states[going]
            used, bonds, _ = layout.tree(s)
            now, caches = self._step(used[:, :t], bonds[:, :t], condition, caches)
            h = torch.cat([h, now], 1)
            fragment = layout.fragment[used[:, :t].clamp(min=0)]
            logits, stop = self._points(now, h[:, 1:], fragment)
            allowed, polar = layout.open(s)
            logits = logits[:, 0].masked_fill(~allowed[:, : t * layout.S], NEG_INF)
            bond = _choose(torch.cat([logits, stop[:, 0]], dim=-1), generator, explore)
            on = bond < t * layout.S  # the others stop
            if not bool(on.any()):
                break
            going, condition, h, bond, used, fragment, polar = (
                part[on] for part in (going, condition, h, bond, used, fragment, polar)
            )
            caches = [(k[on], v[on]) for k, v in caches]
            rows, parent = torch.arange(len(going), device=beta.device), bond // layout.S
            logits = self._pieces(h[:, -1], h[rows, 1 + parent], fragment[rows, parent] * layout.S + bond % layout.S)
            fits = layout.fits[used[:, 0], polar[rows, bond]]
            piece = layout.F + _choose(logits.masked_fill(~fits, NEG_INF), generator, explore)
            states[going, 2 * t], states[going, 2 * t + 1] = piece + 1, bond + 1
        return states


def _choose(logits: Float[Tensor, "b c"], generator: torch.Generator | None, explore: float) -> Int[Tensor, "b"]:
    """A choice for each row, uniform over the allowed ones with probability ``explore``."""
    u = torch.rand(len(logits), generator=generator, device=logits.device)
    p = torch.softmax(logits, dim=-1)
    if explore:
        dare = torch.rand(len(logits), generator=generator, device=logits.device) < explore
        allowed = (logits > NEG_INF).to(p.dtype)
        p = torch.where(dare[:, None], allowed / allowed.sum(-1, keepdim=True), p)
    cdf = p.cumsum(-1)
    # A hair under the last value of the cdf, where rounding would leave the list of choices.
    return (cdf <= (u * cdf[:, -1] * (1 - 2.0**-20))[:, None]).sum(-1)
