r"""What a classifier's label sets ask of memory, told before any of it is taken.

Notation: m base models, n observations, c children of a state that are scored in one pass. The head has an output for each child, each
anchor and each set of the other labels, :math:`c \, m \, k` with :math:`k = \binom{m + n - 2}{n - 1}`.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

__all__ = ["STEP", "Plan", "kept"]

STEP = 2**30
"""Bytes that the tables of a step may take: batches are made for it, and larger ones cut into parts where a family can do that."""

COPIES = 9
"""of the weights: themselves, gradient, two moments, average, best, best teacher, and two that AdamW computes with"""

SAVED = 10
"""more while the state of training is written: six of them as bytes, twice, and not the two that AdamW computes with"""


@dataclass(frozen=True)
class Plan:
    """How large the head over label sets is, and what a step of its training has in memory at once."""

    m: int
    n: int
    width: int
    """of the backbone"""
    odds: bool = False
    children: int = 1
    batch_size: int = 1
    """finished samples of each model"""
    step: int = 0
    """bytes of a step's tables, those for the way back among them"""
    least: int = 0
    """bytes that a step takes with the smallest batch"""

    @property
    def row(self) -> int:
        """Bytes of one child's outputs: all anchors and label sets."""
        return 4 * self.m * math.comb(self.m + self.n - 2, self.n - 1)

    @property
    def smaller(self) -> int:
        """Bytes of the outputs for fewer observations, which are sums over all orders of those that were not made."""
        # 40 labels that were not made have more orders than there is memory.
        sets = ((math.comb(self.m + size - 1, size), self.m ** min(self.n - 1 - size, 40)) for size in range(1, self.n - 1))
        return 4 * self.m * sum(many * (1 + orders // 2) for many, orders in sets)

    @property
    def weights(self) -> int:
        """Bytes of the head's weights."""
        return self.children * self.row * (self.width + 1)

    @property
    def bytes(self) -> int:
        """What the fit has in memory at once, beside samples and models."""
        return COPIES * self.weights + max(self.step, SAVED * self.weights)

    def check(self, memory: float) -> Plan:
        """The plan, or a ValueError where it takes more than so many gigabytes."""
        if self.bytes <= 1e9 * memory:
            return self
        less = (
            replace(self, n=n, step=self.least * replace(self, n=n).row // self.row) for n in range(min(self.n, 100) - 1, 1, -1)
        )
        fits = next((f"observations={plan.n} or " for plan in less if plan.bytes <= 1e9 * memory), "")
        ways = [f"Fit {fits}fewer models"]
        ways += ["leave out the head over children (children=False)"] if self.children > 1 else []
        ways += ["pass a smaller batch_size"] if replace(self, step=self.least).bytes <= 1e9 * memory else []
        raise ValueError(
            f"Label sets of {self.n} observations of {self.m} models would take {_gigabytes(self.bytes)} of memory, and may take {memory:g} GB: "
            f"{_many(self.row // 4)} outputs{f' for each of {self.children} children' if self.children > 1 else ''} are "
            f"{_gigabytes(COPIES * self.weights)} of weights and optimiser, {_gigabytes(SAVED * self.weights)} more to save them, and "
            f"{_gigabytes(self.step)} for a step of batch_size={self.batch_size}. {', or '.join(ways)}, or allow more: "
            "descent=sculpt.Descent(memory=...)."
        )


def kept(network: nn.Module, *state: Tensor) -> float:
    """Bytes that a pass of this network keeps for the way back, for each of these states."""
    network = copy.deepcopy(network).to(state[0].device).eval()
    sizes: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        memory = x.untyped_storage()
        sizes[memory.data_ptr()] = memory.nbytes()
        return x

    with torch.random.fork_rng(devices=[]), torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        features = network(*state)
    for own in (*network.parameters(), *network.buffers(), *state):
        sizes.pop(own.untyped_storage().data_ptr(), None)
    return (sum(sizes.values()) + features.nbytes) / len(features)


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:,.1f} GB" if size < 1e15 else "more than 1,000,000 GB"


def _many(number: int) -> str:
    return f"{number:,}" if number < 10**15 else f"more than {10**15:,}"
