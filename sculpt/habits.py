"""What people do with a model by habit: move it, ask whether it is there, look at it; and the words that other libraries have for options."""

from __future__ import annotations

import functools
import html
import inspect
from collections.abc import Callable, Collection, Iterable
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import torch
from torch import nn

from sculpt import preview

__all__ = ["Habits", "checked", "here", "move", "refuse_words"]

P = ParamSpec("P")
R = TypeVar("R")
H = TypeVar("H", bound="Habits")

WORDS = {
    "torch_dtype": "dtype=",
    "device_map": "device=",
    "seed": "generator=, e.g. generator=torch.Generator().manual_seed(0)",
    "num_inference_steps": "steps=",
    "num_steps": "steps=",
    "num_samples": "n, the first argument",
    "n_samples": "n, the first argument",
    "num_images_per_prompt": "n, the first argument",
    "scheduler": "solver=",
    "callback_on_step_end": "callback=",
    "disable_progress_bar": "progress=",
}
"""What other libraries call an option -> what it is called here."""


def refuse_words(given: Collection[str], known: Collection[str], caller: str) -> None:
    """Raise where an option is known here by another name.

    Args:
        given: the options.
        known: those that there are.
        caller: of what, for the message.
    """
    for word in sorted(given):
        if word in WORDS and word not in known and WORDS[word].partition("=")[0].partition(",")[0] in known:
            raise TypeError(f"{word}: {caller} calls it {WORDS[word]}.")


def checked(method: Callable[P, R]) -> Callable[P, R]:
    """Say what an option is called here, or where it belongs, that is not among the method's."""
    known = [name for name in inspect.signature(method).parameters if name != "self"]

    @functools.wraps(method)
    def call(*args: P.args, **options: P.kwargs) -> R:
        if unknown := sorted(set(options) - set(known)):
            refuse_words(unknown, known, method.__name__)
            raise TypeError(
                f"{', '.join(unknown)}: not an option of {method.__name__}, which takes {', '.join(known)}. What belongs to a road goes into "
                f"the road: model.{method.__name__}(n, sculpt.Guided(classifier, correct=True))."
            )
        return method(*args, **options)

    return call


def move(networks: Iterable[nn.Module], device: torch.device | None, dtype: torch.dtype | None) -> None:
    """Networks to a device, or to another precision, or both.

    Args:
        networks: these.
        device: where to; ``None`` for where they are.
        dtype: of their numbers; ``None`` for what they have.
    """
    where = [one for one in (device, dtype) if one is not None]  # some libraries warn of a dtype even where it is None
    for network in networks:
        network.to(*where)


def here(device: torch.device | str | int) -> torch.device:
    """A device that was asked for; raise where this machine has none such.

    Args:
        device: as torch takes it.
    """
    found = torch.device(device)
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"torch {torch.__version__} sees no CUDA device here, and {str(found)!r} was asked for. Pass 'cpu'.")
    return found


class Habits:
    """What every model can do because people expect it."""

    shape: tuple[int, ...]
    device: torch.device

    if TYPE_CHECKING:

        @property
        def leaves(self) -> tuple[Any, ...]: ...

    networks: tuple[nn.Module, ...] = ()
    """All that is called on the way to a sample, and moves with the model."""

    def to(
        self: H,
        *where: torch.device | str | int | torch.dtype,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> H:
        """Move the model's networks to a device, or to another precision, in place as PyTorch and diffusers do; returns the model.

        Models that share a network move together. A classifier knows its models by their weights: in another precision they are others.

        Args:
            where: a device, a dtype, or both.
            device: the device by name.
            dtype: of floating-point numbers, by name.
        """
        for one in where:
            device, dtype = (device, one) if isinstance(one, torch.dtype) else (one, dtype)
        if device is None and dtype is None:
            raise TypeError("Where to? Pass a device, a dtype, or both.")
        if dtype is not None and not dtype.is_floating_point:
            raise TypeError(
                f"Networks compute in floating-point numbers, got {dtype}. Pass torch.float16, torch.bfloat16 or wider."
            )
        self.place(None if device is None else here(device), dtype)
        return self

    def half(self: H) -> H:
        """:meth:`to` half precision."""
        return self.to(torch.float16)

    def place(self, device: torch.device | None, dtype: torch.dtype | None) -> None:
        """What :meth:`to` does; a family that keeps more than networks moves that too.

        Args:
            device: where to; ``None`` for where it is.
            dtype: of the networks; ``None`` for what they have.
        """
        parts = [leaf for leaf in self.leaves if leaf is not self]
        for leaf in parts:
            leaf.place(device, dtype)
        if not (parts or self.networks):
            raise ValueError(
                f"{self} has no networks to move. Make it where it belongs; a family of your own says what they are in networks."
            )
        move(self.networks, device, dtype)

    def __bool__(self) -> bool:
        raise TypeError(
            f"The model {self} is neither true nor false, so Python's and, or and not compose nothing. Write p & q (likely under both), "
            "p | q (either) or p - q (the first and not the second); whether there is a model, p is not None."
        )

    # To look at

    @property
    def facts(self) -> dict[str, str]:
        """What a person wants to know of the model at a glance, by name."""
        parameters = {id(p): p.numel() for leaf in self.leaves for network in leaf.networks for p in network.parameters()}
        size = {"parameters": f"{sum(parameters.values()):,}"} if parameters else {}
        return {"shape": str(tuple(self.shape)), **size, "device": str(self.device)}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self)!r}, {self._said()})"

    def _said(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.facts.items())

    def outline(self) -> str:
        """The model in one line of HTML; compositions have their parts below."""
        said = html.escape(f"{type(self).__name__}, {self._said()}")
        return f'<b>{html.escape(str(self))}</b> <span style="{preview.SMALL}">{said}</span>'

    def _repr_html_(self) -> str:
        return self.outline()
