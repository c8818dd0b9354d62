"""Samples that are molecules: SMILES, scores, tables, files and pictures."""

from __future__ import annotations

import csv
import functools
import hashlib
import importlib
import io
import json
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rdkit import Chem, rdBase
from rdkit.Chem import rdDepictor
from rdkit.Chem.Draw import rdMolDraw2D
from tqdm.auto import tqdm

from sculpt.files import replace_file
from sculpt.molecules.rewards import QED, SA, SEH
from sculpt.particles import Samples

if TYPE_CHECKING:
    import pandas

__all__ = ["HIGH", "Molecules", "Picture", "Summary", "check_output", "needs", "reward_functions", "score", "write_parquet"]

REWARDS = {"seh": SEH, "sa": SA, "qed": QED}
HIGH = {"seh": 0.5, "sa": 0.6, "qed": 0.25}
"""From where on the paper calls a reward high."""

Rewards = str | Iterable[str] | Mapping[str, Callable[[list[Chem.Mol]], Any]] | None
Table = dict[str, Any]


class Molecules(Samples):
    """Samples of molecule models: canonical SMILES, and each different molecule once with its scores.

    ``rewards`` of its methods are names among seh, sa and qed (by default all three), or functions by name from RDKit molecules to
    numbers. Each is computed once.
    """

    @functools.cached_property
    def smiles(self) -> list[str]:
        """Canonical SMILES, one for each sample."""
        return self.decode()

    def table(self, rewards: Rewards = None, *, progress: bool = True) -> Table:
        """Columns by name: ``smiles``, ``count``, ``weight`` (they sum to one), and the rewards. A row for each different molecule."""
        functions = reward_functions(rewards)
        table = {name: values.copy() for name, values in self._distinct.items()}
        missing = {name: function for name, function in functions.items() if self._scores.get(name, (None,))[0] is not function}
        if missing:
            for name, values in score(table["smiles"].tolist(), missing, progress).items():
                self._scores[name] = (missing[name], values)
        return table | {name: self._scores[name][1].copy() for name in functions}

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
    def _scores(self) -> dict[str, tuple[Callable, np.ndarray]]:
        return {}

    def summary(self, rewards: Rewards = None) -> Summary:
        """Means, shares of high scores, how many are different; ``print`` it."""
        summary = Summary()
        summary.add(self.table(rewards))
        return summary

    # Tables and files

    def to_frame(self, rewards: Rewards = None) -> pandas.DataFrame:
        """:meth:`table` as a pandas data frame."""
        return needs("pandas", "to_frame").DataFrame(self.table(rewards))

    def save(self, path: str | Path, rewards: Rewards = None) -> None:
        """Write .parquet, .csv, .sdf, .smi (all samples, one a line), .png or .svg (the first 24 molecules): all of it or nothing."""
        path = Path(path)
        check_output(path)
        if path.suffix == ".parquet":
            self.to_parquet(path, rewards)
        elif path.suffix == ".sdf":
            self.to_sdf(path, rewards)
        elif path.suffix == ".csv":
            table = self.table(rewards)
            text = io.StringIO()
            writer = csv.writer(text, lineterminator="\n")
            writer.writerow(table)
            writer.writerows(zip(*(values.tolist() for values in table.values()), strict=True))
            replace_file(path, text.getvalue().encode())
        elif path.suffix == ".smi":
            replace_file(path, "".join(f"{smiles}\n" for smiles in self.smiles).encode())
        else:
            self.draw(24, rewards=rewards).save(path)

    def to_parquet(self, path: str | Path, rewards: Rewards = None) -> None:
        """:meth:`table` as a parquet file; formula and verdict are in its metadata."""
        about = {"formula": self.diagnostics.formula, "road": self.diagnostics.road, "verdict": self.diagnostics.verdict}
        write_parquet(Path(path), self.table(rewards), about)

    def to_sdf(self, path: str | Path, rewards: Rewards = None) -> None:
        """A structure file with coordinates in the plane, and count, weight and rewards as properties."""
        table = self.table(rewards)
        text = io.StringIO()
        writer = Chem.SDWriter(text)
        for k, smiles in enumerate(table["smiles"]):
            molecule = _flat(smiles)
            molecule.SetProp("_Name", f"{self.diagnostics.formula or 'molecule'} #{k + 1}")
            for name, values in table.items():
                molecule.SetProp(name, f"{values[k]:.6g}" if isinstance(values[k], np.floating) else str(values[k]))
            writer.write(molecule)
        writer.close()
        replace_file(Path(path), text.getvalue().encode())

    # Pictures

    def draw(self, n: int = 12, *, columns: int | None = None, by: str | None = None, rewards: Rewards = None) -> Picture:
        """n different molecules with their scores: the first that were drawn, or the best ``by`` a reward."""
        if n < 1:
            raise ValueError(f"Got n={n}: a picture shows at least 1 molecule.")
        if by is not None and rewards is None:
            rewards = [by]
        functions = reward_functions(rewards)
        if by is not None and by not in functions:
            raise ValueError(f"by={by!r}: the rewards are {', '.join(functions)}.")
        if by is None:  # only those that are shown have to be scored
            smiles = self._distinct["smiles"][:n].tolist()
            scores = score(smiles, functions)
        else:
            table = self.table(functions)
            best = np.argsort(-table[by], kind="stable")[:n]
            smiles = table["smiles"][best].tolist()
            scores = {name: table[name][best] for name in functions}
        legends = ["   ".join(f"{_title(name)} {values[k]:.2f}" for name, values in scores.items()) for k in range(len(smiles))]
        return Picture([_flat(x) for x in smiles], legends, columns or min(len(smiles), math.ceil(math.sqrt(1.4 * n))))


