"""How a tree of fragments is written as integers, and which action has which number.

A state has two numbers a slot: its piece + 1 (0: the slot is empty), and the attachment point of the tree that holds it + 1 (0: it is
the root). Environment and networks read states and number actions by the same :class:`Layout`.

Notation: ``b`` batch, ``n`` slots of a tree, ``S`` attachment points of a fragment at most, ``j`` attachment points of a tree, ``a``
actions. A *piece* is a fragment together with the attachment point that holds it; the piece of a root has no such point.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from sculpt.molecules.chemistry import Vocabulary

__all__ = ["Layout"]

MOST_SLOTS = 256


class Layout:
    """Tables of a vocabulary: its pieces, their attachment points, and which piece fits where.

    Pieces 0 … F−1 are the fragments as roots, pieces F … F+K−1 the fragments with the point that holds them. Where a symmetry exchanges
    points, one of them stands for all. Actions are numbered: F first fragments; then ``F + S · slot + point``; then ``F + J + piece − F``;
    then the stop.

    Args:
        vocabulary: the fragments.
        slots: fragments of a tree at most.
        hetero_bonds: whether N, O, S and halogens may be joined to each other.
        device: where the tables live.
    """

    def __init__(self, vocabulary: Vocabulary, slots: int, hetero_bonds: bool, device: torch.device | str = "cpu"):
        if not 2 <= slots <= MOST_SLOTS:
            raise ValueError(f"Got slots={slots}: a tree of fragments has at least 2, and at most {MOST_SLOTS}.")
        self.F, self.S, self.slots = len(vocabulary), max(len(sites) for _, sites in vocabulary), slots
        held = [
            (f, i)
            for f, symmetries in enumerate(vocabulary.symmetries)
            for i in range(len(vocabulary[f][1]))
            if i == min(s[i] for s in symmetries)
        ]
        self.K, self.J = len(held), self.S * (slots - 1)
        self.n_actions = self.F + self.J + self.K + 1
        self.fragment = torch.tensor([*range(self.F), *(f for f, _ in held)], device=device)
        self.own = torch.tensor([-1] * self.F + [i for _, i in held], device=device)
        self.points = torch.tensor([len(sites) for _, sites in vocabulary], device=device)
        polar = [[*flags, *[False] * (self.S - len(flags))] for flags in vocabulary.polar]
        self.polar = torch.tensor(polar, dtype=torch.bool, device=device)
        # fits[root, is the point a heteroatom, piece]
        f, i = self.fragment[self.F :], self.own[self.F :]
        fits = (f <= torch.arange(self.F, device=device)[:, None])[:, None].repeat(1, 2, 1)
        if not hetero_bonds:
            fits[:, 1] &= ~self.polar[f, i]
        self.fits, self.fits_any = fits, fits.any(-1)

    def tree(self, states: Int[Tensor, "b s"]) -> tuple[Int[Tensor, "b n"], Int[Tensor, "b n"], Int[Tensor, "b"]]:
        """The piece of each slot (−1: none), the attachment point of the tree that holds it (−1: none), and how many slots are filled."""
        piece, bond = (states.unflatten(-1, (self.slots, 2)) - 1).unbind(-1)
        return piece, bond, (piece >= 0).sum(-1)

    def chosen(self, bond: Int[Tensor, "b n"], n: Int[Tensor, "b"]) -> Int[Tensor, "b"]:
        """The attachment point that waits for its piece; −1 where none does."""
        point = bond.gather(1, n.clamp(max=self.slots - 1)[:, None])[:, 0]
        return torch.where((n > 0) & (n < self.slots), point, -1)

    def open(self, states: Int[Tensor, "b s"]) -> tuple[Bool[Tensor, "b j"], Int[Tensor, "b j"]]:
        """At which attachment points the next fragment may go, and whether each is a heteroatom."""
        piece, bond, n = self.tree(states)
        used, root = piece[:, :-1].clamp(min=0), piece[:, 0].clamp(min=0)
        fragment, point = self.fragment[used], torch.arange(self.S, device=states.device)
        there = (piece[:, :-1, None] >= 0) & (point < self.points[fragment][..., None]) & (point != self.own[used][..., None])
        # A tree is written breadth first with its points in order, so the next point comes after the one that was used last.
        last = bond.gather(1, (n - 1).clamp(min=0)[:, None])
        later = torch.arange(self.J, device=states.device) > last
        polar = self.polar[fragment].flatten(1).long()
        fits = self.fits_any[root[:, None], polar]
        free = (n < self.slots) & (self.chosen(bond, n) < 0)
        return there.flatten(1) & later & fits & free[:, None], polar

    def allowed(self, states: Int[Tensor, "b s"]) -> Bool[Tensor, "b a"]:
        """Which actions each state allows."""
        piece, bond, n = self.tree(states)
        open_, polar = self.open(states)
        point, root = self.chosen(bond, n), piece[:, 0].clamp(min=0)
        waits = point >= 0
        first = (n == 0)[:, None].expand(-1, self.F)
        pieces = waits[:, None] & self.fits[root, polar.gather(1, point.clamp(min=0)[:, None])[:, 0]]
        return torch.cat([first, open_, pieces, ((n > 0) & ~waits)[:, None]], dim=-1)

    def last_action(self, states: Int[Tensor, "b s"]) -> Int[Tensor, "b"]:
        """The action that led to each state; a start, which no action led to, gets a number that means nothing."""
        piece, bond, n = self.tree(states)
        point = self.chosen(bond, n)
        last = piece.gather(1, (n - 1).clamp(min=0)[:, None])[:, 0]
        action = torch.where(n == 1, last, self.J + last)
        return torch.where(point >= 0, self.F + point, action)

    def after(self, states: Int[Tensor, "b s"], actions: Int[Tensor, "b"]) -> Int[Tensor, "b s"]:
        """The states that these actions, none of them the stop, lead to."""
        s, n, rows = states.clone(), self.tree(states)[2], torch.arange(len(states), device=states.device)
        chooses_point = (actions >= self.F) & (actions < self.F + self.J)
        value = torch.where(chooses_point, actions - self.F, torch.where(actions < self.F, actions, actions - self.J))
        s[rows, 2 * n + chooses_point] = value + 1
        return s

    def before(self, states: Int[Tensor, "b s"]) -> Int[Tensor, "b s"]:
        """The one parent of each state."""
        s = states.clone()
        _, bond, n = self.tree(s)
        waits = self.chosen(bond, n) >= 0
        s[torch.arange(len(s), device=s.device), torch.where(waits, 2 * n + 1, 2 * n - 2)] = 0
        return s
