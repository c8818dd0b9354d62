"""What a road is."""

from __future__ import annotations

import abc
import inspect
from collections.abc import Iterator
from types import FunctionType
from typing import TYPE_CHECKING, Any

from torch import nn

from sculpt.chain import Progress, Selection, Settings
from sculpt.classifier.guide import Guide
from sculpt.identity import module_digest
from sculpt.model import BaseModel

if TYPE_CHECKING:
    from sculpt.composition import Composition

__all__ = ["Road"]


class Road(abc.ABC):
    """A way to sample compositions, with its own options. One outside of this package is a subclass like those in it.

    Example:
        >>> [isinstance(road, sculpt.Road) for road in (sculpt.Tracked(), sculpt.Rejection())]
        [True, True]
    """

    selection: Selection | None = None
    """The population whose weights select the samples; ``None`` where samples have no weights."""

    def __new__(cls, *_: Any, **options: Any) -> Road:
        own = list(inspect.signature(cls.__init__).parameters.values())[1:]
        takes_any = cls.__init__ is object.__init__ or any(p.kind is p.VAR_KEYWORD for p in own)
        if not takes_any and (unknown := sorted(set(options) - {p.name for p in own})):
            takes = ", ".join(p.name for p in own)
            raise TypeError(f"{', '.join(unknown)}: not an option of {cls.__name__}, which takes {takes}.")
        return super().__new__(cls)

    @property
    def identity(self) -> dict[str, Any]:
        """The road and its options as JSON values, to tell whether two runs take one road. Options are the constructor's arguments that
        the road or its selection keeps under their names; functions count by their names."""
        return {"road": type(self).__name__} | _options(self) | ({} if self.selection is None else _options(self.selection))

    def __repr__(self) -> str:
        kept = vars(self) | ({} if self.selection is None else vars(self.selection))
        options = [
            (name, kept[name], p.default) for name, p in inspect.signature(type(self)).parameters.items() if name in kept
        ]
        said = [f"{name}={_said(value)}" for name, value, usual in options if value is not usual and value != usual]
        return f"{type(self).__name__}({', '.join(said)})"

    @abc.abstractmethod
    def check(self, composition: Composition) -> None:
        """Raise a ``ValueError`` that says why where this composition cannot be sampled so."""

    @abc.abstractmethod
    def stream(self, composition: Composition, n: int, settings: Settings) -> Iterator[Progress]:
        """Sample; the last progress has the samples."""


def _options(thing: Any) -> dict[str, Any]:
    return {name: _identity(getattr(thing, name)) for name in inspect.signature(type(thing)).parameters if hasattr(thing, name)}


def _identity(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, BaseModel):
        return value.key
    if isinstance(value, nn.Module):
        return module_digest(value)
    if isinstance(value, Guide):  # an exact one has no weights
        return [type(value).__qualname__, *(value.keys or ())]
    return value.__qualname__ if isinstance(value, FunctionType) else {"class": type(value).__qualname__} | _options(value)


def _said(value: Any) -> str:
    return repr(value) if isinstance(value, bool | int | float | str) else getattr(value, "name", type(value).__name__)
