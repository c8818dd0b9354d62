r"""How many ways there are to write a tree down, and which writings are one tree.

Write G for the symmetries of a fragment, :math:`G_i` for those that keep point i. A rooted tree has :math:`|G|` namings of the root's
points, and :math:`|G_i|` of the points of every other fragment, where i holds it. Two of them are one writing where a symmetry of the
whole tree maps one to the other. That group acts freely, so with V the fragments that may be the root

.. math:: w = \frac{\sum_{r \in V} |G^r| \prod_{v \neq r} |G^v_{i(v, r)}|}{|\mathrm{Aut}|}, \qquad |\mathrm{Aut}| = |\text{orbit of the root}| \prod_v c_v

where :math:`c_v` counts the symmetries of v that keep its holder and exchange equal subtrees only. Subtrees are compared by 64-bit hashes.

Notation: ``b`` batch, ``n`` slots of a tree, ``S`` attachment points of a fragment at most, ``g`` symmetries of a fragment at most.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sculpt.molecules.chemistry import Vocabulary
from sculpt.molecules.layout import Layout

__all__ = ["Symmetries"]


class Symmetries:
    """Tables of the symmetries of a vocabulary's fragments, and what they mean for trees.

    Args:
        vocabulary: the fragments.
        layout: how the states of their trees are written.
        device: where the tables live.
    """

    def __init__(self, vocabulary: Vocabulary, layout: Layout, device: torch.device | str = "cpu"):
        self.layout = layout
        S, g = layout.S, max(len(s) for s in vocabulary.symmetries)
        image = torch.arange(S).repeat(len(vocabulary), g, 1)
        self.order = torch.tensor([len(s) for s in vocabulary.symmetries], dtype=torch.float64, device=device)
        keeps = torch.ones(len(vocabulary), S, dtype=torch.float64)
        for f, symmetries in enumerate(vocabulary.symmetries):
            table = torch.tensor(symmetries)
            image[f, : len(table), : table.shape[1]] = table
            keeps[f, : table.shape[1]] = (table == torch.arange(table.shape[1])).sum(0).double()
        self.image, self.keeps = image.to(device), keeps.to(device)
        self.real = torch.arange(g, device=device) < self.order[:, None]
        generator = torch.Generator().manual_seed(0)
        factors = torch.randint(-(2**62), 2**62, (S + 2,), generator=generator) * 2 + 1
        self.factors = factors.to(device)

    def writings_and_hashes(self, x: Int[Tensor, "b s"]) -> tuple[Float[Tensor, "b"], Int[Tensor, "b"]]:
        """In how many ways each tree can be written, and a hash of the tree that is the same for all of them."""
        layout = self.layout
        piece, bond, n = layout.tree(x)
        rows, filled = torch.arange(len(x), device=x.device), piece >= 0
        f, own = layout.fragment[piece.clamp(min=0)], layout.own[piece.clamp(min=0)].clamp(min=0)
        parent, point = bond.clamp(min=0) // layout.S, bond.clamp(min=0) % layout.S
        # What hangs at each point: 0 for nothing, a hash of the subtree, or a mark for the way to the root.
        mark = self.factors[-1]
        hangs = torch.zeros(*piece.shape, layout.S, dtype=torch.long, device=x.device)
        hangs[:, 1:].scatter_(-1, own[:, 1:, None], mark.expand(len(x), layout.slots - 1, 1))
        for c in range(layout.slots - 1, 0, -1):
            here = filled[:, c]
            hangs[rows[here], parent[here, c], point[here, c]] = self._hash(f[here, c], hangs[here, c])
        keeping = torch.where(filled, self._keeping(f, hangs), 1.0)
        # The same seen from every fragment as the root, and the ways to name the points.
        whole = torch.zeros_like(piece)
        whole[:, 0] = self._hash(f[:, 0], hangs[:, 0])
        names = torch.ones(piece.shape, dtype=torch.float64, device=x.device)
        held = torch.where(filled, self.keeps[f, own], 1.0)
        names[:, 0] = self.order[f[:, 0]] * held[:, 1:].prod(-1)
        for c in range(1, layout.slots):
            here = filled[:, c]
            r, p, i, o = rows[here], parent[here, c], point[here, c], own[here, c]
            above = hangs[r, p].scatter(-1, i[:, None], mark.expand(len(r), 1))
            hangs[r, c, o] = self._hash(f[r, p], above)
            whole[here, c] = self._hash(f[here, c], hangs[here, c])
            turn = self.order[f[here, c]] / self.keeps[f[here, c], o] * self.keeps[f[r, p], i] / self.order[f[r, p]]
            names[here, c] = names[r, p] * turn
        root = filled & (f == f[:, :1])
        orbit = (root & (whole == whole[:, :1])).sum(-1)
        w = torch.where(root, names, 0.0).sum(-1) / (keeping.prod(-1) * orbit)
        return w, torch.where(filled, whole, torch.iinfo(torch.long).min).amax(-1)

    def _hash(self, f: Int[Tensor, "*b"], hangs: Int[Tensor, "*b S"]) -> Int[Tensor, "*b"]:
        """Of a fragment and what hangs at its points, up to its symmetries."""
        S = hangs.shape[-1]
        seen = hangs[..., None, :].expand(*f.shape, self.image.shape[1], S).gather(-1, self.image[f])
        code = _mix((seen * self.factors[:S]).sum(-1)).amin(-1)  # the images that pad the table are the identity
        return _mix(code + (f + 1) * self.factors[S])

    def _keeping(self, f: Int[Tensor, "b n"], hangs: Int[Tensor, "b n S"]) -> Float[Tensor, "b n"]:
        """How many symmetries leave what hangs where it is."""
        seen = hangs[..., None, :].expand(*f.shape, self.image.shape[1], hangs.shape[-1]).gather(-1, self.image[f])
        return ((seen == hangs[..., None, :]).all(-1) & self.real[f]).sum(-1).double()


def _mix(x: Tensor) -> Tensor:
    """Spread the bits of a 64-bit hash."""
    for shift, factor in ((33, -49064778989728563), (29, -4265267296055464877)):
        x = (x ^ (x >> shift)) * factor
    return x ^ (x >> 32)
