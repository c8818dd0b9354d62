r"""A mixture of Gaussians in thirty dimensions to the power :math:`\gamma = 2`, in the manner of DriftLite.

Five Gaussians of different weights and covariances; the mixture of the paper could not be established, so its numbers are not
comparable. The square of a mixture is a mixture of all products of two, so exact draws are known. Distances are told as ratios to
those of as many exact draws.
"""

from __future__ import annotations

import functools
import itertools
import math

import torch
from bench.parts.closed import Closed
from bench.parts.ours import ours
from bench.parts.runs import Case, Method, Part
from bench.rivals.experts import experts
from bench.rivals.fkc import fkc
from oracles import GaussianMixture, energy_distance, mean_distance, sliced_wasserstein
from torch import Tensor

import sculpt

__all__ = ["part", "square"]

D, GAMMA = 30, 2.0
REPORTED = (
    "Reported by Ren et al. (2025) on their own mixture: the variance of the potential falls from 10² to 10³ to 10⁻¹ to 1, and 32 particles "
    "with their drift are better than 128 without. Taken from secondary notes, not checked in the paper.",
)


def mixture(seed: int = 0) -> GaussianMixture:
    """Five Gaussians of weights 1 to 5, some of which overlap, drawn from a ``seed``."""
    generator = torch.Generator().manual_seed(seed)
    means = 0.45 * torch.randn(5, D, dtype=torch.float64, generator=generator)
    A = torch.randn(5, D, D, dtype=torch.float64, generator=generator) / math.sqrt(D)
    covariances = 0.2 * (A @ A.mT) + 0.25 * torch.eye(D, dtype=torch.float64)
    return GaussianMixture(means, covariances, torch.arange(1.0, 6.0))


def square(p: GaussianMixture) -> GaussianMixture:
    """The mixture whose density is proportional to the square of that of p."""
    precisions = torch.linalg.inv((p.U * p.eigenvalues[:, None]) @ p.U.mT)
    means, covariances, log_w = [], [], []
    for i, j in itertools.product(range(len(p.means)), repeat=2):
        C = torch.linalg.inv(precisions[i] + precisions[j])
        means.append(C @ (precisions[i] @ p.means[i] + precisions[j] @ p.means[j]))
        covariances.append((C + C.T) / 2)
        apart, both = p.means[i] - p.means[j], torch.linalg.inv(precisions[i]) + torch.linalg.inv(precisions[j])
        log_w.append(p.weights[[i, j]].log().sum() - 0.5 * (torch.logdet(both) + apart @ torch.linalg.solve(both, apart)))
    return GaussianMixture(torch.stack(means), torch.stack(covariances), torch.softmax(torch.stack(log_w), 0))


def part(quick: bool = False) -> Part:
    """One mixture, with all particles in one population and with 32 in each; ``quick``: tiny."""
    n, steps = (128, 24) if quick else (2048, 256)
    p = mixture()
    target, model = square(p), Closed("p", p, D)
    reference, *others = [target.draw(n, torch.Generator().manual_seed(1000 + k)) for k in range(5)]
    within = mean_distance(reference, reference)
    kinds = torch.bincount(p.components(reference, 0.0)[0].argmax(-1), minlength=5).double() / n

    def raw(x: Tensor) -> tuple[float, float]:
        return energy_distance(x, reference, within), sliced_wasserstein(x, reference)

    floor = torch.tensor([raw(x) for x in others]).mean(0).tolist()

    def measure(x: Tensor) -> dict[str, float]:
        energy, sliced = raw(x)
        shares = torch.bincount(p.components(x, 0.0)[0].argmax(-1), minlength=5).double() / len(x)
        nats = float(target.log_prob(reference).mean() - target.log_prob(x).mean())
        return {
            "energy distance": energy / floor[0],
            "sliced Wasserstein": sliced / floor[1],
            "parts, total variation": 0.5 * float((shares - kinds).abs().sum()),
            "mean log-density off": nats,
        }

    def corrected(n: int, steps: int, generator: torch.Generator, particles: int | None = None) -> Tensor:
        return fkc([model], n, steps=steps, generator=generator, powers=[GAMMA], particles=particles)

    def summed(n: int, steps: int, generator: torch.Generator) -> Tensor:
        return experts([model], n, steps=steps, generator=generator, powers=[GAMMA])

    methods = [
        *ours(sculpt.product([model], [GAMMA]), n, 32, 1),
        Method("FKC, all particles", corrected, alone=False),
        Method("FKC, 32 particles", functools.partial(corrected, particles=32), alone=False),
        Method("the score times two, without weights", summed),
        Method("exact draws", lambda n, steps, generator: target.draw(n, generator), 0, kind="exact"),
    ]
    better = {"energy distance": -1, "sliced Wasserstein": -1, "parts, total variation": -1, "mean log-density off": 0}
    case = Case(f"p² in {D} dimensions", methods, measure, better, n, steps, [model])
    return Part("Thirty dimensions", __doc__ or "", REPORTED, [case], 2 if quick else 5)
