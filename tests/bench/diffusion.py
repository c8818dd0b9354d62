"""What the diffusion family reaches, beside an exact sampler: ``make bench-diffusion``.

Base models are closed forms at every noise level. 10,000 equally weighted samples each; errors are ratios to the mean error
of as many draws from an exact sampler (the floor), over several seeds in one run. One thread, CPU time.
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
import time
import warnings
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from diffusers_models import exact_model, sixteen_dimensions, three_rings, tight_rings
from oracles import ExactGuide, Grid, draw_posterior, energy_distance, mean_distance, sliced_wasserstein

import sculpt
from sculpt.classifier.guide import Guide
from sculpt.diffusion.diffusers.encoder import UNetEncoder
from sculpt.diffusion.diffusers.field import NetworkField
from sculpt.formula import Formula, Mixture, Nested

N = 10_000
GRID = Grid(4.0)
RINGS = three_rings()


TIGHT = tight_rings(), Grid(3.5)


def model(i: int, kind: str = "linear", rings=RINGS) -> sculpt.Diffusion:
    return exact_model(rings[i], kind, name="pqr"[i])


def seeds(n: int):
    return [torch.Generator().manual_seed(seed) for seed in range(n)]


def row(name: str, value: str, target: str, note: str = "") -> None:
    print(f"| {name} | {value} | {target} | {note} |", flush=True)


def heading(text: str) -> None:
    print(f"\n{text}\n\n| | measured | target | beside |\n|---|---|---|---|", flush=True)


def on_grid(formula: Formula, run, repeats: int = 3, rings=RINGS, grid=GRID) -> tuple[float, float, float]:
    """Total variation over the floor (mean), the error of log Z (of the worst run), and CPU seconds a run."""
    masses, log_z = grid.exact(formula, rings[: formula.m])
    floor = grid.floor(masses, N)
    ratios, errors, start = [], [], time.process_time()
    for generator in seeds(repeats):
        samples = run(generator)
        ratios.append(grid.total_variation(samples.x, masses) / floor)
        errors.append((samples.log_z if samples.log_z is not None else float("nan")) - log_z)
    return sum(ratios) / repeats, max(errors, key=abs), (time.process_time() - start) / repeats


def exact_formula(composition, rings=RINGS, grid=GRID) -> Formula:
    """The composition's formula over its leaves, inner parts normalised exactly."""
    parts, indices, log_z = [], [], []
    if not any(part.models for part in composition.models):
        return composition.formula
    for part in composition.models:
        inner = part.formula if part.models else Mixture([1.0])
        index = ["pqr".index(str(leaf)) for leaf in part.leaves]
        parts.append(inner)
        indices.append(index)
        log_z.append(grid.exact(inner, [rings[i] for i in index])[1] if inner.m > 1 else 0.0)
    return Nested(composition.formula, parts, indices, log_z)


def tracked(rings=RINGS, grid=GRID, title="", targets_apply: bool = True) -> None:
    p, q, r = (model(i, rings=rings) for i in range(3))
    heading(f"**Tracked densities**{title} (no training; total variation / floor)")
    rows = [
        ("mixture", p | q, 64, 1.3, None),
        ("harmonic mean", p & q, 64, 1.3, None),
        ("labels (0, 1, 2)", p & q & r, 64, 1.3, None),
        ("nested, (p & q) - r", (p & q) - r, 64, 1.3, None),
        ("contrast", p - q, 256, 1.4, None),
        ("product", sculpt.product([p, q], [1, 1]), 256, 1.8, 0.3),
        ("tempering 1.5", sculpt.product([p], [1.5]), 256, 1.8, 0.3),
        ("p·q^-1/2", sculpt.product([p, q], [1, -0.5]), 256, None, None),
        ("power mean, r = -2", sculpt.power_mean([p, q], -2), 256, 1.8, None),
        ("power mean, r = 1/2", sculpt.power_mean([p, q], 0.5), 256, 1.8, None),
        ("harmonic mean", p & q, 256, None, 0.05),
        ("contrast", p - q, 256, None, 0.05),
        ("labels (0, 1, 2)", p & q & r, 256, None, 0.08),
        ("nested, (p & q) - r", (p & q) - r, 256, None, 0.08),
    ]
    for name, composition, steps, target, target_z in rows:
        ratio, error, seconds = on_grid(
            exact_formula(composition, rings, grid),
            lambda g, c=composition, k=steps: c.sample(N, steps=k, generator=g, progress=False),
            rings=rings,
            grid=grid,
        )
        targets = [f"≤ {target}" if target else "", f"log Z within {target_z}" if target_z else ""] if targets_apply else []
        row(
            f"{name}, {steps} steps",
            f"**{ratio:.2f}**, log Z {error:+.3f}",
            ", ".join(filter(None, targets)) or "reported",
            f"{seconds:.1f} CPU s",
        )


