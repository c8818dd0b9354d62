r"""A checkerboard from two experts and a ratio, in the manner of ACE: :math:`p(x, y) \propto p(x | A) \, p(x, y | B) \, / \, p(x)`.

The joint expert is even on the dark squares of a 4 × 4 board, whose columns are not as likely as each other; its marginal is divided
out and another one, which has two of the columns only, is put in. The board, its columns and the number of samples are ours: those of
the paper could not be established, so its numbers are not comparable. An expert of x alone is given the same even y as the marginal it
is divided by. In :math:`z = x_0 + s \varepsilon` all experts have one schedule, so the path exists wherever the powers sum to more than
zero, and there is no collapse to correct. Distances are those of an optimal assignment to as many exact draws.
"""

from __future__ import annotations

import functools
import math

import torch
from bench.parts.closed import Boxes, Closed, cells
from bench.parts.ours import ours
from bench.parts.runs import Case, Method, Part
from bench.rivals.experts import experts
from bench.rivals.fkc import fkc
from torch import Tensor

import sculpt
from sculpt import plots

__all__ = ["part"]

HALF, BOARD = 2.0, ("#.#.", ".#.#", "#.#.", ".#.#")
COLUMNS, WANTED = (0.4, 0.1, 0.3, 0.2), (0.0, 0.7, 0.0, 0.3)
POWERS = (1.0, 1.0, -1.0)
REPORTED = (
    "Reported by Lee et al. (2026) on their own board: W1 .20 ± .04 and W2 .29 for ACE, W1 1.37 ± 1.09 for FKC, W1 .89 without resampling. "
    "Taken from secondary notes, not checked in the paper.",
)


def column(x: float) -> int:
    """The column of the board at x."""
    return int((x + HALF) / (2 * HALF) * len(COLUMNS))


def columns(shares: tuple[float, ...]) -> Boxes:
    """A density of x alone with these ``shares`` of the columns, and an even y."""
    edge = [HALF * (2 * k / len(shares) - 1) for k in range(len(shares) + 1)]
    some = [k for k, share in enumerate(shares) if share]
    return Boxes([(edge[k], edge[k + 1], -HALF, HALF) for k in some], [shares[k] for k in some])


def joint(shares: tuple[float, ...]) -> Boxes:
    """The board, with these ``shares`` of its columns."""
    squares = [box for box in cells(BOARD, HALF) if shares[column(box[0] + 1e-6)]]
    return Boxes(squares, [shares[column(box[0] + 1e-6)] for box in squares])


def distances(x: Tensor, y: Tensor) -> tuple[float, float]:
    """The Wasserstein distances W1 and W2 of two samples x and y of one size."""
    from scipy.optimize import linear_sum_assignment

    far = torch.cdist(x.double(), y.double())
    one, two = (far.numpy()[linear_sum_assignment(cost)] for cost in (far.numpy(), (far**2).numpy()))
    return float(one.mean()), math.sqrt(float((two**2).mean()))


def part(quick: bool = False) -> Part:
    """One composition; ``quick``: tiny."""
    n, steps = (100, 16) if quick else (1000, 128)
    models = [
        Closed(name, density, 2) for name, density in (("A", columns(WANTED)), ("B", joint(COLUMNS)), ("x", columns(COLUMNS)))
    ]
    target = joint(WANTED)
    dark = target.boxes

    def measure(x: Tensor) -> dict[str, float]:
        w1, w2 = distances(x, target.draw(len(x), torch.Generator().manual_seed(12345)))
        on = ((x[:, None] >= dark[:, ::2] - 0.03) & (x[:, None] <= dark[:, 1::2] + 0.03)).all(-1).any(-1)
        return {"W1": w1, "W2": w2, "on its squares": float(on.double().mean())}

    def corrected(n: int, steps: int, generator: torch.Generator) -> Tensor:
        return fkc(models, n, steps=steps, generator=generator, powers=POWERS)

    def summed(n: int, steps: int, generator: torch.Generator) -> Tensor:
        return experts(models, n, steps=steps, generator=generator, powers=POWERS)

    methods = [
        *ours(sculpt.product(models, POWERS), n, 1),
        Method("FKC", corrected, 3, alone=False),
        # With x as the base this is Composable Diffusion, too.
        Method("product of experts, without weights", summed, 3),
        Method("exact draws", lambda n, steps, generator: target.draw(n, generator), 0, kind="exact"),
    ]
    better = {"W1": -1, "W2": -1, "on its squares": 1}
    picture = functools.partial(_picture, "checkerboard")
    case = Case("p(x|A) p(x,y|B) / p(x)", methods, measure, better, n, steps, models, picture=picture)
    return Part("Checkerboard", __doc__ or "", REPORTED, [case], 2 if quick else 5)


def _picture(title: str, x: Tensor) -> bytes:
    return plots.png(plots.points2d(x, title))
