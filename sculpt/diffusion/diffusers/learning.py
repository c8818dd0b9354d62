"""From a pipeline's call to a model: it is run with its networks watched, learned from, and checked against a step of its own."""

from __future__ import annotations

import contextlib
import itertools
import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from sculpt.diffusion.diffusers.calls import Stage, answers
from sculpt.diffusion.diffusers.inputs import Unknown, relative
from sculpt.diffusion.diffusers.learn import learned
from sculpt.diffusion.diffusers.outputs import without_variance
from sculpt.diffusion.diffusers.pipeline import PipelineCall
from sculpt.diffusion.diffusers.probing import Border, Clean, Phase, Probe, Still, Twice
from sculpt.diffusion.diffusers.watch import Step, networks, one, schedulers
from sculpt.diffusion.networks import dtype_of

__all__ = ["Learned", "learn"]

STEPS = (16, 64, 200)
"""of a run that is learned from: more where a part of it has too few"""
BISECTED = 40
"""of a run that looks for the border between two networks' times"""

LOOKS_INSIDE = "when its networks are answered for it fails ({!s:.200}), as where it looks at what is inside of them"


@dataclass(frozen=True)
class Learned:
    """What was learned from a pipeline's call."""

    stages: tuple[Stage, ...]
    """the one of the highest times first"""
    shape: tuple[int, ...]
    scheduler: Any
    error: float
    """of a step of ours against one of the pipeline"""
    start: tuple[Tensor, float] | None
    """a clean sample, and the time from which the pipeline goes on with it"""
    asked: int
    """steps"""
    made: int
    """steps"""
    known: dict[Any, Any]
    """outputs of its networks, without their numbers"""
    codes: list[Any]
    """what its encoding methods gave"""
    rows: bool
    """whether all rows that the scheduler is given are one sample, as where frames are"""

    @cached_property
    def plain(self) -> bool:
        """Whether a network, a condition and a guidance scale say all of it."""
        (strands, rescale), called = (self.stages[0].strands, self.stages[0].rescale), [s.calls for s in self.stages[0].strands]
        said = len(self.stages) == 1 == len({id(call.network) for calls in called for call in calls}) and rescale is None
        return (
            said and len(strands) <= 2 and all(s.plain for s in strands) and abs(sum(s.weights[0] for s in strands) - 1) < 1e-6
        )

    @property
    def guidance(self) -> tuple[dict[str, Any], dict[str, Any] | None, float]:
        """The condition that weighs most, another one where there is one, and the weight."""
        strands = sorted(self.stages[0].strands, key=lambda strand: -abs(strand.weights[-1]))
        null = strands[1].calls[-1].condition if len(strands) > 1 else None
        return strands[0].calls[-1].condition, null, 1.0 if null is None else abs(strands[0].weights[-1])

    def still(self, x: Tensor) -> Still:
        """The lead of a run that ends in these samples."""
        return Still(x, self.asked, self.made, self.known, self.codes, self.rows)


def learn(call: PipelineCall) -> Learned:
    """Run the call with its networks watched, learn what they are called with, and check it against a step of the pipeline."""
    return _Learning(call).learned()


