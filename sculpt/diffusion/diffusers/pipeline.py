"""A pipeline and one call of it: it can be run under a lead, and its tail decodes finished samples."""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sculpt.diffusion.diffusers.switches import Switches, adapters_of
from sculpt.diffusion.diffusers.watch import Lead, networks, parameters, watched
from sculpt.diffusion.networks import is_a, unwrapped

__all__ = ["PipelineCall", "joined"]

SOLVERS = [
    "num_inference_steps",
    "timesteps",
    "sigmas",
    "callback",
    "callback_steps",
    "callback_on_step_end",
    "callback_on_step_end_tensor_inputs",
]
"""How a solver steps, and what is looked at between steps, is no part of a model."""
SEVERAL = r"num_\w+_per_prompt|batch_size"
"""What says how many samples are wanted."""


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
        self.takes = parameters(pipe)
        self.call = {**dict(zip(self.takes, args, strict=False)), **call}
        self._check(args)
        if "prompt" in self.takes and not any(value is not None for name, value in self.call.items() if "prompt" in name):
            self.call["prompt"] = ""  # without one, a text-conditional network is its unconditional self
        self.adapters: Mapping[str, float] | None = None
        self.parts = {name for name, part in pipe.components.items() if part is not None}
        """that there were when the first model of the pipeline was made"""

    def _check(self, args: Sequence[Any]) -> None:
        if unknown := sorted(set(self.call) - {name for name, p in self.takes.items() if p.kind is not p.VAR_KEYWORD}):
            raise ValueError(f"{', '.join(unknown)}: no option of {self.kind}, which takes {', '.join(self.takes)}.")
        if len(args) > len(self.takes):
            raise ValueError(f"{self.kind} takes {', '.join(self.takes)}; got {len(args)} values. Pass them by name.")
        for name in ("prompt", "class_labels"):
            if isinstance(value := self.call.get(name), (list, tuple)) and len(value) != 1:
                raise ValueError(f"{name} has {len(value)} entries, and a base model has one condition. Make a model of each.")
        for name in self.takes:
            if re.fullmatch(SEVERAL, name) and self.call.get(name, 1) != 1:
                raise ValueError(f"{name} is no part of a model: it is sample(n) that says how many. Leave it out.")
        if self.call.get("latents") is not None:
            raise ValueError("latents are where sampling starts, and no part of a model. Pass them to sample(n, latents=...).")

    def __deepcopy__(self, memo: dict[int, Any]) -> PipelineCall:
        return self  # a copy of a model is of the same pipeline, with its text encoders and all

    def changed(self, args: Sequence[Any], call: Mapping[str, Any]) -> PipelineCall:
        """The same with other values."""
        new = PipelineCall(self.pipe, (), {**self.call, **dict(zip(self.takes, args, strict=False)), **call})
        new.adapters, new.parts = self.adapters, self.parts
        return new

    def with_adapters(self, adapters: Mapping[str, float]) -> PipelineCall:
        """The same with these adapters in the pipeline's encoders."""
        new = copy.copy(self)
        new.adapters = adapters
        return new

    @property
    def encoders_adapted(self) -> bool:
        """Whether there are adapters in encoders."""
        return any(adapters_of(part) for part in self._encoders())

    def _encoders(self) -> list[Any]:
        """Networks that are not of diffusers."""
        return [part for part in networks(self.pipe).values() if not is_a(unwrapped(part), "ModelMixin")]

    @property
    def autoencoder(self) -> Any:
        """What makes latents, where there is something."""
        found = (part for part in networks(self.pipe).values() if is_a(unwrapped(part), "ModelMixin"))
        return next((part for part in found if hasattr(part, "encode") and hasattr(part, "decode")), None)

    @property
    def name(self) -> str | None:
        """What the call asks for, in a word."""
        for key, said in (("prompt", "{}"), ("class_labels", "class {}")):
            value = self.call.get(key)
            if value not in (None, ""):
                return said.format(value[0] if isinstance(value, (list, tuple)) else value)
        return None

    @property
    def steps(self) -> int | None:
        """That the pipeline itself would make."""
        return self.call.get("num_inference_steps") or (p.default if (p := self.takes.get("num_inference_steps")) else None)

    @property
    def starts_within(self) -> bool:
        """Whether it is asked to start from an image, and not from pure noise."""
        default = self.takes["strength"].default if "strength" in self.takes else None
        strength = self.call.get("strength", default)
        given = any(self.call.get(name) is not None for name in ("image", "video", "init_image"))
        return given and isinstance(strength, (int, float)) and strength < 1

    @property
    def numbers(self) -> set[float]:
        """That it is called with, those of the pipeline's defaults among them."""
        values = {name: p.default for name, p in self.takes.items()} | self.call
        return {float(v) for v in values.values() if isinstance(v, (int, float)) and not isinstance(v, bool)}

    def twice(self) -> Iterator[dict[str, Any]]:
        """Ways to ask for two samples of the same kind."""
        for name in self.takes:
            if re.fullmatch(SEVERAL, name):
                yield {"generator": None, name: 2}
        for given in ("class_labels", "prompt"):
            if self.call.get(given) is not None:
                both = {name: self.call[name] for name in (given, f"negative_{given}") if self.call.get(name) is not None}
                lists = {name: list(v) if isinstance(v, (list, tuple)) else [v] for name, v in both.items()}
                yield {"generator": None, **{name: value * 2 for name, value in lists.items()}}

    def run(self, lead: Lead, steps: int, **changes: Any) -> Any:
        """Run the call under a lead, in so many steps; the pipeline is left as it was."""
        call = {name: value for name, value in self.call.items() if name not in SOLVERS}
        call |= {name: value for name, value in {"num_inference_steps": steps, **changes}.items() if name in self.takes}
        with contextlib.ExitStack() as stack:
            for part in [] if self.adapters is None else self._encoders():
                known = {k: v for k, v in self.adapters.items() if k in adapters_of(part)}
                stack.enter_context(Switches.of(part).with_adapters(part, known).on(part))
            return watched(self.pipe, call, lead)

    def decode(self, x: Tensor, lead: Any) -> Any:
        """The pipeline's own tail for finished samples; ``lead(x)`` makes its networks and its scheduler stand still."""
        still = lead(x)
        if len(x) == 1 or not still.rows:
            out = self.run(still, still.asked, output_type=self.call.get("output_type", "pt"), return_dict=False)
            out = out[0] if isinstance(out, tuple) else out
            if len(x) in (1, len(out)):
                return out
        # Some pipelines count before their steps how many samples there are.
        return joined([self.decode(part, lead) for part in x.split(1)])

    # Errors

    def failed(self, error: Exception) -> ValueError:
        """The pipeline's own call raised this."""
        gone, why = (
            sorted(name for name in self.parts if self.pipe.components[name] is None),
            f"{type(error).__name__}: {error!s:.300}",
        )
        if gone:
            return ValueError(
                f"{self.kind} has to run again for this, and has lost its {', '.join(gone)} since. Put that back, or make all models "
                f"before. ({why})"
            )
        return ValueError(
            f"{self.kind} failed when its own call was run: {why}. Check what it is called with: {', '.join(self.call) or 'nothing'}."
        )

    def refused(self, why: str) -> ValueError:
        """What the pipeline does cannot be learned."""
        return ValueError(f"Cannot make a base model of {self.kind} with {', '.join(self.call) or 'nothing'}: {why}.")


def joined(parts: Sequence[Any]) -> Any:
    """What a pipeline made of several batches, as one."""
    if len(parts) == 1:
        return parts[0]
    if isinstance(parts[0], Tensor):
        return torch.cat(list(parts))
    return np.concatenate(parts) if isinstance(parts[0], np.ndarray) else [one for part in parts for one in part]
