"""``sculpt demo digits``: three image models and what can be composed of them."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from sculpt import plots
from sculpt.apps.demos.common import Clock, markdown, modules, pretrained
from sculpt.composition import posterior
from sculpt.files import replace_file
from sculpt.hub import load
from sculpt.roads import Guided

__all__ = ["run"]

NAMES = ("cyan", "zero-one", "zero-two")
COMPOSED = {
    "cyan and zero-one": (1, 0),
    "zero-one and zero-two": (1, 2),
    "all three": (1, 0, 2),
    "cyan, not the others": (0, 0, 0),
    "zero-one, not the others": (1, 1, 1),
    "zero-two, not the others": (2, 2, 2),
}
"""Labels by what they read as. The first is the model that is steered: one that draws much of what is asked for already."""


def run(folder: str | Path = "demo", *, n: int = 16, steps: int = 24, seed: int = 0) -> list[dict[str, Any]]:
    """Sample the models and their compositions, write a picture and a table, and return the table's rows.

    Args:
        folder: where picture and table go.
        n: images of each model and composition.
        steps: noise levels.
        seed: of the samples.
    """
    folder, clock = Path(folder), Clock()
    home = pretrained("digits", "triple")
    data, judging = modules(home, "coloured_mnist", "judge")
    models = [load(home / name) for name in NAMES]
    road, judge = Guided(load(home / "triple"), correct=True, particles=2 * n), judging.Judge.from_pretrained(home / "judge")
    shares = [data.proportions(name) for name in NAMES]
    print(
        "Three diffusion models of coloured digits: cyan draws all ten digits in cyan; zero-one draws 0 and 1, zero-two 0 and 2,\n"
        "both in cyan or beige. Composed by the labels of a classifier of all three; nothing is retrained.\n"
    )
    # One label alone is the model itself.
    panels, rows = {}, []
    for name, labels in {**{name: (i,) for i, name in enumerate(NAMES)}, **COMPOSED}.items():
        clock.say(f"{n} images of {name}")
        composition, began = posterior(models, labels), time.monotonic()
        model, by = (models[labels[0]], None) if name in NAMES else (composition, road)
        panels[name] = samples = model.sample(n, by, steps=steps, generator=torch.Generator().manual_seed(seed))
        row = {"name": name, "labels": None if by is None else labels, "seconds": (time.monotonic() - began) / n}
        scores, want = judge.score(samples.x.float()), data.composed(composition.formula, shares)
        row |= {
            "asked": float((want[scores.label] > 0).double().mean()),
            "verdict": "" if by is None else samples.verdict.level,
        }
        rows.append(row | {"drawn": data.written(scores.shares, 0.06), "exact": data.written(want, 0.06)})
    captions = {row["name"]: f"labels {row['labels']}" for row in rows if row["labels"]}
    figure = plots.image_panels(panels, captions=captions, across=8, title="Three models, and what is composed of them")
    plots.save(figure, folder / "digits.png")
    text = _table(rows)
    replace_file(folder / "digits.md", (text + "\n").encode())
    print(f"\n{text}\n\nAsked for: digits in colours that have a share in the exact proportions, which are the data's.")
    print(f"In {folder}/: digits.png, digits.md. It took {clock.seconds:.0f} s.")
    return rows


def _table(rows: list[dict[str, Any]]) -> str:
    cells = [["", "labels", "as asked for", "digits drawn", "exact proportions", "verdict", "s an image"]]
    for row in rows:
        labels = str(row["labels"] or "")
        shares = [_short(row["drawn"]), _short(row["exact"])]
        cells.append([row["name"], labels, f"{row['asked']:.0%}", *shares, row["verdict"], f"{row['seconds']:.2f}"])
    return markdown(cells)


def _short(shares: str, most: int = 4) -> str:
    """The largest shares, so that a row fits a terminal."""
    parts = shares.split(", ")
    return ", ".join(parts if len(parts) <= most else [*parts[: most - 1], f"{len(parts) - most + 1} more"])
