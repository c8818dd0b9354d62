"""What a molecule is worth: ease of synthesis and drug-likeness. Predicted binding is :class:`sculpt.molecules.seh.SEH`."""

from __future__ import annotations

import abc
import importlib.util
import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from jaxtyping import Float
from rdkit import Chem, RDConfig, rdBase
from rdkit.Chem.QED import qed
from torch import Tensor

__all__ = ["QED", "SA", "MoleculesLike", "Odd", "Reward", "parse"]

MoleculesLike = Sequence[str | Chem.Mol | None]
"""SMILES or RDKit molecules."""
Odd = dict[int, str]
"""For each molecule that has no reward, by its number, why."""
Function = Callable[[list[Chem.Mol]], Tensor]


class Reward(abc.ABC):
    """SMILES or RDKit molecules to rewards in [0, about 1].

    What has no reward, because it is no molecule or the reward was not made for its kind, gets NaN, and one warning names it. With
    ``strict`` it is an error that names it. ``invalid`` counts them in the last call.
    """

    strict: bool = False
    invalid: int = 0

    def __call__(self, molecules: MoleculesLike) -> Float[Tensor, "n"]:
        return self._told(molecules, self.of)

    @abc.abstractmethod
    def of(self, molecules: list[Chem.Mol]) -> Float[Tensor, "n"]:
        """The rewards of valid molecules; a ``ValueError`` where one of them has none."""

    def rate(self, molecules: MoleculesLike) -> tuple[Float[Tensor, "n"], Odd]:
        """The rewards, NaN for those that have none, and why these have none."""
        return self._rated(molecules, self.of)

    def tell(self, odd: Odd, molecules: MoleculesLike) -> None:
        """Warn of molecules that have no reward, or raise."""
        if not odd:
            return
        first = [f"{_said(molecules[i])} (number {i}: {odd[i]})" for i in sorted(odd)[:3]]
        more = f" and {len(odd) - 3} more" if len(odd) > 3 else ""
        what = f"{type(self).__name__} has no value for {len(odd)} of {len(molecules)} molecules: {', '.join(first)}{more}."
        if self.strict:
            raise ValueError(f"{what} Leave them out, or take strict=False, which gives them NaN.")
        warnings.warn(f"{what} They get NaN.", stacklevel=4)

    def _told(self, molecules: MoleculesLike, function: Function) -> Float[Tensor, "n"]:
        values, odd = self._rated(molecules, function)
        self.tell(odd, molecules)
        return values

    def _rated(self, molecules: MoleculesLike, function: Function) -> tuple[Float[Tensor, "n"], Odd]:
        if isinstance(molecules, str | Chem.Mol):
            raise TypeError(
                f"{type(self).__name__} takes a list of molecules, got one {type(molecules).__name__}. Put it in brackets."
            )
        parsed = parse(molecules)
        odd = {i: why for i, molecule in enumerate(parsed) if (why := _why_not(molecule))}
        out = torch.full((len(parsed),), math.nan)
        with rdBase.BlockLogs():
            _fill(out, [i for i in range(len(parsed)) if i not in odd], parsed, function, odd)
        self.invalid = len(odd)
        return out, odd


def parse(molecules: MoleculesLike) -> list[Any]:
    """Molecules of SMILES, ``None`` where they are none; RDKit's molecules as they are."""
    with rdBase.BlockLogs():
        return [_parse(x) if isinstance(x, str) else x for x in molecules]


def _parse(smiles: str) -> Chem.Mol | None:
    try:
        return Chem.MolFromSmiles(smiles)
    except (ValueError, RuntimeError):  # letters that are none, and what RDKit finds out too late
        return None


def _why_not(molecule: Any) -> str:
    if not isinstance(molecule, Chem.Mol):
        return "no molecule"
    if not molecule.GetNumAtoms():
        return "no atoms"
    return "not sanitised; call Chem.SanitizeMol, or pass its SMILES" if molecule.NeedsUpdatePropertyCache() else ""


def _fill(out: Tensor, rows: list[int], molecules: list[Any], function: Function, odd: Odd) -> None:
    """The values of these rows. Where one has none, halves are tried, until those that have none are alone."""
    if not rows:
        return
    try:
        out[rows] = function([molecules[i] for i in rows])
    except ValueError as error:
        if len(rows) == 1:
            odd[rows[0]] = " ".join(str(error).split())
            return
        for half in (rows[: len(rows) // 2], rows[len(rows) // 2 :]):
            _fill(out, half, molecules, function, odd)


def _said(molecule: Any) -> str:
    if isinstance(molecule, Chem.Mol):
        try:
            molecule = Chem.MolToSmiles(molecule)
        except (ValueError, RuntimeError):
            return "a molecule without SMILES"
    return f"{molecule!r:.60}"


class SA(Reward):
    """Ease of synthesis: (10 − SA score) / 9, with RDKit's own scorer.

    Args:
        strict: raise where a molecule has no value.

    Example:
        >>> float(sculpt.molecules.SA()(["CCO"])[0]) > 0.8  # ethanol is easy to make
        True
    """

    def __init__(self, *, strict: bool = False) -> None:
        self.scorer, self.strict = _contributed("SA_Score", "sascorer"), strict

    def score(self, molecules: MoleculesLike) -> Float[Tensor, "n"]:
        """The SA score itself: 1 is easy, 10 is hard."""
        return self._told(molecules, lambda valid: torch.tensor(_by_rdkit(self.scorer.calculateScore, valid)))

    def of(self, molecules: list[Chem.Mol]) -> Float[Tensor, "n"]:
        return torch.tensor([(10 - score) / 9 for score in _by_rdkit(self.scorer.calculateScore, molecules)])


class QED(Reward):
    """The quantitative estimate of drug-likeness, as RDKit computes it.

    Args:
        strict: raise where a molecule has no value.

    Example:
        >>> 0 < float(sculpt.molecules.QED()(["CC(=O)Oc1ccccc1C(=O)O"])[0]) < 1
        True
    """

    def __init__(self, *, strict: bool = False) -> None:
        self.strict = strict

    def of(self, molecules: list[Chem.Mol]) -> Float[Tensor, "n"]:
        return torch.tensor(_by_rdkit(qed, molecules))


def _by_rdkit(function: Callable[[Chem.Mol], float], molecules: list[Chem.Mol]) -> list[float]:
    try:
        return [float(function(x)) for x in molecules]
    except Exception as error:  # whatever it raises, it is about a molecule
        raise ValueError(f"RDKit says: {str(error).strip() or type(error).__name__:.200}") from None


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
