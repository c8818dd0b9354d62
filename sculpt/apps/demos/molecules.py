"""``sculpt demo molecules``: molecules that bind sEH and are easy to make, from pretrained policies: trees of fragments, then drug-like ones."""

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
"""about e to minus the nats by which the drug-like seh is further from the prior than sa"""
BOTH = "seh & sa"
LIKE = "drug-like "
DENSITY, DRAWN = "molecules-scores-before-and-after.png", "molecules-bind-and-can-be-made.png"
DONE = (
    "Two pretrained GFlowNets build molecules from fragments in proportion to a reward: seh those predicted to bind soluble epoxide hydrolase, sa "
    "those that are easy to make. seh & sa, their harmonic mean, is likely under both, and nothing was trained for it; guided is the same by a "
    "classifier. Drug-like: the same with two language models of SMILES, which start from a prior whose molecules are easy to make already."
)
NOTE = (
    f"High: sEH ≥ {HIGH['seh']}, SA ≥ {HIGH['sa']}, as in the paper; of drug-like molecules sEH ≥ {Smiles.high['seh']}, SA ≥ {Smiles.high['sa']}. "
    "Distinct: different molecules among those drawn. What the drug-like seh writes is mostly easy to make already, because its prior's molecules "
    "are: the composition lies between its parts, and odds of .01 make up for seh being the more peaked of them."
)
MORE = """
import sculpt

seh, sa = (sculpt.load(f"pretrained/smiles/{name}", beta=64) for name in ("seh", "sa"))
samples = sculpt.harmonic_mean(seh, sa, odds=0.01).sample(500)
print(samples.summary())
samples.save("both.sdf")
"""


def run(folder: str | Path = "demo", *, n: int = 600, beta: float = 64, seed: int = 0) -> list[dict[str, Any]]:
    """Sample the policies and their compositions, write pictures and a table, and return the table's rows.

    Args:
        folder: where pictures and table go.
        n: molecules of each; of drug-like ones a quarter.
        beta: the exponent of the rewards of drug-like molecules; of fragments it is 32.
        seed: of the samples.
    """
    folder, clock = Path(folder), Clock()
    print(
        "GFlowNets build molecules from fragments in proportion to reward^32: seh those predicted to bind soluble epoxide hydrolase, sa those\n"
        "that are easy to make. seh & sa, their harmonic mean, is likely under both. Nothing is retrained. Drug-like: the same with language\n"
        f"models of SMILES, in proportion to prior times reward^{beta:g}; odds put the more peaked of the two in its place.\n"
    )
    results: dict[str, Any] = {}
    rows = []
    for name, (model, road) in _cases(n, beta).items():
        k = n // 4 if name.startswith(LIKE) else n
        clock.say(f"{k:,} molecules of {name}")
        began = time.monotonic()
        samples: Any = model.sample(k, road, generator=torch.Generator().manual_seed(seed))
        seconds, results[name] = time.monotonic() - began, samples
        summary = samples.summary(["seh", "sa"])  # by the marks of its kind: fragments have the paper's
        row = {"name": name, **summary.means, **{f"high {k}": v for k, v in summary.shares.items()}}
        rows.append(
            row | {"distinct": summary.distinct, "n": k, "rate": k / seconds, "verdict": samples.verdict.level if road else ""}
        )
    _write(folder, results, rows, clock)
    return rows


def _write(folder: Path, results: dict[str, Any], rows: list[dict[str, Any]], clock: Clock) -> None:
    *_, (drawn, shown) = results.items()
    cells, title = _table(rows), "Molecules of two policies, and of their composition"
    panels = {name: results[name] for name in ("seh", "sa", BOTH)}
    plots.save(plots.molecule_density(panels, title=title), folder / DENSITY)
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
            f"Twelve molecules of {drawn}, as they were drawn",
            "The first twelve different ones, not the best. Below each, its two scores; the table's last row is theirs.",
            "Structures of twelve molecules with their sEH and SA scores.",
        ),
    ]
    seh, sa, both = (f"{row['high all']:.0%}" for row in rows[:3])
    headline = f"Molecules that bind and can be made: {both} score high in both, where the two policies have {seh} and {sa}"
    page = publish(folder, Part("molecules", headline, DONE, pictures, cells, NOTE, MORE), clock)
    print(f"\n{markdown(cells)}\n\n{NOTE}")
    print("\n".join(f"{level}: {meaning}." for level, meaning in meanings(cells)))
    names = f"{DENSITY}, {DRAWN}, molecules.smi, molecules.md, {page.name}"
    print(f"In {folder}/: {names}. It took {clock.seconds:.0f} s, {clock.cpu:.0f} s of one core.")


def _cases(n: int, beta: float) -> dict[str, tuple[BaseModel, Road | None]]:
    """What is sampled, by name."""
    fragments, smiles = pretrained("molecules", "seh-sa"), pretrained("smiles", "seh")
    seh, sa = (load(fragments / name, beta=32) for name in ("seh", "sa"))
    bind, easy = (load(smiles / name, beta=beta) for name in ("seh", "sa"))
    return {
        "seh": (seh, None),
        "sa": (sa, None),
        BOTH: (harmonic_mean(seh, sa), Tracked()),
        f"{BOTH}, guided": (harmonic_mean(seh, sa), Guided(load(fragments / "seh-sa"), correct="densities")),
        f"{LIKE}seh": (bind, None),
        f"{LIKE}sa": (easy, None),
        f"{LIKE}{BOTH}, odds .01": (harmonic_mean(bind, easy, odds=ODDS), Tracked(particles=n)),
    }


def _table(rows: list[dict[str, Any]]) -> list[list[str]]:
    cells = [["", "mean sEH", "mean SA", "sEH high", "SA high", "both high", "distinct", "verdict", "molecules/s"]]
    for row in rows:
        shares = [f"{row[f'high {name}']:.1%}" for name in ("seh", "sa", "all")]
        numbers = [f"{row['seh']:.3f}", f"{row['sa']:.3f}", *shares, f"{row['distinct']:,} of {row['n']:,}", row["verdict"]]
        cells.append([row["name"], *numbers, f"{row['rate']:.0f}"])
    return cells
