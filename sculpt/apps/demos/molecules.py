"""``sculpt demo molecules``: molecules that bind sEH and can be made, from two pretrained policies."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from sculpt import plots
from sculpt.apps.demos.common import Clock, markdown, pretrained
from sculpt.apps.demos.page import Part, Shown, meanings, publish
from sculpt.composition import harmonic_mean
from sculpt.files import replace_file
from sculpt.hub import load
from sculpt.model import BaseModel
from sculpt.molecules.scores import HIGH
from sculpt.roads import Guided, Road, Tracked

__all__ = ["run"]

DENSITY, DRAWN = "molecules-scores-before-and-after.png", "molecules-bind-and-can-be-made.png"
SHOWN = "seh & sa, tracked"
DONE = (
    "Two pretrained policies write molecules in proportion to a reward: seh those predicted to bind soluble epoxide hydrolase, sa those that "
    "are easy to make. seh & sa, their harmonic mean, is likely under both: once steered by a classifier, once without training anything."
)
MORE = """
import sculpt

seh, sa = (sculpt.load(f"pretrained/molecules/{name}", beta=32) for name in ("seh", "sa"))
samples = (seh & sa).sample(1000)
print(samples.summary(["seh", "sa"]))
samples.save("both.sdf")
"""


def run(folder: str | Path = "demo", *, n: int = 1000, beta: float = 32, seed: int = 0) -> list[dict[str, Any]]:
    """Sample the policies and ``seh & sa`` on both roads, write pictures and a table, and return the table's rows.

    Args:
        folder: where pictures and table go.
        n: molecules of each.
        beta: the exponent of the rewards.
        seed: of the samples.
    """
    folder, clock = Path(folder), Clock()
    home = pretrained("molecules", "seh-sa")
    seh, sa = (load(home / name, beta=beta) for name in ("seh", "sa"))
    print(
        f"Two GFlowNet policies write molecules in proportion to reward^{beta:g}: seh those predicted to bind soluble epoxide\n"
        "hydrolase, sa those that are easy to make. seh & sa, their harmonic mean, is likely under both; nothing is retrained.\n"
    )
    both = harmonic_mean(seh, sa)
    cases: dict[str, tuple[BaseModel, Road | None]] = {
        "seh": (seh, None),
        "sa": (sa, None),
        "seh & sa, guided": (both, Guided(load(home / "seh-sa"), correct=True)),
        "seh & sa, tracked": (both, Tracked()),
    }
    results: dict[str, Any] = {}
    rows = []
    for name, (model, road) in cases.items():
        clock.say(f"{n:,} molecules of {name}")
        began = time.monotonic()
        samples: Any = model.sample(n, road, generator=torch.Generator().manual_seed(seed))
        seconds, results[name] = time.monotonic() - began, samples
        summary = samples.summary(["seh", "sa"])
        row = {"name": name, **summary.means, **{f"high {k}": v for k, v in summary.shares.items()}}
        rows.append(row | {"distinct": summary.distinct, "rate": n / seconds, "verdict": samples.verdict.level if road else ""})
    _write(folder, results, rows, n, clock)
    return rows


def _write(folder: Path, results: dict[str, Any], rows: list[dict[str, Any]], n: int, clock: Clock) -> None:
    shown, cells = results[SHOWN], _table(rows, n)
    plots.save(plots.molecule_density(results, title="Molecules of the policies and of their composition"), folder / DENSITY)
    shown.draw(12, columns=4, rewards=["seh", "sa"]).save(folder / DRAWN)
    shown.save(folder / "molecules.smi")
    replace_file(folder / "molecules.md", (markdown(cells) + "\n").encode())
    shares = ", ".join(f"{row['name']} {row['high all']:.0%}" for row in rows)
    pictures = [
        Shown(
            DENSITY,
            "Where the molecules of each policy and of the composition lie",
            "Right, predicted to bind better; up, easier to make. Dashed: from where on a score is called high.",
            f"A density of molecules over two scores for each model. High in both: {shares}.",
        ),
        Shown(
            DRAWN,
            f"Twelve molecules of {SHOWN}, as they were drawn",
            "The first twelve different ones, not the best. Below each, its two scores.",
            "Structures of twelve molecules with their sEH and SA scores.",
        ),
    ]
    note = f"High: sEH ≥ {HIGH['seh']}, SA ≥ {HIGH['sa']}. Distinct: different molecules among those drawn."
    both = next(row["high all"] for row in rows if row["name"] == SHOWN)
    headline = f"Molecules that bind and can be made: {both:.0%} score high in both"
    page = publish(folder, Part("molecules", headline, DONE, pictures, cells, note, MORE), clock)
    print(f"\n{markdown(cells)}\n\n{note}")
    print("\n".join(f"{level}: {meaning}." for level, meaning in meanings(cells)))
    names = f"{DENSITY}, {DRAWN}, molecules.smi, molecules.md, {page.name}"
    print(f"In {folder}/: {names}. It took {clock.seconds:.0f} s, {clock.cpu:.0f} s of one core.")


def _table(rows: list[dict[str, Any]], n: int) -> list[list[str]]:
    cells = [["", "mean sEH", "mean SA", "sEH high", "SA high", "both high", "distinct", "verdict", "molecules/s"]]
    for row in rows:
        shares = [f"{row[f'high {name}']:.1%}" for name in ("seh", "sa", "all")]
        numbers = [f"{row['seh']:.3f}", f"{row['sa']:.3f}", *shares, f"{row['distinct']:,} of {n:,}", row["verdict"]]
        cells.append([row["name"], *numbers, f"{row['rate']:.0f}"])
    return cells
