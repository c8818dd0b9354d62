r"""Molecules as trees of fragments: an environment for torchgfn, all of it integer tensors.

A tree is written down in one order, breadth first from its root, each fragment's attachment points in the order of the
vocabulary. The root is the fragment that comes last in the vocabulary. Adding a fragment takes two actions: the attachment point
it goes to, then the fragment with the point it is held by; that is some 300 actions where one for both would be 4,000.
A state is what has been written so far, so it has one parent, the DAG is a tree, :math:`P_B = 1`, and the
probability that a policy gives to a sample is exact: a product along its one path.

**What a policy is a distribution over**: written trees. A tree is written in :math:`w(x)` ways (:meth:`FragmentTrees.writings`),
one for each choice of the root, where the last fragment of the vocabulary occurs more than once, and of names for
attachment points that a symmetry of the fragment exchanges; for most trees w is 1 to 4. With :math:`R(x)^\beta / w(x)` as the reward of
each writing, trees are drawn in proportion to :math:`R(x)^\beta`. A molecule that can be cut into fragments in two ways is two trees.

Notation: ``b`` batch, ``n`` slots of a tree, ``S`` attachment points of a fragment at most, ``g`` symmetries of a fragment at
most, *piece*: a fragment with the attachment point that it is held by, the root with none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from gfn.actions import Actions
from gfn.env import DiscreteEnv
from gfn.states import DiscreteStates
from jaxtyping import Bool, Float, Int
from rdkit import Chem
from torch import Tensor, nn

from sculpt.molecules.chemistry import Vocabulary
from sculpt.particles import Samples

__all__ = ["FragmentTrees", "Layout"]


class Layout:
    """The tables of a vocabulary: pieces, attachment points, what fits where. Environment and network number their actions by it.

    Pieces 0 … F−1 are the fragments as roots, F … F+K−1 the fragments with the point they are held by; of points that a symmetry
    exchanges one stands for all. Actions: F first fragments; then ``F + S · slot + point``; then ``F + J + piece − F``; then stop.
    """

    def __init__(self, vocabulary: Vocabulary, slots: int, hetero_bonds: bool, device: torch.device | str = "cpu"):
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
        polar = torch.zeros(self.F, self.S, dtype=torch.bool)
        for f, flags in enumerate(vocabulary.polar):
            polar[f, : len(flags)] = torch.tensor(flags)
        self.polar = polar.to(device)
        # fits[root, is the point a heteroatom, piece]
        f, i = self.fragment[self.F :], self.own[self.F :]
        fits = (f <= torch.arange(self.F, device=device)[:, None])[:, None].repeat(1, 2, 1)
        if not hetero_bonds:
            fits[:, 1] &= ~self.polar[f, i]
        self.fits, self.fits_any = fits, fits.any(-1)

    def tree(self, states: Int[Tensor, "b s"]) -> tuple[Int[Tensor, "b n"], Int[Tensor, "b n"], Int[Tensor, "b"]]:
        """Piece (−1: none) and attachment point of the parent of each slot, and how many slots are filled."""
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
        # Breadth first, points in order: never before the point that was used last.
        last = bond.gather(1, (n - 1).clamp(min=0)[:, None])
        later = torch.arange(self.J, device=states.device) > last
        polar = self.polar[fragment].flatten(1).long()
        fits = self.fits_any[root[:, None], polar]
        free = (n < self.slots) & (self.chosen(bond, n) < 0)
        return there.flatten(1) & later & fits & free[:, None], polar

    def allowed(self, states: Int[Tensor, "b s"]) -> Bool[Tensor, "b a"]:
        piece, bond, n = self.tree(states)
        open_, polar = self.open(states)
        point, root = self.chosen(bond, n), piece[:, 0].clamp(min=0)
        waits = point >= 0
        first = (n == 0)[:, None].expand(-1, self.F)
        pieces = waits[:, None] & self.fits[root, polar.gather(1, point.clamp(min=0)[:, None])[:, 0]]
        return torch.cat([first, open_, pieces, ((n > 0) & ~waits)[:, None]], dim=-1)


class FragmentTrees(DiscreteEnv):
    """Trees of at most ``slots`` fragments, joined by single bonds between attachment points.

    A state holds two numbers a slot: its piece + 1 (0: empty) and the attachment point of the tree that it is bound to + 1 (0: it is
    the root). An action chooses the first fragment, or an attachment point, or the piece that goes there, or stops. Stopping is
    allowed wherever there is a fragment and no point waits for its piece, so there are no dead ends.

    Args:
        vocabulary: a JSON file, or ``[[smiles, [atom, …]], …]``; by default sculpt's own.
        slots: fragments of a molecule at most.
        hetero_bonds: whether N, O, S and halogens may be joined to each other.
        reward: molecules to rewards, for training through torchgfn, and
        beta: its exponent.
    """

    def __init__(
        self,
        vocabulary: str | Iterable[Sequence] | None = None,
        slots: int = 9,
        hetero_bonds: bool = False,
        reward: Callable[[list[Chem.Mol]], Tensor] | None = None,
        beta: float = 1.0,
        device: torch.device | str = "cpu",
    ):
        if slots < 2:
            raise ValueError(f"Got slots={slots}: a tree of fragments needs at least 2.")
        if vocabulary is None or isinstance(vocabulary, str):
            vocabulary = Vocabulary.read(*([] if vocabulary is None else [vocabulary]))
        self.vocabulary, self.slots, self.hetero_bonds = Vocabulary(vocabulary), slots, hetero_bonds
        self.layout = Layout(self.vocabulary, slots, hetero_bonds, device)
        self.reward_function, self.beta = reward, beta
        self._symmetries = _Symmetries(self.vocabulary, device)
        s0 = torch.zeros(2 * slots, dtype=torch.long, device=device)
        super().__init__(self.layout.n_actions, s0, (2 * slots,), sf=torch.full_like(s0, -1))

    @property
    def arguments(self) -> dict[str, Any]:
        """What builds this environment again."""
        return {"vocabulary": self.vocabulary, "slots": self.slots, "hetero_bonds": self.hetero_bonds}

    def make_states_class(self) -> type[DiscreteStates]:
        """States with the masks of the allowed actions, forward and backward."""
        layout = self.layout

        class States(super().make_states_class()):
            def _compute_forward_masks(self) -> Bool[Tensor, "*b a"]:
                return layout.allowed(self.tensor.flatten(0, -2)).unflatten(0, self.batch_shape)

            def _compute_backward_masks(self) -> Bool[Tensor, "*b p"]:
                states = self.tensor.flatten(0, -2)
                piece, bond, n = layout.tree(states)
                point = layout.chosen(bond, n)
                last = piece.gather(1, (n - 1).clamp(min=0)[:, None])[:, 0]
                action = torch.where(n == 1, last, layout.J + last)
                action = torch.where(point >= 0, layout.F + point, action)
                masks = torch.zeros(len(states), layout.n_actions - 1, dtype=torch.bool, device=states.device)
                return masks.scatter_(1, action.clamp(min=0)[:, None], (n > 0)[:, None]).unflatten(0, self.batch_shape)

        return States

    def step(self, states: DiscreteStates, actions: Actions) -> DiscreteStates:
        """The trees after these actions."""
        layout, s, a = self.layout, states.tensor.clone(), actions.tensor[:, 0]
        n, rows = layout.tree(s)[2], torch.arange(len(s), device=s.device)
        chooses_point = (a >= layout.F) & (a < layout.F + layout.J)
        value = torch.where(chooses_point, a - layout.F, torch.where(a < layout.F, a, a - layout.J))
        s[rows, 2 * n + chooses_point] = value + 1
        return self.States(s)

    def backward_step(self, states: DiscreteStates, actions: Actions) -> DiscreteStates:
        """The trees before these actions."""
        s = states.tensor.clone()
        _, bond, n = self.layout.tree(s)
        waits = self.layout.chosen(bond, n) >= 0
        s[torch.arange(len(s), device=s.device), torch.where(waits, 2 * n + 1, 2 * n - 2)] = 0
        return self.States(s)

    def log_reward(self, final_states: DiscreteStates) -> Float[Tensor, "b"]:
        r""":math:`\beta \log R(x) - \log w(x)`"""
        if self.reward_function is None:
            raise ValueError(
                "This environment has no reward. Give it one to train: FragmentTrees(reward=sculpt.molecules.SA(), beta=32)."
            )
        R = self.reward_function(self.molecules(final_states.tensor)).to(self.device)
        return self.beta * R.log() - self.writings(final_states.tensor).log()

    def reward(self, final_states: DiscreteStates) -> Float[Tensor, "b"]:
        """exp of :meth:`log_reward`"""
        return self.log_reward(final_states).exp()

    def classifier_network(self) -> nn.Module:
        """The default backbone of a classifier of these states."""
        from sculpt.molecules.network import FragmentFeatures

        return FragmentFeatures(self.vocabulary, self.slots, self.hetero_bonds)

    # Molecules

    def molecules(self, x: Int[Tensor, "b s"]) -> list[Chem.Mol]:
        """The molecules of these states; of the start there is none."""
        piece, bond, n = self.layout.tree(x)
        fragment, own = self.layout.fragment[piece].tolist(), self.layout.own[piece].tolist()
        S = self.layout.S
        out = []
        for f, o, j, k in zip(fragment, own, bond.tolist(), n.tolist(), strict=True):
            if k == 0:
                raise ValueError(
                    "The initial state is no molecule: it has no fragment yet. Pass states that a policy stopped in."
                )
            out.append(self.vocabulary.assemble(f[:k], [(*divmod(j[c], S), c, o[c]) for c in range(1, k)]))
        return out

    def decode(self, x: Int[Tensor, "b s"]) -> list[str]:
        """Canonical SMILES."""
        return [Chem.MolToSmiles(molecule) for molecule in self.molecules(x)]

    @property
    def samples_class(self) -> type[Samples]:
        """What samples of models on this environment can do: SMILES, scores, tables, files and pictures."""
        from sculpt.molecules.results import Molecules

        return Molecules

    # Trees

    def writings(self, x: Int[Tensor, "b s"]) -> Float[Tensor, "b"]:
        """In how many ways each tree can be written down."""
        return self._symmetries(self.layout, x)[0]

    def trees(self, x: Int[Tensor, "b s"]) -> Int[Tensor, "b"]:
        """A hash of each tree, the same for all its writings."""
        return self._symmetries(self.layout, x)[1]


class _Symmetries:
    r"""Counting the writings of a tree.

    Write G for the symmetries of a fragment, :math:`G_i` for those that keep point i. A rooted tree has :math:`|G|` namings of the root's
    points and :math:`|G_i|` of each other's, held by i. Two of them are one writing where a symmetry of the whole tree maps one to the
    other. That group acts freely, so with V the fragments that may be the root

    .. math:: w = \frac{\sum_{r \in V} |G^r| \prod_{v \neq r} |G^v_{i(v, r)}|}{|\mathrm{Aut}|}, \qquad |\mathrm{Aut}| = |\text{orbit of the root}| \prod_v c_v

    where :math:`c_v` counts the symmetries of v that keep its holder and exchange equal subtrees only. Subtrees are compared by 64-bit hashes.
    """

    def __init__(self, vocabulary: Vocabulary, device: torch.device | str):
        S, g = max(len(sites) for _, sites in vocabulary), max(len(s) for s in vocabulary.symmetries)
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

    def __call__(self, layout: Layout, x: Int[Tensor, "b s"]) -> tuple[Float[Tensor, "b"], Int[Tensor, "b"]]:
        piece, bond, n = layout.tree(x)
        rows, filled = torch.arange(len(x), device=x.device), piece >= 0
        f, own = layout.fragment[piece.clamp(min=0)], layout.own[piece.clamp(min=0)].clamp(min=0)
        parent, point = bond.clamp(min=0) // layout.S, bond.clamp(min=0) % layout.S
        # What hangs at each point: 0 nothing, a hash of the subtree, or a mark for the way to the root.
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


def _mix(x: Tensor) -> Tensor:
    """Spread the bits of a 64-bit hash."""
    for shift, factor in ((33, -49064778989728563), (29, -4265267296055464877)):
        x = (x ^ (x >> shift)) * factor
    return x ^ (x >> 32)
