"""What tells one pretrained network from another: hashes of weights and configuration."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["digest", "module_digest", "weights"]


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


_KNOWN: weakref.WeakKeyDictionary[nn.Module, dict[Any, tuple[Any, str]]] = weakref.WeakKeyDictionary()


def _remembered(module: nn.Module, what: Any, state: Mapping[str, Tensor], compute: Callable[[], str]) -> str:
    """A hash of a module's state, computed again only after the state was changed."""
    stamp = [(k, t.data_ptr(), 0 if t.is_inference() else t._version) for k, t in state.items()]
    known = _KNOWN.setdefault(module, {})
    if what not in known or known[what][0] != stamp:
        known[what] = stamp, compute()
    return known[what][1]


def weights(
    module: nn.Module,
    prefixes: tuple[str, ...] = ("",),
    dtype: torch.dtype | None = None,
    state: Mapping[str, Tensor] | None = None,
    called: Callable[[str], str | None] | None = None,
) -> str:
    """The hash of a module's state under these prefixes, whatever its class.

    Args:
        module: whose state it is.
        prefixes: of the names that count.
        dtype: to which it is rounded first.
        state: the state itself, where the module's own is elsewhere.
        called: another name for a weight; ``None`` for one that does not count.
    """
    state = module.state_dict() if state is None else state
    state = {k: t for k, t in state.items() if isinstance(t, Tensor) and k.startswith(prefixes)}
    if called is not None:
        state = {name: t for k, t in state.items() if (name := called(k)) is not None}

    def compute() -> str:
        return digest({k: t.to(dtype) if dtype and t.is_floating_point() else t for k, t in state.items()})

    return _remembered(module, (prefixes, dtype), state, compute)


def module_digest(module: nn.Module) -> str:
    """The hash of a module's state, class names and configurations; where the classes live does not count."""
    parts = (*module.modules(), getattr(module, "preprocessor", None))
    names = [f"{type(part).__qualname__} {getattr(part, 'config', '')}" for part in parts]
    state = module.state_dict()

    def compute() -> str:
        sha = hashlib.sha256("".join(names).encode())
        for name, value in state.items():
            sha.update(f"{name} {value.dtype}".encode() + value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
        return sha.hexdigest()

    return _remembered(module, ("module", *names), {k: t for k, t in state.items() if isinstance(t, Tensor)}, compute)
