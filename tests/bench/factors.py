"""What factors reach: ``make bench-factors``; ``--parts plane nested grid field molecules`` for some of it.

Every line is the mean of ``--seeds`` runs: the error over that of as many exact draws, how often log Z is within two of its standard errors, and the
verdicts. Targets are exact by quadrature, by counting, in closed form; of molecules rejection is the referee.
"""

from __future__ import annotations

import argparse
import collections
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

import test_factor as exact
from diffusers_models import exact_model
from oracles import Grid

import sculpt
from sculpt.gflownet import exact as enumerated

ROOT = Path(__file__).parents[2]
GRID, N = Grid(6.0), 4000
FACTORS: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "exponential tilt": (lambda x: 0.7 * x[:, 0] - 0.4 * x[:, 1], True),
    "a line, up to .3": (lambda x: -0.5 * ((x[:, 0] - 0.8) / 0.3) ** 2, True),
    "a line, up to .1": (lambda x: -0.5 * ((x[:, 0] - 0.8) / 0.1) ** 2, True),
    "a spot, up to .2": (lambda x: -0.5 * (x - 1.0).square().sum(1) / 0.2**2, True),
    "ripples of two nats": (lambda x: 2 * torch.sin(3 * x[:, 0]) * torch.cos(2 * x[:, 1]), True),
    "half of the plane": (lambda x: torch.where(x[:, 0] + x[:, 1] > 1.5, 0.0, -math.inf), False),
}


def heading(text: str, columns: str) -> None:
    print(f"\n{text}\n\n| {columns} |\n|{'---|' * (columns.count('|') + 1)}", flush=True)


def line(
    name: str, how: str, run: Callable[[torch.Generator], tuple[sculpt.Samples, float]], log_z: float | None, seeds: int
) -> None:
    """One line of a table.

    Args:
        name: of the target.
        how: it was sampled.
        run: from a generator to samples, and their error over that of as many exact draws.
        log_z: the exact one.
        seeds: how many runs.
    """
    errors, covered, levels, start = [], 0, collections.Counter[str](), time.process_time()
    for seed in range(seeds):
        samples, error = run(torch.Generator().manual_seed(seed))
        errors.append(error)
        covered += log_z is not None and abs(samples.log_z - log_z) <= 2 * samples.diagnostics.log_z_error
        levels[samples.verdict.level] += 1
    said = ", ".join(f"{level} {count}" for level, count in levels.most_common())
    mean, spread = sum(errors) / seeds, torch.tensor(errors).std() / seeds**0.5
    seconds, known = (time.process_time() - start) / seeds, "–" if log_z is None else f"{covered} of {seeds}"
    print(f"| {name} | {how} | {mean:.2f} ± {spread:.2f} | {known} | {said} | {seconds:.1f} |", flush=True)


COLUMNS = "target | sampled | error over exact draws' | log Z within 2 se | verdicts | CPU s"


def cells(log: Tensor) -> tuple[Tensor, float]:
    """Masses of a target's cells, and log Z."""
    log = log + math.log(GRID.area)
    z, n, r = float(log.logsumexp(0)), GRID.n, GRID.refine
    return (log - z).exp().view(n, r, n, r).sum((1, 3)).flatten(), z


def on_grid(composition, masses, road, steps):
    floor = GRID.floor(masses, N)

    def run(generator):
        samples = composition.sample(N, road, steps=steps, generator=generator, progress=False)
        return samples, GRID.total_variation(samples.x, masses) / floor

    return run


def plane(seeds: int) -> None:
    heading(f"**One model of rings, times a factor** ({N:,} of 10,000 particles, 32 steps; rejection beside)", COLUMNS)
    p = exact_model(exact.RINGS[0], name="p")
    for name, (log_f, smooth) in FACTORS.items():
        masses, z = cells(exact.RINGS[0].log_prob(GRID.points) + log_f(GRID.points))
        bound = float(log_f(GRID.points).max()) + 1.0
        ways = {"selected": sculpt.Factor(log_f)} | ({"steered": sculpt.Factor(log_f, gradient=True)} if smooth else {})
        for how, factor in ways.items():
            line(name, how, on_grid(p * factor, masses, None, 32), z, seeds)
        if "tilt" not in name:
            line(name, "rejection", on_grid(p * sculpt.Factor(log_f, bound=bound), masses, sculpt.Rejection(), 32), z, seeds)


def nested(seeds: int) -> None:
    heading(f"**Nested** ({N:,} of 10,000 particles, 64 steps; line: up to .3, steered; ripples: selected)", COLUMNS)
    for name, compose in exact.NESTED.items():
        masses, z = exact.masses(name)
        line(name, "tracked", on_grid(compose(exact.LINE[True], exact.RIPPLES[False]), masses, None, 64), z, seeds)


