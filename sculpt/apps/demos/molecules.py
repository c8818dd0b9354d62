"""``sculpt demo molecules``: drug-like molecules that bind sEH and are easy to make, from two pretrained policies; then trees of fragments."""

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
from sculpt.molecules.smiles import Smiles
from sculpt.roads import Guided, Road, Tracked

__all__ = ["run"]

ODDS = 0.01
"""about e to minus the nats by which seh is further from the prior than sa"""
SHOWN = "seh & sa, odds .01"
NOTE = (
    f"High: sEH ≥ {Smiles.high['seh']}, SA ≥ {Smiles.high['sa']} of drug-like molecules; of fragments sEH ≥ {HIGH['seh']}, SA ≥ {HIGH['sa']}, "
    "as in the paper."
)


def run(folder: str | Path = "demo", *, n: int = 1000, beta: float = 64, seed: int = 0) -> list[dict[str, Any]]:
    """Sample the policies and their compositions, write pictures and a table, and return the table's rows.

    Args:
        folder: where pictures and table go.
        n: molecules of each.
        beta: the exponent of the rewards of drug-like molecules; of fragments it is 32.
        seed: of the samples.
    """
    folder, clock = Path(folder), Clock()
    print(
        f"Language models of drug-like molecules write SMILES in proportion to prior times reward^{beta:g}: seh those predicted to bind soluble\n"
        "epoxide hydrolase, sa those that are easy to make. seh & sa, their harmonic mean, is likely under both; odds put the more peaked of\n"
        "the two in its place. Nothing is retrained. Fragments: the same with GFlowNets that assemble larger molecules, of no prior.\n"
    )
    cases = _cases(n, beta)
    results: dict[str, Any] = {}
    rows = []
    for name, (model, road) in cases.items():
        clock.say(f"{n:,} molecules of {name}")
        began = time.monotonic()
        samples: Any = model.sample(n, road, generator=torch.Generator().manual_seed(seed))
        seconds, results[name] = time.monotonic() - began, samples
        summary = samples.summary(["seh", "sa"])  # by the marks of its kind: fragments have the paper's
        row = {"name": name, **summary.means, **{f"high {k}": v for k, v in summary.shares.items()}}
        rows.append(row | {"distinct": summary.distinct, "rate": n / seconds, "verdict": samples.verdict.level if road else ""})
    text, shown = _table(rows, n), results[SHOWN]
    drug_like = {name: result for name, result in results.items() if not name.startswith("fragments")}
    plots.save(
        plots.molecule_density(drug_like, high=(Smiles.high["seh"], Smiles.high["sa"])), folder / "molecules-density.png"
    )
    shown.draw(12, columns=4, rewards=["seh", "sa"]).save(folder / "molecules.png")
    shown.save(folder / "molecules.smi")
    replace_file(folder / "molecules.md", (text + "\n").encode())
    print(f"\n{text}\n\n{NOTE}\n\n{SHOWN}:\n{shown.summary()}")
    print(f"In {folder}/: molecules-density.png, molecules.png, molecules.smi, molecules.md. It took {clock.seconds:.0f} s.")
    return rows


def _cases(n: int, beta: float) -> dict[str, tuple[BaseModel, Road | None]]:
    """What is sampled, by name."""
    smiles, fragments = pretrained("smiles", "seh"), pretrained("molecules", "seh-sa")
    seh, sa = (load(smiles / name, beta=beta) for name in ("seh", "sa"))
    bind, easy = (load(fragments / name, beta=32) for name in ("seh", "sa"))
    return {
        "seh": (seh, None),
        "sa": (sa, None),
        SHOWN: (harmonic_mean(seh, sa, odds=ODDS), Tracked(particles=2 * n)),
        "fragments: seh & sa, tracked": (harmonic_mean(bind, easy), Tracked()),
        "fragments: seh & sa, guided": (harmonic_mean(bind, easy), Guided(load(fragments / "seh-sa"), correct=True)),
    }


def _table(rows: list[dict[str, Any]], n: int) -> str:
    cells = [["", "mean sEH", "mean SA", "sEH high", "SA high", "both high", "distinct", "verdict", "molecules/s"]]
    for row in rows:
        shares = [f"{row[f'high {name}']:.1%}" for name in ("seh", "sa", "all")]
        numbers = [f"{row['seh']:.3f}", f"{row['sa']:.3f}", *shares, f"{row['distinct']:,} of {n:,}", row["verdict"]]
        cells.append([row["name"], *numbers, f"{row['rate']:.0f}"])
    return markdown(cells)
