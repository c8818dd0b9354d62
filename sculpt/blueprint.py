"""Networks that a file describes, drawn before they are built: what does not fit the file's weights costs neither time nor memory."""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks

from sculpt.weights import Weights

__all__ = ["build", "draw", "frugal"]

M = TypeVar("M", bound=nn.Module)

SPARE = 2**24
"""numbers in buffers that are made anew and not stored"""


class Extravagant(Exception):
    """A description asks for more than the weights have."""


@contextlib.contextmanager
def frugal(weights: Weights) -> Iterator[None]:
    """Modules that are made meanwhile, in this thread, may have as many parameters as the weights have; more raise."""
    thread, left = threading.get_ident(), {"tensors": len(weights.shapes), "numbers": weights.numel, "spare": SPARE}
    largest = max((math.prod(shape) for shape in weights.shapes.values()), default=0)
    left["modules"] = 16 * len(weights.shapes) + 64

    def spend(what: str, much: int) -> None:
        left[what] -= much
        if left[what] < 0:
            raise Extravagant(f"more {what} than the weights have")

    def parameter(module: nn.Module, name: str, value: Tensor | None) -> None:
        if value is None or threading.get_ident() != thread:
            return
        spend("tensors", 1)
        spend("numbers", value.numel())
        if value.numel() > largest:
            raise Extravagant(
                f"{type(module).__name__} has a {name} of shape {tuple(value.shape)}, larger than any of the weights"
            )

    def buffer(module: nn.Module, name: str, value: Tensor | None) -> None:
        if value is not None and threading.get_ident() == thread:
            spend("spare", value.numel())

    def child(module: nn.Module, name: str, value: nn.Module | None) -> None:
        if threading.get_ident() == thread:
            spend("modules", 1)

    registered = [
        hooks.register_module_parameter_registration_hook(parameter),
        hooks.register_module_buffer_registration_hook(buffer),
        hooks.register_module_module_registration_hook(child),
    ]
    try:
        yield
    finally:
        for hook in registered:
            hook.remove()


def draw(make: Callable[[], M], weights: Weights, what: str) -> M:
    """The network on the meta device, where it takes no memory, or a ValueError that says what is wrong with its description.

    Args:
        make: the network, from its description.
        weights: it should have.
        what: it is, for messages.
    """
    try:
        with frugal(weights), torch.device("meta"):
            return make()
    except Exception as error:  # whatever a constructor says about arguments that come from a file
        raise ValueError(
            f"{weights.path.parent}: {what} cannot be built as its config.json describes it: {type(error).__name__}: {error!s:.300}"
        ) from None


def build(make: Callable[[], M], weights: Weights, what: str, prefix: str = "") -> M:
    """The network, once its blueprint has the shapes of the weights.

    Args:
        make: the network, from its description.
        weights: the file.
        what: it is, for messages.
        prefix: of its tensors in the file; others are not looked at.
    """
    blueprint = {f"{prefix}{name}": tuple(value.shape) for name, value in draw(make, weights, what).state_dict().items()}
    stored = {name: shape for name, shape in weights.shapes.items() if name.startswith(prefix)}
    for name in [*blueprint, *stored]:
        if blueprint.get(name) != stored.get(name):
            got, expected = stored.get(name, "missing"), blueprint.get(name, "no such tensor")
            raise ValueError(
                f"The weights in {weights.path} do not fit {what} that config.json describes: {name} is {got}, expected {expected}. "
                "Copy or download both files again."
            )
    return make()
