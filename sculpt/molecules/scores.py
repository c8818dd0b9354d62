"""Scores of many molecules: rewards by name, a column for each, and what they come to."""

from __future__ import annotations

import functools
import hashlib
import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from rdkit import Chem

from sculpt.bars import bar
from sculpt.molecules import seh
from sculpt.molecules.rewards import QED, SA, Odd, Reward, parse

__all__ = ["HIGH", "Rewards", "Scorer", "Summary", "Table", "at_hand", "reward_functions", "score", "title"]

REWARDS: dict[str, Callable[[], Reward]] = {"seh": seh.SEH, "sa": SA, "qed": QED}
HIGH = {"seh": 0.5, "sa": 0.6, "qed": 0.25}
"""From where on the paper calls a reward high."""

Scorer = Callable[[list[Chem.Mol]], Any]
"""A function from RDKit molecules to a number for each."""
Rewards = str | Iterable[str] | Mapping[str, Scorer] | None
"""Names among seh, sa and qed (``None``: all three), or functions by name."""
Table = dict[str, Any]
"""Columns by name, as arrays."""


def reward_functions(rewards: Rewards) -> dict[str, Scorer]:
    """The functions that these names stand for."""
    if rewards is None:
        rewards = list(REWARDS)
        try:
            _reward("seh")
        except ValueError as error:  # its weights are not here and cannot be downloaded
            rewards.remove("seh")
            warnings.warn(f"seh is left out of the scores: {error}", stacklevel=3)
    if isinstance(rewards, Mapping):
        return dict(rewards)
    rewards = [rewards] if isinstance(rewards, str) else list(rewards)
    if unknown := [name for name in rewards if name not in REWARDS]:
        raise ValueError(
            f"There is no reward {', '.join(map(repr, unknown))}; expected names among {', '.join(REWARDS)}, or functions by name: "
            "rewards={'mine': function from RDKit molecules to numbers}."
        )
    return {name: _reward(name) for name in rewards}


def at_hand() -> list[str]:
    """The rewards that need no download."""
    return [name for name in REWARDS if name != "seh" or seh.kept_weights() is not None]


@functools.cache
def _reward(name: str) -> Reward:
    return REWARDS[name]()


def score(smiles: list[str], functions: Mapping[str, Scorer], progress: bool = True, chunk: int = 256) -> Table:
    """A column of scores of these molecules for each function; each molecule is parsed once. Rewards of sculpt's own give NaN where they
    have no value and one warning, or raise: see :class:`~sculpt.molecules.rewards.Reward`."""
    parts: dict[str, list[np.ndarray]] = {name: [np.zeros(0)] for name in functions}
    unknown: dict[str, Odd] = {name: {} for name in functions}
    done = bar(title=f"scoring {', '.join(functions)}", total=len(smiles), show=progress, leave=False)
    for first in range(0, len(smiles), chunk) if functions else ():
        molecules = parse(smiles[first : first + chunk])
        for name, function in functions.items():
            if isinstance(function, Reward):
                values, odd = function.rate(molecules)
                unknown[name] |= {first + i: why for i, why in odd.items()}
                if function.strict:
                    function.tell(unknown[name], smiles)
            else:
                values = function(molecules)
            values = np.asarray(values, dtype=np.float64)
            if values.shape != (len(molecules),):
                raise ValueError(
                    f"The reward {name} answered with shape {values.shape} for {len(molecules)} molecules; expected a number for each."
                )
            parts[name].append(values)
        done.update(len(molecules))
    done.close()
    for name, function in functions.items():
        if isinstance(function, Reward):
            function.tell(unknown[name], smiles)
    return {name: np.concatenate(values) for name, values in parts.items()}


class Summary:
    """Scores of any number of molecules, added up table by table. It keeps 8 bytes for each different molecule.

    Molecules without a value count in no mean, and are not high.
    """

    def __init__(self) -> None:
        self.n, self.all_high = 0, 0.0
        self.sums: dict[str, float] = {}
        self.known: dict[str, float] = {}
        self.missing: dict[str, float] = {}
        self.high: dict[str, float] = {}
        self._seen: list[np.ndarray] = []

    def add(self, table: Table) -> None:
        """Count the molecules of a table in."""
        n = int(table["count"].sum())
        w = table["weight"] * n if "weight" in table else table["count"]
        names = [name for name in table if name not in ("smiles", "count", "weight")]
        everything = np.ones(len(w), dtype=bool)
        for name in names:
            there = ~np.isnan(table[name])
            self.sums[name] = self.sums.get(name, 0.0) + float((w * table[name])[there].sum())
            self.known[name] = self.known.get(name, 0.0) + float(w[there].sum())
            self.missing[name] = self.missing.get(name, 0.0) + float(w[~there].sum())
            if name in HIGH:
                good = table[name] >= HIGH[name]
                everything &= good
                self.high[name] = self.high.get(name, 0.0) + float(w[good].sum())
        self.all_high += float(w[everything].sum())
        self.n += n
        codes = [hashlib.blake2b(smiles.encode(), digest_size=8).digest() for smiles in table["smiles"]]
        self._seen = [np.unique(np.concatenate([*self._seen, np.frombuffer(b"".join(codes), dtype=np.uint64)]))]

    @property
    def distinct(self) -> int:
        """How many different molecules there are."""
        return sum(map(len, self._seen))

    @property
    def means(self) -> dict[str, float]:
        """The mean of each reward, over the molecules that have a value."""
        return {name: total / self.known[name] if self.known[name] else math.nan for name, total in self.sums.items()}

    @property
    def unknown(self) -> dict[str, int]:
        """How many molecules have no value of a reward, where there are any."""
        return {name: round(missing) for name, missing in self.missing.items() if missing}

    @property
    def shares(self) -> dict[str, float]:
        """The share of molecules whose reward is high (:data:`HIGH`); under ``"all"`` the share where all rewards are."""
        return {name: total / self.n for name, total in self.high.items()} | {"all": self.all_high / self.n}

    def __str__(self) -> str:
        if not self.n:
            return "no molecules"
        rows = [("", "mean", "high", "share")]
        for name, mean in self.means.items():
            high = (f"≥ {HIGH[name]:g}", f"{self.shares[name]:.1%}") if name in self.high else ("", "")
            rows.append((title(name), f"{mean:.3f}", *high))
        if len(self.high) > 1:
            rows.append(("all of them", "", "", f"{self.shares['all']:.1%}"))
        width = max(16, *(len(row[0]) for row in rows))
        lines = [f"{a:>{width}}  {b:>6}  {c:>6}  {d:>6}".rstrip() for a, b, c, d in rows]
        if self.unknown:
            said = ", ".join(f"{title(name)} of {missing:,}" for name, missing in self.unknown.items())
            lines.append(f"{'not known':>{width}}  {said}")
        return "\n".join([*lines, f"{'distinct':>{width}}  {self.distinct:,} of {self.n:,} molecules"])


def title(name: str) -> str:
    """A reward's name as chemists write it."""
    return {"seh": "sEH", "sa": "SA", "qed": "QED"}.get(name, name)
