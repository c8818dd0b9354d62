"""Scores of many molecules: rewards by name, a column for each, and what they come to."""

from __future__ import annotations

import functools
import hashlib
import math
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from rdkit import Chem

from sculpt.bars import bar
from sculpt.molecules import seh
from sculpt.molecules.druglike import alerts, properties
from sculpt.molecules.rewards import QED, SA, Odd, Reward, parse

__all__ = ["HIGH", "Rewards", "Scorer", "Summary", "Table", "at_hand", "named", "reward_functions", "score", "title"]

REWARDS: dict[str, Callable[[], Reward]] = {"seh": seh.SEH, "sa": SA, "qed": QED}
HIGH = {"seh": 0.5, "sa": 0.6, "qed": 0.25}
"""From where on the paper calls a reward high."""
SHOWN = {"mw": "MW", "logp": "logP", "tpsa": "TPSA", "rings": "rings", "fsp3": "Fsp3"}
"""Properties in a summary, and what they are called there."""
SOME = 300
"""Of so many different molecules a summary has properties and alerts: finding alerts takes milliseconds each."""

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


def named(formula: str) -> list[str]:
    """The rewards that a formula names, as in ``seh[beta=32] ⊗ sa[beta=32]``."""
    words = set(re.findall(r"[a-z]+", formula.lower()))
    return [name for name in REWARDS if name in words]


class Summary:
    """What any number of molecules come to, added up table by table. It keeps 8 bytes for each different molecule.

    Molecules without a value count in no mean, and are not high; neither are samples that are no molecule.

    Args:
        n: how many samples there are.
        high: from where on a reward is called high.
        asked: the rewards that ``shares["all"]`` is of; by default all that have such a mark.
    """

    def __init__(self, n: int, high: Mapping[str, float] = HIGH, asked: Sequence[str] = ()) -> None:
        self.n, self.marks, self.asked = n, high, asked
        self.valid, self.all_high = 0, 0.0
        self.sums: dict[str, float] = {}
        self.known: dict[str, float] = {}
        self.missing: dict[str, float] = {}
        self.high: dict[str, float] = {}
        self._seen: list[np.ndarray] = []
        self._some: dict[str, float] = {}

    def add(self, table: Table) -> None:
        """Count the molecules of a table in; over all tables, the weights of all samples sum to one."""
        w = table["weight"] * self.n if "weight" in table else table["count"]
        names = [name for name in table if name not in ("smiles", "count", "weight")]
        together = [name for name in names if name in self.asked] or names
        everything = np.ones(len(w), dtype=bool)
        for name in names:
            there = ~np.isnan(table[name])
            self.sums[name] = self.sums.get(name, 0.0) + float((w * table[name])[there].sum())
            self.known[name] = self.known.get(name, 0.0) + float(w[there].sum())
            self.missing[name] = self.missing.get(name, 0.0) + float(w[~there].sum())
            if name in self.marks:
                good = table[name] >= self.marks[name]
                everything &= good | (name not in together)
                self.high[name] = self.high.get(name, 0.0) + float(w[good].sum())
        self.all_high += float(w[everything].sum())
        self.valid += int(table["count"].sum())
        self._some |= dict(zip(table["smiles"][: SOME - len(self._some)], w, strict=False))
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
        """Of all samples, the share whose reward is high; under ``"all"`` the share where all rewards are."""
        return {name: total / self.n for name, total in self.high.items()} | {"all": self.all_high / self.n}

    @property
    def ranges(self) -> dict[str, tuple[float, float, float]]:
        """Of the first :data:`SOME` different molecules, where 5, 50 and 95 % of a property lie below."""
        found, w = properties([*self._some]), np.array([*self._some.values()])
        return {name: _quantiles(found[name], w) for name in SHOWN}

    @property
    def passed(self) -> float:
        """Of the first :data:`SOME` different molecules, the share without an alert of RDKit's PAINS, BRENK and NIH."""
        w = np.array([*self._some.values()])
        return float(w[~np.any([*alerts([*self._some]).values()], axis=0)].sum() / w.sum())

    def __str__(self) -> str:
        if not self.valid:
            return f"no molecules: none of {self.n:,} samples is one" if self.n else "no molecules"
        rows = [("", "mean", "high", "share")]
        for name, mean in self.means.items():
            high = (f"≥ {self.marks[name]:g}", f"{self.shares[name]:.1%}") if name in self.high else ("", "")
            rows.append((title(name), f"{mean:.3f}", *high))
        together = [name for name in self.high if name in self.asked] or [*self.high]
        if len(together) > 1:
            of = "all of them" if len(together) == len(self.high) else ", ".join(map(title, together))
            rows.append((of, "", "", f"{self.shares['all']:.1%}"))
        rows.append(("", "5 %", "median", "95 %"))
        rows += [(SHOWN[name], *(f"{value:.3g}" for value in values)) for name, values in self.ranges.items()]
        rows.append(("no alerts", f"{self.passed:.1%}", "", ""))
        width = max(16, *(len(row[0]) for row in rows))
        lines = [f"{a:>{width}}  {b:>6}  {c:>6}  {d:>6}".rstrip() for a, b, c, d in rows]
        if self.unknown:
            said = ", ".join(f"{title(name)} of {missing:,}" for name, missing in self.unknown.items())
            lines.append(f"{'not known':>{width}}  {said}")
        if self.valid < self.n:
            lines.append(f"{'valid':>{width}}  {self.valid:,} of {self.n:,} samples")
        return "\n".join([*lines, f"{'distinct':>{width}}  {self.distinct:,} of {self.valid:,} molecules"])


def _quantiles(values: np.ndarray, w: np.ndarray) -> tuple[float, float, float]:
    """The values below which 5, 50 and 95 % of the weight is."""
    order = np.argsort(values)
    below = np.cumsum(w[order]) - w[order] / 2
    low, middle, high = np.interp(np.array([0.05, 0.5, 0.95]) * w.sum(), below, values[order])
    return float(low), float(middle), float(high)


def title(name: str) -> str:
    """A reward's name as chemists write it."""
    return {"seh": "sEH", "sa": "SA", "qed": "QED"}.get(name, name)