class Picture:
    """Molecules in a grid, each above its scores. Notebooks show it; ``save`` writes .png or .svg."""

    def __init__(self, molecules: Sequence[Chem.Mol], legends: Sequence[str], columns: int, side: tuple[int, int] = (300, 230)):
        self.molecules, self.legends, self.columns, self.side = list(molecules), list(legends), columns, side

    @property
    def svg(self) -> str:
        return self._drawn(rdMolDraw2D.MolDraw2DSVG, 1)

    @property
    def png(self) -> bytes:
        return self._drawn(rdMolDraw2D.MolDraw2DCairo, 2)

    def save(self, path: str | Path) -> None:
        """Write a .png or an .svg, all of it or nothing."""
        path = Path(path)
        if path.suffix not in (".png", ".svg"):
            raise ValueError(f"Cannot draw {path.name}: expected a name that ends in .png or .svg.")
        replace_file(path, self.png if path.suffix == ".png" else self.svg.encode())

    def _repr_svg_(self) -> str:
        return self.svg

    def _drawn(self, canvas: type, scale: int) -> Any:
        width, height = (scale * side for side in self.side)
        rows = math.ceil(len(self.molecules) / self.columns)
        drawing = canvas(width * self.columns, height * rows, width, height)
        options = drawing.drawOptions()
        options.bondLineWidth, options.fixedBondLength, options.padding = 1.4 * scale, 24.0 * scale, 0.06
        options.drawMolsSameScale = False
        options.minFontSize, options.maxFontSize = 10 * scale, 12 * scale
        options.legendFontSize, options.legendFraction = 13 * scale, 0.12
        options.setLegendColour((0.169, 0.129, 0.208, 1.0))  # the ink of sculpt.plots
        drawing.DrawMolecules(self.molecules, legends=self.legends)
        drawing.FinishDrawing()
        return drawing.GetDrawingText()


