r"""The sEH proxy of Bengio et al. (2021): a network that predicts binding to soluble epoxide hydrolase from the graph of a molecule.

Notation: ``n`` molecules, ``a`` atoms of all molecules, ``e`` directed bonds, ``d`` width, :math:`h_i` features of atom i,
:math:`\Theta(e)` the d × d matrix of a bond e, :math:`\varphi` a LeakyReLU, q and r the query and the read-out of Set2Set.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from rdkit import Chem
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["Proxy", "graph"]


class Proxy(nn.Module):
    r"""Twelve rounds of messages along the bonds with the same weights, then three of Set2Set.

    .. math::
        m_i = \varphi\Bigl(\operatorname{mean}_{j \to i} h_j \Theta(e_{ji}) + R h_i + b\Bigr), \qquad h_i \leftarrow \mathrm{GRU}(m_i, h_i)

    A bond is single, double, triple, aromatic or nothing, so there are five :math:`\Theta`, which are computed once. Gradients reach
    the weights.

    Args:
        weights: the arrays of the published file, or of a narrower network of the same form.
        root: ``"published"`` applies R transposed, as every published GFlowNet result does, ``"trained"`` as it was trained.
        rounds: of messages.
    """

    def __init__(self, weights: dict[str, Tensor], root: str = "published", rounds: int = 12):
        super().__init__()
        for name, value in weights.items():
            self.register_buffer(name.replace(".", "_"), value)
        w, self.rounds, self.width = self._buffers, rounds, len(weights["conv.bias"])
        bonds = torch.cat([torch.eye(4), torch.zeros(1, 4)])
        hidden = F.leaky_relu(F.linear(bonds, w["edge_net_0_weight"], w["edge_net_0_bias"]))
        theta = F.linear(hidden, w["edge_net_1_weight"], w["edge_net_1_bias"])
        self.register_buffer("theta", theta.view(5, self.width, self.width))
        self.register_buffer("R", w["conv_root"].T.contiguous() if root == "published" else w["conv_root"])

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.theta.device

    def forward(
        self,
        x: Float[Tensor, "a 71"],
        source: Int[Tensor, "e"],
        target: Int[Tensor, "e"],
        bond: Int[Tensor, "e"],
        owner: Int[Tensor, "a"],
    ) -> Float[Tensor, "n"]:
        """The raw output for each molecule of a graph, as :func:`graph` gives it."""
        *_, h = self.states(x, source, target, bond)
        return self.read(h, owner)

    def states(
        self, x: Float[Tensor, "a 71"], source: Int[Tensor, "e"], target: Int[Tensor, "e"], bond: Int[Tensor, "e"]
    ) -> Iterator[Float[Tensor, "a d"]]:
        """h after each round."""
        w = self._buffers
        # An atom sends the same along all its bonds of one kind. So there is one product for each pair of atom and kind, kind by kind.
        pairs, message = torch.unique(bond * len(x) + source, return_inverse=True)
        sender, sizes = pairs % len(x), torch.bincount(pairs // len(x), minlength=5).tolist()
        degree = torch.bincount(target, minlength=len(x)).clamp(min=1)[:, None].to(x.dtype)
        h = F.leaky_relu(F.linear(x, w["atom_in_weight"], w["atom_in_bias"]))
        for _ in range(self.rounds):
            messages = torch.cat(
                [part @ theta for part, theta in zip(h.index_select(0, sender).split(sizes), self.theta, strict=True)]
            )
            mean = torch.zeros_like(h).index_add(0, target, messages.index_select(0, message)) / degree
            m = F.leaky_relu(mean + torch.addmm(w["conv_bias"], h, self.R))
            h = torch.gru_cell(m, h, w["gru_weight_ih"], w["gru_weight_hh"], w["gru_bias_ih"], w["gru_bias_hh"])
            yield h

    def read(self, h: Float[Tensor, "a d"], owner: Int[Tensor, "a"]) -> Float[Tensor, "n"]:
        """Set2Set over the atoms of each molecule."""
        w, n, d = self._buffers, int(owner[-1]) + 1, self.width
        q_star, q, c = h.new_zeros(n, 2 * d), h.new_zeros(n, d), h.new_zeros(n, d)
        for _ in range(3):
            q, c = torch.lstm_cell(
                q_star, (q, c), w["readout_weight_ih"], w["readout_weight_hh"], w["readout_bias_ih"], w["readout_bias_hh"]
            )
            e = (h * q[owner]).sum(-1)
            highest = h.new_full((n,), -math.inf).scatter_reduce(0, owner, e.detach(), "amax")
            e = (e - highest[owner]).exp()
            a = e / h.new_zeros(n).index_add(0, owner, e)[owner]
            r = torch.zeros_like(q).index_add(0, owner, a[:, None] * h)
            q_star = torch.cat([q, r], dim=-1)
        return F.linear(q_star, w["out_weight"], w["out_bias"])[:, 0]


_ELEMENT = {1: 0, 6: 1, 7: 2, 8: 3, 9: 4}
_ORBITALS = {Chem.HybridizationType.SP: 10, Chem.HybridizationType.SP2: 11, Chem.HybridizationType.SP3: 12}
_BOND = {
    Chem.BondType.UNSPECIFIED: 0,
    Chem.BondType.SINGLE: 0,
    Chem.BondType.DOUBLE: 1,
    Chem.BondType.TRIPLE: 2,
    Chem.BondType.AROMATIC: 3,
}


def graph(molecules: list[Chem.Mol]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """All molecules as one graph: features of atoms; source, target and kind of the directed bonds; the molecule of each atom."""
    kinds: dict[tuple[Any, ...], int] = {}  # many atoms are of few kinds
    atoms, sizes, source, target, bonds = [], [], [], [], []
    for molecule in molecules:
        first, n = len(atoms), molecule.GetNumAtoms()
        # By index: RDKit's iterators take twice as long.
        for atom in map(molecule.GetAtomWithIdx, range(n)):
            kind = (atom.GetAtomicNum(), atom.GetIsAromatic(), atom.GetHybridization(), atom.GetTotalNumHs(True))
            if kind not in kinds:
                if not 0 < kind[0] <= 56:
                    raise ValueError(f"the sEH proxy knows the elements up to barium (56), got {atom.GetSymbol()} ({kind[0]})")
                kinds[kind] = len(kinds)
            atoms.append(kinds[kind])
        sizes.append(n)
        for bond in map(molecule.GetBondWithIdx, range(molecule.GetNumBonds())):
            if (kind := _BOND.get(bond.GetBondType())) is None:
                raise ValueError(f"the sEH proxy knows single, double, triple and aromatic bonds, got {bond.GetBondType()}")
            p, q = first + bond.GetBeginAtomIdx(), first + bond.GetEndAtomIdx()
            source += (p, q)
            target += (q, p)
            bonds += (kind, kind)
        if not molecule.GetNumBonds():  # the published features have one empty bond here, from the first atom to itself
            source.append(first)
            target.append(first)
            bonds.append(4)
    x = torch.stack([_features(*kind) for kind in kinds])[torch.tensor(atoms)]
    owner = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    return x, *(torch.tensor(column) for column in (source, target, bonds)), owner


def _features(Z: int, aromatic: bool, orbitals: Chem.HybridizationType, hydrogens: int) -> Float[Tensor, "71"]:
    x = torch.zeros(71)
    x[[_ELEMENT.get(Z, 5), 13 + Z]] = 1.0
    x[9], x[13] = aromatic, hydrogens
    if orbitals in _ORBITALS:
        x[_ORBITALS[orbitals]] = 1.0
    return x
