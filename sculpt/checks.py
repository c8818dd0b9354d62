"""Numbers that a caller gives: each is what it has to be, or an error says what was got and what was expected."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable
from typing import Any

__all__ = ["check_count", "check_whole", "each", "number", "real", "several", "whole"]

LARGEST = 2**63 - 1
"""What an entry of a tensor can count."""


def whole(name: str, value: Any, least: int = 1, most: int = LARGEST) -> int:
    """A whole number that was given; raise where it is none, or too small or large."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} has to be a whole number, got {value!r:.60}.")
    if value < least:
        raise ValueError(f"{name} has to be at least {least}, got {value!s:.60}.")
    if value > most:
        raise ValueError(f"{name} has to be at most {most}, got {value!s:.60}.")
    return int(value)


def check_whole(name: str, value: Any, least: int = 1) -> int | None:
    """The same for what may be left out: ``None`` was not given."""
    return None if value is None else whole(name, value, least)


def check_count(n: Any) -> int:
    """A number of samples; raise where n is none."""
    if isinstance(n, bool) or not isinstance(n, numbers.Integral):
        raise TypeError(f"The number of samples is a whole number, got n={n!r:.60}.")
    if n < 1:
        raise ValueError(f"The number of samples has to be at least 1, got n={n!s:.60}.")
    return whole("n", n)


def number(name: str, value: Any) -> float:
    """A number that was given, of Python, NumPy or PyTorch, perhaps infinite or NaN; raise where it is none."""
    try:
        if not isinstance(value, bool | str | bytes):
            return float(value)
    except OverflowError:  # a whole number of more than 308 digits
        return math.inf if value > 0 else -math.inf
    except (TypeError, ValueError, RuntimeError):  # the last is PyTorch's, of a tensor of several numbers
        pass
    raise TypeError(f"{name} has to be a number, got {value!r:.60}.")


def real(name: str, value: Any) -> float:
    """The same, and finite."""
    if not math.isfinite(found := number(name, value)):
        raise ValueError(f"{name} has to be a finite number, got {value!r:.60}.")
    return found


def several(value: Any) -> bool:
    """Whether these are several things and not one."""
    return isinstance(value, Iterable) and not isinstance(value, str | bytes) and getattr(value, "ndim", 1) > 0


def each(name: str, values: Any, kind: str = "numbers") -> list[Any]:
    """Several things that were given, as a list; raise where it was one or none."""
    if not several(values):
        raise TypeError(f"{name} has to be a list of {kind}, got {values!r:.60}.")
    return list(values)


def normalised(weights: Sequence[float], what: str) -> tuple[float, ...]:
    """Positive numbers scaled to sum to one; only their ratios matter."""
    given = tuple(number(f"one of the {what}", w) for w in each(what, weights))
    total = sum(given)
    # A ratio of more than 300 digits leaves no share.
    if not given or not 0 < total < math.inf or not all(w / total > 0 for w in given):
        raise ValueError(f"{what} have to be positive numbers, one per base model; got {given}.")
    return tuple(w / total for w in given)
