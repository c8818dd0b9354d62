"""``sculpt demo digits``: three image models and what can be composed of them."""

from __future__ import annotations

import importlib
import sys
import time
from pathlib import Path

import torch

from sculpt import plots
from sculpt.composition import posterior
from sculpt.demo import markdown, pretrained
from sculpt.files import replace_file
from sculpt.hub import load

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


def run(folder: str | Path = "demo", *, n: int = 16, steps: int = 24, seed: int = 0) -> list[dict]:
    """Sample the models and their compositions, write a picture and a table to ``folder``, and return the table's rows."""
    folder, started = Path(folder), time.monotonic()
    home = pretrained("digits", "triple")
    sys.path.append(str(home))
    data, judging = importlib.import_module("coloured_mnist"), importlib.import_module("judge")
    models = [load(home / name) for name in NAMES]
    classifier, judge = load(home / "triple"), judging.Judge.from_pretrained(home / "judge")
    shares = [data.proportions(name) for name in NAMES]
    print(
        "Three diffusion models of coloured digits: cyan draws all ten digits in cyan; zero-one draws 0 and 1, zero-two 0 and 2,\n"
        "both in cyan or beige. Composed by the labels of a classifier of all three; nothing is retrained.\n"
    )
    panels, captions, rows = {}, {}, []
    for name, labels in {**dict.fromkeys(NAMES), **COMPOSED}.items():
        print(f"[{time.monotonic() - started:4.0f} s] {n} images of {name}", flush=True)
        generator, began = torch.Generator().manual_seed(seed), time.monotonic()
        if labels is None:
            want = shares[NAMES.index(name)]
            samples = models[NAMES.index(name)].sample(n, steps=steps, generator=generator)
        else:
            composition = posterior(models, labels)
            want = data.composed(composition.formula, shares)
            samples = composition.sample(n, classifier, correct=True, particles=2 * n, steps=steps, generator=generator)
        seconds = time.monotonic() - began
        scores = judge.score(samples.x.float())
        panels[name] = samples
        rows.append(
            {
                "name": name,
                "labels": labels,
                "asked": float((want[scores.label] > 0).double().mean()),
                "drawn": data.written(scores.shares, 0.06),
                "exact": data.written(want, 0.06),
                "verdict": samples.diagnostics.verdict.partition(":")[0] if labels else "",
                "seconds": seconds / n,
            }
        )
        captions[name] = "" if labels is None else f"labels {labels}"
    text = _table(rows)
    figure = plots.image_panels(panels, captions=captions, across=8, title="Three models, and what is composed of them")
    plots.save(figure, folder / "digits.png")
    replace_file(folder / "digits.md", (text + "\n").encode())
    print(f"\n{text}\n\nAsked for: digits in colours that have a share in the exact proportions, which are the data's.")
    print(f"In {folder}/: digits.png, digits.md. It took {time.monotonic() - started:.0f} s.")
    return rows


def _table(rows: list[dict]) -> str:
    cells = [["", "labels", "as asked for", "digits drawn", "exact proportions", "verdict", "s an image"]]
    for row in rows:
        labels = "" if row["labels"] is None else str(row["labels"])
        cells.append(
            [row["name"], labels, f"{row['asked']:.0%}", row["drawn"], row["exact"], row["verdict"], f"{row['seconds']:.2f}"]
        )
    return markdown(cells)
