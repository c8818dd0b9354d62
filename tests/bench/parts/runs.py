"""What a benchmark is made of: cases, the methods that are compared in each, and runs that survive a kill."""

from __future__ import annotations

import itertools
import json
import subprocess
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from bench.rivals.walk import evaluations
from torch import Tensor

from sculpt.diffusion.denoiser import Denoiser
from sculpt.files import replace_file

__all__ = ["Case", "Method", "Part", "Records", "commit", "run"]


@dataclass(frozen=True)
class Method:
    """One way to sample a composition.

    Args:
        name: as the table calls it.
        draw: from the number of samples, the steps and the generator to samples.
        width: evaluations a sample and step; 0 where nothing is evaluated.
        looks: evaluations a sample beside the steps.
        kind: ``ours``, ``rival``, or ``exact`` for what nobody can beat.
        same: whether it is after the case's own target; others are not compared by their distance to it.
        alone: whether every sample goes its way alone; populations are no match for one that does.
        fixed: whether it takes the first method's steps, and so about what that costs, looks of unknown number included.
    """

    name: str
    draw: Callable[[int, int, torch.Generator], Tensor]
    width: float = 1.0
    looks: float = 0.0
    kind: str = "rival"
    same: bool = True
    alone: bool = True
    fixed: bool = False

    def steps(self, budget: float) -> int:
        """How many steps so many evaluations a sample pay for."""
        return max(2, round((budget - self.looks) / self.width)) if self.width else 2


@dataclass(frozen=True)
class Case:
    """A composition, and those who sample it. The first method's evaluations are everybody's budget.

    Args:
        name: of the composition.
        methods: the first sets the budget.
        measure: from samples to numbers, of which the first decides who is ahead.
        better: for each number, 1 where more is better, -1 where less is, 0 where it is only told.
        n: how many samples a run is.
        steps: of the first method.
        models: whose evaluations are counted.
        exact: the numbers of the exact target, where they are known.
        picture: of samples, as a PNG.
        prepare: what is found out once, before anything is counted.
    """

    name: str
    methods: Sequence[Method]
    measure: Callable[[Tensor], dict[str, float]]
    better: dict[str, int]
    n: int
    steps: int
    models: Sequence[Denoiser] = ()
    exact: dict[str, float] = field(default_factory=dict)
    picture: Callable[[Tensor], bytes] | None = None
    prepare: Callable[[], object] | None = None


@dataclass(frozen=True)
class Part:
    """Cases of one kind, what a reader has to know of them, and what others report."""

    title: str
    about: str
    reported: Sequence[str]
    cases: Sequence[Case]
    seeds: int


def commit() -> str:
    """The commit that runs, with a plus where files differ from it."""
    told = subprocess.run(
        ["git", "describe", "--always", "--dirty=+"], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    return told.stdout.strip() or "unknown"


class Records:
    """Runs, one a line of a file, and one picture for each method of a case beside them."""

    def __init__(self, folder: Path):
        self.folder, self.path = folder, folder / "runs.jsonl"
        self.pictures = folder / "pictures"
        self.pictures.mkdir(parents=True, exist_ok=True)
        text = self.path.read_text() if self.path.exists() else ""
        # A kill in the middle of a line loses that run only.
        if text and not text.endswith("\n"):
            with self.path.open("a") as file:
                file.write("\n")
        self.runs = {told["key"]: told for told in filter(None, map(_read, text.splitlines()))}

    def add(self, told: dict[str, Any]) -> None:
        """Keep a run."""
        self.runs[told["key"]] = told
        with self.path.open("a") as file:
            file.write(json.dumps(told) + "\n")

    def picture(self, key: str) -> Path:
        """Where the picture of a method is."""
        return self.pictures / ("".join(c if c.isalnum() else "-" for c in key) + ".png")


def _read(line: str) -> dict[str, Any] | None:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None


def key(part: str, case: Case, method: Method, seed: int) -> str:
    """What a run is known by."""
    return f"{part} | {case.name} | {method.name} | n={case.n} steps={case.steps} | seed {seed}"


def run(
    name: str,
    part: Part,
    records: Records,
    log: Callable[[str], None] = print,
    share: tuple[int, int] = (0, 1),
) -> None:
    """All runs of a part that are not there yet, one seed of every case before the next.

    Args:
        name: of the part.
        part: its cases.
        records: where runs are kept.
        log: told of every run.
        share: every so manyth case of a seed from this one on, for several processes.
    """
    k, of = share
    for seed, case in list(itertools.product(range(part.seeds), part.cases))[k::of]:
        labels = [key(name, case, method, seed) for method in case.methods]
        if case.prepare and not all(label in records.runs for label in labels):
            case.prepare()
        for method, label in zip(case.methods, labels, strict=True):
            if label in records.runs:
                continue
            budget = None if label == labels[0] else records.runs[labels[0]]["evaluations"] / case.n
            told, x = _one(case, method, seed, budget)
            records.add({"key": label, "part": name, "case": case.name, "method": method.name, "seed": seed, **told})
            if case.picture and not seed:
                replace_file(records.picture(f"{name} {case.name} {method.name}"), case.picture(x))
            log(f"{label}: {told['measures']}, {told['seconds']} s")


def _one(case: Case, method: Method, seed: int, budget: float | None) -> tuple[dict[str, Any], Tensor]:
    steps = case.steps if budget is None or method.fixed else method.steps(budget)
    started = time.process_time()
    with evaluations(case.models) as seen, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Who keeps more than n samples is compared on n: distances fall with their number.
        x = method.draw(case.n, steps, torch.Generator().manual_seed(seed))[: case.n]
    told = {
        "n": len(x),
        "steps": steps,
        "evaluations": seen.count,
        "seconds": round(time.process_time() - started, 2),
        "measures": {name: float(f"{value:.6g}") for name, value in case.measure(x).items()},
        "commit": commit(),
    }
    return told, x
