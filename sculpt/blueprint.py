"""Networks that a file describes, drawn before they are built: what does not fit the file's weights costs neither time nor memory."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks

from sculpt.weights import Weights

__all__ = ["build", "check", "draw", "fill", "frugal"]

M = TypeVar("M", bound=nn.Module)

SPARE = 2**24
"""numbers in buffers that are made anew and not stored"""
TIMES = 4
"""by how much more than the weights have may be drawn: a part of it is thrown away again, such as a UNet's way up"""


_WATCH: ContextVar[Mapping[str, Callable[[nn.Module, str, Any], None]] | None] = ContextVar("watch", default=None)


class Extravagant(Exception):
    """A description asks for more than the weights have."""


@contextlib.contextmanager
def frugal(weights: Weights) -> Iterator[None]:
    """Modules that are made meanwhile, in this thread, may have a few times what the weights have; more raise."""
    left = {"tensors": TIMES * len(weights.shapes), "numbers": TIMES * weights.numel}
    largest = TIMES * max((math.prod(shape) for shape in weights.shapes.values()), default=0)
    left |= {"modules": 16 * len(weights.shapes) + 64, "spare numbers": SPARE}

    def spend(what: str, much: int) -> None:
        left[what] -= much
        if left[what] < 0:
            raise Extravagant(f"far more {what} than the weights have")

    def parameter(module: nn.Module, name: str, value: Tensor) -> None:
        spend("tensors", 1)
        spend("numbers", value.numel())
        if value.numel() > largest:
            raise Extravagant(
                f"{type(module).__name__} has a {name} of shape {tuple(value.shape)}, far larger than any of the weights"
            )

    def buffer(module: nn.Module, name: str, value: Tensor) -> None:
        spend("spare numbers", value.numel())

    def child(module: nn.Module, name: str, value: nn.Module) -> None:
        spend("modules", 1)

    before = _WATCH.set({"parameter": parameter, "buffer": buffer, "module": child})
    try:
        yield
    finally:
        _WATCH.reset(before)


def _watched(what: str) -> Callable[[nn.Module, str, Any], None]:
    def hook(module: nn.Module, name: str, value: Any) -> None:
        if value is not None and (watch := _WATCH.get()) is not None:
            watch[what](module, name, value)

    return hook


# Once and for all: hooks that come and go break whoever makes a module in another thread meanwhile.
hooks.register_module_parameter_registration_hook(_watched("parameter"))
hooks.register_module_buffer_registration_hook(_watched("buffer"))
hooks.register_module_module_registration_hook(_watched("module"))


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


def check(network: nn.Module, weights: Weights, what: str, prefix: str = "") -> None:
    """Raise where the weights' shapes are not those of a network; only tensors whose names begin with the prefix are looked at."""
    own = {f"{prefix}{name}": tuple(value.shape) for name, value in network.state_dict().items()}
    stored = {name: shape for name, shape in weights.shapes.items() if name.startswith(prefix)}
    for name in [*own, *stored]:
        if own.get(name) != stored.get(name):
            got, expected = stored.get(name, "missing"), own.get(name, "no such tensor")
            raise ValueError(
                f"The weights in {weights.path} do not fit {what}: {name:.200} is {got!s:.200}, expected {expected!s:.200}. "
                "Copy or download the folder again."
            )


def build(make: Callable[[], M], weights: Weights, what: str, prefix: str = "") -> M:
    """The network, once its blueprint has the shapes of the weights.

    Args:
        make: the network, from its description.
        weights: the file.
        what: it is, for messages.
        prefix: of its tensors in the file; others are not looked at.
    """
    check(draw(make, weights, what), weights, f"{what} that config.json describes", prefix)
    return make()


def fill(network: nn.Module, tensors: Mapping[str, Tensor], weights: Weights, prefix: str = "") -> None:
    """Load what was read into a network that was checked. A parameter that is not a finite number makes no samples.

    Args:
        network: with these shapes.
        tensors: of the file, all of them.
        weights: the file, for messages.
        prefix: of the network's tensors among them.
    """
    parameters = {name for name, _ in network.named_parameters()}
    for name, own in network.state_dict().items():
        value = tensors[f"{prefix}{name}"]
        if (value.is_floating_point(), value.is_complex()) != (own.is_floating_point(), own.is_complex()):
            raise ValueError(
                f"{weights.path}: {prefix}{name} holds {value.dtype}, expected {own.dtype}. Copy or download the folder again."
            )
        if name in parameters and not value.to(own.dtype).isfinite().all():
            raise ValueError(
                f"{weights.path}: {prefix}{name} holds numbers that are not finite. Its training went wrong, or the file is damaged: "
                "train it again, or copy or download it again."
            )
    network.load_state_dict({name: tensors[f"{prefix}{name}"] for name in network.state_dict()})
