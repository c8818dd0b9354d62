"""Networks that are passed as they are: with their conditions as keyword tensors, and a form of the time that is found out by calling them."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sculpt.diffusion.diffusers.calls import Answer, Call, Strand
from sculpt.diffusion.diffusers.sources import Given, State, Time
from sculpt.diffusion.diffusers.switches import Switches
from sculpt.diffusion.diffusers.trees import entries, mapped
from sculpt.diffusion.networks import is_a, unwrapped

__all__ = [
    "batched",
    "check_answer",
    "check_conditions",
    "class_condition",
    "config_shape",
    "direct_strand",
    "probed_time",
    "splits",
]

TimeForm = tuple[bool, torch.dtype]
"""Whether the time goes in as ``(b,)`` or 0-dim, and its dtype."""


def direct_strand(
    network: Any,
    condition: Mapping[str, Any],
    time: TimeForm,
    shape: tuple[int, ...],
    split: bool,
    switches: Switches,
    weight: float = 1.0,
) -> Strand:
    """A call with x and t in front and a condition as keywords.

    Args:
        network: from diffusers, which calls its time ``timestep``, or anything that takes (x, t).
        condition: trees of tensors with a batch axis of one.
        time: how t goes in.
        shape: of a sample.
        split: whether the second half of the output's channels is a learned variance.
        switches: of the network.
        weight: in a sum of several.
    """
    zero, one = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
    t = Time(0 if time[0] else None, zero, one, time[1])
    given = mapped(lambda _, c: Given(c, 0 if isinstance(c, Tensor) and c.ndim else None, cast=True), dict(condition))
    by_name = is_a(unwrapped(network), "ModelMixin")
    call = Call(network, {"timestep": t, **given} if by_name else given, (State(0),) if by_name else (State(0), t), switches)
    return Strand((call,), (weight,), Answer(index=torch.arange(math.prod(shape)) if split else None))


def splits(network: Any, shape: tuple[int, ...], name: str) -> bool | None:
    """Whether a network of diffusers answers with a variance too; ``None`` where it does not say."""
    config = network.config if is_a(unwrapped(network), "ModelMixin") else {}
    channels, out = config.get("in_channels"), config.get("out_channels") or config.get("in_channels")
    if channels is None:
        return None
    if channels != shape[0]:
        raise ValueError(
            f"{name} takes {channels} channels, got shape={shape}. Pass shape=({channels}, ...), or make the model of the network's own "
            "pipeline, sculpt.Diffusion.from_pipeline(pipe, ...), where samples are packed or have their channels elsewhere."
        )
    if out not in (channels, 2 * channels):
        raise ValueError(
            f"{name} has {channels} channels in and {out} out, expected as many (or twice, with a learned variance). "
            "Wrap a model with further inputs in a callable (x, t), or make it of its pipeline, sculpt.Diffusion.from_pipeline(pipe, ...)."
        )
    return out == 2 * channels


def config_shape(model: Any) -> tuple[int, ...]:
    """The shape of one sample from a diffusers config: ``in_channels`` and ``sample_size``."""
    kind = type(unwrapped(model)).__name__
    config = model.config if is_a(unwrapped(model), "ModelMixin") else {}
    channels, size = config.get("in_channels"), config.get("sample_size")
    if channels is None or size is None or any(word in kind for word in ("3D", "Temporal", "Motion")):
        raise ValueError(
            f"Cannot read the shape of a sample from {kind}: it has no config that tells it. "
            "Pass shape=, for one sample and without the batch, e.g. shape=(3, 32, 32)."
        )
    axes = 1 if "1D" in kind else 2
    return (channels, *((size,) * axes if isinstance(size, int) else size))


def class_condition(model: Any, label: int) -> tuple[dict, dict | None]:
    """A class label as a condition; transformers of the DiT kind have a null class after the last one."""
    config = model.config if is_a(unwrapped(model), "ModelMixin") else {}
    null = config.get("num_embeds_ada_norm")
    classes = null or config.get("num_class_embeds")
    if classes is None:
        raise ValueError(f"{type(model).__name__} is not class-conditional, got class_label={label}. Pass its tensors instead.")
    if not 0 <= label < classes:
        raise ValueError(f"{type(model).__name__} knows classes 0 to {classes - 1}, got class_label={label}.")
    return {"class_labels": torch.tensor([label])}, None if null is None else {"class_labels": torch.tensor([null])}


def tensors(condition: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Those of a condition, with their places."""
    found = sorted((".".join(map(str, path)), c) for path, c in entries(dict(condition)) if isinstance(c, Tensor))
    return iter(found)


