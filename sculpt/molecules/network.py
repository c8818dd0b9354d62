r"""Networks over fragment trees: a causal transformer that reads a tree as it is written.

Each fragment is a token that sees the fragments written before it, so one pass over a finished tree serves all states
on the way to it, and a step of sampling costs one token. A policy makes two choices in turn: the attachment point
(or to stop), then the piece that goes there, :math:`P(j|s)` and :math:`P(k|s, j)`.

Notation: ``b`` batch, ``t`` tokens (a start, then one a slot), ``n`` slots, ``S`` points of a slot, ``j = n S`` points of the tree,
``k`` pieces, ``d`` width, ``u`` different trees, h the transformer's output, :math:`\beta` the exponent that the policy is conditioned on.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from sculpt.gflownet.model import distinct, state_keys
from sculpt.molecules.chemistry import Vocabulary
from sculpt.molecules.fragments import Layout

__all__ = ["FragmentFeatures", "FragmentNetwork"]

NEG_INF = float("-inf")
BETA_MAX = 96.0
MEMORY = 2**28  # numbers: one gigabyte


class FragmentTransformer(nn.Module):
    """States ``(b, 2 slots)`` to what the transformer has to say about them; the part that all networks here share.

    In evaluation it remembers the states of the last two steps, so that sampling costs one token a step.
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
        self.vocabulary, self.hetero_bonds, self.width = vocabulary, hetero_bonds, width
        self.layout = layout = Layout(vocabulary, slots, hetero_bonds)
        d, points = width, layout.F * layout.S
        self.start = nn.Parameter(torch.zeros(d))
        self.piece, self.bond = nn.Embedding(layout.F + layout.K, d), nn.Embedding(points + 1, d)
        self.place, self.parent = nn.Embedding(slots, d), nn.Embedding(slots, d)
        self.blocks = nn.ModuleList(Block(d, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(d)
        self.here, self.there, self.at = nn.Linear(d, d), nn.Linear(d, d), nn.Embedding(points, d)
        for embedding in (self.piece, self.bond, self.place, self.parent, self.at):
            nn.init.normal_(embedding.weight, std=0.3)
        self.memory = Memory()

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self.memory = Memory()
        if self.start.device != self.layout.fragment.device:
            self.layout = Layout(self.vocabulary, self.layout.slots, self.hetero_bonds, self.start.device)
        return self

    # Tokens

    def _embed(self, piece: Int[Tensor, "b n"], bond: Int[Tensor, "b n"], first: int = 0) -> Float[Tensor, "b m d"]:
        """Tokens of the slots first, first + 1, …; ``bond`` is −1 for the root and ``piece`` −1 for what is empty."""
        fragment, S = self.layout.fragment[piece.clamp(min=0)], self.layout.S
        piece, bond = piece[:, first:], bond[:, first:]
        parent, point = bond.clamp(min=0) // S, bond.clamp(min=0) % S
        bonds = torch.where(bond < 0, self.bond.num_embeddings - 1, fragment.gather(1, parent) * S + point)
        place = first + torch.arange(piece.shape[1], device=piece.device)
        return self.piece(piece.clamp(min=0)) + self.place(place) + self.parent(parent) + self.bond(bonds)

    def _hidden(
        self, piece: Int[Tensor, "b n"], bond: Int[Tensor, "b n"], condition: Float[Tensor, "b d"]
    ) -> tuple[Float[Tensor, "b t d"], list[Cache]]:
        """The output at the start and at each slot, and the keys and values of each block."""
        x = torch.cat([self.start.expand(len(piece), 1, -1), self._embed(piece, bond)], 1) + condition[:, None]
        caches = []
        for block in self.blocks:
            x, cache = block(x)
            caches.append(cache)
        return self.norm(x), caches

    def _step(
        self, piece: Int[Tensor, "b n"], bond: Int[Tensor, "b n"], condition: Float[Tensor, "b d"], caches: list[Cache]
    ) -> tuple[Float[Tensor, "b 1 d"], list[Cache]]:
        """The output at the last slot, given the keys and values of those before it."""
        x = self._embed(piece, bond, piece.shape[1] - 1) + condition[:, None]
        longer = []
        for block, cache in zip(self.blocks, caches, strict=True):
            x, cache = block(x, cache)
            longer.append(cache)
        return self.norm(x), longer

    # States

    def _read(self, states: Int[Tensor, "b s"], condition: Float[Tensor, "b d"], alike: bool = True) -> State:
        """``alike``: the condition is the same in all rows."""
        piece, bond, n = self.layout.tree(states)
        point = self.layout.chosen(bond, n)
        lasting = not (torch.is_grad_enabled() or self.training)
        if lasting and alike and len(n) and bool((n == n[0]).all()):
            h = self._remembered(states, int(n[0]), condition[0])
        else:
            h = self._shared(states, piece, bond, n, condition, alike)
        now = h.gather(1, n[:, None, None].expand(-1, -1, h.shape[-1]))[:, 0]
        filled = h.shape[1] - 1
        return State(piece[:, :filled], bond[:, :filled], n, point, now, h[:, 1:])

    def _shared(self, states, piece, bond, n, condition, alike) -> Float[Tensor, "b t d"]:
        """Read only the trees that no other one begins with: the output at a tree is that at the same place in a longer one."""
        longest = int(n.max()) if len(n) else 0
        piece, bond = piece[:, :longest], bond[:, :longest]
        filled = piece >= 0
        piece, bond = torch.where(filled, piece, -1), torch.where(filled, bond, -1)
        if not alike or not longest:
            return self._hidden(piece, bond, condition)[0]
        numbers = torch.stack([piece, bond], -1) + 2
        keys = torch.stack([state_keys(numbers[:, :t].flatten(1)) for t in range(1, longest + 1)], 1)
        keys = torch.cat([torch.zeros_like(keys[:, :1]), keys], 1)
        own = keys.gather(1, n[:, None])[:, 0]
        inner = torch.arange(longest + 1, device=n.device) < n[:, None]
        ends = ~torch.isin(own, keys[inner])
        _, first = torch.unique(own[ends], return_inverse=True)
        leaves = ends.nonzero()[:, 0].new_empty(int(first.max()) + 1).scatter_(0, first, ends.nonzero()[:, 0])
        # Where does each state's own key stand among those of the leaves?
        flat, order = keys[leaves].flatten().sort()
        leaf = leaves[order[torch.searchsorted(flat, own)] // (longest + 1)]
        row = torch.empty_like(n).index_copy_(0, leaves, torch.arange(len(leaves), device=n.device))[leaf]
        same = (numbers[leaf] == numbers) | ~filled[..., None]
        if not bool(same.all()):  # two trees, one hash: about never
            return self._hidden(piece, bond, condition)[0]
        return self._hidden(piece[leaves], bond[leaves], condition[leaves])[0][row]

    def _remembered(self, states: Int[Tensor, "b s"], n: int, condition: Float[Tensor, "d"]) -> Float[Tensor, "b t d"]:
        """The same for states of n fragments each, from what was computed for them or their parents a moment ago."""
        layout, memory = self.layout, self.memory
        weights = sum(parameter._version for parameter in self.parameters())
        if n == 0 or memory.weights != weights or not torch.equal(memory.condition, condition):
            memory = self.memory = Memory(weights, condition)
        memory.depths = {depth: memory.depths[depth] for depth in (n - 1, n) if depth in memory.depths}
        written = states.clone()
        written[:, 2 * n :] = 0
        written, rows = distinct(written)
        known = memory.find(n, written)
        new = known < 0
        h = self.start.new_empty(len(written), n + 1, self.width)
        if not bool(new.all()):
            h[~new] = memory.depths[n].h[known[~new]]
        if bool(new.any()):
            piece, bond, _ = layout.tree(written[new])
            piece, bond, conditions = piece[:, :n], bond[:, :n], condition.expand(len(piece), -1)
            parents = written[new].clone()
            parents[:, 2 * n - 2 :] = 0
            parent = memory.find(n - 1, parents)
            if n and bool((parent >= 0).all()):
                before = memory.depths[n - 1]
                now, caches = self._step(piece, bond, conditions, [(k[parent], v[parent]) for k, v in before.caches])
                h[new] = torch.cat([before.h[parent], now], 1)
            else:
                h[new], caches = self._hidden(piece, bond, conditions)
            memory.add(n, Depth(written[new], h[new], caches))
        if n == layout.slots:  # nothing comes after
            self.memory = Memory()
        return h[rows]

    def _pending(self, now: Float[Tensor, "*b d"], slot: Float[Tensor, "*b d"], at: Int[Tensor, "*b"]) -> Float[Tensor, "*b d"]:
        """A state in which a point, given as fragment · S + point, waits for its piece."""
        return F.gelu(self.here(now) + self.there(slot) + self.at(at))

    def _waiting(self, state: State, rows: Int[Tensor, "b"]) -> Float[Tensor, "b d"]:
        """The same for those of these states."""
        S, point = self.layout.S, state.point[rows]
        parent = point // S
        fragment = self.layout.fragment[state.piece[rows, parent]]
        return self._pending(state.now[rows], state.slots[rows, parent], fragment * S + point % S)


@dataclass
class State:
    """Pieces and bonds of the slots, how many there are, the point that waits (−1: none), and the outputs there."""

    piece: Int[Tensor, "b n"]
    bond: Int[Tensor, "b n"]
    n: Int[Tensor, "b"]
    point: Int[Tensor, "b"]
    now: Float[Tensor, "b d"]
    slots: Float[Tensor, "b n d"]


Cache = tuple[Tensor, Tensor]
"""Keys and values of a block, ``(b, heads, t, e)``."""


@dataclass
class Depth:
    """Different trees of one size, what was said about them, and where each stands in the order of their hashes."""

    trees: Int[Tensor, "u s"]
    h: Float[Tensor, "u t d"]
    caches: list[Cache]

    def __post_init__(self):
        self.keys, self.order = state_keys(self.trees).sort()

    def numel(self) -> int:
        return self.h.numel() * (1 + 2 * len(self.caches))


@dataclass
class Memory:
    """What a transformer said about the trees of the last two sizes, under one condition and one set of weights."""

    weights: int = -1
    condition: Tensor = field(default_factory=lambda: torch.zeros(0))
    depths: dict[int, Depth] = field(default_factory=dict)

    def find(self, n: int, trees: Int[Tensor, "b s"]) -> Int[Tensor, "b"]:
        """The row of each tree, −1 where it is not known."""
        if n not in self.depths:
            return torch.full((len(trees),), -1, device=trees.device)
        depth = self.depths[n]
        place = torch.searchsorted(depth.keys, state_keys(trees)).clamp(max=len(depth.keys) - 1)
        row = depth.order[place]
        return torch.where((depth.trees[row] == trees).all(-1), row, -1)

    def add(self, n: int, new: Depth) -> None:
        """Keep it, as long as there is room: what is forgotten is computed again."""
        if sum(depth.numel() for depth in (*self.depths.values(), new)) > MEMORY:
            return
        if (old := self.depths.get(n)) is not None:
            caches = [tuple(map(torch.cat, zip(a, b, strict=True))) for a, b in zip(old.caches, new.caches, strict=True)]
            new = Depth(torch.cat([old.trees, new.trees]), torch.cat([old.h, new.h]), caches)
        self.depths[n] = new


class FragmentFeatures(FragmentTransformer):
    """States to features: the backbone of a classifier."""

    def forward(self, states: Int[Tensor, "b s"]) -> Float[Tensor, "b d"]:
        state = self._read(states, self.start.new_zeros(len(states), self.width))
        waiting = (state.point >= 0).nonzero()[:, 0]
        return state.now.index_put((waiting,), self._waiting(state, waiting))


class FragmentNetwork(FragmentTransformer):
    """States ``(b, 2 slots)`` and exponents ``(b, 1)`` to log-probabilities of all actions.

    ``log_p`` scores finished trees, ``sample`` draws them: both are faster than going step by step.
    """

    ranges = {"beta": (0.0, BETA_MAX)}

    def __init__(
        self,
        vocabulary: Iterable[Sequence],
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
        # Close to uniform at first.
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
        state = self._read(states, self._embed_condition(conditions[:, 0]), alike)
        empty, waits = state.n == 0, state.point >= 0
        out = state.now.new_full((len(states), layout.n_actions), NEG_INF)
        rows = empty.nonzero()[:, 0]
        out[rows, : layout.F] = self.root(state.now[rows])
        rows = waits.nonzero()[:, 0]
        out[rows, layout.F + layout.J : -1] = self.out(self._waiting(state, rows))
        rows = (~empty & ~waits).nonzero()[:, 0]
        if len(rows):
            slots = min(state.slots.shape[1], layout.slots - 1)
            fragment = layout.fragment[state.piece[rows, :slots].clamp(min=0)]
            logits, stop = self._points(state.now[rows, None], state.slots[rows, :slots], fragment)
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

        going = torch.arange(B, device=device)
        h, caches = self._hidden(states[:, :0], states[:, :0], condition)
        for t in range(layout.slots):
            now = h[:, -1]
            if t == 0:
                piece, bond = choose(self.root(now)), torch.full_like(going, -1)
            else:
                s = states[going]
                used = layout.tree(s)[0][:, :t].clamp(min=0)
                fragment = layout.fragment[used]
                logits, stop = self._points(now[:, None], h[:, 1:], fragment)
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
            if t + 1 < layout.slots:
                pieces, bonds, _ = layout.tree(states[going])
                now, caches = self._step(pieces[:, : t + 1], bonds[:, : t + 1], condition, caches)
                h = torch.cat([h, now], 1)
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

    def forward(self, x: Float[Tensor, "b t d"], cache: Cache | None = None) -> tuple[Float[Tensor, "b t d"], Cache]:
        """These tokens, or one more after those in the cache."""
        q, k, v = self._split(x)
        if cache is not None:
            k, v = torch.cat([cache[0], k], 2), torch.cat([cache[1], v], 2)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=cache is None)
        x = x + self.mix(attended.transpose(1, 2).flatten(2))
        return x + self.feed(x), (k, v)
