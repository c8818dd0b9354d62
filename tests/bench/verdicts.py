"""Whether verdicts tell good runs from bad ones: ``python tests/bench/verdicts.py --runs FILE``.

Compositions whose targets are known exactly, sampled well and badly. The error of a run is the total variation between its n samples
and the target on cells of about equal mass (48, or n/2 where that is less), divided by the mean of 200 times n exact draws: its ratio.
One run's ratio is noisy, by some 12 % with 48 cells and 25 % with 8; beside every run as many exact draws are judged in its place.

The list is fixed. FILE gets one line of JSON per run; runs that are there are not done again. Tables are printed with today's rules
for verdicts, from what the lines say of each run: ``--reprint`` does only that. ``--quick`` takes every fifth run, which are the first.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import json
import math
import sys
import time
import warnings
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2] / "pretrained" / "grid"))

import recipe
from diffusers_models import exact_model, three_rings, tight_rings
from gflownet_models import ENVIRONMENTS, arbitrary, network_policy, perfect
from gfn.gym import HyperGrid
from oracles import ExactGuide, GaussianMixture

import sculpt
from sculpt.diagnostics import Diagnostics, Verdict
from sculpt.gflownet import exact

BAD, GOOD = 2.0, 1.2
"""The ratios over which a run should not be called sound, and under which it should."""
DRAWS = 200


# --------------------------------------------------------------------------------------------------------------- base models


@dataclass
class Base:
    """Base models p, q, r, ... with their densities at points that stand for the whole space."""

    models: Sequence[Any]
    points: Tensor
    log_p: Tensor
    log_area: float = 0.0
    mixtures: Sequence[GaussianMixture] = ()

    def value(self, model) -> tuple[Tensor, float]:
        """A model's normalised log-density at the points, and log Z of its formula."""
        if not model.models:
            return self.log_p[:, [str(base) for base in self.models].index(str(model))], 0.0
        log_p = model.formula.value(torch.stack([self.value(part)[0] for part in model.models], -1))
        log_z = float((log_p + self.log_area).logsumexp(0))
        return log_p - log_z, log_z


def in_the_plane(mixtures: Sequence[GaussianMixture], half_width: float, n: int = 700) -> Base:
    axis = ((torch.arange(n, dtype=torch.float64) + 0.5) / n * 2 - 1) * half_width
    points = torch.cartesian_prod(axis, axis)
    log_p = torch.stack([mixture.log_prob(points) for mixture in mixtures], -1)
    models = [exact_model(mixture, name=name) for mixture, name in zip(mixtures, "pqr", strict=False)]
    return Base(models, points, log_p, 2 * math.log(2 * half_width / n), mixtures)


def blob(x: float, y: float, variance: float = 1.0) -> GaussianMixture:
    return GaussianMixture([[x, y]], torch.tensor(variance))


def nested_widths(x: float, y: float, variances: Sequence[float], weights: Sequence[float]) -> GaussianMixture:
    return GaussianMixture([[x, y]] * len(variances), torch.stack([v * torch.eye(2) for v in variances]).double(), weights)


def square(x: float, y: float, k: int = 4, spacing: float = 0.45, variance: float = 0.04) -> GaussianMixture:
    """Flat inside, with sharp edges."""
    axis = (torch.arange(k, dtype=torch.float64) - (k - 1) / 2) * spacing
    return GaussianMixture(torch.cartesian_prod(axis + x, axis + y), torch.tensor(variance))


PLANE = {
    "rings": lambda: in_the_plane(three_rings(), 7.0),
    "tight rings": lambda: in_the_plane(tight_rings(), 7.0),
    "2 apart": lambda: in_the_plane([blob(-1, 0), blob(1, 0), blob(0, 1.5, 0.5)], 12.0),
    "6 apart": lambda: in_the_plane([blob(-3, 0), blob(3, 0), blob(0, 2)], 20.0),
    "widths": lambda: in_the_plane(
        [nested_widths(0, 0, (0.04, 4), (0.5, 0.5)), nested_widths(1, 0, (0.2, 4), (0.5, 0.5)), blob(0, 0.5)], 20.0, 1000
    ),
    "tails": lambda: in_the_plane(
        [nested_widths(x, y, (0.1, 0.8, 6), (0.6, 0.3, 0.1)) for x, y in ((-0.6, 0.0), (0.6, 0.3), (0.0, -0.6))], 22.0, 1000
    ),
    "edges": lambda: in_the_plane([square(-0.4, 0), square(0.5, 0.2), square(0, -0.5, 3, 0.4)], 7.0),
}


