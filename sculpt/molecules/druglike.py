"""What a medicinal chemist looks at: properties, alerts, diversity and novelty of molecules; ranges and filters as factors."""

from __future__ import annotations

import csv
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rdkit import Chem, DataStructs, rdBase
from rdkit.Chem import Crippen, Descriptors, Lipinski, rdFingerprintGenerator, rdMolDescriptors
from rdkit.Chem.FilterCatalog import FilterCatalog, FilterCatalogParams
from rdkit.Chem.Scaffolds import MurckoScaffold

from sculpt.checks import number
from sculpt.factor import Factor
from sculpt.molecules.rewards import QED, MoleculesLike, parse
from sculpt.molecules.unstable import UNSTABLE
from sculpt.tables import Table

__all__ = ["Patterns", "Profile", "alerts", "passes", "profile", "properties", "valid", "within"]

PROPERTIES: dict[str, Callable[[Chem.Mol], float]] = {
    "mw": Descriptors.MolWt,
    "logp": Crippen.MolLogP,
    "tpsa": rdMolDescriptors.CalcTPSA,
    "donors": Lipinski.NumHDonors,
    "acceptors": Lipinski.NumHAcceptors,
    "rotatable": Lipinski.NumRotatableBonds,
    "rings": rdMolDescriptors.CalcNumRings,
    "aromatic": rdMolDescriptors.CalcNumAromaticRings,
    "fsp3": rdMolDescriptors.CalcFractionCSP3,
    "atoms": Chem.Mol.GetNumHeavyAtoms,
}
"""Of a molecule, by name: weight in Da, logP, polar surface in Å², counts, the share of sp³ carbons, heavy atoms."""
SOFT = {"mw": 25.0, "logp": 0.5, "tpsa": 10.0, "fsp3": 0.1}
"""How far outside of a range costs half a nat; of counts it is one."""
CATALOGUES = ("pains", "brenk", "nih")
"""Of RDKit's alerts."""
OWN = {"unstable": UNSTABLE}
"""Catalogues of sculpt's, which are asked for by name."""


def properties(molecules: MoleculesLike) -> dict[str, np.ndarray]:
    """Columns by name, NaN where there is no molecule.

    Args:
        molecules: SMILES or RDKit molecules.

    Example:
        >>> float(sculpt.molecules.properties(["CCO"])["mw"][0].round(1))
        46.1
    """
    known = parse(molecules)
    return {name: np.array([_of(function, x) for x in known]) for name, function in PROPERTIES.items()}


def _of(function: Callable[[Chem.Mol], float], molecule: Chem.Mol | None) -> float:
    return math.nan if molecule is None else float(function(molecule))


@functools.cache
def _catalogue(name: str) -> FilterCatalog | Patterns:
    if name in OWN:
        return Patterns(OWN[name].values(), name)
    if name not in CATALOGUES:
        raise ValueError(
            f"{name!r:.60} is no catalogue of alerts; expected {', '.join([*CATALOGUES, *OWN])}, or sculpt.molecules.Patterns."
        )
    params = FilterCatalogParams()
    params.AddCatalog(getattr(FilterCatalogParams.FilterCatalogs, name.upper()))
    return FilterCatalog(params)


class Patterns:
    """Alerts of your own: SMARTS that a molecule must not have.

    Args:
        smarts: these.
        name: of the list.

    Example:
        >>> halogens = sculpt.molecules.Patterns(["[F,Cl,Br,I]"], name="halogens")
        >>> [bool(found) for found in sculpt.molecules.alerts(["CCl", "CCO"], halogens)["halogens"]]
        [True, False]
    """

    def __init__(self, smarts: Iterable[str], name: str = "patterns"):
        self.name, self.patterns = name, []
        for text in smarts:
            with rdBase.BlockLogs():
                pattern = Chem.MolFromSmarts(text)
            if pattern is None:
                raise ValueError(f"{text!r:.100} is no SMARTS pattern of RDKit's.")
            self.patterns.append(pattern)

    @classmethod
    def read(cls, path: str | Path, column: str = "smarts", name: str | None = None) -> Patterns:
        """The patterns of a CSV file, such as MOSES' ``mcf.csv`` and ``wehi_pains.csv``.

        Args:
            path: of the file; one without such a column has them first in its rows, and no heading.
            column: that has them.
            name: of the list; by default the file's.
        """
        with Path(path).open(newline="", encoding="utf-8") as file:
            rows = list(csv.reader(file))
        headed = bool(rows) and column in rows[0]
        place = rows[0].index(column) if headed else 0
        return cls([row[place] for row in rows[headed:] if row], name or Path(path).stem)

    def HasMatch(self, molecule: Chem.Mol) -> bool:
        """Whether the molecule has one of them; some of them name hydrogens."""
        whole = Chem.AddHs(molecule)
        return any(whole.HasSubstructMatch(pattern) for pattern in self.patterns)


