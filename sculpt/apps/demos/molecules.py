"""``sculpt demo molecules``: molecules that bind sEH and can be made, from two pretrained policies."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from sculpt import plots
from sculpt.apps.demos.common import Clock, markdown, pretrained
from sculpt.composition import harmonic_mean
from sculpt.files import replace_file
from sculpt.hub import load
from sculpt.model import BaseModel
from sculpt.molecules.scores import HIGH
from sculpt.roads import Guided, Road, Tracked

__all__ = ["run"]


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
    text, shown = _table(rows, n), results["seh & sa, guided"]
    plots.save(plots.molecule_density(results), folder / "molecules-density.png")
    shown.draw(12, columns=4, rewards=["seh", "sa"]).save(folder / "molecules.png")
    shown.save(folder / "molecules.smi")
    replace_file(folder / "molecules.md", (text + "\n").encode())
    print(f"\n{text}\n\nHigh: sEH ≥ {HIGH['seh']}, SA ≥ {HIGH['sa']}.")
    print(f"In {folder}/: molecules-density.png, molecules.png, molecules.smi, molecules.md. It took {clock.seconds:.0f} s.")
    return rows


def _table(rows: list[dict[str, Any]], n: int) -> str:
    cells = [["", "mean sEH", "mean SA", "sEH high", "SA high", "both high", "distinct", "verdict", "molecules/s"]]
    for row in rows:
        shares = [f"{row[f'high {name}']:.1%}" for name in ("seh", "sa", "all")]
        numbers = [f"{row['seh']:.3f}", f"{row['sa']:.3f}", *shares, f"{row['distinct']:,} of {n:,}", row["verdict"]]
        cells.append([row["name"], *numbers, f"{row['rate']:.0f}"])
    return markdown(cells)
