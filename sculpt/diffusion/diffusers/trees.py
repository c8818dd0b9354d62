"""Trees: what goes into a network and comes out of it, tensors and other values in dicts, lists and tuples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["LISTED", "Path", "at", "axes", "entries", "first", "joined", "mapped", "rows"]

Path = tuple[Any, ...]

LISTED = -1
"""The axis of what is a list with an entry for every sample."""


def entries(tree: Any, path: Path = (), stop: Mapping[Path, Any] = {}) -> Iterator[tuple[Path, Any]]:
    """Every value with its place, those of dicts, lists and tuples inside among them; what is at a place in ``stop`` is one value."""
    inside = None if path in stop else _inside(tree)
    if inside is None:
        yield path, tree
    else:
        for key, value in inside:
            yield from entries(value, (*path, key), stop)


def mapped(f: Callable[[Path, Any], Any], tree: Any, path: Path = (), stop: Mapping[Path, Any] = {}) -> Any:
    """The same tree with f(place, value) in the place of every value."""
    inside = None if path in stop else _inside(tree)
    if inside is None:
        return f(path, tree)
    new = {key: mapped(f, value, (*path, key), stop) for key, value in inside}
    if isinstance(tree, Mapping):
        return new if type(tree) is dict else type(tree)(**new)
    return type(tree)(*new.values()) if hasattr(tree, "_fields") else type(tree)(new.values())


def at(tree: Any, path: Path) -> Any:
    """The value at a place."""
    for key in path:
        tree = tree[key]
    return tree


def first(out: Any) -> Any:
    """What counts of a network's output: its first part, or the one called ``sample``."""
    if isinstance(out, (Tensor, list)):
        return out
    return out[0] if isinstance(out, tuple) else next(iter(out.values())) if isinstance(out, Mapping) else out.sample


def _inside(tree: Any) -> list[tuple[Any, Any]] | None:
    if isinstance(tree, Mapping):
        return [(key, tree[key]) for key in tree]
    return list(enumerate(tree)) if isinstance(tree, (list, tuple)) else None


def axes(one: Any, two: Any, path: Path = ()) -> dict[Path, int | None]:
    """For every value of a tree the axis that counts samples: the one twice as long in a tree of twice as many; ``None`` where there is none.

    Raises:
        ValueError: where the two differ in anything else.
    """
    if isinstance(one, Tensor) and isinstance(two, Tensor):
        longer = [i for i, (n, m) in enumerate(zip(one.shape, two.shape, strict=True)) if n != m]
        if not longer:
            return {path: None}
        if len(longer) == 1 and two.shape[longer[0]] == 2 * one.shape[longer[0]]:
            return {path: longer[0]}
        raise ValueError(f"{_said(path)} has shape {tuple(one.shape)} for one sample and {tuple(two.shape)} for two")
    first, second = _inside(one), _inside(two)
    if first is None or second is None:
        if type(one) is not type(two):
            raise ValueError(f"{_said(path)} is a {type(one).__name__} for one sample and a {type(two).__name__} for two")
        return {path: None}
    if isinstance(one, (list, tuple)) and len(second) == 2 * len(first) > 0:
        return {path: LISTED}
    if [key for key, _ in first] != [key for key, _ in second]:
        raise ValueError(f"{_said(path)} has {len(first)} entries for one sample and {len(second)} for two")
    return {place: axis for key, value in first for place, axis in axes(value, two[key], (*path, key)).items()}


def _said(path: Path) -> str:
    return ".".join(map(str, path)) or "what it is called with"


def rows(value: Any, axis: int | None, part: int, parts: int) -> Any:
    """One of so many equal parts along the axis; all of it where there is no axis."""
    if axis is None:
        return value
    n = len(value) if axis == LISTED else value.shape[axis]
    k, rest = divmod(n, parts)
    if rest or not k:
        raise ValueError(f"{n} rows are not {parts} equal parts")
    return value[part * k : (part + 1) * k] if axis == LISTED else value.narrow(axis, part * k, k)


def joined(values: list[Any], axis: int | None) -> Any:
    """Parts after one another along the axis; where there is none they are all the same."""
    if len(values) == 1 or axis is None:
        return values[0]
    return sum(values[1:], values[0]) if axis == LISTED else torch.cat(values, axis)