class Summary:
    """Scores of any number of molecules, added up table by table. It keeps 8 bytes for each different molecule."""

    def __init__(self):
        self.n, self.sums, self.high, self.all_high = 0, {}, {}, 0.0
        self._seen: list[np.ndarray] = []

    def add(self, table: Table) -> None:
        n = int(table["count"].sum())
        w = table["weight"] * n if "weight" in table else table["count"]
        names = [name for name in table if name not in ("smiles", "count", "weight")]
        everything = np.ones(len(w), dtype=bool)
        for name in names:
            self.sums[name] = self.sums.get(name, 0.0) + float((w * table[name]).sum())
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
        return {name: total / self.n for name, total in self.sums.items()}

    @property
    def shares(self) -> dict[str, float]:
        """The share of molecules whose reward is high (:data:`HIGH`), and under ``"all"`` of those where all of them are."""
        return {name: total / self.n for name, total in self.high.items()} | {"all": self.all_high / self.n}

    def __str__(self) -> str:
        if not self.n:
            return "no molecules"
        rows = [("", "mean", "high", "share")]
        for name, mean in self.means.items():
            high = (f"≥ {HIGH[name]:g}", f"{self.shares[name]:.1%}") if name in self.high else ("", "")
            rows.append((_title(name), f"{mean:.3f}", *high))
        if len(self.high) > 1:
            rows.append(("all of them", "", "", f"{self.shares['all']:.1%}"))
        width = max(16, *(len(row[0]) for row in rows))
        lines = [f"{a:>{width}}  {b:>6}  {c:>6}  {d:>6}".rstrip() for a, b, c, d in rows]
        return "\n".join([*lines, f"{'distinct':>{width}}  {self.distinct:,} of {self.n:,} molecules"])


# Rewards by name


def reward_functions(rewards: Rewards) -> dict[str, Callable[[list[Chem.Mol]], Any]]:
    if rewards is None:
        rewards = list(REWARDS)
        try:
            _reward("seh")
        except ValueError as error:  # its weights can be had neither here nor from their public address
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


@functools.cache
def _reward(name: str) -> Callable:
    return REWARDS[name]()


def score(
    smiles: list[str], functions: Mapping[str, Callable[[list[Chem.Mol]], Any]], progress: bool = True, chunk: int = 256
) -> Table:
    """A column for each function, of these molecules; each is parsed once."""
    parts: dict[str, list[np.ndarray]] = {name: [np.zeros(0)] for name in functions}
    bar = tqdm(total=len(smiles), desc=f"scoring {', '.join(functions)}", disable=not progress, delay=2, leave=False)
    for first in range(0, len(smiles), chunk) if functions else ():
        with rdBase.BlockLogs():
            molecules = [Chem.MolFromSmiles(x) for x in smiles[first : first + chunk]]
        for name, function in functions.items():
            values = np.asarray(function(molecules), dtype=np.float64)
            if values.shape != (len(molecules),):
                raise ValueError(
                    f"The reward {name} answered with shape {values.shape} for {len(molecules)} molecules; expected a number for each."
                )
            parts[name].append(values)
        bar.update(len(molecules))
    bar.close()
    return {name: np.concatenate(values) for name, values in parts.items()}


# Files


def check_output(path: Path) -> None:
    """Raise before the work where the result could not be written."""
    formats = (".parquet", ".csv", ".sdf", ".smi", ".png", ".svg")
    if path.is_dir():
        raise ValueError(f"{path} is a folder; pass the file to write.")
    if path.suffix not in formats:
        raise ValueError(f"Cannot write {path.name}: expected a name that ends in {', '.join(formats)}.")
    if path.suffix == ".parquet":
        needs("pyarrow", "a .parquet file", "Or write .csv, which needs nothing.")


def needs(module: str, what: str, otherwise: str = "") -> Any:
    """An optional dependency, or how to get it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError:
        why = f"pip install {module}, or install sculpt as 'sculpt[molecules]'."
    except ImportError as error:  # it is there, and does not go with the others
        why = f"the one that is installed does not work ({error})."
    raise ImportError(f"{what} needs {module}: {why} {otherwise}".strip())


def write_parquet(path: Path, table: Table, about: dict[str, Any]) -> None:
    pyarrow = needs("pyarrow", "a .parquet file")
    parquet = needs("pyarrow.parquet", "a .parquet file")
    columns = pyarrow.table({name: pyarrow.array(values, from_pandas=False) for name, values in table.items()})
    buffer = io.BytesIO()
    parquet.write_table(columns.replace_schema_metadata({"sculpt": json.dumps(about)}), buffer)
    replace_file(path, buffer.getvalue())


def _flat(smiles: str) -> Chem.Mol:
    """A molecule with coordinates in the plane."""
    molecule = Chem.MolFromSmiles(smiles)
    rdDepictor.Compute2DCoords(molecule)
    rdDepictor.StraightenDepiction(molecule)
    return molecule


def _title(name: str) -> str:
    return {"seh": "sEH", "sa": "SA", "qed": "QED"}.get(name, name)