def alerts(molecules: MoleculesLike, *catalogues: str | Patterns) -> dict[str, np.ndarray]:
    """For each catalogue, which molecules have one of its alerts; what is no molecule has.

    Args:
        molecules: SMILES or RDKit molecules.
        catalogues: among pains, brenk and nih (these three by default), ``unstable`` (groups that no chemist accepts), and
            :class:`Patterns`.

    Example:
        >>> [bool(found) for found in sculpt.molecules.alerts(["O=C1C=CC(=O)C=C1", "CCO"], "pains")["pains"]]
        [True, False]
    """
    asked = {
        c if isinstance(c, str) else c.name: c if isinstance(c, Patterns) else _catalogue(c) for c in catalogues or CATALOGUES
    }
    known = parse(molecules)
    return {name: np.array([x is None or found.HasMatch(x) for x in known]) for name, found in asked.items()}


# Factors


def within(*, softness: float = 1.0, name: str | None = None, **ranges: tuple[float | None, float | None]) -> Factor:
    r"""Ranges of properties as a factor: one inside, :math:`e^{-d^2/2}` at d soft widths outside.

    ``p * within(mw=(250, 450), logp=(None, 4))``. With ``softness=0`` what is outside is forbidden.

    Args:
        softness: what the widths (25 Da, .5 of logP, 10 Å², .1 of Fsp3, one of a count) are multiplied with.
        name: of the factor; by default what it says.
        ranges: of properties by name: mw, logp, tpsa, donors, acceptors, rotatable, rings, aromatic, fsp3, atoms. ``None`` is no bound.

    Example:
        >>> sculpt.molecules.within(mw=(250, 450), logp=(None, 4)).log_f(["CCO"]) < 0
        tensor([True])
    """
    if not ranges or (unknown := sorted(set(ranges) - set(PROPERTIES))):
        raise ValueError(
            f"Ranges are of {', '.join(PROPERTIES)}, e.g. mw=(250, 450); got {', '.join(unknown) if ranges else 'none'}."
        )
    if not 0 <= number("softness", softness) < math.inf:
        raise ValueError(f"softness is a number from 0, got {softness}.")
    bounds = {}
    for what, given in ranges.items():
        if not (isinstance(given, tuple | list) and len(given) == 2):
            raise ValueError(
                f"{what} has a least and a most, e.g. ({what}=(1, 5)), of which one may be None; got {given!r:.60}."
            )
        low, high = (
            other if end is None else number(what, end) for end, other in zip(given, (-math.inf, math.inf), strict=True)
        )
        if not low <= high:
            raise ValueError(f"{what}={given}: no number is at least {low:g} and at most {high:g}.")
        bounds[what] = low, high

    def log_f(smiles: Sequence[str]) -> torch.Tensor:
        out = torch.zeros(len(smiles), dtype=torch.float64)
        for i, molecule in enumerate(parse(smiles)):
            for what, (low, high) in bounds.items():
                value = _of(PROPERTIES[what], molecule)
                outside = max(low - value, value - high, 0.0)
                d = outside / (softness * SOFT.get(what, 1.0)) if softness else math.inf if outside else 0.0
                out[i] -= math.inf if math.isnan(value) else d**2 / 2
        return out

    said = ", ".join(f"{what} {low:g} to {high:g}" for what, (low, high) in bounds.items())
    return Factor(log_f, bound=0.0, name=name or (said if softness == 1 else f"{said} (softness {softness:g})"))


def valid(name: str = "valid") -> Factor:
    """Strings that are molecules, as a factor: one for these, zero for others. For language models of SMILES.

    Args:
        name: of the factor.

    Example:
        >>> prior = sculpt.load("pretrained/smiles/prior")
        >>> print(prior * sculpt.molecules.valid())
        prior · valid
    """

    def log_f(smiles: Sequence[str]) -> torch.Tensor:
        there = [molecule is not None and molecule.GetNumAtoms() > 0 for molecule in parse(smiles)]
        return torch.where(torch.tensor(there, dtype=torch.bool), 0.0, -math.inf).double()

    return Factor(log_f, bound=0.0, name=name)


def passes(*catalogues: str | Patterns, penalty: float = math.inf, name: str | None = None) -> Factor:
    """No alerts, as a factor: one without, :math:`e^{-\\text{penalty}}` for each catalogue that has one, by default zero.

    Args:
        catalogues: as for :func:`alerts`.
        penalty: nats.
        name: of the factor; by default the catalogues'.

    Example:
        >>> sculpt.molecules.passes("pains", penalty=3).log_f(["O=C1C=CC(=O)C=C1", "CCO"]).tolist()
        [-3.0, 0.0]
    """
    if not number("penalty", penalty) > 0:
        raise ValueError(f"penalty is a number of nats over 0, got {penalty}.")
    names = list(alerts([], *catalogues))

    def log_f(smiles: Sequence[str]) -> torch.Tensor:
        found = torch.tensor(np.stack(list(alerts(smiles, *catalogues).values())))
        return torch.where(found, -penalty, 0.0).double().sum(0)

    return Factor(log_f, bound=0.0, name=name or f"no {', '.join(names)} alerts")