def sixteen(seed: int = 0, title="") -> None:
    heading(f"**16 dimensions**{title}, 256 steps, tracked densities")
    mixtures = sixteen_dimensions(seed)
    p, q = (exact_model(m, name=name) for m, name in zip(mixtures, "pq", strict=True))
    x = mixtures[0].draw(1_000_000, torch.Generator().manual_seed(9))
    ell = torch.stack([m.log_prob(x) for m in mixtures], -1)
    for name, composition in (("harmonic mean", p & q), ("contrast", p - q)):
        formula = composition.formula
        reference, *others = [draw_posterior(formula, mixtures, N, torch.Generator().manual_seed(100 + k)) for k in range(4)]
        log_z = float((formula.value(ell) - ell[:, 0]).logsumexp(0)) - math.log(len(x))
        within = mean_distance(reference, reference)

        def distances(x, reference=reference, within=within):
            return torch.tensor([energy_distance(x, reference, within), sliced_wasserstein(x, reference)])

        floors = torch.stack([distances(x) for x in others]).mean(0)
        ratios, errors, least = [], [], 1.0
        for generator in seeds(3):
            samples = composition.sample(N, steps=256, generator=generator, progress=False)
            ratios.append(distances(samples.x) / floors)
            errors.append(samples.log_z - log_z)
            least = min(least, *(ess / samples.diagnostics.particles for ess in samples.diagnostics.ess))
        energy, wasserstein = torch.stack(ratios).mean(0).tolist()
        row(
            name,
            f"energy distance **{energy:.2f}** ({', '.join(f'{ratio[0]:.2f}' for ratio in ratios)}), "
            f"sliced Wasserstein {wasserstein:.2f}, log Z {max(errors, key=abs):+.3f}",
            "≤ 1.5, log Z within 0.05",
            f"least effective share {least:.0%}",
        )


def fresh() -> None:
    """Models that are not the benchmark's own: tighter rings, for which no target was set, and other pairs in 16 dimensions."""
    tracked(*TIGHT, title=", tighter rings", targets_apply=False)
    for seed in (4, 5):
        sixteen(seed, title=f", pair of seed {seed}")


class ProductOfSingles(Guide):
    """The published simplification: labels independent given the noisy state, p(y1, y2 | z) = p(y1 | z) p(y2 | z)."""

    def __init__(self, exact: ExactGuide):
        self.exact, self.m, self.observations, self.keys = exact, exact.m, exact.observations, exact.keys

    def marginal(self, *state):
        return self.exact.marginal(*state)

    def terminal(self, x):
        return self.exact.terminal(x)

    def log_h(self, *state, labels, odds=None):
        return self.marginal(*state)[:, list(labels[1:])].sum(-1)


def guided() -> None:
    p, q = model(0), model(1)
    heading("**Guided**, anchored, 32 steps of the second-order stochastic solver (total variation / floor)")
    exact = ExactGuide(RINGS[:2])
    start = time.process_time()
    fitted = sculpt.fit([p, q], progress=False)
    cost = time.process_time() - start
    for name, composition in (("harmonic mean", p & q), ("contrast", p - q)):

        def measure(guide, composition=composition, steps=32, repeats=3, **options):
            road = sculpt.Guided(guide, **options)
            run = functools.partial(composition.sample, N, road, steps=steps, progress=False)
            return on_grid(composition.formula, lambda g: run(generator=g), repeats)

        ratio, _, seconds = measure(exact)
        row(f"{name}, exact h", f"**{ratio:.2f}**", "≤ 1.2", f"{seconds:.1f} CPU s, quadrature included")
        ratio, error, seconds = measure(fitted)
        row(
            f"{name}, fitted in {cost:.0f} CPU s",
            f"**{ratio:.2f}**, log Z {error:+.3f}",
            "≤ 2.5 in ≤ 180 CPU s",
            f"{seconds:.1f} CPU s",
        )
        ratio, error, seconds = measure(fitted, correct=True)
        row(f"{name}, fitted, corrected", f"**{ratio:.2f}**, log Z {error:+.3f}", "≤ 1.5", f"{seconds:.1f} CPU s")
        ratio, _, seconds = measure(ProductOfSingles(exact), steps=500, form="mixture", repeats=1)
        row(f"{name}, the published form, 500 steps", f"{ratio:.2f}", "reported", f"{seconds:.1f} CPU s")
        referee = sculpt.Rejection(lambda x: torch.stack([m.log_prob(x) for m in RINGS[:2]], -1))
        run = functools.partial(composition.sample, N, referee, steps=64, progress=False)
        rejected, _, _ = on_grid(composition.formula, lambda g, run=run: run(generator=g))
        row(f"{name}, rejection with exact densities, base models at 64 steps", f"**{rejected:.2f}**", "1", "")


