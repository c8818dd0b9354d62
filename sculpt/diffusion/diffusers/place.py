r"""The place of a network: where its x and t go in, and what it answers with.

Pipelines differ in how they call their networks: by which names, with t counted in thousands or in ones, or upside down with the sign of
the answer changed, with x as a list. A base model makes the same calls, so its own are watched, and nothing is known of any pipeline.

.. math:: \tau = \alpha t + \beta, \qquad F_{network} = \pm F

with t the time of the base model's training scheduler, and F what that expects.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sculpt.diffusion.clock import level, like
from sculpt.diffusion.networks import unwrapped

if TYPE_CHECKING:
    from sculpt.diffusion.diffusers.adapter import Diffusion

__all__ = ["Place", "place_of"]

LOOKS, ENOUGH = 12, 3
"""Noise levels at which a model's calls are looked at, until so many of them are of the network."""
NEAR = 0.02
"""How far what was learned may be off, as a share: half precision rounds to a hundredth."""


@dataclass(frozen=True)
class Place:
    """How a network is called. By default like those of diffusers, in the scheduler's own times."""

    signature: inspect.Signature | None = None
    x: tuple[str, ...] = ("sample", "hidden_states")
    """the names that x may have"""
    t: tuple[str, ...] = ("timestep",)
    alpha: float = 1.0
    beta: float = 0.0
    sign: int = 1
    answers: int = 1
    """how many times as long as x its answer is: two where it has a learned variance"""

    def read(self, args: Sequence[Any], options: Mapping[str, Any]) -> tuple[Tensor | list[Tensor], Tensor]:
        """x as it came, and the scheduler's time, 0-dim or one for each sample."""
        inputs = _named(self.signature, args, options)
        found = [next((inputs[name] for name in names if inputs.get(name) is not None), None) for names in (self.x, self.t)]
        found = list(args[:2]) if found[1] is None and len(args) > 1 else found  # (x, t) of a loop written by hand
        if any(value is None for value in found):
            wanted = " and ".join(" or ".join(dict.fromkeys(names)) for names in (self.x, self.t))
            raise TypeError(f"A composition as a network is called with {wanted}, got {', '.join(inputs) or 'nothing'}.")
        x, tau = found
        tau = torch.as_tensor(tau, device=(x[0] if isinstance(x, list) else x).device).double()
        return x, (tau - self.beta) / self.alpha