def grid(seeds: int) -> None:
    heading("**Grid policies, learned** (pretrained/grid, 10,000 samples; L1 by counting)", COLUMNS)
    one, two = (sculpt.load(ROOT / f"pretrained/grid/{name}") for name in ("circle1", "circle2"))
    graph = enumerated.dag(one)
    x, p, q = graph.states, *(enumerated.terminal_distribution(model).log() for model in (one, two))

    def log_f(s: Tensor) -> Tensor:
        return -0.5 * ((s.double() - 20) / 6).square().sum(-1)

    def unit(log: Tensor) -> Tensor:
        return log - log.logsumexp(0)

    targets = {
        "circle1 · f": (lambda f: one * f, p + log_f(x)),
        "(circle1 & circle2) · f": (lambda f: (one & two) * f, unit(p + q - torch.logaddexp(p, q)) + log_f(x)),
        "circle1 - (circle2 · f)": (lambda f: one - two * f, 2 * p - torch.logaddexp(p, unit(q + log_f(x)))),
    }
    ways = {
        "selected, 60,000 particles": (sculpt.Factor(log_f), sculpt.Tracked(particles=60_000)),
        "steered by f itself, 20,000": (sculpt.Factor(log_f, value=True), sculpt.Tracked(particles=20_000)),
        "rejection": (sculpt.Factor(log_f, bound=0.0), sculpt.Rejection()),
    }
    for name, (compose, log) in targets.items():
        target, z, n = log.softmax(0), float(log.logsumexp(0)), 10_000
        g = torch.Generator().manual_seed(9)

        def l1(index: Tensor, target=target, n=n) -> float:
            return float((torch.bincount(index, minlength=len(target)) / n - target).abs().sum())

        floor = sum(l1(torch.multinomial(target, n, True, generator=g)) for _ in range(20)) / 20
        for how, (factor, road) in ways.items():
            composition = compose(factor)

            def run(generator, composition=composition, road=road, l1=l1, floor=floor, n=n):
                samples = composition.sample(n, road, generator=generator, progress=False)
                return samples, l1(graph.index(samples.x)) / floor

            line(name, how, run, z, seeds)


def field(seeds: int) -> None:
    heading(
        "**Inpainting a Gaussian field** (closed form; the error of the mean in posterior standard deviations, over that of as many exact draws)",
        COLUMNS,
    )
    for side, share, noise in ((8, 0.1, 0.3), (8, 0.5, 0.3), (16, 0.1, 0.3), (16, 0.5, 0.3), (16, 0.5, 0.1)):
        model, known, mean, variance, log_z = exact.observed_field(side, share, noise)
        name = f"{side}×{side}, {share:.0%} known up to {noise:g}"
        for n, particles, steps in ((256, 2000, 64), (256, 1, 64)):

            def run(generator, particles=particles, steps=steps, n=n, model=model, known=known, mean=mean, variance=variance):
                road = sculpt.Tracked(particles=particles)
                samples = (model * known).sample(n, road, steps=steps, generator=generator, progress=False)
                return samples, exact.off(samples, mean, variance)[0]

            if particles > 1:
                line(name, f"{n} of {particles:,} particles, {steps} steps", run, log_z, seeds)
            else:
                line(name, f"{n} particles that go alone", run, None, seeds)


def molecules(seeds: int) -> None:
    from sculpt.molecules import QED

    heading(
        "**Rewards on molecules** (seh, β = 32, times QED^γ: 1,000 molecules)",
        "γ | sampled | mean QED | log Z | verdict | CPU s",
    )
    seh, qed = sculpt.load(ROOT / "pretrained/molecules/seh", beta=32), QED()
    for power in (1, 2):
        factor = sculpt.Factor(lambda smiles: qed(smiles).clamp(min=1e-6).log(), power=power, bound=0.0, name="QED")
        for how, road in (("selected, 8,192 particles", sculpt.Tracked(particles=8192)), ("rejection", sculpt.Rejection())):
            start = time.process_time()
            samples = (seh * factor).sample(1000, road, generator=torch.Generator().manual_seed(0), progress=False)
            scores, seconds = qed(samples.smiles), time.process_time() - start
            z = f"{samples.log_z:.3f} ± {samples.diagnostics.log_z_error:.2g}"
            print(
                f"| {power} | {how} | {scores.mean():.4f} ± {scores.std() / 1000**0.5:.4f} | {z} | {samples.verdict.level} | {seconds:.0f} |",
                flush=True,
            )


PARTS = {"plane": plane, "nested": nested, "grid": grid, "field": field, "molecules": molecules}

if __name__ == "__main__":
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="*", default=list(PARTS), choices=PARTS, help="which tables")
    parser.add_argument("--seeds", type=int, default=5, help="runs of each line")
    given = parser.parse_args()
    for part in given.parts:
        PARTS[part](given.seeds)