# What a set of molecules is like


@dataclass
class Profile:
    """A set of molecules as a chemist sees it; ``print`` it.

    Args:
        n: how many there are.
        valid: how many are molecules.
        distinct: how many of these are different.
        columns: properties of the valid ones, QED among them.
        passed: by catalogue, the share of the valid ones without an alert.
        diversity: one minus the mean similarity of two of them (Morgan fingerprints of radius 2, Tanimoto).
        scaffolds: how many Murcko scaffolds the different ones have.
        novel: the share of the different ones that are not in the reference, where there is one.
        nearest: of the different ones, the median similarity to the nearest in the reference.
    """

    n: int
    valid: int
    distinct: int
    columns: Table = field(repr=False)
    passed: dict[str, float]
    diversity: float
    scaffolds: int
    novel: float | None = None
    nearest: float | None = None

    def share(self, **ranges: tuple[float, float]) -> float:
        """Of all molecules, the share inside these ranges of the columns.

        Args:
            ranges: by property, least and most.
        """
        inside = np.ones(self.valid, dtype=bool)
        for name, (low, high) in ranges.items():
            inside &= (self.columns[name] >= low) & (self.columns[name] <= high)
        return float(inside.sum() / max(self.n, 1))

    def __str__(self) -> str:
        lines = [f"{'':>12}  {'5 %':>8}  {'median':>8}  {'95 %':>8}"]
        for name, values in self.columns.items():
            low, middle, high = np.quantile(values, [0.05, 0.5, 0.95]) if len(values) else [math.nan] * 3
            lines.append(f"{name:>12}  {low:8.4g}  {middle:8.4g}  {high:8.4g}")
        lines += [f"{f'no {name}':>12}  {share:.1%}" for name, share in self.passed.items()]
        lines.append(f"{'valid':>12}  {self.valid} of {self.n}, {self.distinct} different, {self.scaffolds} scaffolds")
        lines.append(f"{'diversity':>12}  {self.diversity:.3f}")
        if self.novel is not None:
            lines.append(
                f"{'novel':>12}  {self.novel:.1%}" + ("" if self.nearest is None else f", nearest known at {self.nearest:.2f}")
            )
        return "\n".join(lines)


def profile(
    molecules: MoleculesLike, *catalogues: str | Patterns, reference: Iterable[str] | None = None, most: int = 2000
) -> Profile:
    """What a set of molecules is like.

    Args:
        molecules: SMILES or RDKit molecules.
        catalogues: of alerts, as for :func:`alerts`.
        reference: canonical SMILES of molecules that are known.
        most: how many molecules are compared with each other, and with so many of the reference, at most.

    Example:
        >>> print(sculpt.molecules.profile(["CCO", "CCN", "c1ccccc1"], "pains"))
                           5 %    median      95 %
        ...
    """
    known = [x for x in parse(molecules) if x is not None]
    smiles = [Chem.MolToSmiles(x) for x in known]
    distinct = list(dict.fromkeys(smiles))
    columns: Table = dict(properties(known)) | {"qed": QED()(known).numpy() if known else np.zeros(0)}
    passed = {name: float(1 - found.mean()) if known else math.nan for name, found in alerts(known, *catalogues).items()}
    scaffolds = len({MurckoScaffold.MurckoScaffoldSmiles(mol=x) for x in parse(distinct)})
    prints = _fingerprints(parse(distinct[:most]))
    out = Profile(len(molecules), len(known), len(distinct), columns, passed, _diversity(prints), scaffolds)
    if reference is not None:
        given = list(reference)
        out.novel = 1 - len(set(distinct) & set(given)) / max(len(distinct), 1)
        others = _fingerprints([x for x in parse(given[:most]) if x is not None])
        if prints and others:
            out.nearest = float(np.median([max(DataStructs.BulkTanimotoSimilarity(one, others)) for one in prints]))
    return out


def _fingerprints(molecules: Sequence[Any]) -> list[Any]:
    generator = rdFingerprintGenerator.GetMorganGenerator(radius=2, fpSize=2048)
    return [generator.GetFingerprint(x) for x in molecules]


def _diversity(prints: Sequence[Any]) -> float:
    if len(prints) < 2:
        return 0.0
    total = sum(sum(DataStructs.BulkTanimotoSimilarity(one, prints[:i])) for i, one in enumerate(prints))
    return 1 - total / (len(prints) * (len(prints) - 1) / 2)
