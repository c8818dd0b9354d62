"""Samples that are molecules: SMILES, scores, tables, files and pictures."""

from __future__ import annotations

import csv
import functools
import io
import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from rdkit import Chem

from sculpt.diagnostics import printable
from sculpt.files import replace_file
from sculpt.molecules.pictures import Picture, flat
from sculpt.molecules.scores import Rewards, Scorer, Summary, at_hand, reward_functions, score, title
from sculpt.samples import Samples, check_name
from sculpt.tables import Table, needs, write_parquet

if TYPE_CHECKING:
    import pandas

__all__ = ["Molecules", "check_output"]


PROBES = ["CC(=O)Nc1ccc(O)cc1", "CCOC(=O)C1CCNCC1", "c1ccc(-c2nc3ccccc3s2)cc1"]


class Molecules(Samples):
    """Samples of molecule models: canonical SMILES, and each different molecule once with its scores.

    ``rewards`` of its methods are names among seh, sa and qed (by default all three), or functions by name from RDKit molecules to
    numbers. Each is computed once. A result that was saved or pickled keeps its SMILES, so whoever reads it needs no model.

    Example:
        >>> seh = sculpt.load("pretrained/molecules/seh", beta=32)
        >>> molecules = seh.sample(8, generator=seed)
        >>> list(molecules.to_frame(["sa"]).columns)
        ['smiles', 'count', 'weight', 'sa']
    """

    columns = ("smiles",)
    keeps_x = False

    @functools.cached_property
    def smiles(self) -> list[str]:
        """Canonical SMILES, one for each sample."""
        return list(super().decode())

    def decode(self) -> list[str]:
        """The same as :attr:`smiles`."""
        return self.smiles

    def table(self, rewards: Rewards = None, *, progress: bool = True) -> Table:
        """Columns by name: ``smiles``, ``count``, ``weight`` (the weights sum to one), and the rewards. Each different molecule is a row.

        Args:
            rewards: which scores to add.
            progress: show a bar where scoring takes longer than two seconds.
        """
        functions = reward_functions(rewards)
        if missing := {name: function for name, function in functions.items() if not self._has(name, function)}:
            for name, values in score(self._distinct["smiles"].tolist(), missing, progress).items():
                self._scores[name] = (missing[name], values)
        table = self._distinct | {name: self._scores[name][1] for name in functions}
        return {name: values.copy() for name, values in table.items()}

    @classmethod
    def described(cls, rewards: Rewards = None) -> dict[str, Any]:
        """The rewards' scores of a few molecules, so that no two versions of a reward meet in one folder."""
        return {name: values.tolist() for name, values in score(PROBES, reward_functions(rewards), progress=False).items()}

    def rows(self, rewards: Rewards = None) -> Table:
        """The same as :meth:`table`, without a bar."""
        return self.table(rewards, progress=False)

    @functools.cached_property
    def _distinct(self) -> Table:
        n = len(self)
        log_w = torch.zeros(n) if self.log_weights is None else self.log_weights.cpu()
        w = torch.softmax(log_w.double(), dim=0)
        rows: dict[str, int] = {}
        index = np.array([rows.setdefault(smiles, len(rows)) for smiles in self.smiles], dtype=np.int64)
        count = np.bincount(index, minlength=len(rows))
        weight = np.bincount(index, w.numpy(), minlength=len(rows))
        return {"smiles": np.array(list(rows), dtype=object), "count": count, "weight": weight}

    @functools.cached_property
    def _scores(self) -> dict[str, tuple[Scorer, np.ndarray]]:
        return {}

    def _has(self, name: str, function: Scorer) -> bool:
        """Whether all molecules are scored by this function."""
        return name in self._scores and self._scores[name][0] is function

    def summary(self, rewards: Rewards = None) -> Summary:
        """Means, shares of high scores, and how many molecules are different; ``print`` it.

        Args:
            rewards: which scores to sum up.
        """
        summary = Summary()
        summary.add(self.table(rewards))
        return summary

    @classmethod
    def summed(cls, tables: Iterable[Table], n: int) -> Summary:
        summary = Summary()
        for table in tables:
            own = {name: values for name, values in table.items() if name not in ("log_weight", "log_z", "shard", "seed")}
            summary.add(own | {"weight": table["weight"] * n / table["count"].sum()})
        return summary

    # Tables and files

    def to_frame(self, rewards: Rewards = None) -> pandas.DataFrame:
        """:meth:`table` as a pandas data frame.

        Args:
            rewards: which scores to add.
        """
        return needs("pandas", "to_frame").DataFrame(self.table(rewards))

    def save(self, path: str | Path, rewards: Rewards = None) -> None:
        """Write a file, all of it or nothing. Its ending says what is in it.

        Tables and structures with scores (``.parquet``, ``.csv``, ``.sdf``); all samples, one a line (``.smi``); the first 24 molecules as a
        picture (``.png``, ``.svg``); or everything but the scores (``.safetensors``, which :meth:`load` reads, and ``.npz``).

        Args:
            path: the file.
            rewards: which scores to write, where there are any.
        """
        path = Path(path)
        check_output(path)
        match path.suffix:
            case ".parquet":
                self.to_parquet(path, rewards)
            case ".sdf":
                self.to_sdf(path, rewards)
            case ".csv":
                table = self.table(rewards)
                text = io.StringIO()
                writer = csv.writer(text, lineterminator="\n")
                writer.writerow(table)
                writer.writerows(zip(*(values.tolist() for values in table.values()), strict=True))
                replace_file(path, text.getvalue().encode())
            case ".smi":
                replace_file(path, "".join(f"{smiles}\n" for smiles in self.smiles).encode())
            case ".png" | ".svg":
                self.draw(24, rewards=rewards).save(path)
            case _:
                super().save(path)

    def to_parquet(self, path: str | Path, rewards: Rewards = None) -> None:
        """:meth:`table` as a parquet file, with formula, road and verdict in its metadata.

        Args:
            path: the file.
            rewards: which scores to add.
        """
        write_parquet(Path(path), self.table(rewards), self.origin())

    def to_sdf(self, path: str | Path, rewards: Rewards = None) -> None:
        """A structure file with coordinates in the plane, and with count, weight and rewards as properties.

        Args:
            path: the file.
            rewards: which scores to add.
        """
        table = self.table(rewards)
        text = io.StringIO()
        writer = Chem.SDWriter(text)
        for k, smiles in enumerate(table["smiles"]):
            molecule = flat(smiles)
            molecule.SetProp("_Name", f"{printable(self.diagnostics.formula, 70) or 'molecule'} #{k + 1}")
            for name, values in table.items():
                molecule.SetProp(name, f"{values[k]:.6g}" if isinstance(values[k], np.floating) else str(values[k]))
            writer.write(molecule)
        writer.close()
        replace_file(Path(path), text.getvalue().encode())

    # Pictures

    def draw(self, n: int = 12, *, columns: int | None = None, by: str | None = None, rewards: Rewards = None) -> Picture:
        """n different molecules with their scores.

        Args:
            n: how many.
            columns: molecules in a row.
            by: the reward whose best molecules are shown; by default those are that were drawn first.
            rewards: which scores to show; by default ``by``, or all.
        """
        if n < 1:
            raise ValueError(f"Got n={n}: a picture shows at least 1 molecule.")
        functions = reward_functions([by] if by is not None and rewards is None else rewards)
        if by is not None and by not in functions:
            raise ValueError(f"by={by!r}: the rewards are {', '.join(functions)}.")
        known = all(self._has(name, function) for name, function in functions.items())
        if by is None and not known:  # only the molecules that are shown have to be scored
            smiles = self._distinct["smiles"][:n].tolist()
            scores = score(smiles, functions)
        else:
            table = self.table(functions)
            shown = slice(n) if by is None else np.argsort(-table[by], kind="stable")[:n]
            smiles = table["smiles"][shown].tolist()
            scores = {name: table[name][shown] for name in functions}
        legends = ["   ".join(f"{title(name)} {values[k]:.2f}" for name, values in scores.items()) for k in range(len(smiles))]
        return Picture([flat(x) for x in smiles], legends, columns or min(len(smiles), math.ceil(math.sqrt(1.4 * n))))

    def picture(self, most: int = 6) -> tuple[Literal["png", "svg+xml", "text"], bytes]:
        """Some molecules with the scores that are known already, or else with those that need no download."""
        known = {name: function for name, (function, _) in self._scores.items()}
        return "svg+xml", self.draw(most, columns=2, rewards=known or at_hand()).svg.encode()


# Files


def check_output(path: Path) -> None:
    """Raise before the work where the result could not be written."""
    check_name(path, (".parquet", ".csv", ".sdf", ".smi", ".png", ".svg", ".safetensors", ".npz"))
    if path.suffix == ".parquet":
        needs("pyarrow", "a .parquet file", "Or write .csv, which needs nothing.")
