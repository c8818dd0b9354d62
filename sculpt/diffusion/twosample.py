r"""Whether two sets of samples may be of one distribution: the maximum mean discrepancy, and how often it is as large by chance.

.. math:: \text{MMD}^2 = E\,k(a, a') + E\,k(b, b') - 2\,E\,k(a, b), \qquad k(a, b) = \sum_c e^{-|a - b|^2 / (2 c^2 \mu)}

with :math:`\mu` the median of the squared distances. Where both are of one distribution, their samples may be exchanged.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["two_sample_test"]

SCALES = (0.25, 0.5, 1.0)


@torch.no_grad()
def two_sample_test(
    a: Float[Tensor, "n d"], b: Float[Tensor, "k d"], generator: torch.Generator, permutations: int = 500
) -> tuple[float, float]:
    """MMD², which is not negative, and the p-value of so large a one.

    Args:
        a: samples, or features of them.
        b: others.
        generator: of the permutations.
        permutations: how many; the p-value is at least one over their number plus one.
    """
    both = torch.cat([a.flatten(1), b.flatten(1)]).double()
    square = torch.cdist(both, both).square()
    median = square[square > 0].median().clamp(min=1e-12)
    kernel = sum(torch.exp(-square / (2 * c**2 * median)) for c in SCALES)
    signs = torch.cat([torch.full((len(a),), 1 / len(a)), torch.full((len(b),), -1 / len(b))]).double().to(both.device)
    order = [torch.arange(len(both))] + [torch.randperm(len(both), generator=generator) for _ in range(permutations)]
    v = signs[torch.stack(order).to(both.device)]
    found = ((v @ kernel) * v).sum(1)
    return float(found[0]), (1 + int((found[1:] >= found[0]).sum())) / (permutations + 1)
