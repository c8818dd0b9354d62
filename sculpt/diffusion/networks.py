"""What networks of diffusion models tell about themselves: their class, where and in what they compute, and who they are."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from sculpt.identity import weights

__all__ = ["device_of", "dtype_of", "is_a", "known_as", "latents_of", "patch_of", "state_of", "unwrapped"]


def is_a(thing: Any, name: str) -> bool:
    """``isinstance`` by the name of the class, so that models without diffusers do not load it."""
    return any(parent.__name__ == name for parent in type(thing).__mro__)


def unwrapped(model: Any) -> Any:
    """The network itself, where it was compiled."""
    return getattr(model, "_orig_mod", model)


def device_of(model: Any) -> torch.device | None:
    """Where a network wants its inputs, looked up anew because networks move. Weights that are offloaded rest elsewhere."""
    if not isinstance(model, nn.Module):
        return None
    if (
        place := next((hook.execution_device for _, hook in _offloading(model) if hook.execution_device is not None), None)
    ) is not None:
        return torch.device(place)
    if is_a(unwrapped(model), "ModelMixin"):
        return model.device  # knows of groups that are offloaded
    state = _first_state(model)
    return None if state is None else state.device


_DTYPES: weakref.WeakKeyDictionary[nn.Module, tuple[Any, torch.dtype]] = weakref.WeakKeyDictionary()


def dtype_of(model: Any) -> torch.dtype:
    """What a network computes in, which is not what fp8 weights are stored in; float32 where nothing tells."""
    state = _first_state(model)
    if state is None:
        return torch.float32
    if not is_a(unwrapped(model), "ModelMixin"):
        return state.dtype
    # diffusers looks through all modules of the network, which takes as long as a small network's call.
    stamp = id(state), state.dtype
    if _DTYPES.get(model, (None,))[0] != stamp:
        _DTYPES[model] = stamp, model.dtype
    return _DTYPES[model][1]


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """The weights and buffers of a network, those that are offloaded among them."""
    network = unwrapped(model)
    state = dict(network.state_dict())
    for name, hook in _offloading(network):
        if (stored := getattr(hook, "weights_map", None)) is not None:
            prefix, module = f"{name}." if name else "", network.get_submodule(name)
            for own in module.state_dict():
                if state[prefix + own].is_meta and (hook.place_submodules or "." not in own):
                    state[prefix + own] = stored[own]
    return state


def known_as(model: Any, name: str | None, anonymous: str, called: Callable[[str], str | None] | None = None) -> Any:
    """What tells this network from others: weights and configuration, or its name.

    Args:
        model: the network.
        name: of a model that has no configuration, or no weights.
        anonymous: in its place where there is none.
        called: another name for a weight; ``None`` for one that does not count.
    """
    model = unwrapped(model)
    if is_a(model, "DenoiserUNet"):
        return model.denoiser.key
    if not isinstance(model, nn.Module) or not model.state_dict():
        return name or anonymous
    config = name
    if is_a(model, "ModelMixin"):
        config = json.dumps({k: v for k, v in model.config.items() if not k.startswith("_")}, sort_keys=True, default=str)
    return type(model).__qualname__, config, weights(model, state=state_of(model), called=called)


def latents_of(autoencoder: nn.Module | None) -> tuple[Any, ...] | None:
    """What defines a latent space: the encoder and the scaling. Decoders may differ, and half precision is the same encoder."""
    if autoencoder is None:
        return None
    autoencoder = unwrapped(autoencoder)
    known = weights(autoencoder, ("encoder", "quant_conv"), torch.float16, state_of(autoencoder))
    entries = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")
    scaling = tuple((k, autoencoder.config.get(k)) for k in entries if autoencoder.config.get(k) is not None)
    return type(autoencoder).__name__, *scaling, known[:8]


def patch_of(model: Any) -> int:
    """How many positions along a side are one token of a transformer."""
    model = unwrapped(model)
    patch = model.config.get("patch_size") if is_a(model, "ModelMixin") else None
    return patch if isinstance(patch, int) else 1


def _first_state(model: Any) -> Tensor | None:
    """The first parameter or buffer of floating-point numbers."""
    state = chain(model.parameters(), model.buffers()) if isinstance(model, nn.Module) else ()
    return next((t for t in state if t.is_floating_point()), None)


def _offloading(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The hooks of accelerate that bring weights to where they are computed with, and the names of their modules."""
    for name, module in model.named_modules():
        hook = vars(module).get("_hf_hook")
        for part in getattr(hook, "hooks", [hook]):
            if hasattr(part, "execution_device"):
                yield name, part
