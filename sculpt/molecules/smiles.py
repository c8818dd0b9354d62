"""Samples of language models that write SMILES: texts, and molecules where they are some."""

from __future__ import annotations

import functools

from rdkit import Chem

from sculpt.molecules.results import Molecules
from sculpt.molecules.rewards import parse
from sculpt.tokens.results import Texts

__all__ = ["Smiles"]


class Smiles(Molecules, Texts):
    """Samples of language models of SMILES: the strings with their log-densities, and the molecules that they stand for.

    A molecule has many strings. Densities are over strings: ``log_p``, the weights and log Z speak of them, while tables and
    :meth:`summary` count molecules. Strings that are no molecule are a part of the distribution: they stay among the samples, their SMILES
    is empty, tables leave them out, and the summary says how many there are. ``p * sculpt.molecules.valid()`` forbids them.

    Example:
        >>> prior = sculpt.load("pretrained/smiles/prior")
        >>> drawn = prior.sample(3, generator=torch.Generator().manual_seed(0))
        >>> print(len(drawn.text), len(drawn.smiles), list(drawn.log_p))
        3 3 ['prior']
    """

    columns = ("text", "smiles")
    high = {"seh": 0.8, "sa": 0.8, "qed": 0.7}

    @functools.cached_property
    def smiles(self) -> list[str]:
        """Canonical SMILES, one for each sample; empty where a string is no molecule."""
        return ["" if molecule is None else Chem.MolToSmiles(molecule) for molecule in parse(self.text)]
