"""What networks of diffusion models tell about themselves: their class, where they are, and who they are."""

from __future__ import annotations

import json
from itertools import chain
from typing import Any

from torch import Tensor, nn

from sculpt.identity import weights

__all__ = ["first_state", "is_a", "known_as", "patch_of", "unwrapped"]


def is_a(thing: Any, name: str) -> bool:
    """``isinstance`` by the name of the class, so that models without diffusers do not load it."""
    return any(parent.__name__ == name for parent in type(thing).__mro__)


def unwrapped(model: Any) -> Any:
    """The network itself, where it was compiled."""
    return getattr(model, "_orig_mod", model)


def first_state(model: Any) -> Tensor | None:
    """The parameter or buffer that tells a network's device and dtype, looked up anew because networks move."""
    state = chain(model.parameters(), model.buffers()) if isinstance(model, nn.Module) else ()
    return next((t for t in state if t.is_floating_point()), None)


def known_as(model: Any, name: str | None, anonymous: str) -> Any:
    """What tells this network from others: weights and configuration, or its name."""
    if is_a(model, "DenoiserUNet"):
        return model.denoiser.key
    if not isinstance(model, nn.Module) or not model.state_dict():
        return name or anonymous
    config = name
    if is_a(model, "ModelMixin"):
        config = json.dumps({k: v for k, v in model.config.items() if not k.startswith("_")}, sort_keys=True, default=str)
    return type(model).__qualname__, config, weights(model)


def patch_of(model: Any) -> int:
    """How many positions along a side are one token of a transformer."""
    patch = model.config.get("patch_size") if is_a(model, "ModelMixin") else None
    return patch if isinstance(patch, int) else 1
