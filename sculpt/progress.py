"""Where a run of samples is, and the bar that shows it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from sculpt.bars import bar
from sculpt.samples import Samples

__all__ = ["Progress", "watch"]


@dataclass(frozen=True)
class Progress:
    """Where a run is. The last one of a run has its ``samples``."""

    title: str
    step: int = 0
    steps: int | None = None
    ended: int = 0
    n: int = 0
    """how many have to end"""
    effective: float | None = None
    """the effective share of the particles, where they have weights"""
    samples: Samples | None = field(default=None, repr=False)
    state: Any = field(default=None, repr=False, compare=False)
    """of the particles, as their chain has it: diffusion models' noisy samples are its ``z``, or ``x`` with a solver"""
    longest: int | None = None
    """how many actions or tokens a sample has at most, where samples end by themselves; the first step writes none of them"""

    @property
    def far(self) -> tuple[int, int | None]:
        """How far the run is, and of how much: in steps; in what its longest sample has written, where samples end by themselves; in
        samples, where there are no steps. ``None`` where nobody knows of how much.

        Most samples that end by themselves end late and together, so how many have ended says little of the time that is left.
        """
        if self.steps:
            return self.step, self.steps
        if not self.step and self.longest is None:
            return self.ended, self.n
        written = max(0, self.step - 1)
        return written if self.longest is None else min(written, self.longest), self.longest

    @property
    def note(self) -> str:
        """What :attr:`far` does not say: how many have ended, where this is not known from the step."""
        return f"{self.ended:,} of {self.n:,} have ended" if self.step and not self.steps else ""


def watch(progress: Iterator[Progress], show: bool = True, callback: Callable[[Progress], Any] | None = None) -> Samples:
    """Run to the end, with a bar for what takes longer than two seconds, and return the samples. Whoever wants to look on is called after every step."""
    shown, now, title = None, None, None
    try:
        for now in progress:
            done, of = now.far
            if shown is None or now.title != title:
                if shown is not None:
                    shown.close()
                title = now.title
                shown = bar(title=title, total=of, show=show, leave=False)
            shown.total = of  # the first progress does not know yet whether there are steps
            shown.set_postfix_str(now.note, refresh=False)
            if callback is not None:
                callback(now)
            shown.update(done - shown.n)
    finally:
        if shown is not None:
            shown.close()
    if now is None or now.samples is None:
        raise RuntimeError("A run ended without samples: the last progress of a run has to carry them.")
    return now.samples
