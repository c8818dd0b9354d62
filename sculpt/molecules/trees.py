r"""Molecules as trees of fragments: an environment for torchgfn, all of it integer tensors.

A tree is written in one order: breadth first from its root, the attachment points of each fragment in the order of the vocabulary. The
root is the fragment that comes last in the vocabulary. It takes two actions to add a fragment: the attachment point that it goes to, then
the fragment with the point that holds it. That makes some 300 actions, where one action for both would make 4,000. A state is what has
been written so far. It has one parent, so the DAG is a tree, :math:`P_B = 1`, and the probability that a policy gives to a sample is
exact: a product along its one path.

**Policies are distributions over written trees.** A tree is written in :math:`w(x)` ways (:meth:`FragmentTrees.writings`): one for each
choice of the root, where the last fragment of the vocabulary occurs more than once, and for each way to name attachment points that a
symmetry of the fragment exchanges. For most trees w is 1 to 4. With :math:`R(x)^\beta / w(x)` as the reward of each writing, trees are
drawn in proportion to :math:`R(x)^\beta`. A molecule that can be cut into fragments in two ways is two trees.
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
from sculpt.molecules.layout import Layout
from sculpt.molecules.network import FragmentFeatures
from sculpt.molecules.symmetries import Symmetries
from sculpt.samples import Samples

__all__ = ["FragmentTrees"]


class FragmentTrees(DiscreteEnv):
    """Trees of at most ``slots`` fragments, joined by single bonds between attachment points.

    :class:`~sculpt.molecules.layout.Layout` says how states are written. An action chooses the first fragment, or an attachment point, or
    the piece that goes there, or stops. Stopping is allowed wherever there is a fragment and no point waits for its piece, so there are
    no dead ends.

    Args:
        vocabulary: a JSON file, or ``[[smiles, [atom, …]], …]``; by default sculpt's own.
        slots: fragments of a molecule at most.
        hetero_bonds: whether N, O, S and halogens may be joined to each other.
        reward: a function from molecules to rewards, to train through torchgfn.
        beta: the exponent of the reward.
        device: where states live.

    Example:
        >>> env = sculpt.molecules.FragmentTrees([["c1ccccc1", [0, 3]], ["CO", [0]]], slots=3)
        >>> model = sculpt.exact.solve(env, lambda x: torch.zeros(len(x)), name="any tree")
        >>> len(model.sample(5, generator=seed).smiles)
        5
    """

    known_as = "sculpt.molecules.fragments:FragmentTrees"
    """The name in checkpoints, which the keys of models hash: where this class was when the first of them were made."""

    def __init__(
        self,
        vocabulary: str | Iterable[Sequence[Any]] | None = None,
        slots: int = 9,
        hetero_bonds: bool = False,
        reward: Callable[[list[Chem.Mol]], Tensor] | None = None,
        beta: float = 1.0,
        device: torch.device | str = "cpu",
    ):
        if vocabulary is None or isinstance(vocabulary, str):
            vocabulary = Vocabulary.read(*([] if vocabulary is None else [vocabulary]))
        self.vocabulary, self.slots, self.hetero_bonds = Vocabulary(vocabulary), slots, hetero_bonds
        self.layout = Layout(self.vocabulary, slots, hetero_bonds, device)
        self.reward_function, self.beta = reward, beta
        self._symmetries = Symmetries(self.vocabulary, self.layout, device)
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
                masks = torch.zeros(len(states), layout.n_actions - 1, dtype=torch.bool, device=states.device)
                begun = (states[:, 0] > 0)[:, None]
                action = layout.last_action(states).clamp(min=0)[:, None]
                return masks.scatter_(1, action, begun).unflatten(0, self.batch_shape)

        return States

    def step(self, states: DiscreteStates, actions: Actions) -> DiscreteStates:
        """The trees after these actions."""
        return self.States(self.layout.after(states.tensor, actions.tensor[:, 0]))

    def backward_step(self, states: DiscreteStates, actions: Actions) -> DiscreteStates:
        """The trees before these actions."""
        return self.States(self.layout.before(states.tensor))

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

    # What sculpt asks of an environment

    def classifier_network(self) -> nn.Module:
        """The default backbone of a classifier of these states."""
        return FragmentFeatures(self.vocabulary, self.slots, self.hetero_bonds)

    def decode(self, x: Int[Tensor, "b s"]) -> list[str]:
        """Canonical SMILES."""
        return [Chem.MolToSmiles(molecule) for molecule in self.molecules(x)]

    @property
    def samples_class(self) -> type[Samples]:
        """What samples of models on this environment can do: SMILES, scores, tables, files and pictures."""
        from sculpt.molecules.results import Molecules  # training needs no pictures and no tables

        return Molecules

    # Molecules and trees

    def molecules(self, x: Int[Tensor, "b s"]) -> list[Chem.Mol]:
        """The molecules of these states, each of which needs at least one fragment."""
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

    def writings(self, x: Int[Tensor, "b s"]) -> Float[Tensor, "b"]:
        """In how many ways each tree can be written."""
        return self._symmetries.writings_and_hashes(x)[0]

    def trees(self, x: Int[Tensor, "b s"]) -> Int[Tensor, "b"]:
        """A hash of each tree, the same for all its writings."""
        return self._symmetries.writings_and_hashes(x)[1]
