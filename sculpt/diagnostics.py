"""What a run knows about itself, and the verdict: how far its samples may be trusted."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal

import torch

from sculpt import preview
from sculpt.entries import Entries

if TYPE_CHECKING:
    from sculpt.particles import Population

__all__ = ["LEVELS", "Diagnostics", "Verdict", "printable"]

LEVELS = ("exact", "sound", "thin", "steered", "strained", "biased", "doubtful", "collapsed", "uncovered")
Level = Literal["exact", "sound", "thin", "steered", "strained", "biased", "doubtful", "collapsed", "uncovered"]

COPIES = 5.0
"""Samples for every family, from which on many are near-copies. Noise makes the members of a family differ, so a few are none."""
SHARE, FEW = 0.02, 10
"""Of the starting particles, and how many, under which the weight comes from too few."""
LOST, SLIP, APART = 0.01, 1.0, 0.25
"""From which on weights are in doubt: the share of lost particles, what the steps put into log Z, and how far two looks are apart."""
NOTHING = 0.01
"""Nats that two looks may differ by and still be exact."""

LONG, MANY = 1_000_000, 100_000
"""Characters of a text, and runs or notes, in a file."""
COUNT = 2**53


def printable(text: str, most: int = 1000) -> str:
    """A text in one line that any terminal can show, and no more than so many characters of it."""
    text = text if len(text) <= most else f"{text[: most - 1]}…"
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


@dataclass(frozen=True)
class Verdict:
    """How far a result may be trusted. ``str`` gives the sentence.

    Args:
        level: a word, from exact and sound to collapsed and uncovered.
        reason: why.

    Example:
        >>> verdict = (one & two).sample(100, generator=seed).verdict
        >>> verdict.level, verdict.trust
        ('sound', 'good')
    """

    level: Level
    reason: str

    @property
    def trust(self) -> Literal["good", "careful", "bad"]:
        """What the level means: take it; read the reason first; do not take it for draws from the target."""
        rank = LEVELS.index(self.level)
        return "good" if rank < 2 else "careful" if rank < LEVELS.index("doubtful") else "bad"

    def _repr_html_(self) -> str:
        return preview.box(str(self), self.trust)

    def __str__(self) -> str:
        return f"{self.level.upper() if self.trust == 'bad' else self.level}: {self.reason}"


@dataclass(repr=False)
class Diagnostics:
    """What one run tells about itself. ``print`` it; the verdict is the last line.

    Args:
        road: how the samples were drawn.
        formula: of what.
        steps: how many the run took.
        particles: the size of its population.
        samples: how many were asked of it.
        lost: particles that went to numbers that are not finite.
        ess: the effective sample size after every weighting.
        log_z: the estimate of the target's log-normaliser.
        log_z_error: the standard error of ``log_z``, what the steps may have added to it included.
        slip: that part of it: what their finite number may have added to log Z.
        ancestors: how many particles of the start have descendants with weight.
        families: how many particles of the start the weight comes from.
        apart: how far two looks at the log-ratios of one sample are apart, in nats: standard deviation.
        steered: whether every sample is a run of its own, that nothing was selected from.
        doubt: a known error that the weights do not show.
        acceptance: the share of the anchor's samples that rejection keeps, or would keep.
        referee: what rejection decided by.
        seed: of the generator, where the run was the first to use it: the same seed gives the same samples.
        notes: what else there is to know.
        parts: the diagnostics of the runs that these samples come from, where there are several.

    Example:
        >>> print((one & two).sample(100, generator=seed).diagnostics)
                    road  tracked densities
                 formula  circle1 ⊗ circle2
        ...
    """

    road: str
    formula: str = ""
    steps: int = 0
    particles: int | None = None
    samples: int | None = None
    lost: int = 0
    ess: list[float] = field(default_factory=list)
    log_z: float | None = None
    log_z_error: float | None = None
    slip: float = 0.0
    ancestors: int | None = None
    families: float | None = None
    apart: float = 0.0
    steered: bool = False
    doubt: str = ""
    acceptance: float | None = None
    referee: str = ""
    seed: int | None = None
    notes: list[str] = field(default_factory=list)
    parts: list[Diagnostics] = field(default_factory=list)

    def observe(self, population: Population, acceptance: float | None = None, *, selected: bool = True) -> None:
        """Take down what a population knows about itself, and whether its weights select the samples or are there to look at."""
        self.particles, self.lost, self.ess = population.n, population.lost, list(population.ess)
        if selected:
            self.ancestors, self.families = population.ancestors, population.families
        self.log_z, self.acceptance = population.log_z, acceptance
        self.log_z_error = math.hypot(population.log_z_error, self.slip)

    @property
    def verdict(self) -> Verdict:
        """May the samples be trusted as draws from the target?"""
        if self.parts:
            runs = list(self.runs())
            worst = max((run.verdict for run in runs), key=lambda verdict: LEVELS.index(verdict.level))
            return worst if len(runs) == 1 else Verdict(worst.level, f"the least trusted of {len(runs)} runs: {worst.reason}")
        if self.referee:
            return self._of_rejection()
        if self.steered:
            return Verdict(
                "steered",
                "every sample was steered on its own, and nothing was selected: proportions are not the target's. Take "
                "Tracked(particles=64) or more for that.",
            )
        if not (self.particles and self.ess):
            return Verdict("sound", "nothing was weighted, and nothing unusual happened.")
        return self._of_weights() if self.families is None else self._of_particles(self.families, self.particles)

    def _of_rejection(self) -> Verdict:
        said = f"for the base samplers and {self.referee}; {self.acceptance:.2g} of the draws were kept."
        if self.apart <= NOTHING:
            return Verdict("exact", said)
        if doubt := self._doubt:
            return Verdict("doubtful", doubt)
        return Verdict("sound", f"{said} Two looks at one sample differ by {self.apart:.2g} nats.")

    def _of_weights(self) -> Verdict:
        last = self.ess[-1] / (self.particles or 1)
        if last >= 0.5:
            return Verdict("sound", f"guidance stays close to the exact chain (weights would keep {last:.0%}).")
        return Verdict(
            "biased",
            f"guidance leaves the exact chain (weights would keep {last:.1%}). Sample with Guided(classifier, correct=True), or train the "
            "classifier longer.",
        )

    def _of_particles(self, families: float, n: int) -> Verdict:
        least, last, ancestors = min(self.ess) / n, self.ess[-1] / n, self.ancestors or 0
        if ancestors < max(2, min(10, 0.02 * n)) or last < 0.01:
            worth = f"descend from {ancestors} of the start" if ancestors < n else f"are worth {families:.0f}"
            return Verdict(
                "collapsed",
                f"the {n} particles {worth} (least effective share {least:.1%}). Take the samples as near-copies; use a classifier, more "
                "particles, or a milder composition.",
            )
        if doubt := self._doubt:
            return Verdict("doubtful", doubt)
        few = f"the weight comes from {families:.0f} of {n} starting particles"
        if families < max(SHARE * n, min(FEW, 0.5 * n)) or last < 0.1:
            return Verdict("strained", f"{few}. More particles would help.")
        if min(self.ess) < min(FEW, 0.5 * n):
            return Verdict("strained", f"all weight was with {min(self.ess):.0f} of {n} particles once. More would help.")
        if self.samples and self.samples > COPIES * families:
            return Verdict(
                "strained",
                f"{few}, and {self.samples} samples were asked of them: many are near-copies. More particles would help.",
            )
        return Verdict("sound", f"{few}, least effective share {least:.0%}.")

    @property
    def _doubt(self) -> str:
        """What makes every weight doubtful, however many particles share it."""
        if self.doubt:
            return self.doubt
        if self.lost > LOST * (self.particles or 1):
            return f"{self.lost} of {self.particles} particles were lost to numbers that are not finite. Check the networks, or take more steps."
        if not self.slip <= SLIP:
            return f"the finite number of steps may have moved log Z by {self.slip:.2g} nats. Take more steps."
        if not self.apart <= APART:
            return (
                f"two looks at the log-densities of one sample differ by {self.apart:.2g} nats: weights are as uncertain as that. Train the base "
                "models longer, or decide by a classifier."
            )
        return ""

    def runs(self) -> Iterator[Diagnostics]:
        """The runs that these samples were put together from, or this one."""
        for part in self.parts:
            yield from part.runs()
        if not self.parts:
            yield self

    def rows(self) -> list[tuple[str, str]]:
        """What is printed, without the verdict."""
        rows = [("road", self.road), ("formula", self.formula), ("steps", str(self.steps or ""))]
        if self.particles and self.ess:
            shares = f"least {min(self.ess) / self.particles:.1%}, last {self.ess[-1] / self.particles:.1%}"
            rows += [("particles", str(self.particles)), ("effective share", shares)]
            if self.families is not None:
                rows.append(("ancestors", f"{self.ancestors}, worth {self.families:.0f}"))
        if self.log_z is not None:
            error = "" if self.log_z_error is None else f" ± {self.log_z_error:.2g}"
            rows.append(("log Z", f"{self.log_z:.3f}{error}"))
        if self.acceptance is not None:
            rows.append(("acceptance", f"{self.acceptance:.3g}"))
        rows += [("runs", str(sum(1 for _ in self.runs())) if self.parts else "")] + [("note", note) for note in self.notes]
        return [(name, printable(value)) for name, value in rows if value]

    def __str__(self) -> str:
        return "\n".join(f"{name:>16}  {value}" for name, value in [*self.rows(), ("verdict", printable(str(self.verdict)))])

    def __repr__(self) -> str:
        return f"{type(self).__name__}({printable(f'{self.road} of {self.formula}')!r}, {self.verdict.level})"

    def _repr_html_(self) -> str:
        return f"{self.verdict._repr_html_()}{preview.table(self.rows())}"

    @classmethod
    def join(cls, parts: Sequence[Diagnostics]) -> Diagnostics:
        """Of several runs together. Where all of them estimate one Z, so does their mean."""
        parts = [part for i, part in enumerate(parts) if part not in parts[:i]]  # slices of one run are one run
        if len(parts) == 1:
            return parts[0]
        parts = [run for part in parts for run in (part.parts if part._is_joined else [part])]
        parts = [part for i, part in enumerate(parts) if part not in parts[:i]]
        first = vars(parts[0])
        same = {name: first[name] for name in ("road", "formula", "steps") if all(vars(p)[name] == first[name] for p in parts)}
        joined = cls(same.get("road", "several"), same.get("formula", ""), same.get("steps", 0), parts=list(parts))
        estimates = [(part.particles, part.log_z, part.log_z_error) for part in parts]
        if "formula" in same and all(None not in estimate for estimate in estimates):
            n, log_z, error = (torch.tensor(column, dtype=torch.float64) for column in zip(*estimates, strict=True))
            share = torch.softmax(n.log() + log_z, 0)
            joined.particles, joined.log_z = int(n.sum()), float((n.log() + log_z).logsumexp(0) - n.sum().log())
            joined.log_z_error = float((share * error).square().sum().sqrt())
        return joined

    @property
    def _is_joined(self) -> bool:
        """Whether these are several runs of one thing, or of things that are put side by side; a mixture's parts are parts of it."""
        return bool(self.parts) and (not self.formula or all(part.formula == self.formula for part in self.parts))

    @classmethod
    def read(cls, said: Entries) -> Diagnostics:
        """What ``dataclasses.asdict`` made of one, from a file: each entry of its kind, and no others."""
        may_lack = {each.name for each in fields(cls) if each.default is None}
        found: dict[str, Any] = {}
        for name in dict.fromkeys(("road", *said.found)):
            if name not in _READ and name != "parts":
                raise said.refuse(name, "no such entry")
            if name != "parts" and not (name in may_lack and said.get(name) is None):
                found[name] = _READ[name](said, name)
        if found.get("referee") and "acceptance" not in found:
            raise said.refuse("acceptance", "a number, where something was rejected")
        parts = said.each("parts", dict, "objects", MANY) if "parts" in said else []
        return cls(**found, parts=[cls.read(Entries(part, f"{said.where}: a part")) for part in parts])


