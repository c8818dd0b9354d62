"""What a transformer keeps of the trees that it read a moment ago, so that a step of sampling costs one token.

Notation: ``b`` batch, ``u`` different trees, ``s`` numbers of a state, ``t`` tokens, ``d`` width.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sculpt.actions.states import state_keys

__all__ = ["Cache", "Depth", "Memory"]

MOST = 2**28
"""Numbers that are kept at most: one gigabyte."""

Cache = tuple[Tensor, Tensor]
"""Keys and values of a block, ``(b, heads, t, e)``."""


@dataclass
class Depth:
    """Different trees of one size, the transformer's outputs for them, and their places in the order of their hashes."""

    trees: Int[Tensor, "u s"]
    h: Float[Tensor, "u t d"]
    caches: list[Cache]

    def __post_init__(self) -> None:
        self.keys, self.order = state_keys(self.trees).sort()

    def numel(self) -> int:
        """How many numbers are kept."""
        return self.h.numel() * (1 + 2 * len(self.caches))


@dataclass
class Memory:
    """The trees of the last two sizes, under one condition and one set of weights."""

    weights: int = -1
    condition: Tensor = field(default_factory=lambda: torch.zeros(0))
    depths: dict[int, Depth] = field(default_factory=dict)

    def find(self, n: int, trees: Int[Tensor, "b s"]) -> Int[Tensor, "b"]:
        """The row of each tree of n fragments; −1 where it is not known."""
        if n not in self.depths:
            return torch.full((len(trees),), -1, device=trees.device)
        depth = self.depths[n]
        place = torch.searchsorted(depth.keys, state_keys(trees)).clamp(max=len(depth.keys) - 1)
        row = depth.order[place]
        return torch.where((depth.trees[row] == trees).all(-1), row, -1)

    def add(self, n: int, new: Depth) -> None:
        """Keep these trees of n fragments if there is room; the transformer reads again what is not kept."""
        if sum(depth.numel() for depth in (*self.depths.values(), new)) > MOST:
            return
        if (old := self.depths.get(n)) is not None:
            pairs = zip(old.caches, new.caches, strict=True)
            caches = [(torch.cat([a[0], b[0]]), torch.cat([a[1], b[1]])) for a, b in pairs]
            new = Depth(torch.cat([old.trees, new.trees]), torch.cat([old.h, new.h]), caches)
        self.depths[n] = new

    def keep(self, *sizes: int) -> None:
        """Forget the trees of all other sizes."""
        self.depths = {n: self.depths[n] for n in sizes if n in self.depths}
