"""What a molecule is worth: ease of synthesis and drug-likeness. Predicted binding is :class:`sculpt.molecules.seh.SEH`."""

from __future__ import annotations

import abc
import importlib.util
import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import torch
from jaxtyping import Float
from rdkit import Chem, RDConfig, rdBase
from rdkit.Chem.QED import qed
from torch import Tensor

__all__ = ["QED", "SA", "MoleculesLike", "Reward"]

MoleculesLike = Sequence[str | Chem.Mol | None]
"""SMILES or RDKit molecules."""


class Reward(abc.ABC):
    """SMILES or RDKit molecules to rewards in [0, about 1].

    An entry that is no molecule gets NaN and a warning; ``invalid`` counts them in the last call.
    """

    invalid: int = 0

    def __call__(self, molecules: MoleculesLike) -> Float[Tensor, "n"]:
        return self._each(molecules, self.of)

    @abc.abstractmethod
    def of(self, molecules: list[Chem.Mol]) -> Float[Tensor, "n"]:
        """The rewards of valid molecules."""

    def _each(self, molecules: MoleculesLike, function: Callable[[list[Chem.Mol]], Tensor]) -> Float[Tensor, "n"]:
        if isinstance(molecules, str | Chem.Mol):
            raise TypeError(
                f"{type(self).__name__} takes a list of molecules, got one {type(molecules).__name__}. Put it in brackets."
            )
        with rdBase.BlockLogs():
            parsed = [Chem.MolFromSmiles(x) if isinstance(x, str) else x for x in molecules]
        valid = [i for i, molecule in enumerate(parsed) if isinstance(molecule, Chem.Mol) and molecule.GetNumAtoms()]
        for i in valid:
            if parsed[i].NeedsUpdatePropertyCache():
                raise ValueError(f"Molecule {i} was not sanitised. Call Chem.SanitizeMol on it, or pass its SMILES.")
        self.invalid = len(parsed) - len(valid)
        if self.invalid:
            i = min(set(range(len(parsed))) - set(valid))
            warnings.warn(
                f"{self.invalid} of {len(parsed)} are no molecules and get NaN, number {i} first: {molecules[i]!r}",
                stacklevel=3,
            )
        out = torch.full((len(parsed),), math.nan)
        if valid:
            out[valid] = function([parsed[i] for i in valid])
        return out


class SA(Reward):
    """Ease of synthesis: (10 − SA score) / 9, with RDKit's own scorer."""

    def __init__(self) -> None:
        self.scorer = _contributed("SA_Score", "sascorer")

    def score(self, molecules: MoleculesLike) -> Float[Tensor, "n"]:
        """The SA score itself: 1 is easy, 10 is hard."""
        return self._each(molecules, lambda valid: torch.tensor([self.scorer.calculateScore(x) for x in valid]))

    def of(self, molecules: list[Chem.Mol]) -> Float[Tensor, "n"]:
        return torch.tensor([(10 - self.scorer.calculateScore(x)) / 9 for x in molecules])


class QED(Reward):
    """The quantitative estimate of drug-likeness, as RDKit computes it."""

    def of(self, molecules: list[Chem.Mol]) -> Float[Tensor, "n"]:
        return torch.tensor([qed(x) for x in molecules])


def _contributed(folder: str, module: str) -> ModuleType:
    """A script that RDKit ships beside its package."""
    path = Path(RDConfig.RDContribDir) / folder / f"{module}.py"
    if not path.is_file():
        raise ValueError(f"This RDKit has no Contrib/{folder} ({path}). Install the wheel from PyPI: pip install rdkit.")
    spec = importlib.util.spec_from_file_location(module, path)
    assert spec is not None and spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found
