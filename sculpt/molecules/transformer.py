"""A causal transformer that reads a tree as it is written: the part that all networks over fragment trees share.

Each fragment is a token that sees the fragments written before it. One pass over a finished tree thus serves all states on the way to it,
and a step of sampling costs one token.

Notation: ``b`` batch, ``t`` tokens (a start, then one a slot), ``m`` new tokens, ``n`` slots, ``s`` numbers of a state, ``d`` width,
h the transformer's output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from sculpt.actions.states import distinct, state_keys
from sculpt.molecules.chemistry import Vocabulary
from sculpt.molecules.layout import Layout
from sculpt.molecules.memory import Cache, Depth, Memory

__all__ = ["FragmentTransformer", "Reading"]


@dataclass
class Reading:
    """States as the transformer read them: pieces and bonds of the filled slots, and its outputs."""

    piece: Int[Tensor, "b n"]
    bond: Int[Tensor, "b n"]
    n: Int[Tensor, "b"]
    """how many slots are filled"""
    point: Int[Tensor, "b"]
    """the point that waits for its piece; −1 where none does"""
    now: Float[Tensor, "b d"]
    """the output at the last token"""
    slots: Float[Tensor, "b n d"]
    """the outputs at the slots"""


class FragmentTransformer(nn.Module):
    """States ``(b, 2 slots)`` to the outputs of a transformer. In evaluation it remembers the states of the last two steps.

    Args:
        vocabulary: the fragments, ``[[smiles, [atom, …]], …]``.
        slots: fragments of a tree at most.
        hetero_bonds: whether N, O, S and halogens may be joined to each other.
        width: numbers a token.
        depth: how many blocks there are.
        heads: of the attention.
    """

    def __init__(
        self,
        vocabulary: Iterable[Sequence[Any]],
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
        if min(width, depth, heads) < 1 or width % heads:
            raise ValueError(
                f"Got width={width}, depth={depth} and heads={heads}: expected at least 1 of each, and heads that divide the width."
            )
        self.start = nn.Parameter(torch.zeros(d))
        self.piece, self.bond = nn.Embedding(layout.F + layout.K, d), nn.Embedding(points + 1, d)
        self.place, self.parent = nn.Embedding(slots, d), nn.Embedding(slots, d)
        self.blocks = nn.ModuleList(Block(d, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(d)
        self.here, self.there, self.at = nn.Linear(d, d), nn.Linear(d, d), nn.Embedding(points, d)
        for embedding in (self.piece, self.bond, self.place, self.parent, self.at):
            nn.init.normal_(embedding.weight, std=0.3)
        self.memory = Memory()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FragmentTransformer:
        super()._apply(fn, recurse)
        self.memory = Memory()
        if self.start.device != self.layout.fragment.device:
            self.layout = Layout(self.vocabulary, self.layout.slots, self.hetero_bonds, self.start.device)
        return self

    # Tokens

    def _embed(self, piece: Int[Tensor, "b n"], bond: Int[Tensor, "b n"], first: int = 0) -> Float[Tensor, "b m d"]:
        """Tokens of the slots first, first + 1, …; ``bond`` is −1 for the root, ``piece`` −1 for an empty slot."""
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
        tokens = torch.cat([self.start.expand(len(piece), 1, -1), self._embed(piece, bond)], 1)
        return self._through(tokens, condition, [None] * len(self.blocks))

    def _step(
        self, piece: Int[Tensor, "b n"], bond: Int[Tensor, "b n"], condition: Float[Tensor, "b d"], caches: list[Cache]
    ) -> tuple[Float[Tensor, "b 1 d"], list[Cache]]:
        """The output at the last slot, given the keys and values of the tokens before it."""
        return self._through(self._embed(piece, bond, piece.shape[1] - 1), condition, caches)

    def _through(
        self, x: Float[Tensor, "b m d"], condition: Float[Tensor, "b d"], caches: Sequence[Cache | None]
    ) -> tuple[Float[Tensor, "b m d"], list[Cache]]:
        x, longer = x + condition[:, None], []
        for block, cache in zip(self.blocks, caches, strict=True):
            x, cache = block(x, cache)
            longer.append(cache)
        return self.norm(x), longer

    def _pending(self, now: Float[Tensor, "*b d"], slot: Float[Tensor, "*b d"], at: Int[Tensor, "*b"]) -> Float[Tensor, "*b d"]:
        """Features of a state whose point ``at`` (fragment · S + point), of a fragment with output ``slot``, waits for its piece."""
        return F.gelu(self.here(now) + self.there(slot) + self.at(at))

    def _waiting(self, read: Reading, rows: Int[Tensor, "b"]) -> Float[Tensor, "b d"]:
        """The same for these rows of what was read."""
        S, point = self.layout.S, read.point[rows]
        parent = point // S
        fragment = self.layout.fragment[read.piece[rows, parent]]
        return self._pending(read.now[rows], read.slots[rows, parent], fragment * S + point % S)

    # States

    def _read(self, states: Int[Tensor, "b s"], condition: Float[Tensor, "b d"], alike: bool = True) -> Reading:
        """Read states of any size. ``alike``: the condition is the same in all rows."""
        piece, bond, n = self.layout.tree(states)
        point = self.layout.chosen(bond, n)
        lasting = not (torch.is_grad_enabled() or self.training)
        if lasting and alike and len(n) and bool((n == n[0]).all()):
            h = self._remembered(states, int(n[0]), condition[0])
        else:
            h = self._shared(piece, bond, n, condition, alike)
        now = h.gather(1, n[:, None, None].expand(-1, -1, h.shape[-1]))[:, 0]
        filled = h.shape[1] - 1
        return Reading(piece[:, :filled], bond[:, :filled], n, point, now, h[:, 1:])

    def _shared(
        self,
        piece: Int[Tensor, "b n"],
        bond: Int[Tensor, "b n"],
        n: Int[Tensor, "b"],
        condition: Float[Tensor, "b d"],
        alike: bool,
    ) -> Float[Tensor, "b t d"]:
        """Read the longest trees only: the outputs of a tree that another one begins with are among the outputs of that one."""
        longest = int(n.max()) if len(n) else 0
        piece, bond = piece[:, :longest], bond[:, :longest]
        filled = piece >= 0
        piece, bond = torch.where(filled, piece, -1), torch.where(filled, bond, -1)
        if not alike or not longest:
            return self._hidden(piece, bond, condition)[0]
        numbers = torch.stack([piece, bond], -1) + 2
        leaves, row = _leaves(numbers, n, longest)
        same = (numbers[leaves[row]] == numbers) | ~filled[..., None]
        if not bool(same.all()):  # two trees have one hash: about never
            return self._hidden(piece, bond, condition)[0]
        return self._hidden(piece[leaves], bond[leaves], condition[leaves])[0][row]

    def _remembered(self, states: Int[Tensor, "b s"], n: int, condition: Float[Tensor, "d"]) -> Float[Tensor, "b t d"]:
        """The outputs at states of n fragments each, by one more token than was read for their parents a moment ago."""
        layout, memory = self.layout, self.memory
        weights = sum(parameter._version for parameter in self.parameters())
        if n == 0 or memory.weights != weights or not torch.equal(memory.condition, condition):
            memory = self.memory = Memory(weights, condition)
        memory.keep(n - 1, n)
        written = states.clone()
        written[:, 2 * n :] = 0
        written, rows = distinct(written)
        known = memory.find(n, written)
        new = known < 0
        h = self.start.new_empty(len(written), n + 1, self.width)
        if not bool(new.all()):
            h[~new] = memory.depths[n].h[known[~new]]
        if bool(new.any()):
            h[new] = self._remember(written[new], n, condition)
        if n == layout.slots:  # nothing comes after
            self.memory = Memory()
        return h[rows]

    def _remember(self, trees: Int[Tensor, "u s"], n: int, condition: Float[Tensor, "d"]) -> Float[Tensor, "u t d"]:
        """Read different trees of n fragments, from their parents where these are known, and keep them."""
        piece, bond, _ = self.layout.tree(trees)
        piece, bond, conditions = piece[:, :n], bond[:, :n], condition.expand(len(piece), -1)
        parents = trees.clone()
        parents[:, 2 * n - 2 :] = 0
        parent = self.memory.find(n - 1, parents)
        if n and bool((parent >= 0).all()):
            before = self.memory.depths[n - 1]
            now, caches = self._step(piece, bond, conditions, [(k[parent], v[parent]) for k, v in before.caches])
            h = torch.cat([before.h[parent], now], 1)
        else:
            h, caches = self._hidden(piece, bond, conditions)
        self.memory.add(n, Depth(trees, h, caches))
        return h


def _leaves(numbers: Int[Tensor, "b t 2"], n: Int[Tensor, "b"], longest: int) -> tuple[Int[Tensor, "u"], Int[Tensor, "b"]]:
    """Different trees that no other one begins with, and for each tree which of them begins with it. By hashes, so check it."""
    keys = torch.stack([state_keys(numbers[:, :t].flatten(1)) for t in range(1, longest + 1)], 1)
    keys = torch.cat([torch.zeros_like(keys[:, :1]), keys], 1)
    own = keys.gather(1, n[:, None])[:, 0]
    inner = torch.arange(longest + 1, device=n.device) < n[:, None]
    ends = (~torch.isin(own, keys[inner])).nonzero()[:, 0]
    _, first = torch.unique(own[ends], return_inverse=True)
    leaves = ends.new_empty(int(first.max()) + 1).scatter_(0, first, ends)
    # Where does each tree's own key stand among those of the leaves?
    flat, order = keys[leaves].flatten().sort()
    return leaves, order[torch.searchsorted(flat, own)] // (longest + 1)


class Block(nn.Module):
    """Causal attention and a feed-forward layer, each on top of its own normalisation."""

    def __init__(self, d: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm, self.qkv, self.mix = nn.LayerNorm(d), nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.feed = nn.Sequential(nn.LayerNorm(d), nn.Linear(d, 3 * d), nn.GELU(), nn.Linear(3 * d, d))

    def forward(self, x: Float[Tensor, "b t d"], cache: Cache | None = None) -> tuple[Float[Tensor, "b t d"], Cache]:
        """These tokens, or one more after those in the cache."""
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        if cache is not None:
            k, v = torch.cat([cache[0], k], 2), torch.cat([cache[1], v], 2)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=cache is None)
        x = x + self.mix(attended.transpose(1, 2).flatten(2))
        return x + self.feed(x), (k, v)
