"""``sculpt demo digits``: three image models and what can be composed of them."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sculpt import plots
from sculpt.apps.demos.common import Clock, luck, markdown, modules, pretrained
from sculpt.apps.demos.page import Part, Shown, meanings, publish
from sculpt.composition import posterior
from sculpt.files import replace_file
from sculpt.hub import load
from sculpt.roads import Guided

__all__ = ["run"]

NAMES = ("cyan", "zero-one", "zero-two")
COMPOSED = {
    "all three": ((1, 0, 2), "likely under all three"),
    "zero-one & zero-two": ((1, 2), "likely under both"),
    "cyan & zero-one": ((1, 0), "likely under both"),
    "cyan - zero-one - zero-two": ((0, 0, 0), "likelier under cyan than under the others"),
    "zero-one - cyan - zero-two": ((1, 1, 1), "likelier under zero-one than under the others"),
}
"""Labels and what they mean. The first label is the model that is steered: one that draws much of what is asked for already."""
SHOWN = 16
NOTE = (
    "Expected: the exact proportions of the target, from the proportions in the models' training data. Obtained: what a judge network, which "
    "no sampler sees, counts in the images. Misplaced: the share of images that would have to be of another kind for the two to agree (total "
    "variation); by luck: how much of that as many draws of an exact sampler have on average. Clear: the judge is at least 90 % sure of digit and colour."
)
MORE = """
import sculpt

models = [sculpt.load(f"pretrained/digits/{name}") for name in ("cyan", "zero-one", "zero-two")]
classifier = sculpt.load("pretrained/digits/triple")
road = sculpt.Guided(classifier, correct=True, particles=64)
sculpt.posterior(models, labels=(1, 0)).sample(16, road, steps=24).save("both.png")
print(sculpt.overlap(models, classifier, n=64, steps=24))
"""


def run(folder: str | Path = "demo", *, n: int = 24, steps: int = 24, seed: int = 0) -> list[dict[str, Any]]:
    """Sample the models and their compositions, write pictures, a table and the page, and return the table's rows.

    Args:
        folder: where they go.
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
    rows = []
    # One label alone is the model itself.
    for k, (name, (labels, read)) in enumerate(
        {**{name: ((i,), "as trained") for i, name in enumerate(NAMES)}, **COMPOSED}.items()
    ):
        clock.say(f"{n} images of {name}")
        composition, began = posterior(models, labels), time.monotonic()
        model, by = (models[labels[0]], None) if name in NAMES else (composition, road)
        samples = model.sample(n, by, steps=steps, generator=torch.Generator().manual_seed(seed + k))
        row = {"name": name, "read": read, "labels": labels if by else None, "seconds": (time.monotonic() - began) / n}
        scores, want = judge.score(samples.x.float()), data.composed(composition.formula, shares)
        kinds = {f"{colour} {digit}": i for i, (digit, colour) in enumerate(data.CLASSES) if max(want[i], scores.shares[i]) > 0}
        row |= {"clear": float(scores.accepted.double().mean()), "verdict": samples.verdict.level if by else ""}
        row |= {"shares": {kind: (float(want[i]), float(scores.shares[i])) for kind, i in kinds.items()}}
        row |= {"misplaced": 0.5 * float((scores.shares - want).abs().sum()), "luck": luck(want, n, 200)}
        rows.append(row | {"images": plots.distinct(samples, SHOWN)})
    _write(folder, rows, n, clock)
    return [{name: value for name, value in row.items() if name != "images"} for row in rows]


def _write(folder: Path, rows: list[dict[str, Any]], n: int, clock: Clock) -> None:
    pictures = [
        _picture(folder, "digits-base-models", "Three base models, as trained", rows[:3], n),
        _picture(folder, "digits-composed", "Composed: no model was trained on these proportions", rows[3:], n),
    ]
    cells = _table(rows)
    replace_file(folder / "digits.md", (markdown(cells) + "\n").encode())
    part = Part(
        "digits",
        "Digits that three image models share, and digits that only one of them draws",
        f"Three diffusion models of 32 × 32 pixels, and one classifier that was fitted to them once. {n} images of each formula from "
        f"{2 * n} particles, steered by the classifier and corrected by weights.",
        pictures[::-1],
        cells,
        NOTE,
        MORE,
    )
    page = publish(folder, part, clock)
    print(f"\n{markdown(cells)}\n\n{NOTE}")
    print("\n".join(f"{level}: {meaning}." for level, meaning in meanings(cells)))
    names = ", ".join(shown.file for shown in pictures)
    print(f"In {folder}/: {names}, digits.md, {page.name}. It took {clock.seconds:.0f} s, {clock.cpu:.0f} s of one core.")


def _picture(folder: Path, name: str, title: str, rows: list[dict[str, Any]], n: int) -> Shown:
    figure = plots.image_shares([_row(row, n) for row in rows], title=title)
    plots.save(figure, folder / f"{name}.png")
    said = "; ".join(f"{row['name']}: {_short(row, 1)} obtained, {_short(row, 0)} expected" for row in rows)
    caption = "Left, images; near-copies are left out of the display and counted in every number. Right, the share of each kind of image: outlined, expected; filled, obtained."
    return Shown(f"{name}.png", title, caption, f"Rows of coloured digits with bars beside them. {said}.")


def _row(row: dict[str, Any], n: int) -> dict[str, Any]:
    images: Tensor = row["images"]
    verdict = f"verdict: {row['verdict']}" if row["verdict"] else "a base model alone"
    caption = f"{len(images)} distinct ones of {n} images; {verdict}"
    shares = {kind.replace(" ", "\n"): both for kind, both in row["shares"].items()}
    return {"title": f"{row['name']}: {row['read']}", "images": images, "shares": shares, "caption": caption}


def _table(rows: list[dict[str, Any]]) -> list[list[str]]:
    cells = [["", "labels", "expected", "obtained", "misplaced", "by luck", "clear", "verdict", "s an image"]]
    for row in rows:
        numbers = [f"{row[name]:.0%}" for name in ("misplaced", "luck", "clear")]
        labels = str(row["labels"] or "")
        cells.append([row["name"], labels, _short(row, 0), _short(row, 1), *numbers, row["verdict"], f"{row['seconds']:.2f}"])
    return cells


def _short(row: dict[str, Any], which: int, most: int = 3) -> str:
    """The largest shares, so that a row fits a terminal."""
    parts = sorted(((both[which], kind) for kind, both in row["shares"].items() if both[which] > 0), reverse=True)
    said = [f"{kind} {share:.0%}" for share, kind in parts[:most]]
    return ", ".join(said if len(parts) <= most else [*said, f"{len(parts) - most} more"])
