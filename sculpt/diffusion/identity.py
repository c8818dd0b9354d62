"""What tells one pretrained network from another: hashes of weights and configuration."""

import hashlib
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["digest", "is_a", "weights"]


def is_a(thing: Any, name: str) -> bool:
    """``isinstance`` by the name of the class, so that models without diffusers do not load it."""
    return any(parent.__name__ == name for parent in type(thing).__mro__)


def digest(*parts: Any) -> str:
    """A hash of tensors, and of dicts, tuples and lists of anything with a stable ``repr``."""
    sha = hashlib.sha256()

    def update(part: Any) -> None:
        if isinstance(part, Tensor):
            sha.update(f"{part.dtype}{tuple(part.shape)}".encode())
            sha.update(part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        elif isinstance(part, Mapping):
            update(sorted(part.items(), key=lambda item: item[0]))
        elif isinstance(part, (tuple, list)):
            sha.update(b"(")
            for entry in part:
                update(entry)
            sha.update(b")")
        else:
            sha.update(f"{part!r},".encode())

    update(parts)
    return sha.hexdigest()


_KNOWN: weakref.WeakKeyDictionary[nn.Module, dict] = weakref.WeakKeyDictionary()


def weights(module: nn.Module, prefixes: tuple[str, ...] = ("",), dtype: torch.dtype | None = None) -> str:
    """The hash of a module's state under these prefixes, computed again only after the state was changed."""
    state = {k: t for k, t in module.state_dict().items() if isinstance(t, Tensor) and k.startswith(prefixes)}
    stamp = [(k, t.data_ptr(), 0 if t.is_inference() else t._version) for k, t in state.items()]
    known = _KNOWN.setdefault(module, {})
    if known.get((prefixes, dtype), (None,))[0] != stamp:
        state = {k: t.to(dtype) if dtype and t.is_floating_point() else t for k, t in state.items()}
        known[prefixes, dtype] = stamp, digest(state)
    return known[prefixes, dtype][1]
