"""``sculpt demo molecules``: molecules that bind sEH and can be made, from two pretrained policies."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from sculpt import plots
from sculpt.composition import harmonic_mean
from sculpt.demo import markdown, pretrained
from sculpt.files import replace_file
from sculpt.hub import load
from sculpt.molecules.results import HIGH, Molecules

__all__ = ["run"]


def run(folder: str | Path = "demo", *, n: int = 1000, beta: float = 32, seed: int = 0) -> list[dict]:
    """Sample the policies and ``seh & sa`` on both roads, write pictures and a table to ``folder``, and return the table's rows."""
    folder, started = Path(folder), time.monotonic()
    home = pretrained("molecules", "seh-sa")
    seh, sa = (load(home / name, beta=beta) for name in ("seh", "sa"))
    classifier = load(home / "seh-sa")
    print(
        f"Two GFlowNet policies write molecules in proportion to reward^{beta:g}: seh those predicted to bind soluble epoxide\n"
        "hydrolase, sa those that are easy to make. seh & sa, their harmonic mean, is likely under both; nothing is retrained.\n"
    )
    both = harmonic_mean(seh, sa)
    roads = {
        "seh": lambda g: seh.sample(n, generator=g),
        "sa": lambda g: sa.sample(n, generator=g),
        "seh & sa, guided": lambda g: both.sample(n, classifier, correct=True, generator=g),
        "seh & sa, tracked": lambda g: both.sample(n, generator=g),
    }
    results: dict[str, Molecules] = {}
    rows = []
    for name, sample in roads.items():
        print(f"[{time.monotonic() - started:4.0f} s] {n:,} molecules of {name}", flush=True)
        began = time.monotonic()
        results[name] = sample(torch.Generator().manual_seed(seed))
        seconds = time.monotonic() - began
        summary = results[name].summary(["seh", "sa"])
        rows.append({"name": name, **summary.means, **{f"high {k}": v for k, v in summary.shares.items()}})
        rows[-1] |= {"distinct": summary.distinct, "rate": n / seconds}
    text = _table(rows, n)
    plots.save(plots.molecule_density(results), folder / "molecules-density.png")
    results["seh & sa, guided"].draw(12, columns=4, rewards=["seh", "sa"]).save(folder / "molecules.png")
    replace_file(folder / "molecules.md", (text + "\n").encode())
    replace_file(folder / "molecules.smi", "".join(f"{s}\n" for s in results["seh & sa, guided"].smiles).encode())
    print(f"\n{text}\n\nHigh: sEH ≥ {HIGH['seh']}, SA ≥ {HIGH['sa']}.")
    print(
        f"In {folder}/: molecules-density.png, molecules.png, molecules.smi, molecules.md. It took {time.monotonic() - started:.0f} s."
    )
    return rows


def _table(rows: list[dict], n: int) -> str:
    cells = [["", "mean sEH", "mean SA", "sEH high", "SA high", "both high", "distinct", "molecules/s"]]
    for row in rows:
        shares = [f"{row[f'high {name}']:.1%}" for name in ("seh", "sa", "all")]
        numbers = [f"{row['seh']:.3f}", f"{row['sa']:.3f}", *shares, f"{row['distinct']:,} of {n:,}", f"{row['rate']:.0f}"]
        cells.append([row["name"], *numbers])
    return markdown(cells)
