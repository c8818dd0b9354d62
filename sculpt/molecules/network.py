r"""The policy network: a causal transformer that writes a tree down.

Each fragment is a token that sees the fragments written before it, so one pass over a finished tree gives the probability of
every step on the way, and a step of sampling costs one token. A step is two choices: the attachment point
(or to stop), then the piece that goes there, :math:`P(a|s) = P(j|s) \, P(k|s, j)`.

Notation: ``b`` batch, ``t`` tokens (a start, then one a slot), ``n`` slots, ``S`` points of a slot, ``j = n S`` points of the tree,
``k`` pieces, ``d`` width, h the transformer's output, :math:`\beta` the exponent that the policy is conditioned on.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from sculpt.molecules.chemistry import Vocabulary
from sculpt.molecules.fragments import Layout

__all__ = ["FragmentNetwork"]

NEG_INF = float("-inf")
BETA_MAX = 96.0


class FragmentNetwork(nn.Module):
    """States ``(b, 2 slots)`` and exponents ``(b, 1)`` to log-probabilities of all actions.

    ``log_p`` scores finished trees, ``sample`` draws them: both are many times faster than going step by step.
    """

    def __init__(
        self,
        vocabulary: Iterable[Sequence],
        slots: int = 9,
        hetero_bonds: bool = False,
        width: int = 128,
        depth: int = 4,
        heads: int = 4,
    ):
        super().__init__()
        vocabulary = Vocabulary(vocabulary)
        self.config = {"vocabulary": vocabulary, "slots": slots, "hetero_bonds": hetero_bonds}
        self.config |= {"width": width, "depth": depth, "heads": heads}
        self.vocabulary, self.hetero_bonds = vocabulary, hetero_bonds
        self.layout = layout = Layout(vocabulary, slots, hetero_bonds)
        d, points = width, layout.F * layout.S
        self.start = nn.Parameter(torch.zeros(d))
        self.piece, self.bond = nn.Embedding(layout.F + layout.K, d), nn.Embedding(points + 1, d)
        self.place, self.parent = nn.Embedding(slots, d), nn.Embedding(slots, d)
        self.condition = nn.Sequential(nn.Linear(16, d), nn.SiLU(), nn.Linear(d, d))
        self.blocks = nn.ModuleList(Block(d, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(d)
        self.root = nn.Linear(d, layout.F)
        self.query, self.stop = nn.Linear(d, d), nn.Linear(d, 1)
        self.key, self.point, self.slot_bias = nn.Linear(d, d), nn.Embedding(points, d), nn.Linear(d, layout.S)
        self.here, self.there, self.at = nn.Linear(d, d), nn.Linear(d, d), nn.Embedding(points, d)
        self.out = nn.Linear(d, layout.K)
        for embedding in (self.piece, self.bond, self.place, self.parent, self.at):
            nn.init.normal_(embedding.weight, std=0.3)
        # Close to uniform at first.
        for last in (self.root, self.stop, self.point, self.slot_bias, self.query, self.out):
            nn.init.normal_(last.weight, std=0.02)
        # Nearly all trees are large ones.
        nn.init.constant_(self.stop.bias, -4.0)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        if self.start.device != self.layout.fragment.device:
            self.layout = Layout(self.vocabulary, self.layout.slots, self.hetero_bonds, self.start.device)
        return self

    # Tokens

    def _embed_condition(self, beta: Float[Tensor, "b"]) -> Float[Tensor, "b d"]:
        x = (beta / BETA_MAX)[:, None].to(self.start.dtype)
        waves = x * math.pi * torch.arange(1, 8, device=x.device)
        return self.condition(torch.cat([x, x.sqrt(), waves.sin(), waves.cos()], dim=-1))

    def _embed(self, piece: Int[Tensor, "b n"], bond: Int[Tensor, "b n"], first: int = 0) -> Float[Tensor, "b n d"]:
        """Tokens of the slots first, first + 1, …; ``bond`` is −1 for the root and ``piece`` −1 for what is empty."""
        place = first + torch.arange(piece.shape[1], device=piece.device)
        return self.piece(piece.clamp(min=0)) + self.place(place) + self.parent(bond.clamp(min=0) // self.layout.S)

    def _bonds(self, fragments: Int[Tensor, "b n"], bond: Int[Tensor, "b m"]) -> Int[Tensor, "b m"]:
        """The parent's fragment and point as one number, for each bond."""
        S = self.layout.S
        parent = fragments.gather(1, bond.clamp(min=0) // S)
        return torch.where(bond < 0, self.bond.num_embeddings - 1, parent * S + bond.clamp(min=0) % S)

    def _hidden(self, states: Int[Tensor, "b s"], beta: Float[Tensor, "b"]) -> Float[Tensor, "b t d"]:
        piece, bond, n = self.layout.tree(states)
        longest = int(n.max()) if len(n) else 0
        piece, bond = piece[:, :longest], bond[:, :longest]
        fragment = self.layout.fragment[piece.clamp(min=0)]
        x = self._embed(piece, bond) + (self.bond(self._bonds(fragment, bond)) if longest else 0.0)
        x = torch.cat([self.start.expand(len(x), 1, -1), x], 1) + self._embed_condition(beta)[:, None]
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

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
        return self.out(F.gelu(self.here(now) + self.there(slot) + self.at(at)))

    # One step

    def forward(self, states: Int[Tensor, "b s"], conditions: Float[Tensor, "b 1"]) -> Float[Tensor, "b a"]:
        """log P(a|s), minus infinity where an action is not allowed."""
        layout = self.layout
        piece, _, n = layout.tree(states)
        h = self._hidden(states, conditions[:, 0])
        rows = torch.arange(len(states), device=states.device)
        out = h.new_full((len(states), layout.n_actions), NEG_INF)
        empty, going = (n == 0).nonzero()[:, 0], (n > 0).nonzero()[:, 0]
        out[empty, : layout.F] = torch.log_softmax(self.root(h[empty, 0]), dim=-1)
        if not len(going):
            return out
        now, filled = h[rows, n], h.shape[1] - 1
        slots = min(filled, layout.slots - 1)
        fragment = layout.fragment[piece[:, :slots].clamp(min=0)]
        logits, stop = self._points(now[going, None], h[going, 1 : slots + 1], fragment[going])
        allowed, polar = layout.open(states[going])
        width = slots * layout.S
        logits = torch.cat([logits[:, 0].masked_fill(~allowed[:, :width], NEG_INF), stop[:, 0]], dim=-1)
        log_j = torch.log_softmax(logits, dim=-1)
        # Only points that are open: there are few of them among all.
        which, j = allowed.nonzero(as_tuple=True)
        r = going[which]
        at = fragment[r, j // layout.S] * layout.S + j % layout.S
        fits = layout.fits[piece[r, 0], polar[which, j]]
        log_k = torch.log_softmax(self._pieces(now[r], h[r, 1 + j // layout.S], at).masked_fill(~fits, NEG_INF), dim=-1)
        table = out[:, layout.F : -1].view(len(states), layout.J, layout.K)
        table[r, j] = log_j[which, j, None] + log_k
        out[going, -1] = log_j[:, -1]
        return out

    # Whole trees

    def log_p(self, x: Int[Tensor, "b s"], beta: Float[Tensor, "b"]) -> Float[Tensor, "b"]:
        """The log-probability that a policy writes these trees and stops."""
        return self.trace(x, beta)[1].sum(-1)

    def trace(self, x: Int[Tensor, "b s"], beta: Float[Tensor, "b"]) -> tuple[Float[Tensor, "b t d"], Float[Tensor, "b t"]]:
        """The transformer's output at each state on the way to x, and the log-probability of the step from there; zero after the stop."""
        layout = self.layout
        piece, bond, n = layout.tree(x)
        h = self._hidden(x, beta)
        longest = h.shape[1] - 1
        piece, bond = piece[:, :longest], bond[:, :longest]
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
        """One tree for each exponent. Each choice is uniform with probability ``explore``."""
        layout = self.layout
        B, device = len(beta), beta.device
        states = layout.fragment.new_zeros(B, 2 * layout.slots)
        condition = self._embed_condition(beta)

        def choose(logits: Float[Tensor, "b c"]) -> Int[Tensor, "b"]:
            u = torch.rand(len(logits), generator=generator, device=device)
            p = torch.softmax(logits, dim=-1)
            if explore:
                dare = torch.rand(len(logits), generator=generator, device=device) < explore
                allowed = (logits > NEG_INF).to(p.dtype)
                p = torch.where(dare[:, None], allowed / allowed.sum(-1, keepdim=True), p)
            cdf = p.cumsum(-1)
            return (cdf <= (u * cdf[:, -1] * (1 - 2.0**-20))[:, None]).sum(-1)

        caches = [None] * len(self.blocks)
        h = condition.new_zeros(B, layout.slots + 1, condition.shape[-1])
        x, going = (self.start + condition)[:, None], torch.arange(B, device=device)
        for t in range(layout.slots + 1):
            for i, block in enumerate(self.blocks):
                x, caches[i] = block.step(x, caches[i])
            now = self.norm(x[:, 0])
            h[:, t] = now
            if t == layout.slots:
                break
            if t == 0:
                piece, bond = choose(self.root(now)), torch.full_like(going, -1)
            else:
                s = states[going]
                used = layout.tree(s)[0][:, :t].clamp(min=0)
                fragment = layout.fragment[used]
                logits, stop = self._points(now[:, None], h[:, 1 : t + 1], fragment)
                allowed, polar = layout.open(s)
                width = t * layout.S
                logits = torch.cat([logits[:, 0].masked_fill(~allowed[:, :width], NEG_INF), stop[:, 0]], dim=-1)
                bond = choose(logits)
                on = bond < width
                going, now, h, bond, used, fragment, polar = (v[on] for v in (going, now, h, bond, used, fragment, polar))
                condition = condition[on]
                caches = [(k[on], v[on]) for k, v in caches]
                if not len(going):
                    break
                rows, parent = torch.arange(len(going), device=device), bond // layout.S
                logits = self._pieces(now, h[rows, 1 + parent], fragment[rows, parent] * layout.S + bond % layout.S)
                fits = layout.fits[used[:, 0], polar[rows, bond]]
                piece = layout.F + choose(logits.masked_fill(~fits, NEG_INF))
            states[going, 2 * t], states[going, 2 * t + 1] = piece + 1, bond + 1
            fragments = layout.fragment[(states[going, ::2] - 1).clamp(min=0)]
            x = (
                self._embed(piece[:, None], bond[:, None], t)
                + self.bond(self._bonds(fragments, bond[:, None]))
                + condition[:, None]
            )
        return states


class Block(nn.Module):
    """Causal attention and a feed-forward layer, each on top of its own normalisation."""

    def __init__(self, d: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm, self.qkv, self.mix = nn.LayerNorm(d), nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.feed = nn.Sequential(nn.LayerNorm(d), nn.Linear(d, 3 * d), nn.GELU(), nn.Linear(3 * d, d))

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)

    def _finish(self, x: Tensor, attended: Tensor) -> Tensor:
        x = x + self.mix(attended.transpose(1, 2).flatten(2))
        return x + self.feed(x)

    def forward(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        q, k, v = self._split(x)
        return self._finish(x, F.scaled_dot_product_attention(q, k, v, is_causal=True))

    def step(self, x: Float[Tensor, "b 1 d"], cache: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """One more token after those in the cache."""
        q, k, v = self._split(x)
        if cache is not None:
            k, v = torch.cat([cache[0], k], 2), torch.cat([cache[1], v], 2)
        return self._finish(x, F.scaled_dot_product_attention(q, k, v)), (k, v)