class _Learning:
    def __init__(self, call: PipelineCall):
        self.call = call
        for network in networks(call.pipe).values():
            network.eval()
        for self.steps in STEPS:
            if self._probed():
                break
        else:
            raise call.refused(f"what it does changes too often in {self.steps} steps to be learned")
        names = {phase.late.name if phase.late else phase.steps[-1].name for phase in self.probe.phases}
        if len(names) > 1 or self.probe.again:
            raise call.refused(
                f"it steps with {', '.join(sorted(names))}, more than one sample each time or one after another. Make a model of each of its parts"
            )
        if self.probe.changed:
            raise call.refused("it changes its samples between steps, as where parts of an image are put back")
        self.scheduler = schedulers(call.pipe)[names.pop()]

    def learned(self) -> Learned:
        """All that there is to learn."""
        twice, found = self._twice(), []
        for phase in self.phases:
            called = [id(seen.network) for seen in phase.steps[-1].calls]
            match = next((step for step in twice if [id(seen.network) for seen in step.calls] == called), None)
            found.append((phase, *self._checked(phase, match)))
        found.sort(key=lambda own: -max(own[0].times))
        borders = [self._border(above[0], below[0]) for above, below in itertools.pairwise(found)] + [-math.inf]
        stages = tuple(replace(stage, least=t) for (_, stage, _), t in zip(found, borders, strict=True))
        p, error = self.probe, max(error for *_, error in found)
        shape = tuple(one(found[0][0].steps[-1].x, self.rows).shape[1:])
        return Learned(stages, shape, self.scheduler, error, self._start(), self.steps, p.steps, p.known, p.codes, self.rows)

    def _start(self) -> tuple[Tensor, float] | None:
        """What the pipeline noises and goes on from, as image-to-image does."""
        start = t = None
        if self.probe.has_noised:
            lead = Clean(self.probe.known)
            with contextlib.suppress(Exception):  # where the start is depends on the steps that the caller has in mind
                self.call.run(lead, self.call.steps or self.steps, output_type="latent")
            start, t = lead.start, lead.t
        if start is None and self.call.starts_within:
            raise self.call.refused(
                "it starts from an image in a way of its own. Pass strength=1.0, and with_start(...) for the image"
            )
        return None if start is None or t is None else (one(start, self.rows), t)

    @property
    def phases(self) -> list[Phase]:
        """Kinds of steps, but for the first where encoders are called before it."""
        phases = self.probe.phases
        return [phase for k, phase in enumerate(phases) if k or len(phases) == 1 or not set(phases[1].key) < set(phase.key)]

    def _probed(self) -> bool:
        """Whether enough is seen in so many steps. What comes after them is no matter, an error least of all."""
        self.probe, failure = Probe(), None
        try:
            self.call.run(self.probe, self.steps, output_type="latent")
        except Exception as error:
            failure = error
        if self.phases and all(phase.complete for phase in self.phases):
            return True
        if failure is not None and (not self.probe.steps or self.steps == STEPS[-1]):
            raise (
                self.call.refused(LOOKS_INSIDE.format(failure)) if self.probe.steps else self.call.failed(failure)
            ) from failure
        if not self.probe.steps and failure is None:
            raise self.call.refused("it has no scheduler whose step it calls")
        return False

    def _twice(self) -> list[Step]:
        """Steps of the same call with two samples; none where the pipeline makes one only."""
        for changes in self.call.twice():
            lead = Twice(self.probe.known)
            # What comes after all steps is no matter, and what makes one sample only is called for one at a time.
            with contextlib.suppress(Exception):
                self.call.run(lead, self.steps, output_type="latent", **changes)
            if len(lead.steps) > 1 and len(lead.steps[-1].x) == 2 * self.probe.rows:
                return lead.steps[1:]
        return []

    @torch.no_grad()
    def _checked(self, phase: Phase, twice: Step | None) -> tuple[Stage, float]:
        """What a phase does, and by how much a step of ours is off; samples are kept apart where their rows cannot be told apart."""
        T, failures = self.scheduler.config.get("num_train_timesteps", 1000), []
        matches = [twice, None] if twice is not None else [None]
        for rows, match in itertools.product([False, True] if self.probe.rows > 1 else [False], matches):
            self.rows = rows
            try:
                stage = learned(phase, match, T, self.call.numbers, self.rows)
                error = self._error(stage, phase.steps[-1])
            except Exception as raised:  # by a network that cannot take some of its rows, or two samples at once
                failures.append(str(raised) if isinstance(raised, Unknown) else f"{type(raised).__name__}: {raised!s:.200}")
                continue
            if error <= (limit := _limit(stage, phase.steps[-1])):
                return stage, error
            failures.append(
                f"a step of ours is off by {error:.2g}, expected at most {limit:.2g}: something in its networks is changed while it runs, as "
                "for perturbed-attention guidance"
            )
        raise self.call.refused("; ".join(dict.fromkeys(failures)))

    def _error(self, stage: Stage, step: Step) -> float:
        """The relative error of F, every strand by itself; and that of two samples and two models that go together."""
        t, x = torch.tensor(step.t, dtype=torch.float64, device=step.x.device), one(step.x, self.rows)
        F = without_variance(one(step.F, self.rows), x.shape[1:]).float()
        alone = [answers([strand], x, t, F.dtype)[0] for strand in stage.strands]
        error = relative(stage.total(alone), F)
        if any(strand.single for strand in stage.strands):
            return error
        both = answers([*stage.strands, *stage.strands], torch.cat([x, x.flip(-1)]), t, F.dtype)
        off = [float((two[:1] - one).norm() / F.norm()) for two, one in zip(both, alone * 2, strict=True)]
        return max([error, *off])

    def _border(self, above: Phase, below: Phase) -> float:
        """The time from which on up the one is called, and not the other."""
        border = Border(self.probe.known, above.key, min(above.times), max(below.times))
        if border.low < border.high:
            with contextlib.suppress(Exception):
                self.call.run(border, BISECTED, output_type="latent")
        if border.found is None:
            raise self.call.refused("what it does depends on more than the time. Turn off what ends after a share of the steps")
        return border.found


def _limit(stage: Stage, step: Step) -> float:
    """Of an error, in the precision of the networks: guidance multiplies it."""
    dtypes = [step.F.dtype, *(dtype_of(strand.calls[-1].network) for strand in stage.strands)]
    eps = max(torch.finfo(dtype).eps for dtype in dtypes if dtype.is_floating_point)
    return max(1e-5, 2 * eps) * (1 + sum(abs(w) for strand in stage.strands for w in strand.weights))
