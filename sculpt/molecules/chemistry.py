"""Vocabularies of fragments, and molecules assembled from them."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from rdkit import Chem, rdBase

__all__ = ["Vocabulary"]

DEFAULT = Path(__file__).with_name("vocabulary.json")

# Vocabularies come from files, and what they ask for is tables of all fragments and their symmetries.
MOST_FRAGMENTS, MOST_POINTS, MOST_CHARACTERS, MOST_RINGS, MOST_SIZE = 1000, 16, 200, 12, 100_000
MOST_SYMMETRIES = 100_000
"""of all fragments together, and of the table that has as many for each as the most symmetric one"""
MOST_IMAGES = 20_000
"""of a fragment in itself"""


class Vocabulary(tuple[tuple[str, tuple[int, ...]], ...]):
    """Fragments ``(smiles, attachment points)``; an attachment point is the index of an atom, repeated if it may hold several bonds.

    The order matters: the fragment of a tree that comes last here is its root.

    Args:
        fragments: ``[[smiles, [atom, …]], …]``.

    Example:
        >>> len(sculpt.molecules.Vocabulary([["c1ccccc1", [0, 3]], ["CO", [0]]]))
        2
    """

    def __new__(cls, fragments: Iterable[Sequence[Any]]) -> Vocabulary:
        if isinstance(fragments, Vocabulary):
            return fragments
        fragments = list(fragments)
        if not 1 <= len(fragments) <= MOST_FRAGMENTS:
            raise ValueError(f"Got a vocabulary of {len(fragments):,} fragments, expected 1 to {MOST_FRAGMENTS:,}.")
        plain = [_plain(i, fragment) for i, fragment in enumerate(fragments)]
        if (size := sum(len(smiles) * len(sites) for smiles, sites in plain)) > MOST_SIZE:
            raise ValueError(
                f"The fragments of this vocabulary have {size:,} characters times points, expected at most {MOST_SIZE:,}. Leave some out."
            )
        return super().__new__(cls, [_checked(i, smiles, sites) for i, (smiles, sites) in enumerate(plain)])

    @classmethod
    def read(cls, path: str | Path = DEFAULT) -> Vocabulary:
        """Read a JSON file ``[[smiles, [atom, …]], …]``.

        Args:
            path: the file; by default sculpt's own vocabulary.
        """
        try:
            fragments = json.loads(Path(path).read_text())
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} is no vocabulary: {error}. Expected a JSON file [[smiles, [atom, ...]], ...].") from None
        if not isinstance(fragments, list) or not fragments:
            raise ValueError(
                f"{path} is no vocabulary: expected a list [[smiles, [atom, ...]], ...] with at least one fragment."
            )
        return cls(fragments)

    @property
    def sha256(self) -> str:
        """A hash of all fragments and their attachment points, in order."""
        return hashlib.sha256(json.dumps(self).encode()).hexdigest()

    def __repr__(self) -> str:  # messages name vocabularies, and a hundred fragments would hide the message
        return f"<{len(self)} fragments, {self.sha256[:8]}>"

    __str__ = __repr__

    @cached_property
    def molecules(self) -> list[Chem.Mol]:
        """The fragments as RDKit molecules."""
        return [Chem.MolFromSmiles(smiles) for smiles, _ in self]

    @cached_property
    def symmetries(self) -> list[list[tuple[int, ...]]]:
        """For each fragment, the permutations of its attachment points that change no molecule made with it."""
        found, tried = [], 0
        for molecule, (smiles, sites) in zip(self.molecules, self, strict=True):
            symmetries, more = _symmetries(molecule, sites, MOST_SYMMETRIES - tried)
            found.append(symmetries)
            tried = max(tried + more, len(self) * len(symmetries))
            if tried >= MOST_SYMMETRIES:
                raise ValueError(
                    f"The fragments of this vocabulary have more symmetries than can be counted, {smiles!r} with {len(sites)} attachment "
                    "points among them. Leave it out, or give it fewer points."
                )
        return found

    @cached_property
    def polar(self) -> list[list[bool]]:
        """Which attachment points are N, O, S or a halogen. Sulphur(VI) does not count: it binds nitrogen in every sulphonamide."""

        def polar(atom: Chem.Atom) -> bool:
            return (
                atom.GetSymbol() in ("N", "O", "F", "Cl", "Br", "I") or atom.GetSymbol() == "S" and atom.GetTotalValence() == 2
            )

        return [[polar(x.GetAtomWithIdx(a)) for a in sites] for x, (_, sites) in zip(self.molecules, self, strict=True)]

    def assemble(self, fragments: Sequence[int], bonds: Sequence[tuple[int, int, int, int]]) -> Chem.Mol:
        """The molecule of a tree.

        Args:
            fragments: the fragment of each slot.
            bonds: ``(slot, attachment point, slot, attachment point)`` each.
        """
        whole = Chem.RWMol(self.molecules[fragments[0]])
        first = [0]
        for f in fragments[1:]:
            first.append(whole.GetNumAtoms())
            whole.InsertMol(self.molecules[f])
        for p, i, c, j in bonds:
            ends = [first[slot] + self[fragments[slot]][1][site] for slot, site in ((p, i), (c, j))]
            whole.AddBond(*ends, Chem.BondType.SINGLE)
            for end in ends:
                _give_up_hydrogen(whole.GetAtomWithIdx(end))
        Chem.SanitizeMol(whole)
        return whole.GetMol()


def _give_up_hydrogen(atom: Chem.Atom) -> None:
    """Take one explicit hydrogen off an atom, if it has any; RDKit adjusts implicit ones by itself."""
    if H := atom.GetNumExplicitHs():
        atom.SetNumExplicitHs(H - 1)


def _plain(i: int, fragment: Sequence[Any]) -> tuple[str, tuple[int, ...]]:
    try:
        smiles, sites = fragment
        sites = tuple(sites)
        if not (isinstance(smiles, str) and all(type(a) is int for a in sites)):
            raise TypeError
    except (TypeError, ValueError):
        raise ValueError(f"Fragment {i} of the vocabulary is {fragment!r:.200}, expected [smiles, [atom, ...]].") from None
    if len(smiles) > MOST_CHARACTERS or len(sites) > MOST_POINTS or not (smiles.isascii() and smiles.isprintable()):
        raise ValueError(
            f"Fragment {i} of the vocabulary, {smiles!r:.200}, has {len(smiles):,} characters and {len(sites):,} attachment points, expected "
            f"a SMILES of at most {MOST_CHARACTERS} plain characters and at most {MOST_POINTS} points."
        )
    return smiles, sites


@lru_cache(maxsize=4 * MOST_FRAGMENTS)
def _checked(i: int, smiles: str, sites: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
    with rdBase.BlockLogs():
        molecule = Chem.MolFromSmiles(smiles)
    if molecule is None or not molecule.GetNumAtoms():
        raise ValueError(
            f"Fragment {i} of the vocabulary, {smiles!r}, is no valid molecule. Correct its SMILES, or leave it out."
        )
    if len(Chem.GetMolFrags(molecule)) > 1:
        raise ValueError(f"Fragment {i} of the vocabulary, {smiles!r}, falls apart. Make each part a fragment of its own.")
    if (rings := molecule.GetNumBonds() - molecule.GetNumAtoms() + 1) > MOST_RINGS:
        raise ValueError(
            f"Fragment {i} of the vocabulary, {smiles!r}, has {rings} rings, expected at most {MOST_RINGS}. Leave it out."
        )
    if not sites:
        raise ValueError(f"Fragment {i} of the vocabulary, {smiles!r}, has no attachment point. Give it one, or leave it out.")
    for a, bonds in Counter(sites).items():
        if not 0 <= a < molecule.GetNumAtoms():
            raise ValueError(
                f"Attachment point {a} of fragment {i}, {smiles!r}, is out of range: it has atoms 0 to {molecule.GetNumAtoms() - 1}."
            )
        if not _holds(molecule, a, bonds):
            raise ValueError(
                f"Attachment point {a} of fragment {i}, {smiles!r}, is to hold {bonds} bond(s), but the atom has no free valence for "
                f"{'it' if bonds == 1 else 'them'}. Choose another atom."
            )
    return smiles, sites


def _holds(molecule: Chem.Mol, a: int, bonds: int) -> bool:
    """Whether the atom can hold this many methyl groups. Its hydrogens alone do not tell: phosphorus(III) turns into phosphorus(V)."""
    trial = Chem.RWMol(molecule)
    for _ in range(bonds):
        trial.AddBond(a, trial.AddAtom(Chem.Atom(6)), Chem.BondType.SINGLE)
        _give_up_hydrogen(trial.GetAtomWithIdx(a))
    with rdBase.BlockLogs():
        return Chem.SanitizeMol(trial, catchErrors=True) == Chem.SanitizeFlags.SANITIZE_NONE


def _symmetries(molecule: Chem.Mol, sites: Sequence[int], most: int) -> tuple[list[tuple[int, ...]], int]:
    """The permutations, and how many images of the molecule and namings of its points were tried; it stops at so many."""
    hydrogens = [atom.GetTotalNumHs() for atom in molecule.GetAtoms()]
    points = {a: [t for t, b in enumerate(sites) if b == a] for a in sites}
    namings = math.prod(math.factorial(len(held)) for held in points.values())
    images = molecule.GetSubstructMatches(molecule, uniquify=False, useChirality=True, maxMatches=MOST_IMAGES)
    if len(images) == MOST_IMAGES or len(images) * namings >= most:
        return [], most
    found = set()
    for image in images:
        # A pyrrole nitrogen and a pyridine nitrogen match; they differ by their hydrogen.
        if any(hydrogens[a] != hydrogens[b] for a, b in enumerate(image)):
            continue
        if any(len(points.get(image[a], ())) != len(held) for a, held in points.items()):
            continue
        for named in itertools.product(*(itertools.permutations(points[image[a]]) for a in points)):
            place = {
                t: to for held, targets in zip(points.values(), named, strict=True) for t, to in zip(held, targets, strict=True)
            }
            found.add(tuple(place[t] for t in range(len(sites))))
    return sorted(found), len(images) * namings
