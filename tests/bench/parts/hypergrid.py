r"""GFlowNets on the 32 × 32 grid, composed of two to five objectives.

Linear: rewards :math:`\sum_i R_i / Z_i`, the mixture. All of them: the harmonic mean of the policies' distributions,
:math:`(\sum_i 1 / p_i)^{-1}`. The policies are those of ``pretrained/grid``, learned, and targets are exact for them, by pushing mass.
L1 is :math:`\sum |p - q|` of so many samples; that of as many exact draws is the least to be expected. The published mixing policy
weighs the policies by how likely each reaches the state: one particle with tracked densities is that policy.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from bench.parts.runs import Case, Method, Part
from imported import PRETRAINED
from torch import Tensor

import sculpt
from sculpt import plots
from sculpt.formula import PowerMean
from sculpt.gflownet import exact

__all__ = ["part"]

NAMES = ("circle1", "circle2", "circle3", "diag_sigmoid", "symmetric_shubert")
REPORTED = (
    "Reported by Yoon et al. (2026), linear, two to five objectives: L1 .003, and .0071 to .0108 where it was reproduced. Compositional "
    "Sculpting, circle1 ⊗ circle2: .229 and .397. Taken from secondary notes, not checked in the papers.",
)


def case(models: Sequence[sculpt.GFlowNet], exponent: float, n: int) -> Case:
    """Objectives by a power mean.

    Args:
        models: one for each objective.
        exponent: of the mean: 1 is the mixture, -1 all of them.
        n: samples of a run.
    """
    every = [exact.terminal_distribution(model) for model in models]
    target = exact.target(PowerMean(exponent, [1.0] * len(models)), every)
    states = exact.dag(models[0]).states

    def measure(x: Tensor) -> dict[str, float]:
        return {"L1": exact.l1(exact.histogram(models[0], x), target)}

    def draw(n: int, steps: int, generator: torch.Generator) -> Tensor:
        return states[torch.multinomial(target, n, True, generator=generator)]

    def sampled(composition: sculpt.Composition, road: sculpt.Road | None = None) -> Callable[..., Tensor]:
        return lambda n, steps, generator: composition.sample(n, road, generator=generator, progress=False).x

    mean = sculpt.power_mean(models, exponent)
    road = sculpt.Tracked(particles=n)
    best = sampled(sculpt.mixture(*models)) if exponent == 1 else sampled(mean, road)
    alone = sampled(mean, sculpt.Tracked(particles=1))
    methods = [
        Method("ours" if exponent == 1 else f"ours, {n:,} particles", best, 0, kind="ours", alone=False),
        Method("mixing policy, one particle", alone, 0),
        Method("exact draws", draw, 0, kind="exact"),
    ]
    name = f"{'linear' if exponent == 1 else 'all'}, {len(models)} objectives"
    return Case(name, methods, measure, {"L1": -1}, n, 0, picture=functools.partial(_picture, name))


def _picture(title: str, x: Tensor) -> bytes:
    return plots.png(plots.points2d(x, title))


def part(quick: bool = False) -> Part:
    """Linear and all, of two to five; ``quick``: of two."""
    n = 2000 if quick else 100_000
    models = [sculpt.load(PRETRAINED / "grid" / name) for name in NAMES]
    cases = [case(models[:m], exponent, n) for exponent in (1.0, -1.0) for m in ((2,) if quick else range(2, 6))]
    return Part("HyperGrid", __doc__ or "", REPORTED, cases, 2 if quick else 5)
