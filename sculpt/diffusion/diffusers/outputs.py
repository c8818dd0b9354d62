r"""Learning what a scheduler is given: a weighted sum of what networks answer, :math:`F = \sum_r w_r O_r`, perhaps rescaled."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sculpt.diffusion.diffusers.calls import Rescale
from sculpt.diffusion.diffusers.inputs import Unknown, relative, tolerance
from sculpt.diffusion.diffusers.probing import BASE, Phase
from sculpt.diffusion.diffusers.trees import first
from sculpt.diffusion.diffusers.watch import Seen, Step, one

__all__ = ["Sum", "learned_sum", "rows_of", "without_variance"]

NOT_A_SUM = (
    "what it gives to its scheduler is no fixed weighted sum of what its networks answer. Turn off what changes guidance on the way or limits "
    "it, or guidance itself (guidance_scale=1)"
)


@dataclass(frozen=True)
class Sum:
    """How F is made of the rows of all calls that count."""

    index: Tensor | None
    """which numbers of a row are F's; all of them where there is none"""
    weights: list[float]
    own: int | None = None
    """the row whose size F is brought back to, where it is rescaled"""
    rescale: Rescale | None = None


def rows_of(seen: Seen) -> list[Tensor]:
    """The rows of an output, in its first tensor or list."""
    out = first(seen.output)
    if isinstance(out, list) and not all(isinstance(row, Tensor) for row in out):
        raise Unknown(f"{type(seen.network).__name__} answers with a list of {', '.join({type(row).__name__ for row in out})}")
    return out if isinstance(out, list) else list(out)


def without_variance(F: Tensor, shape: Sequence[int]) -> Tensor:
    """F without a learned variance, which doubles an axis."""
    for axis, (n, m) in enumerate(zip(F.shape[1:], shape, strict=True)):
        F = F.narrow(axis + 1, 0, m) if n == 2 * m else F
    return F


def learned_sum(phase: Phase, final: Sequence[int], numbers: Iterable[float], rows: bool) -> Sum:
    """How F comes out of the calls that count, ``final``; ``numbers`` are those that the pipeline was called with."""
    return _Output(phase, final, rows).learned(numbers)


class _Output:
    def __init__(self, phase: Phase, final: Sequence[int], rows: bool):
        self.final, self.rows, self.shape = final, rows, tuple(one(phase.steps[-1].x, rows).shape[1:])
        self.ones, self.last = phase.steps[1], phase.steps[-1]
        self.coded = phase.steps[3 : 3 + phase.digits]
        self.fitted, *held_out = (phase.steps[k] for k in phase.random)
        self.held_out = held_out + ([] if phase.late is None else [phase.late])
        networks = {id(self.last.calls[c].network): type(self.last.calls[c].network).__name__ for c in final}
        if len(networks) > 1:
            raise Unknown(
                f"{' and '.join(networks.values())} are called in one step, and what one answers is changed before the next takes it"
            )
        rows = self._rows(self.last)
        self.sizes, self.dtypes = {row.numel() for row in rows}, [row.dtype for row in rows]
        self.error = tolerance(*self.dtypes, self.fitted.F.dtype)

    def learned(self, numbers: Iterable[float]) -> Sum:
        index = self._traced()
        A, F = self._columns(self.fitted, index), self._F(self.fitted)
        w = torch.linalg.lstsq(A, F[:, None]).solution[:, 0]
        w = self._rounded(w, A, F)
        plain = len(index) == min(self.sizes) and torch.equal(index, torch.arange(len(index)))
        plain &= tuple(self._rows(self.last)[0].shape) == self.shape
        kept = None if plain else index
        worst = max(relative(self._columns(step, index) @ w, self._F(step)) for step in self.held_out)
        if worst < self.error * (1 + float(w.abs().sum())):
            return Sum(kept, w.tolist())
        for found in self._rescaled(index, numbers) if A.shape[1] == 2 else []:
            return Sum(kept, *found)
        raise Unknown(f"{NOT_A_SUM} (relative error {worst:.2g})")

    def _rows(self, step: Step) -> list[Tensor]:
        return [row for c in self.final for row in rows_of(step.calls[c])]

    def _F(self, step: Step) -> Tensor:
        """Of one sample."""
        F = without_variance(one(step.F, self.rows), self.shape)
        if tuple(F.shape[1:]) != self.shape:
            raise Unknown(
                f"the scheduler steps samples of shape {self.shape} with an output of shape {tuple(step.F.shape[1:])}"
            )
        return F.flatten().double().cpu()

    def _columns(self, step: Step, index: Tensor) -> Tensor:
        """Those numbers of every row that F is made of."""
        return torch.stack([row.flatten().double().cpu()[index] for row in self._rows(step)], -1)

    def _traced(self) -> Tensor:
        """Which number of a row every number of F is."""
        total = self._F(self.ones)
        # With ones for an output F is the sum of the weights, which is one, or minus one, but for guidance that is rescaled.
        total = torch.where(total.isfinite() & (total.abs() > 0.05), total, 1.0)
        index = torch.zeros(len(total), dtype=torch.long)
        for d, step in enumerate(self.coded):
            index += BASE**d * (self._F(step) / total).round().nan_to_num().long().clamp(0, BASE - 1)
        if len(self.sizes) != 1 or int(index.max()) >= min(self.sizes):
            raise Unknown(NOT_A_SUM)
        return index

    def _rounded(self, w: Tensor, A: Tensor, F: Tensor) -> Tensor:
        """Weights with as few digits as what the fit leaves open allows."""
        spread = (A @ w - F).square().mean() * torch.linalg.pinv(A.mT @ A).diagonal()
        open_ = 5 * spread.sqrt() + 1e-6 * w.abs()
        for k in range(7):
            nice = (w * 10**k).round() / 10**k
            if ((nice - w).abs() <= open_).all():
                return nice
        return w

    def _rescaled(self, index: Tensor, numbers: Iterable[float]) -> Iterable[tuple[list[float], int, Rescale]]:
        """Guidance at a scale of the call's, brought back to the size of the condition's answer."""
        scales = sorted({float(number) for number in numbers})
        shares = [share for share in scales if 0 < share < 1] + [1.0]
        columns = [self._columns(step, index).reshape(*self.shape, 2) for step in self.held_out]
        F = [self._F(step).reshape(self.shape) for step in self.held_out]
        for w, own, along_last, share in itertools.product(scales, (0, 1), (True, False), shares):
            rescale = Rescale(own, share, along_last)
            weights = [w, 1 - w] if own == 0 else [1 - w, w]
            made = [rescale((o @ torch.tensor(weights, dtype=o.dtype))[None], o[None, ..., own])[0] for o in columns]
            for sign in (1, -1):
                if all(relative(sign * one, two) < self.error * (1 + 2 * abs(w)) for one, two in zip(made, F, strict=True)):
                    yield [sign * weight for weight in weights], own, rescale
                    return