def place_of(model: Diffusion, network: nn.Module) -> Place:
    """Where this model puts x and t, and what it takes its network's answers for: from calls of which the network answers one."""
    schedule, signature = model.schedule, inspect.signature(unwrapped(network).forward)
    z = torch.randn(1, *model.shape, generator=torch.Generator().manual_seed(0)).to(model.device)
    calls, levels = [], []
    for s in torch.logspace(math.log10(max(model.s_min, 0.1)), math.log10(min(model.s_max, 80.0)), LOOKS).tolist():
        seen = _inputs_of(model, network, z, level(s, model.device))
        if seen is not None:  # at others another expert is called
            calls.append(_named(signature, *seen))
            levels.append(level(s, model.device))
        if len(calls) == ENOUGH:
            break
    if len(calls) < ENOUGH:
        raise ValueError(
            f"{model} does not call the {type(network).__name__} that it is to take the place of. Pass network=, the one it calls."
        )
    x = like(schedule.scale(levels[0]), z) * z
    holding = [name for name, value in calls[0].items() if _holds(value, x)]
    if not holding:
        raise ValueError(
            f"{model} calls its {type(network).__name__} without the sample among its inputs {', '.join(calls[0])}. Pass network=, the one "
            "that takes its x."
        )
    name, alpha, beta = _time(calls, [float(schedule.time(s)) for s in levels], model)
    s = levels[len(levels) // 2]
    F, D, answers = _answer_of(model, network, z, s)
    off = {sign: float((schedule.denoised(z, s, sign * F) - D).norm() / (D - z).norm()) for sign in (1, -1)}
    sign = min(off, key=lambda sign: off[sign])
    if off[sign] > NEAR:
        raise ValueError(
            f"{model} does not take the answers of its {type(network).__name__} for the {schedule.prediction_type} of its scheduler: what it "
            f"makes of them is {off[sign]:.0%} off. Wrap the network so that it is, or pass network=."
        )
    return Place(signature, (holding[0], *Place.x), (name, *Place.t), alpha, beta, sign, answers)


def _time(calls: Sequence[Mapping[str, Any]], times: Sequence[float], model: Diffusion) -> tuple[str, float, float]:
    """Which input is the time, and its alpha and beta."""
    for name, values in ((name, [_number(call.get(name)) for call in calls]) for name in calls[0]):
        if None in values or len(set(values)) < len(values):
            continue
        alpha = (values[-1] - values[0]) / (times[-1] - times[0])
        beta = values[0] - alpha * times[0]
        if all(
            abs(alpha * t + beta - value) < NEAR * abs(values[-1] - values[0]) for t, value in zip(times, values, strict=True)
        ):
            return name, float(f"{alpha:.2g}"), round(beta, 2) + 0.0
    raise ValueError(
        f"No input of {model}'s network grows with the time of its scheduler. Pass the one that it was trained with."
    )


def _named(signature: inspect.Signature | None, args: Sequence[Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Inputs by their names."""
    if signature is None:
        return dict(zip(("sample", "timestep"), args, strict=False)) | dict(options)
    try:
        bound = signature.bind(*args, **options).arguments
    except TypeError:  # a pipeline of another kind of network
        return _named(None, args, options)
    inputs = {}
    for name, value in bound.items():
        more = signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD
        inputs |= value if more else {name: value}
    return inputs


def _holds(value: Any, x: Float[Tensor, "1 *x"]) -> bool:
    """Whether this is x: as a tensor, as the list of its samples, in another shape, repeated, or with further channels behind it."""
    if isinstance(value, list) and value and all(isinstance(part, Tensor) for part in value):
        value = value[0]
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return False
    if value.ndim == x.ndim and value.shape[1] > x.shape[1]:
        value = value[:, : x.shape[1]]
    if not value.numel() or value.numel() % x.numel():
        return False
    got = value.detach().double().reshape(-1, x.numel())
    return bool((got - x.double().reshape(1, -1)).norm(dim=1).max() < NEAR * x.double().norm())


def _number(value: Any) -> float | None:
    """A time that is the same for all samples."""
    if isinstance(value, Tensor) and value.numel() and not value.is_complex() and (value == value.flatten()[0]).all():
        return float(value.flatten()[0])
    return float(value) if isinstance(value, int | float) else None


# ----------------------------------------------------------------------------------------------------------------- watching


class _Seen(Exception):
    """Carries the inputs of a network out of the call that it never answers."""


@torch.no_grad()
def _inputs_of(model: Diffusion, network: nn.Module, z: Tensor, s: Tensor) -> tuple[Any, ...] | None:
    """What the model calls this network with, where it calls it."""

    def stop(module, args, options):
        raise _Seen(args, options)

    handle = network.register_forward_pre_hook(stop, with_kwargs=True, prepend=True)
    try:
        model.denoise(z, s)
    except _Seen as seen:
        return seen.args
    finally:
        handle.remove()
    return None


@torch.no_grad()
def _answer_of(
    model: Diffusion, network: nn.Module, z: Tensor, s: Tensor
) -> tuple[Float[Tensor, "1 *x"], Float[Tensor, "1 *x"], int]:
    """Random numbers in the place of the network's answer, what the model makes of them, and how many times as many they are."""
    answers: list[Tensor] = []

    def answer(module, args, output):
        for part in _parts(output):
            noise = torch.randn(part.shape[1:], generator=torch.Generator().manual_seed(1)).to(part)
            part.copy_(noise.expand_as(part))  # the same for every condition, so that no guidance shows
            answers.append(noise.double())

    handle = network.register_forward_hook(answer)
    try:
        D = model.denoise(z, s)
    finally:
        handle.remove()
    # A learned variance comes behind the answer itself.
    return answers[0].flatten()[: z.numel()].reshape(z.shape).to(z), D, answers[0].numel() // z.numel()


def _parts(output: Any) -> Iterator[Tensor]:
    """The answers in what a network returns, a batch or a list of samples."""
    first = output[0] if isinstance(output, tuple) else output
    first = first if isinstance(first, Tensor | list) else first.sample
    yield from (part[None] for part in first) if isinstance(first, list) else [first]
