"""The settings of other libraries' networks, schedulers and tokenizers in JSON: kinds and sizes are checked before a library sees them.

What a library still cannot make sense of becomes one sentence.
"""

from __future__ import annotations

import collections.abc
import contextlib
import inspect
import typing
from collections.abc import Iterator
from typing import Any

from sculpt.entries import Entries

__all__ = ["check_settings", "check_tokenizer", "clear", "known"]

LARGEST = 2**18
"""of a whole number, where the class itself has none that is larger"""
MOST_VALUES, DEEPEST, LONGEST = 50_000, 6, 10_000
TOKENS = 2**16
"""in a text: some libraries end the process where so many do not fit into memory"""
TooDeep = object()
SKIPPED = ("self", "dtype", "args", "kwargs")


def known(config: Entries, cls: type) -> dict[str, Any]:
    """The settings that a class has a parameter for."""
    return {name: config.get(name) for name in _parameters(cls) if name in config}


def check_settings(config: Entries, cls: type) -> None:
    """Raise where a setting is of another kind than its parameter, or of a size that nothing has."""
    _check_values(config)
    hints = _hints(cls)
    for name, parameter in _parameters(cls).items():
        if name not in config:
            continue
        defaults, hint = list(_leaves(parameter.default)), hints.get(name, parameter.annotation)
        kinds = (_kinds(hint) if hint is not parameter.empty else set()) | {type(value) for value in defaults} - {type}
        if isinstance(parameter.default, (list, tuple)):
            kinds.add(list)
        if kinds <= {type(None)}:
            kinds = {object}
        least, most = (edge(0, LARGEST, *(v for v in defaults if type(v) in (int, float))) for edge in (min, max))
        if not _fits(config.get(name), kinds, least, most):
            expected = " or ".join(sorted(kind.__name__ for kind in kinds - {object})) or "a plain value"
            raise config.refuse(name, f"{expected}; whole numbers from {min(least, 0)} to {most:,}")


def check_tokenizer(config: Entries) -> None:
    """Raise where a tokenizer would pad a text to more than memory can hold, or be made of other files than its own."""
    _check_values(config)
    if config.get("init_inputs"):
        raise config.refuse("init_inputs", "an empty list")
    for name, value in config.found.items():
        if any(isinstance(part, (int, float)) and not -1 <= part <= TOKENS for part in _parts(value)):
            raise config.refuse(name, f"no number beyond {TOKENS:,}")


@contextlib.contextmanager
def clear(what: str) -> Iterator[None]:
    """Whatever a library says about files that it cannot make sense of becomes one sentence."""
    try:
        yield
    except ImportError as error:
        raise ImportError(f"{what}: {_sentence(error)}.") from None
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":  # of a library in Rust
            raise ValueError(f"{what}: {type(error).__name__}: {_sentence(error)}. Copy or download it again.") from None
        raise


def _sentence(error: BaseException) -> str:
    return " ".join(str(error).split())[:300].rstrip(".")


def _parameters(cls: type) -> dict[str, inspect.Parameter]:
    found = inspect.signature(cls).parameters.values()
    return {p.name: p for p in found if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) and p.name not in SKIPPED}


def _hints(cls: type) -> dict[str, Any]:
    for described in (cls.__init__, cls):  # type: ignore[misc]
        try:
            if found := typing.get_type_hints(described):
                return found
        except (NameError, TypeError, AttributeError):  # an annotation of what is not imported
            pass
    return {}


def _kinds(hint: Any) -> set[type]:
    """The kinds of values in a type; ``object`` where it does not tell."""
    if hint in (int, float, str, bool, dict, list):
        return {hint}
    if hint is ...:
        return set()
    if hint in (None, type(None)):
        return {type(None)}
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is dict:
        return {dict}
    if origin is typing.Literal:
        return {type(value) for value in parts}
    several = {list} if origin in (list, tuple, collections.abc.Sequence) else set()
    return several | {kind for part in parts for kind in _kinds(part)} if parts else {object}


def _fits(value: Any, kinds: set[type], least: float, most: float) -> bool:
    """Whether a value, or each in a list, is of one of the kinds, and no whole number is too small or too large."""
    if isinstance(value, list):
        return bool({list, tuple, object} & kinds) and all(_fits(part, kinds, least, most) for part in value)
    if type(value) is int and not (abs(value) < 2**63 if float in kinds else least <= value <= most):
        return False
    if object in kinds or type(value) in kinds:
        return True
    # Zero or one for a flag, and null for one that is off, are to be found in files that work.
    return (type(value) is int and (float in kinds or (bool in kinds and value in (0, 1)))) or (value is None and bool in kinds)


def _leaves(value: Any) -> Iterator[Any]:
    """What is in lists of lists; an object is one value."""
    if isinstance(value, (list, tuple)):
        for part in value:
            yield from _leaves(part)
    else:
        yield value


def _parts(value: Any) -> Iterator[Any]:
    """A value and all that is in it, level by level, as deep as values are that are looked at."""
    level = [value]
    for _ in range(DEEPEST):
        yield from level
        level = [
            part
            for whole in level
            if isinstance(whole, (list, dict))
            for part in (whole.values() if isinstance(whole, dict) else whole)
        ]
    if level:
        yield TooDeep


def _check_values(config: Entries) -> None:
    """Raise where there are more or deeper values than settings have, or a number that is none."""
    left = MOST_VALUES
    for name, value in config.found.items():
        for part in _parts(value):
            left -= 1
            if left < 0 or part is TooDeep:
                raise config.refuse(name, f"at most {MOST_VALUES:,} values in all, {DEEPEST} deep")
            if part != part or (isinstance(part, str) and len(part) > LONGEST):
                raise config.refuse(name, f"numbers, and texts of at most {LONGEST:,} characters")
