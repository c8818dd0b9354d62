"""What a chain knows of its particles, and functions of it in parts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

__all__ = ["State", "finite", "in_parts"]

S = TypeVar("S", bound="State")


class State:
    """What a chain knows of its particles. A subclass is a dataclass of tensors, particles first; tuples of tensors, States and ``None`` may be among them.

    It is indexed and concatenated as a whole, so whatever a chain carries along is selected with its particle.
    """

    def __post_init__(self) -> None:
        lengths = [(name, n) for name, value in vars(self).items() for n in _lengths(name, value)]
        if len({n for _, n in lengths}) > 1:
            said = ", ".join(f"{name} {n}" for name, n in lengths)
            raise ValueError(
                f"The parts of a {type(self).__name__} disagree in length: {said}. Every tensor of a State has the particles along its "
                "first axis."
            )

    def __len__(self) -> int:
        return next(n for name, value in vars(self).items() for n in _lengths(name, value))

    def __getitem__(self: S, index: Any) -> S:
        return self._map(lambda part: part[index])

    @staticmethod
    def cat(states: Sequence[S]) -> S:
        """The particles of several states, one after another."""
        return states[0]._map(lambda *parts: torch.cat(parts), *states[1:])

    def _map(self: S, function: Callable[..., Tensor], *others: State) -> S:
        return type(self)(
            *(_over(function, *parts) for parts in zip(*(vars(state).values() for state in (self, *others)), strict=True))
        )


def _over(function: Callable[..., Tensor], value: Any, *others: Any) -> Any:
    if isinstance(value, State):
        return value._map(function, *others)
    if isinstance(value, tuple):
        return tuple(_over(function, *parts) for parts in zip(value, *others, strict=True))
    return None if value is None else function(value, *others)


def _lengths(name: str, value: Any) -> Iterator[int]:
    if isinstance(value, tuple):
        for part in value:
            yield from _lengths(name, part)
    elif isinstance(value, State) or (isinstance(value, Tensor) and value.ndim):
        yield len(value)
    elif value is not None:
        raise TypeError(f"{name} of a State is {value!r:.60}; expected a tensor with an entry for every particle.")


def finite(x: Tensor) -> Tensor:
    """For each of these, whether all of its numbers are finite."""
    return x.flatten(1).isfinite().all(1) if x.ndim > 1 else x.isfinite()


def in_parts(function: Callable[..., Any], batch_size: int, *values: Any) -> Any:
    """A function of tensors or States over a population, in parts that fit; what it gives, one of them or a tuple, is joined again."""
    n = len(values[0])
    if n <= batch_size:
        return function(*values)
    parts = [function(*(value[i : i + batch_size] for value in values)) for i in range(0, n, batch_size)]
    return tuple(map(_join, zip(*parts, strict=True))) if isinstance(parts[0], tuple) else _join(parts)


def _join(parts: Sequence[Any]) -> Any:
    first = parts[0]
    return State.cat(parts) if isinstance(first, State) else None if first is None else torch.cat(list(parts))