def _real(said: Entries, name: str) -> float:
    """A number, which may be infinite or NaN: nothing is decided by it."""
    value = said.get(name)
    return value if isinstance(value, float) and math.isnan(value) else said.number(name)


def _sizes(said: Entries, name: str) -> list[float]:
    values = said.each(name, (int, float), "numbers")
    if not all(0 <= value <= COUNT for value in values):
        raise said.refuse(name, "numbers of particles")
    return values


_READ = {
    **dict.fromkeys(("road", "formula", "doubt", "referee"), lambda said, name: said.text(name, LONG)),
    **dict.fromkeys(("steps", "ancestors", "lost"), lambda said, name: said.whole(name, most=COUNT)),
    **dict.fromkeys(("log_z", "log_z_error", "slip", "apart"), _real),
    **dict.fromkeys(("particles", "samples"), lambda said, name: said.whole(name, least=1, most=COUNT)),
    "steered": lambda said, name: said.flag(name),
    "families": lambda said, name: said.number(name, 0, COUNT),
    "acceptance": lambda said, name: said.number(name, 0, 2),
    "seed": lambda said, name: said.whole(name, -(2**64), 2**64),
    "ess": _sizes,
    "notes": lambda said, name: said.texts(name, MANY),
}
"""How each entry is read."""