def check_conditions(name: str, condition: Mapping[str, Any], null: Mapping[str, Any] | None, scale: float) -> None:
    """Raise where these are no condition of one model."""
    for part in (condition, null or {}):
        for k, c in tensors(part):
            if c.ndim and len(c) != 1:
                raise ValueError(
                    f"The condition {k} of {name} has shape {tuple(c.shape)}; a base model has one condition, so the batch "
                    "axis has to be 1. Make one base model per condition, using with_condition."
                )
    if scale != 1:
        own, other = ([(k, tuple(c.shape)) for k, c in tensors(part or {})] for part in (condition, null))
        if other != own or not own:
            raise ValueError(
                f"guidance_scale={scale:g} needs a condition and a null_condition of the same shapes; "
                f"{name} has {own} and {other}. Pass both, or guidance_scale=1."
            )


def batched(shape: tuple[int, ...]) -> int:
    """A batch unlike every side of the sample, so that t of shape (b,) cannot be broadcast along the wrong axis unnoticed."""
    return next(b for b in range(2, len(shape) + 3) if b not in shape)


def probed_time(call: Callable[[TimeForm], Any], forms: list[torch.dtype], shape: tuple[int, ...], name: str) -> TimeForm:
    """Whether t goes in as ``(b,)`` or 0-dim, and its dtype: the first form that gives an output of the right shape."""
    b, failures = batched(shape), {}
    for dtype in dict.fromkeys(forms):
        for whole in (True, False):
            try:
                call((whole, dtype))
                return whole, dtype
            except Exception as error:
                failures[f"{dtype} t of shape {f'({b},)' if whole else '()'}"] = f"{type(error).__name__}: {error}"
    listed = "\n".join(f"  {form}: {failure}" for form, failure in failures.items())
    raise ValueError(
        f"Cannot call {name} on x of shape {(b, *shape)}: it should answer (x, t) with x's shape.\n{listed}\n"
        "Check shape= and condition=, or wrap the network in a callable (x, t)."
    )


SMALL = 2**32
"""Parameters times numbers of a sample, where a call takes milliseconds."""


def check_answer(model: Any) -> None:
    """Call a model's network of diffusers without its numbers, and a small one with them too: raise where it cannot take what it is called with."""
    takes, config = {*inspect.signature(model.model.forward).parameters}, model.model.config
    labelled = config.get("num_class_embeds") or config.get("class_embed_type")
    if not model.condition and (labelled or takes - {"sample", "timestep", "class_labels", "return_dict"}):
        return  # its condition comes later
    state = dict([*model.model.named_parameters(), *model.model.named_buffers()])
    # Without numbers first: a setting may make a small network's images so large that it would never answer.
    _try(model, state, torch.device("meta"))
    if sum(value.numel() for value in state.values()) * math.prod(model.shape) < SMALL:
        _try(model, state, model.device)


def _try(model: Any, state: dict[str, Tensor], place: torch.device) -> None:
    state = {name: value.to(place) for name, value in state.items()}
    twin, x = copy.copy(model), torch.zeros(2, *model.shape, dtype=model.dtype, device=place)
    twin.model = _Holding(model.model, state)
    twin.build()
    try:
        with torch.no_grad():
            twin.outputs([twin], x, torch.ones((), device=place))
    except Exception as error:
        # Some networks look at numbers.
        if not isinstance(error, NotImplementedError) and "meta" not in str(error):
            raise ValueError(
                f"{model} cannot be called on samples of shape {model.shape}: {type(error).__name__}: {error!s:.300} Check its config.json, "
                "and shape= and the condition that it was loaded with."
            ) from None


class _Holding(nn.Module):
    """A network with other numbers in it, and of its own type."""

    def __init__(self, network: nn.Module, state: dict[str, Tensor]):
        super().__init__()
        self.network, self.state = network, state

    def forward(self, x: Tensor, t: Tensor, **options: Any) -> Any:
        return torch.func.functional_call(self.network, self.state, (x,), {"timestep": t, **options})