def schedules() -> None:
    heading("**Schedules**: linear-ε, cosine-v and flow matching in one composition, tracked densities, 64 steps")
    one, other = ([model(i, kind) for i, kind in enumerate(kinds)] for kinds in (["linear"] * 3, ["linear", "cosine", "flow"]))
    ratios = []
    for models in (one, other):
        composition = sculpt.posterior(models, (0, 1, 2))
        ratios.append(
            on_grid(
                composition.formula, lambda g, c=composition: c.sample(N, steps=64, generator=g, progress=False), repeats=6
            )[0]
        )
    row(
        "labels (0, 1, 2)",
        f"**{ratios[1]:.2f}**",
        f"within 10 % of one schedule's {ratios[0]:.2f}",
        f"ratio {ratios[1] / ratios[0]:.2f}",
    )


def cost() -> None:
    heading("**Cost of a guided step**, 1M-parameter UNet, batch 16, 3×32×32, two base models, anchored")
    from diffusers import DDPMScheduler, UNet2DModel

    def unet(seed):
        torch.manual_seed(seed)
        blocks = {"down_block_types": ("DownBlock2D",) * 3, "up_block_types": ("UpBlock2D",) * 3}
        return UNet2DModel(sample_size=32, layers_per_block=1, block_out_channels=(32, 64, 64), **blocks)

    networks = [unet(0), unet(1)]
    p, q = (sculpt.Diffusion(network, DDPMScheduler(), name=name) for network, name in zip(networks, "pq", strict=True))
    torch.manual_seed(2)
    heads = sculpt.Classifier(UNetEncoder.of(p), [p.key, q.key])
    with_field = sculpt.Classifier(UNetEncoder.of(p), [p.key, q.key], field=NetworkField.of(p, 2, False, 0.5))
    seconds = {}
    for name, classifier in (("gradient of log h", heads), ("field", with_field)):
        seconds[name] = step_cost(name, p & q, classifier.eval().requires_grad_(False), networks)
    row(
        "a step with a field, beside one with the gradient",
        f"**{seconds['field'] / seconds['gradient of log h']:.2f}**",
        "≤ 1.35",
    )


def step_cost(name: str, composition: sculpt.Composition, classifier: sculpt.Classifier, networks, steps: int = 32) -> float:
    """CPU seconds of a guided step; where they go, and what is called, goes into the table."""
    spent, calls = {"base": 0.0, "guidance": 0.0}, {"base": 0, "heads": 0, "field": 0}
    hooks = [network.register_forward_hook(lambda *_: count("base")) for network in networks]
    hooks.append(classifier.network.register_forward_hook(lambda *_: count("heads")))
    if classifier.field is not None:
        hooks.append(classifier.field.register_forward_hook(lambda *_: count("field")))

    def count(what):
        calls[what] += 1

    def timed(function, what):
        def run(*args, **kwargs):
            start = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                spent[what] += time.process_time() - start

        return run

    guided, found = composition.guided(classifier), []
    guided.base = timed(guided.base, "base")
    guided.guidance.log_h = timed(guided.guidance.log_h, "guidance") if classifier.field is not None else guided.guidance.log_h
    within = "added" if classifier.field is not None else "with_gradient"  # the latter is one forward and one backward pass
    setattr(guided.guidance, within, timed(getattr(guided.guidance, within), "guidance"))
    for _ in range(4):
        for record in (spent, calls):
            record.update(dict.fromkeys(record, 0))
        start = time.process_time()
        guided.sample(16, steps=steps, generator=torch.Generator().manual_seed(0), progress=False)
        total = time.process_time() - start
        found.append((total / steps, (total - sum(spent.values())) / total))
    for hook in hooks:
        hook.remove()
    seconds, outside = min(found)
    told = ", ".join(f"{what} {calls[what] / steps:.3g}" for what in calls)
    row(f"{name}: calls of networks a step", f"**{told}**", "base 1", f"{networks[0].num_parameters() / 1e6:.2f}M parameters")
    row(f"{name}: time outside the networks", f"**{outside:.1%}**", "≤ 2 %", f"{seconds * 1e3:.0f} CPU ms a step")
    return seconds


def main() -> None:
    parts = {"tracked": tracked, "sixteen": sixteen, "fresh": fresh, "guided": guided, "schedules": schedules, "cost": cost}
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", choices=list(parts) + [[]], help="which tables (all by default)")
    chosen = parser.parse_args().parts or list(parts)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for name in chosen:
        parts[name]()


if __name__ == "__main__":
    main()
