"""Watching a pipeline: its own call is run, every call of a network and of its scheduler is seen, and a lead decides what these answer.

Nothing of the pipeline stays changed after the run, an error included.
"""

from __future__ import annotations

import abc
import contextlib
import copy
import functools
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Lead", "Seen", "Step", "networks", "one", "parameters", "schedulers", "watched"]


@dataclass
class Seen:
    """One call of a network: what went in, by keyword, and what came out."""

    network: nn.Module
    inputs: dict[str, Any]
    output: Any = None


@dataclass
class Step:
    """One call of the scheduler's step, and the networks' calls before it."""

    F: Tensor
    t: float
    x: Tensor
    calls: list[Seen]
    scheduler: Any
    """a copy of the pipeline's, of this run"""
    name: str
    """of that part"""


def one(x: Tensor, rows: bool) -> Tensor:
    """One sample of what a scheduler is given, with an axis that counts them: its first row, or all of its ``rows`` together."""
    return x[None] if rows else x[:1]


class Lead(abc.ABC):
    """Who decides where a watched pipeline goes."""

    @abc.abstractmethod
    def answer(self, seen: Seen, real: Callable[[], Any]) -> Any:
        """A network's output for these inputs: its real one, or another."""

    @abc.abstractmethod
    def after(self, step: Step) -> Tensor:
        """The sample that the scheduler gives back."""

    def noised(self, clean: Tensor, t: float, real: Callable[[], Tensor]) -> Tensor:
        """The scheduler is asked for a noisy version of a clean sample."""
        return real()

    def encoded(self, name: str, real: Callable[[], Any]) -> Any:
        """What one of the pipeline's own encoding methods gives."""
        return real()


def parameters(pipe: Any) -> Mapping[str, inspect.Parameter]:
    """What a pipeline's call takes."""
    return {name: p for name, p in inspect.signature(type(pipe).__call__).parameters.items() if name != "self"}


def schedulers(pipe: Any) -> dict[str, Any]:
    """The parts of a pipeline that step."""
    return {name: part for name, part in pipe.components.items() if hasattr(part, "set_timesteps")}


def networks(pipe: Any) -> dict[str, nn.Module]:
    """The parts that may be called on the way, each once."""
    found = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    return {name: part for name, part in found.items() if next(n for n, p in found.items() if p is part) == name}


def watched(pipe: Any, call: Mapping[str, Any], lead: Lead) -> Any:
    """Run the pipeline's call under this lead; what it returns."""
    watch = _Watch(lead)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_unchanged(pipe, call))
        for network in networks(pipe).values():
            stack.enter_context(watch.network(network))
        for name, scheduler in schedulers(pipe).items():
            vars(pipe)[name] = watch.scheduler(name, scheduler)
        for name in dir(type(pipe)):
            if re.fullmatch("_?encode_.*", name) and callable(getattr(type(pipe), name)):
                vars(pipe)[name] = watch.encoder(name, getattr(pipe, name))
        vars(pipe)["_progress_bar_config"] = {"disable": True}
        return pipe(**call)


@contextlib.contextmanager
def _unchanged(pipe: Any, call: Mapping[str, Any]) -> Iterator[None]:
    """Put back at the end what a call may change: attributes of the pipeline, attention processors, and the state of generators."""
    kept = dict(vars(pipe))
    processors = [(part, dict(part.attn_processors)) for part in networks(pipe).values() if hasattr(part, "attn_processors")]
    given = call.get("generator")
    generators = [(g, g.get_state()) for g in (given if isinstance(given, list) else [given]) if g is not None]
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        hooks = {
            name: vars(pipe)[name] for name in ("_all_hooks",) if name in vars(pipe)
        }  # of offloading, made anew by the call itself
        vars(pipe).clear()
        vars(pipe).update({**kept, **hooks})
        for part, before in processors:
            now = part.attn_processors
            if any(now.get(name) is not processor for name, processor in before.items()):
                part.set_attn_processor(dict(before))
        for generator, state in generators:
            generator.set_state(state)


class _Watch:
    def __init__(self, lead: Lead):
        self.lead, self.calls, self.inside = lead, [], 0  # type: ignore[var-annotated]

    @contextlib.contextmanager
    def network(self, network: nn.Module) -> Iterator[None]:
        """Calls of this network are seen."""
        own, real = "forward" in vars(network), network.forward
        signature = inspect.signature(getattr(network, "_orig_mod", network).forward)

        @functools.wraps(real)
        def forward(*args, **kwargs):
            if self.inside:
                return real(*args, **kwargs)
            seen = Seen(network, _by_name(signature, args, kwargs))
            self.inside += 1
            try:
                seen.output = self.lead.answer(seen, lambda: real(*args, **kwargs))
            finally:
                self.inside -= 1
            self.calls.append(seen)
            return seen.output

        network.forward = forward  # type: ignore[method-assign]
        try:
            yield
        finally:
            if vars(network).get("forward") is not forward:
                pass  # offloading has hooked it anew
            elif own:
                network.forward = real  # type: ignore[method-assign]
            else:
                del network.forward

    def scheduler(self, name: str, scheduler: Any) -> Any:
        """A copy whose steps are seen, and go where the lead wants. It scales nothing: what it is given is what the networks see."""
        new = copy.deepcopy(scheduler)
        if (step := getattr(new, "step", None)) is not None:
            new.step = self._stepping(name, new, step)
        if (scale := getattr(new, "scale_model_input", None)) is not None:
            new.scale_model_input = functools.wraps(scale)(
                lambda sample, *args, **kwargs: (scale(sample, *args, **kwargs), sample)[1]
            )
        for method, clean in (("add_noise", "original_samples"), ("scale_noise", "sample")):
            if (real := getattr(new, method, None)) is not None:
                setattr(new, method, self._noising(real, clean))
        return new

    def _stepping(self, name: str, scheduler: Any, real: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(real)

        @functools.wraps(real)
        def step(*args, **kwargs):
            given = signature.bind(*args, **kwargs).arguments
            seen = Step(given["model_output"], float(given["timestep"]), given["sample"], self.calls, scheduler, name)
            self.calls = []
            out, x = real(*args, **kwargs), self.lead.after(seen)
            if isinstance(out, tuple):
                return (x, *out[1:])
            out.prev_sample = x
            return out

        return step

    def _noising(self, real: Callable[..., Any], clean: str) -> Callable[..., Any]:
        signature = inspect.signature(real)

        @functools.wraps(real)
        def noise(*args, **kwargs):
            given = signature.bind(*args, **kwargs).arguments
            t = torch.as_tensor(given.get("timesteps", given.get("timestep")))
            return self.lead.noised(given[clean], float(t.flatten()[0]), lambda: real(*args, **kwargs))

        return noise

    def encoder(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        """An encoding method of the pipeline."""

        @functools.wraps(real)
        def encode(*args, **kwargs):
            if self.inside:
                return real(*args, **kwargs)
            self.inside += 1
            try:
                return self.lead.encoded(name, lambda: real(*args, **kwargs))
            finally:
                self.inside -= 1

        return encode


def _by_name(signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """What a network is called with, but for what it would take anyway, and for the form of its output."""
    named: dict[str, Any] = {}
    for name, value in signature.bind(*args, **kwargs).arguments.items():
        parameter = signature.parameters[name]
        if parameter.kind is parameter.VAR_KEYWORD:
            named |= value
        elif isinstance(value, Tensor) or type(value) is not type(parameter.default) or value != parameter.default:
            named[name] = value
    return {name: value for name, value in named.items() if name != "return_dict"}
