"""A pipeline and one call of it, as a base model's source: its network's calls are learned from it, and its tail decodes samples."""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sculpt.diffusion.diffusers.calls import Strand, answers
from sculpt.diffusion.diffusers.learn import Unknown, learned, tolerance
from sculpt.diffusion.diffusers.probing import Border, Phase, Probe, Still, Twice
from sculpt.diffusion.diffusers.switches import Switches, adapters_of
from sculpt.diffusion.diffusers.watch import Step, denoisers, parameters, schedulers, watched
from sculpt.diffusion.networks import is_a

__all__ = ["Learned", "PipelineCall", "joined"]

STEPS = (16, 64, 200)
"""of a run that is learned from: more where a part of it has too few"""
BISECTED = 40
"""steps of a run that looks for a border between two times"""
SOLVERS = (
    "num_inference_steps",
    "timesteps",
    "sigmas",
    "callback_on_step_end",
    "callback_on_step_end_tensor_inputs",
    "callback",
    "callback_steps",
)
"""What says how a solver steps is no part of a model."""


@dataclass(frozen=True)
class Learned:
    """What was learned from a pipeline's call."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    scheduler: Any
    phases: tuple[tuple[float, tuple[Strand, ...]], ...]
    """the least time of each, and its strands; the highest first"""
    start: tuple[Tensor, float] | None
    """a clean sample, and the time from which the pipeline goes on with it"""
    error: float
    """of a step of ours against one of the pipeline"""
    steps: int
    """that the pipeline was asked for"""
    total: int
    """that it made"""
    known: dict[Any, Any]
    """outputs of its networks, without their numbers"""
    codes: list[Any]
    """what its encoding methods gave"""

    @property
    def plain(self) -> bool:
        """Whether a network, a condition and a guidance scale say all of it."""
        strands, networks = self.phases[0][1], {id(c.network) for _, own in self.phases for s in own for c in s.calls}
        said = len(self.phases) == 1 == len(networks) and len(strands) <= 2 and all(strand.plain for strand in strands)
        return said and abs(sum(strand.weights[0] for strand in strands) - 1) < 1e-6

    @property
    def guidance(self) -> tuple[dict[str, Any], dict[str, Any] | None, float]:
        """The condition that weighs most, the other one where there is one, and the weight."""
        strands = sorted(self.phases[0][1], key=lambda strand: -abs(strand.weights[-1]))
        null = strands[1].calls[-1].condition if len(strands) > 1 else None
        return strands[0].calls[-1].condition, null, 1.0 if null is None else abs(strands[0].weights[-1])


class PipelineCall:
    """A pipeline with what it is called with.

    Args:
        pipe: of diffusers.
        args: of its call, by position.
        call: of its call, by name.
    """

    def __init__(self, pipe: Any, args: Sequence[Any], call: Mapping[str, Any]):
        self.pipe, self.kind = pipe, type(pipe).__name__
        if not (callable(pipe) and hasattr(pipe, "components")):
            raise TypeError(
                f"A model is made of a pipeline of diffusers, which has parts and can be called; got a {self.kind}. Pass a network to "
                "sculpt.Diffusion(model, scheduler, shape)."
            )
        takes = parameters(pipe)
        self.call = {**dict(zip(takes, args, strict=False)), **call}
        if len(args) > len(takes) or (
            unknown := sorted(set(call) - {name for name, p in takes.items() if p.kind is not p.VAR_KEYWORD})
        ):
            said = f"{len(args)} values" if len(args) > len(takes) else ", ".join(unknown)
            raise ValueError(f"{said}: no option of {self.kind}, which takes {', '.join(takes)}.")
        for name in ("prompt", "class_labels"):
            if isinstance(value := self.call.get(name), (list, tuple)) and len(value) > 1:
                raise ValueError(f"{name} has {len(value)} entries, and a base model has one condition. Make a model of each.")
        if "prompt" in takes and not any(value is not None for name, value in self.call.items() if "prompt" in name):
            self.call["prompt"] = ""  # without one, a text-conditional network is its unconditional self
        self.adapters: Mapping[str, float] | None = None
        self.parts = {name for name, part in pipe.components.items() if part is not None}

    def changed(self, args: Sequence[Any], call: Mapping[str, Any]) -> PipelineCall:
        """The same with other values."""
        names = list(parameters(self.pipe))
        new = PipelineCall(self.pipe, (), {**self.call, **dict(zip(names, args, strict=False)), **call})
        new.adapters, new.parts = self.adapters, self.parts
        return new

    def with_adapters(self, adapters: Mapping[str, float]) -> PipelineCall:
        """The same with these adapters in the pipeline's encoders."""
        new = copy.copy(self)
        new.adapters = adapters
        return new

    def encoders_adapted(self) -> bool:
        """Whether there are adapters in encoders."""
        return any(adapters_of(part) for part in self._encoders())

    def _encoders(self) -> list[Any]:
        """Networks that diffusers does not denoise with."""
        return [part for part in denoisers(self.pipe).values() if not is_a(part, "ModelMixin")]

    @property
    def autoencoder(self) -> Any:
        """What makes latents, where there is something."""
        found = (part for part in denoisers(self.pipe).values() if is_a(part, "ModelMixin"))
        return next((part for part in found if hasattr(part, "encode") and hasattr(part, "decode")), None)

    @property
    def name(self) -> str | None:
        """What the call asks for, in a word."""
        for key in ("prompt", "class_labels"):
            if (value := self.call.get(key)) is not None and (
                one := value[0] if isinstance(value, (list, tuple)) and len(value) == 1 else value
            ) != "":
                return str(one) if key == "prompt" else f"class {one}"
        return None

    # Learning

    def learn(self) -> Learned:
        """Run the call with its networks watched, learn what they are called with, and check it against a step of the pipeline."""
        for steps in STEPS:
            probe = self._probed(steps)
            if all(phase.complete for phase in self._phases(probe)):
                break
        else:
            raise self._refused(
                f"its networks are called in {len(self._phases(probe))} ways in {steps} steps, which change too often to be learned"
            )
        if probe.again:
            raise self._refused("it steps two samples at once, and a base model has one")
        if probe.changed:
            raise self._refused("it changes its samples between steps, as where parts of an image are put back")
        twice = self._twice(steps, probe)
        (name, scheduler), *others = self._scheduler()
        phases, worst = [], 0.0
        for phase in self._phases(probe):
            match = next(
                (
                    step
                    for step in twice
                    if [id(s.network) for s in step.calls] == [id(s.network) for s in phase.steps[-1].calls]
                ),
                None,
            )
            strands, error = self._checked(phase, match, scheduler)
            phases.append((phase, tuple(strands)))
            worst = max(worst, error)
        last = phases[-1][0].steps[-1]
        return Learned(
            tuple(last.x.shape[1:]),
            last.x.dtype,
            scheduler,
            self._from(phases, probe),
            probe.clean,
            worst,
            steps,
            probe.steps,
            probe.known,
            probe.codes,
        )

    def _scheduler(self) -> list[tuple[str, Any]]:
        found = list(schedulers(self.pipe).items())
        if not found:
            raise self._refused(f"it has no scheduler among {', '.join(self.parts)}")
        return found

    def _phases(self, probe: Probe) -> list[Phase]:
        """But for what comes before all steps: encoders are called there."""
        last = probe.phases[-1].key if probe.phases else ()
        return [phase for k, phase in enumerate(probe.phases) if k or len(probe.phases) == 1 or not set(last) < set(phase.key)]

    def _from(
        self, phases: list[tuple[Phase, tuple[Strand, ...]]], probe: Probe
    ) -> tuple[tuple[float, tuple[Strand, ...]], ...]:
        """Every phase with the time from which on up it is."""
        phases, found = sorted(phases, key=lambda pair: -max(pair[0].times)), []
        for (phase, strands), (below, _) in itertools.pairwise(phases):
            border = Border(probe.known, phase.key, min(phase.times), max(below.times))
            if border.low < border.high:
                with contextlib.suppress(Exception):
                    self._run(border, BISECTED, output_type="latent")
            if border.found is None:
                raise self._refused(
                    "which networks are called depends on more than the time. Turn off what ends after a share of the steps"
                )
            found.append((border.found, strands))
        return (*found, (-math.inf, phases[-1][1]))

    def _run(self, lead: Any, steps: int, **changes: Any) -> Any:
        takes = parameters(self.pipe)
        call = {name: value for name, value in self.call.items() if name not in SOLVERS}
        call |= {"num_inference_steps": steps} if "num_inference_steps" in takes else {}
        with contextlib.ExitStack() as stack:
            for part in [] if self.adapters is None else self._encoders():
                stack.enter_context(Switches.of(part).with_adapters(part, self.adapters).on(part))
            return watched(self.pipe, {**call, **{k: v for k, v in changes.items() if k in takes}}, lead)

    def _probed(self, steps: int) -> Probe:
        for network in denoisers(self.pipe).values():
            network.eval()
        probe = Probe()
        try:
            self._run(probe, steps, output_type="latent")
        except Exception as error:
            # What comes after all steps is no matter here.
            if not probe.phases or not all(phase.complete for phase in self._phases(probe)):
                raise self._failed(error) from error
        if not probe.phases:
            raise self._refused(f"it never called its scheduler's step ({', '.join(schedulers(self.pipe)) or 'it has none'})")
        return probe

    def _twice(self, steps: int, probe: Probe) -> list[Step]:
        """Steps of the same call with two samples; none where the pipeline makes one only."""
        for changes in self._doubled():
            lead = Twice(probe.known)
            # What comes after all steps is no matter, and what makes one sample only is called for one at a time.
            with contextlib.suppress(Exception):
                self._run(lead, steps, **{"generator": None, "output_type": "latent", **changes})
            if len(lead.steps) > 1 and probe.first is not None and len(lead.steps[-1].x) == 2 * len(probe.first):
                return lead.steps[1:]
        return []

    def _doubled(self) -> Iterator[dict[str, Any]]:
        """Ways to ask for two samples of the same kind."""
        for name in parameters(self.pipe):
            if re.fullmatch(r"num_\w+_per_prompt|batch_size", name):
                yield {name: 2}
        for given in ("class_labels", "prompt"):
            twice = {name: self.call.get(name) for name in (given, f"negative_{given}")}
            if twice[given] is not None:
                lists = {name: list(v) if isinstance(v, (list, tuple)) else [v] for name, v in twice.items() if v is not None}
                yield {name: value * 2 for name, value in lists.items()}

    @torch.no_grad()
    def _checked(self, phase: Phase, twice: Step | None, scheduler: Any) -> tuple[list[Strand], float]:
        """What a phase does, and by how much a step of ours is off; samples kept apart where their rows cannot be."""
        step, failures = phase.steps[-1], []
        T = scheduler.config.get("num_train_timesteps", 1000)
        for match in dict.fromkeys((id(twice), id(None))):
            try:
                strands = learned(phase, twice if match == id(twice) else None, T)
                error = self._error(strands, step)
                limit = (
                    tolerance(step.F.dtype, *(p.dtype for s in strands for p in list(s.calls[-1].network.parameters())[:1]))
                    * 10
                )
                if error <= limit:
                    return strands, error
                failures.append(f"a step of ours is off by {error:.2g}, expected at most {limit:.2g}")
            except Unknown as error:
                failures.append(str(error))
        raise self._refused("; ".join(dict.fromkeys(failures)))

    def _error(self, strands: list[Strand], step: Step) -> float:
        """The relative error of F, rows one by one; and that rows of two samples and two models at once are those one by one."""
        t, x = torch.tensor(step.t, dtype=torch.float64, device=step.x.device), step.x[:1]
        alone = [answers([strand], x, t, step.F.dtype)[0].double() for strand in strands]
        F = step.F[:1]
        for axis, (n, m) in enumerate(zip(F.shape, x.shape, strict=True)):
            F = F.narrow(axis, 0, m) if n == 2 * m else F
        error = _relative(sum(alone), F.double())
        if strands[0].single:
            return error
        both = answers([*strands, *strands], torch.cat([x, x.flip(-1)]), t, step.F.dtype)
        scale = F.double().norm()
        off = [float((two[0] - one[0]).double().norm() / scale) for two, one in zip(both, alone * 2, strict=True)]
        return max([error, *off])

    # Decoding

    @torch.no_grad()
    def decode(self, x: Tensor, learned: Learned) -> Any:
        """The pipeline's own tail for finished samples: its networks and its scheduler stand still."""
        lead = Still(x, learned.total, learned.known, learned.codes)
        out = self._run(lead, learned.steps, output_type=self.call.get("output_type", "pt"), return_dict=False)
        out = out[0] if isinstance(out, tuple) else out
        if len(x) > 1 and len(out) != len(x):  # some pipelines count before their steps how many samples there are
            return joined([self.decode(one, learned) for one in x.split(1)])
        return out

    # Errors

    def _failed(self, error: Exception) -> ValueError:
        gone = sorted(self.parts - {name for name, part in self.pipe.components.items() if part is not None})
        why = f"{type(error).__name__}: {error!s:.300}"
        if gone:
            return ValueError(
                f"{self.kind} has to run again for this, and has lost its {', '.join(gone)} since. Put that back, or make all models first. ({why})"
            )
        return ValueError(
            f"{self.kind} failed when its own call was run: {why}. Check what it is called with: {', '.join(self.call) or 'nothing'}."
        )

    def _refused(self, why: str) -> ValueError:
        return ValueError(f"Cannot make a base model of {self.kind} with {', '.join(self.call) or 'nothing'}: {why}.")


def joined(parts: Sequence[Any]) -> Any:
    """What a pipeline made of several batches, as one."""
    if len(parts) == 1:
        return parts[0]
    if isinstance(parts[0], Tensor):
        return torch.cat(list(parts))
    return np.concatenate(parts) if isinstance(parts[0], np.ndarray) else [one for part in parts for one in part]


def _relative(got: Any, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm().clamp(min=1e-30))
