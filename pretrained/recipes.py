"""What the recipes of this folder share: a training that is watched, and the skeleton of a card."""

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from sculpt.entries import read_json
from sculpt.files import replacing, settled
from sculpt.training import Row, Training, mean


class Recipe(Protocol):
    """How a network is trained."""

    name: str
    steps: int
    training: Training

    def loss(self, seed: int) -> tuple[Tensor, Row]:
        """The loss of a new batch that is drawn with this seed, and what else to print of it."""

    def evaluate(self) -> Row:
        """What the averaged weights are worth."""


def train(recipe: Recipe, *, report: int = 100, check: int = 1000, keep: float = 120.0, seconds: float = math.inf) -> None:
    """Train to the end, or for so many seconds. Print the mean of every ``report`` steps, evaluate every ``check`` steps, save every
    ``keep`` seconds.
    """
    training, rows = recipe.training, []
    for row in training.run(recipe.loss, recipe.steps if training.seconds < seconds else 0):
        rows.append(row)
        done = training.step == recipe.steps or training.seconds >= seconds
        if training.step % report == 0:
            say(recipe, mean(rows))
            rows = []
        if done or training.step % check == 0:
            training.curve.append({"step": training.step, **recipe.evaluate()})
            say(recipe, training.curve[-1])
        training.save(every=0.0 if done else keep)
        if done:
            break


def say(recipe: Recipe, row: Row) -> None:
    at = {"step": recipe.training.step, "seconds": round(recipe.training.seconds)}
    print(recipe.name, json.dumps(at | _rounded(row)), flush=True)


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(entry) for key, entry in value.items()}
    return round(value, 4) if isinstance(value, float) else value


# Cards


def card(
    folder: Path,
    intro: str,
    code: str,
    facts: Mapping[str, str],
    *,
    title: str = "",
    measured: str = "",
    after: str = "",
    weights: str = "model.safetensors",
    licence: str = "the project's",
) -> str:
    """The card of a folder.

    Args:
        folder: of the weights.
        intro: what they are.
        code: how they are used.
        facts: where they come from, by row.
        title: by default the folder's name.
        measured: what was measured, before the facts.
        after: or after them.
        weights: the file.
        licence: of the weights.
    """
    sha = hashlib.sha256((folder / weights).read_bytes()).hexdigest()
    told = table(("", ""), {**facts, f"`{weights}`": f"sha256 {sha}", "licence": licence}.items())
    parts = [f"# {title or folder.name}", intro, f"```python\n{code.strip()}\n```", measured.strip(), told, after.strip()]
    return "\n\n".join(part for part in parts if part) + "\n"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    cells = ["|" + "|".join(f" {cell} " if cell else " " for cell in row) + "|" for row in (head, *rows)]
    return "\n".join([cells[0], "|" + "---|" * len(head), *cells[1:]])


def written_steps(runs: Sequence[dict], usual: int) -> str:
    """How long each run was, and how large its batches where they were not as usual."""
    sizes = [run.get("batch", usual) for run in runs]
    parts = [f"{run['steps']:,}" + f" (of {size})" * (size != usual) for run, size in zip(runs, sizes, strict=True)]
    return f"{' and '.join(parts)} steps of {usual}"


def written_cost(runs: Sequence[dict]) -> str:
    """The minutes of all runs; a GPU's by the clock."""
    cost = {"CPU": 0.0, "GPU": 0.0}
    for run in runs:
        cost["CPU" if run.get("device", "cpu") == "cpu" else "GPU"] += run["seconds"] / 60
    return " and ".join(f"{minutes:.0f} {where} minutes" for where, minutes in cost.items() if minutes)


def write_runs(folder: Path, runs: Sequence[dict]) -> None:
    """What ``--more`` and the card want to know of the trainings so far."""
    (folder / "training.json").write_text(json.dumps({"kind": "training", "runs": runs}, indent=1) + "\n")


def read_runs(folder: Path) -> list[dict]:
    """The trainings so far of what is in a folder."""
    with settled(folder):
        return read_json(folder / "training.json", "trained model")["runs"]


def publish(state: Path, folder: Path, runs: Sequence[dict], card: Callable[[Path], str]) -> None:
    """Put what a training has made in its checkpoint into a folder of its own, all of it at once, without the state of the training.

    Args:
        state: the checkpoint.
        folder: where it goes.
        runs: that made it.
        card: from the new folder to its card.
    """
    with settled(state), replacing(folder) as new:
        for path in sorted(state.iterdir()):
            if path.is_dir() and path.name != "training":
                shutil.copytree(path, new / path.name)
            elif path.is_file():
                shutil.copy(path, new / path.name)
        write_runs(new, runs)
        (new / "README.md").write_text(card(new))
