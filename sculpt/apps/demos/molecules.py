"""``sculpt demo molecules``: drug-like molecules that bind sEH and are easy to make, from two pretrained policies; then trees of fragments."""

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
from sculpt.molecules.smiles import Smiles
from sculpt.roads import Guided, Road, Tracked

__all__ = ["run"]

ODDS = 0.01
"""about e to minus the nats by which seh is further from the prior than sa"""
SHOWN = "seh & sa, odds .01"
DENSITY, DRAWN = "molecules-scores-before-and-after.png", "molecules-bind-and-can-be-made.png"
DONE = (
    "Two pretrained language models of drug-like molecules write SMILES in proportion to a reward: seh those predicted to bind soluble epoxide "
    "hydrolase, sa those that are easy to make. seh & sa, their harmonic mean, is likely under both, and nothing was trained for it. The same "
    "for policies that build molecules from fragments, with and without a classifier."
)
NOTE = (
    f"High: sEH ≥ {Smiles.high['seh']}, SA ≥ {Smiles.high['sa']} of drug-like molecules; of fragments sEH ≥ {HIGH['seh']}, SA ≥ {HIGH['sa']}, "
    "as in the paper. Distinct: different molecules among those drawn."
)
MORE = """
import sculpt

seh, sa = (sculpt.load(f"pretrained/smiles/{name}", beta=64) for name in ("seh", "sa"))
samples = sculpt.harmonic_mean(seh, sa, odds=0.01).sample(500)
print(samples.summary())
samples.save("both.sdf")
"""


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
    _write(folder, results, rows, n, clock)
    return rows


def _write(folder: Path, results: dict[str, Any], rows: list[dict[str, Any]], n: int, clock: Clock) -> None:
    shown, cells = results[SHOWN], _table(rows, n)
    drug_like = {name: result for name, result in results.items() if not name.startswith("fragments")}
    high = Smiles.high["seh"], Smiles.high["sa"]
    title = "Molecules of the policies and of their composition"
    plots.save(plots.molecule_density(drug_like, high=high, title=title), folder / DENSITY)
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
    both = next(row["high all"] for row in rows if row["name"] == SHOWN)
    headline = f"Molecules that bind and can be made: {both:.0%} score high in both"
    page = publish(folder, Part("molecules", headline, DONE, pictures, cells, NOTE, MORE), clock)
    print(f"\n{markdown(cells)}\n\n{NOTE}")
    print("\n".join(f"{level}: {meaning}." for level, meaning in meanings(cells)))
    names = f"{DENSITY}, {DRAWN}, molecules.smi, molecules.md, {page.name}"
    print(f"In {folder}/: {names}. It took {clock.seconds:.0f} s, {clock.cpu:.0f} s of one core.")


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


def _table(rows: list[dict[str, Any]], n: int) -> list[list[str]]:
    cells = [["", "mean sEH", "mean SA", "sEH high", "SA high", "both high", "distinct", "verdict", "molecules/s"]]
    for row in rows:
        shares = [f"{row[f'high {name}']:.1%}" for name in ("seh", "sa", "all")]
        numbers = [f"{row['seh']:.3f}", f"{row['sa']:.3f}", *shares, f"{row['distinct']:,} of {n:,}", row["verdict"]]
        cells.append([row["name"], *numbers, f"{row['rate']:.0f}"])
    return cells