def grid(height: int = 32, ndim: int = 2) -> HyperGrid:
    return HyperGrid(ndim=ndim, height=height, validate_modes=False)


def counted(models: Sequence[sculpt.GFlowNet]) -> Base:
    """GFlowNets, by pushing mass through each."""
    p = torch.stack([exact.terminal_distribution(model) for model in models], -1)
    return Base(models, exact.dag(models[0]).states.double(), p.log())


def flows(names: Sequence[str]) -> list[sculpt.GFlowNet]:
    env = grid()
    return [exact.solve(env, lambda states, name=name: recipe.log_reward(name, states), name=name) for name in names]


def hills(*centres: tuple[float, float], width: float = 4.0) -> list[sculpt.GFlowNet]:
    """Exact flows of rewards that lie around these cells."""
    env = grid()

    def solved(centre: tuple[float, float], name: str) -> sculpt.GFlowNet:
        middle = torch.tensor(centre)
        return exact.solve(env, lambda s: -((s.double() - middle) ** 2).sum(-1) / (2 * width**2), name=name)

    return [solved(centre, name) for centre, name in zip(centres, "pqr", strict=False)]


def bumps(rough: float, *centres: tuple[float, float]) -> list[sculpt.GFlowNet]:
    """Exact flows of narrow bumps on a low, rough floor: where two of them overlap no flow says before it is there."""
    env, generator = grid(), torch.Generator().manual_seed(0)
    states = exact.dag(env).states.double()

    def solved(centre: tuple[float, float], name: str) -> sculpt.GFlowNet:
        bump = (-((states - torch.tensor(centre)) ** 2).sum(-1) / 8).clamp(min=-14)
        noise = torch.randn(len(states), generator=generator, dtype=torch.float64)
        return exact.solve(env, bump + rough * noise, name=name)

    return [solved(centre, name) for centre, name in zip(centres, "pqr", strict=False)]


def pretending(scale: float, height: int = 10, m: int = 3) -> list[sculpt.GFlowNet]:
    """Exact flows of backward policies that are not told: the paths to one state disagree."""
    env = grid(height)
    backwards = [network_policy(env, i, is_backward=True, scale=scale) for i in range(m)]
    return [sculpt.GFlowNet(env, model.policy, name=model.name) for model in perfect(env, m, backwards=backwards)]


def own_backwards(height: int = 10, m: int = 3) -> list[sculpt.GFlowNet]:
    env = grid(height)
    return perfect(env, m, backwards=[network_policy(env, i, is_backward=True, scale=4.0) for i in range(m)])


@functools.cache
def stopped(steps: int) -> list[sculpt.GFlowNet]:
    """The circles' policies after so many steps of training."""
    models = []
    for name in ("circle1", "circle2", "circle3"):
        training = recipe.Recipe(name)
        network = training.training.network
        parameters = [{"params": network.parameters()}, {"params": training.log_Z.parameters(), "lr": 0.1}]
        optimizer = torch.optim.Adam(parameters, lr=recipe.RATE)
        for step in range(steps):
            loss, _ = training.loss(step)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        model = copy.copy(training.model())
        network.eval().requires_grad_(False)
        models.append(model)
    return models


CIRCLES, PAIR = recipe.SETS["circles"]["models"], recipe.SETS["pair"]["models"]
COUNTED = {
    "circles, exact flows": lambda: counted(flows(CIRCLES)),
    "hills, exact flows": lambda: counted(hills((8, 8), (20, 20), (8, 20))),
    "far hills, exact flows": lambda: counted(hills((5, 5), (26, 26), (16, 16))),
    "rough bumps, exact flows": lambda: counted(bumps(3.0, (6, 25), (25, 6), (16, 16))),
    "rougher bumps, exact flows": lambda: counted(bumps(6.0, (6, 25), (25, 6), (16, 16))),
    "3-D grid, exact flows": lambda: counted(perfect(ENVIRONMENTS["grid-3d"](), 3)),
    "bits, exact flows": lambda: counted(perfect(ENVIRONMENTS["bits"](), 3)),
    "sets, exact flows": lambda: counted(perfect(ENVIRONMENTS["sets"](), 3)),
    "own backward policies": lambda: counted(own_backwards()),
    "circles, learned": lambda: counted([sculpt.load(recipe.HERE / name) for name in CIRCLES]),
    "pair, learned": lambda: counted([sculpt.load(recipe.HERE / name) for name in PAIR]),
    "circles, 40 steps": lambda: counted(stopped(40)),
    "circles, 150 steps": lambda: counted(stopped(150)),
    "random policies": lambda: counted(arbitrary(grid(10), 3)),
    "random policies, sets": lambda: counted(arbitrary(ENVIRONMENTS["sets"](), 3)),
    "untold backward policies, 1": lambda: counted(pretending(1.0)),
    "untold backward policies, 2": lambda: counted(pretending(2.0)),
    "untold backward policies, 4": lambda: counted(pretending(4.0)),
}


@functools.lru_cache(maxsize=2)
def base(name: str) -> Base:
    return (PLANE | COUNTED)[name]()


# -------------------------------------------------------------------------------------------------------------- compositions

FORMULAS: dict[str, Callable[..., Any]] = {
    "p & q": lambda p, q, *_: p & q,
    "p & q & r": lambda p, q, r: p & q & r,
    "p & q, odds .1": lambda p, q, *_: sculpt.harmonic_mean(p, q, 0.1),
    "p - q": lambda p, q, *_: p - q,
    "p - q - r": lambda p, q, r: p - q - r,
    "(p, p, q)": lambda p, q, *_: sculpt.posterior([p, q], (0, 0, 1)),
    "p q": lambda p, q, *_: sculpt.product([p, q], [1, 1]),
    "p q^-.5": lambda p, q, *_: sculpt.product([p, q], [1, -0.5]),
    "p^1.5 q^-.5": lambda p, q, *_: sculpt.product([p, q], [1.5, -0.5]),
    "p^1.5": lambda p, *_: sculpt.product([p], [1.5]),
    "M_-2": lambda p, q, *_: sculpt.power_mean([p, q], -2),
    "M_0": lambda p, q, *_: sculpt.power_mean([p, q], 0),
    "M_.5": lambda p, q, *_: sculpt.power_mean([p, q], 0.5),
    "(p & q) - r": lambda p, q, r: (p & q) - r,
    "(p & q) r": lambda p, q, r: sculpt.product([p & q, r], [1, 1]),
    # of all three models, for a classifier of three
    "of 3: (0, 1)": lambda *m: sculpt.posterior(m, (0, 1)),
    "of 3: (0, 0)": lambda *m: sculpt.posterior(m, (0, 0)),
    "of 3: (0, 1, 2)": lambda *m: sculpt.posterior(m, (0, 1, 2)),
    "of 3: (0, 0, 2)": lambda *m: sculpt.posterior(m, (0, 0, 2)),
}
ALL = [name for name in FORMULAS if not name.startswith("of 3")]
TRACKED = {
    "rings": ALL,
    "tight rings": ALL,
    "2 apart": [name for name in ALL if name not in ("p & q, odds .1", "(p, p, q)", "p^1.5", "M_.5", "p - q - r")],
    "6 apart": ["p & q", "p & q & r", "p - q", "p q", "p^1.5 q^-.5", "M_0", "(p & q) - r", "(p & q) r"],
    "widths": ["p & q", "p & q & r", "p - q", "p q", "p q^-.5", "p^1.5 q^-.5", "M_-2", "(p & q) - r"],
    "tails": ["p & q", "p & q & r", "p - q", "p q", "p q^-.5", "p^1.5 q^-.5", "M_-2", "(p & q) r"],
    "edges": ["p & q", "p & q & r", "p - q", "p q", "p^1.5 q^-.5", "(p & q) - r"],
}
PAIRS = ["p & q", "p - q", "p q", "p^1.5 q^-.5"]
THREES = [*PAIRS, "p & q & r", "(p & q) - r"]


@dataclass(frozen=True)
class Case:
    """One run."""

    group: str
    models: str
    formula: str
    road: str
    particles: int
    steps: int | None
    n: int
    number: int

    @property
    def name(self) -> str:
        steps = "" if self.steps is None else f" x {self.steps}"
        return f"{self.models} | {self.formula} | {self.road} | {self.particles}{steps} -> {self.n} | {self.number}"

    @property
    def seed(self) -> int:
        """Another one for every run."""
        return zlib.crc32(self.name.encode())


def cases() -> list[Case]:
    """All runs. Those that take seconds are done once for a composition, others several times."""
    found: list[Case] = []
    numbers: dict[tuple[str, str, str], int] = {}

    def add(group: str, models: str, formula: str, road: str, particles: int, steps: int | None, *ns: int) -> None:
        for n in ns:
            numbers[models, formula, road] = number = numbers.get((models, formula, road), -1) + 1
            found.append(Case(group, models, formula, road, particles, steps, n, number))

    for models, formulas in TRACKED.items():
        for i, formula in enumerate(formulas):
            for N, steps, *ns in (
                (64, 8, 64, 16),
                (64, 32, 64, 16),
                (200, 32, 200, 200, 25),
                (200, 128, 25 if i % 2 else 200),
                (1000, 64, 1000 if i % 2 else 125),
                (2048, 128, 2048 if i % 2 else 256),
                (2048, 256, 256 if i % 2 else 2048),
            ):
                add(f"diffusion, tracked, {N} x {steps}", models, formula, "tracked", N, steps, *ns)
    for formula in ("p & q", "p - q"):
        for N, steps in ((64, 8), (64, 32), (200, 32), (1000, 32), (2048, 64)):
            for classifier in ("fair", "poor"):
                add("diffusion, guided", "rings", formula, f"guided, {classifier}", N, steps, N, N)
                add("diffusion, corrected", "rings", formula, f"corrected, {classifier}", N, steps, N, N // 4)
            if N <= 200:
                add("diffusion, guided", "rings", formula, "guided, exact", N, steps, N)
                add("diffusion, corrected", "rings", formula, "corrected, exact", N, steps, N, N // 4)
            add("diffusion, rejection", "rings", formula, "rejection by densities", N, steps, N)
            add("diffusion, rejection", "rings", formula, "rejection by the fair head", N, steps, N)
    for models in COUNTED:
        kind = next((kind for kind in ("exact flows", "learned", "steps") if kind in models), "paths disagree")
        kind = {"steps": "unconverged"}.get(kind, "exact flows" if models.startswith("own") else kind)
        for i, formula in enumerate(PAIRS if models.startswith("pair") else THREES):
            for N, *ns in ((64, 64, 16), (200, 200, 25), (1000, 1000, 125), (2048, 256 if i % 2 else 2048)):
                add(f"GFlowNets, tracked, {kind}", models, formula, "tracked", N, None, *ns)
        for formula in ("p & q", "p - q", "p & q & r")[: 2 if models.startswith("pair") else 3]:
            add(f"GFlowNets, rejection, {kind}", models, formula, "rejection", 200, None, 200, 2000)
    for models, formulas in (
        ("circles, learned", [name for name in FORMULAS if name.startswith("of 3")]),
        ("pair, learned", ["p & q", "p - q"]),
    ):
        for formula in formulas:
            for classifier in ("good", "fair", "poor"):
                for N in (64, 200, 2048):
                    add("GFlowNets, guided", models, formula, f"guided, {classifier}", N, None, N)
                    add("GFlowNets, corrected", models, formula, f"corrected, {classifier}", N, None, N, N // 4)
                add("GFlowNets, corrected", models, formula, f"corrected by densities, {classifier}", 1000, None, 1000)
    return found


@functools.cache
def classifier(models: str, kind: str):
    """Fitted for long, for a little while, or hardly at all."""
    ours = base(models)
    if kind == "exact":
        return ExactGuide(ours.mixtures[:2])
    if kind == "good":
        return sculpt.load(recipe.HERE / models.split(",")[0])
    if models == "rings":
        return sculpt.fit(ours.models[:2], steps={"fair": 500, "poor": 30}[kind], samples=5000, progress=False)
    return sculpt.fit(ours.models, len(ours.models), steps={"fair": 100, "poor": 10}[kind], progress=False)


def road(case: Case):
    """The road of a case; a population is as large as it says."""
    kind, _, fitted = case.road.partition(", ")
    if kind == "tracked":
        return sculpt.Tracked(particles=case.particles)
    if kind == "guided":
        return sculpt.Guided(classifier(case.models, fitted))
    if kind.startswith("corrected"):
        correct = "densities" if "densities" in kind else True
        return sculpt.Guided(classifier(case.models, fitted), correct=correct, particles=case.particles)
    if kind == "rejection by densities":
        mixtures = base(case.models).mixtures[:2]
        return sculpt.Rejection(lambda x: torch.stack([mixture.log_prob(x) for mixture in mixtures], -1))
    return sculpt.Rejection(classifier(case.models, "fair") if "head" in kind else None, max_draws=200_000)


# -------------------------------------------------------------------------------------------------------------------- errors


class Cells:
    """Space cut into k parts of about equal mass, each cut through the axis along which the mass is widest."""

    def __init__(self, points: Tensor, masses: Tensor, k: int):
        self.count = 0
        some = masses > 1e-12 * masses.max()
        self.tree = self._cut(points[some], masses[some], k)
        self.masses = torch.bincount(self.of(points), masses, minlength=self.count)

    def _cut(self, points: Tensor, masses: Tensor, k: int):
        w = masses / masses.sum()
        spread = (w[:, None] * (points - w @ points) ** 2).sum(0)
        if k == 1 or float(spread.max()) <= 0:
            self.count += 1
            return self.count - 1
        axis = int(spread.argmax())
        x, index = points[:, axis].unique(return_inverse=True)
        below = torch.bincount(index, w).cumsum(0)[:-1]
        place = int((below - (k // 2) / k).abs().argmin())
        at = float(x[place] + x[place + 1]) / 2
        left = points[:, axis] <= at
        # Where cells of the same size cannot be had, larger parts are cut into more.
        few = min(k - 1, max(1, round(k * float(below[place]))))
        return axis, at, self._cut(points[left], masses[left], few), self._cut(points[~left], masses[~left], k - few)

    def of(self, x: Tensor) -> Tensor:
        """The cell of each sample."""
        cells = torch.zeros(len(x), dtype=torch.long)

        def descend(tree, rows: Tensor) -> None:
            if isinstance(tree, int):
                cells[rows] = tree
                return
            axis, at, *sides = tree
            left = x[rows, axis].double() <= at
            for side, chosen in zip(sides, (left, ~left), strict=True):
                descend(side, rows[chosen])

        descend(self.tree, torch.arange(len(x)))
        return cells

    def distance(self, cells: Tensor) -> float:
        """The total variation of n samples in these cells."""
        return 0.5 * float((torch.bincount(cells, minlength=self.count) / len(cells) - self.masses).abs().sum())

    def draws(self, n: int, repeats: int, seed: int) -> list[float]:
        """The same of n exact draws."""
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.multinomial(self.masses.expand(repeats, -1), n, replacement=True, generator=generator)
        return [self.distance(row) for row in drawn]


@functools.lru_cache(maxsize=2)
def composed(models: str, formula: str) -> tuple[Any, Tensor, float]:
    """The composition, its masses at the points, and log Z."""
    ours = base(models)
    composition = FORMULAS[formula](*ours.models)
    log_p, log_z = ours.value(composition)
    return composition, (log_p + ours.log_area).exp(), log_z


@functools.lru_cache(maxsize=16)
def cut(models: str, formula: str, n: int) -> tuple[Cells, float]:
    """Cells for n samples, and the mean distance of exact draws."""
    cells = Cells(base(models).points, composed(models, formula)[1], min(48, n // 2))
    return cells, sum(cells.draws(n, DRAWS, 0)) / DRAWS


def measured(case: Case) -> dict[str, Any]:
    """Run it; what is known of the run, as a line for the file."""
    composition, _, log_z = composed(case.models, case.formula)
    cells, floor = cut(case.models, case.formula, case.n)
    how = road(case)
    said: dict[str, Any] = {"name": case.name, **dataclasses.asdict(case), "cells": cells.count, "floor": floor}
    said["exact_ratio"] = cells.draws(case.n, 1, 1 + case.seed)[0] / floor
    start, generator = time.process_time(), torch.Generator().manual_seed(case.seed)
    try:
        samples = composition.sample(case.n, how, steps=case.steps, generator=generator, progress=False)
    except (ValueError, RuntimeError, FloatingPointError) as error:
        return said | {"raised": f"{type(error).__name__}: {error}"[:300]}
    found = samples.diagnostics
    return said | {
        "ratio": cells.distance(cells.of(samples.x)) / floor,
        "distinct": len(samples.x.unique(dim=0)),
        "log_z_off": None if found.log_z is None else found.log_z - log_z,
        "seconds": time.process_time() - start,
        "level": found.verdict.level,
        "notes": found.notes,
        "diagnostics": stored(found),
    }


# --------------------------------------------------------------------------------------------------------------------- lines


def stored(found: Diagnostics) -> dict[str, Any]:
    """Diagnostics as numbers and texts, without their notes."""
    said = dataclasses.asdict(found)
    said |= {"notes": [], "ess": [round(value, 4) for value in found.ess], "parts": [stored(part) for part in found.parts]}
    return said


def restored(said: dict[str, Any]) -> Diagnostics:
    """Diagnostics from such a line; fields that are no more are left out."""
    known = {each.name for each in dataclasses.fields(Diagnostics)}
    kept = {name: value for name, value in said.items() if name in known}
    return Diagnostics(**kept | {"parts": [restored(part) for part in said["parts"]]})


def judged(line: dict[str, Any]) -> Verdict:
    """By today's rules."""
    return restored(line["diagnostics"]).verdict


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a file; one that was cut short is left out."""
    lines = []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return lines


def append(path: Path, line: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


# -------------------------------------------------------------------------------------------------------------------- tables


def share(part: Sequence, whole: Sequence) -> str:
    return f"{len(part)} of {len(whole)}" + (f" ({len(part) / len(whole):.1%})" if whole else "")


def row(name: str, lines: Sequence[dict[str, Any]]) -> None:
    ran = [line for line in lines if "raised" not in line]
    bad, good = [line for line in ran if line["ratio"] > BAD], [line for line in ran if line["ratio"] < GOOD]
    trusted, doubted = [line for line in bad if line["trusted"]], [line for line in good if not line["trusted"]]
    ratios = sorted(line["ratio"] for line in ran)
    exact_bad, exact_good = ([line for line in ran if test(line["exact_ratio"])] for test in (BAD.__lt__, GOOD.__gt__))
    print(
        f"| {name} | {len(ran)}{f' + {len(lines) - len(ran)} refused' * (len(lines) > len(ran))} | {ratios[len(ratios) // 2]:.2f} "
        f"| {share(trusted, bad)} | {share(doubted, good)} | {len(exact_bad)}, {len(exact_good)} |"
        if ran
        else f"| {name} | 0{f' + {len(lines)} refused' * bool(lines)} | | | | |",
        flush=True,
    )


def offenders(title: str, lines: Sequence[dict[str, Any]]) -> None:
    print(
        f"\n{title}\n\n| run | ratio | level | families, n | ess least, last | slip | apart | log Z off ± said |\n|---|---|---|---|---|---|---|---|"
    )
    for line in lines:
        found = line["diagnostics"]
        N, ess = found["particles"] or 0, found["ess"]
        families = "" if found["families"] is None else f"{found['families']:.0f} of {N}, "
        shares = f"{min(ess) / N:.0%}, {ess[-1] / N:.0%}" if ess and N else ""
        off = "" if line["log_z_off"] is None else f"{line['log_z_off']:+.2f} ± {found['log_z_error'] or 0:.2g}"
        print(
            f"| {line['name'].replace(' | ', ', ')} | {line['ratio']:.2f} | {line['now']} | {families}{line['n']} | {shares} | {found.get('slip', 0):.2g} "
            f"| {found.get('apart', 0):.2g} | {off} |"
        )


def report(lines: Sequence[dict[str, Any]]) -> None:
    for line in lines:
        if "raised" not in line:
            verdict = judged(line)
            line.update(now=verdict.level, trusted=verdict.trust == "good")
    compositions = {(line["models"], line["formula"]) for line in lines}
    print(f"\n{len(lines)} runs of {len(compositions)} compositions\n")
    print(
        f"| | runs | median ratio | over {BAD:g}: called sound | under {GOOD:g}: doubted | exact draws over {BAD:g}, under {GOOD:g} |"
    )
    print("|---|---|---|---|---|---|")
    groups: dict[str, list] = {}
    for line in lines:
        groups.setdefault(line["group"], []).append(line)
    for name, members in groups.items():
        row(name, members)
    for family in ("diffusion", "GFlowNets"):
        row(f"**{family}**", [line for line in lines if line["group"].startswith(family)])
    row("**all**", lines)
    ran = sorted((line for line in lines if "raised" not in line), key=lambda line: -line["ratio"])
    offenders(f"Over {BAD:g} and called sound", [line for line in ran if line["ratio"] > BAD and line["trusted"]])
    offenders(f"Under {GOOD:g} and doubted", [line for line in ran if line["ratio"] < GOOD and not line["trusted"]])
    for line in lines:
        if "raised" in line:
            print(f"\nRefused: {line['name']}: {line['raised']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, required=True, help="where the runs are kept")
    parser.add_argument("--quick", action="store_true", help="every fifth run")
    parser.add_argument("--reprint", action="store_true", help="judge what is there again, and run nothing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    first, planned = cases()[::5], cases()
    if not options.reprint:
        done = {line["name"] for line in read(options.runs)}
        for case in first if options.quick else [*first, *(case for case in planned if case not in first)]:
            if case.name not in done:
                append(options.runs, measured(case))
    names = {case.name for case in planned}
    report([line for line in read(options.runs) if line["name"] in names])


if __name__ == "__main__":
    main()
