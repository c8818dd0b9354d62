"""JSON from files, believed entry by entry: each is of the type, range and size that is expected, or an error names it."""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

__all__ = ["Entries", "open_plain", "parse_json", "read_json"]

MOST_BYTES = 2**24
"""of a JSON file"""
LARGEST = 2**31 - 1
"""of an integer, where nothing else is said"""
MOST_OBJECTS, MOST_LISTS = 50_000, 300_000
"""in it: reading as many takes a third of a second"""
DEEPEST = 64
"""of objects and lists in each other"""

_HALF = re.compile(r"\\u[dD][89a-fA-F]")


def open_plain(path: Path, most: int | None = None) -> BinaryIO:
    """A plain file of no more than so many bytes; what could be read without end, or waits for a writer, is refused."""
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}. Check it, or copy or download it again.") from None
    found = os.fstat(handle)
    if stat.S_ISREG(found.st_mode) and (most is None or found.st_size <= most):
        return os.fdopen(handle, "rb")  # closed by whoever reads it
    os.close(handle)
    if stat.S_ISREG(found.st_mode):
        raise ValueError(f"{path} has {found.st_size:,} bytes, expected at most {most:,}. Copy or download it again.")
    raise ValueError(f"{path} is no plain file. Copy or download it again.")


def read_json(path: Path, what: str) -> dict[str, Any]:
    """The object of a JSON file.

    Args:
        path: the file.
        what: its folder should be.
    """
    try:
        with open_plain(path, MOST_BYTES) as file:
            text = file.read(MOST_BYTES).decode()
    except FileNotFoundError:
        raise ValueError(f"{path.parent} is no {what}: {path.name} is missing.") from None
    except (OSError, UnicodeDecodeError):
        raise ValueError(f"{path} is not readable JSON: truncated or damaged. Copy or download it again.") from None
    return parse_json(text, str(path))


def parse_json(text: str, where: str) -> dict[str, Any]:
    """The object that a JSON text holds, each of its names once."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"{where} has an entry {twice:.80} twice. Copy or download it again.")
        return found

    if text.count("{") > MOST_OBJECTS or text.count("[") > MOST_LISTS:
        raise ValueError(f"{where} has more objects and lists than sculpt reads. Copy or download it again.")
    try:
        found = json.loads(text, object_pairs_hook=once)
    except (json.JSONDecodeError, RecursionError):
        raise ValueError(f"{where} is not readable JSON: truncated or damaged. Copy or download it again.") from None
    except ValueError as error:
        if str(error).startswith(where):
            raise
        raise ValueError(f"{where} is not readable JSON: {error!s:.200}. Copy or download it again.") from None
    if not isinstance(found, dict):
        raise ValueError(
            f"{where} is not readable JSON: it holds {_short(found)}, expected an object. Copy or download it again."
        )
    if _depth(found) > DEEPEST:
        raise ValueError(f"{where} is nested deeper than {DEEPEST} levels. Copy or download it again.")
    if _HALF.search(text):
        try:
            json.dumps(found, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError(f"{where} has half a character (a surrogate) in a text. Copy or download it again.") from None
    return found


def _depth(found: Any) -> int:
    """How deep it is nested, no further than matters."""
    level, depth = [found], 0
    while level and depth <= DEEPEST:
        below = [each.values() if isinstance(each, dict) else each for each in level]
        level, depth = [child for each in below for child in each if isinstance(child, (dict, list))], depth + 1
    return depth


class Entries:
    """A JSON object, read entry by entry.

    Args:
        found: the object.
        where: it is, for messages: the file, and the place in it.
    """

    def __init__(self, found: Any, where: str):
        if not isinstance(found, dict):
            raise ValueError(f"{where} is {_short(found)}, expected an object. Copy or download it again.")
        self.found, self.where = found, where

    def __contains__(self, name: str) -> bool:
        return name in self.found

    def get(self, name: str) -> Any:
        """The entry as it is, ``None`` where it is missing."""
        return self.found.get(name)

    def refuse(self, name: str, expected: str) -> ValueError:
        """The error that says what this entry is and what was expected."""
        got = _short(self.found[name]) if name in self.found else "missing"
        return ValueError(
            f"{self.where}: {name:.80} is {got}, expected {expected}. Copy or download it again, or update sculpt."
        )

    def whole(self, name: str, least: int = 0, most: int = LARGEST) -> int:
        """An integer."""
        value = self.get(name)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise self.refuse(name, f"a whole number from {least} to {most:,}")
        return value

    def number(self, name: str, least: float = -math.inf, most: float = math.inf) -> float:
        """A number; NaN is none."""
        value = self.get(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
            raise self.refuse(
                name, "a number" if (least, most) == (-math.inf, math.inf) else f"a number from {least:g} to {most:g}"
            )
        try:
            return float(value)
        except OverflowError:
            raise self.refuse(name, "a number") from None

    def text(self, name: str, most: int = 10_000) -> str:
        """A string of at most so many characters."""
        value = self.get(name)
        if not isinstance(value, str) or len(value) > most:
            raise self.refuse(name, f"a text of at most {most:,} characters")
        return value

    def flag(self, name: str) -> bool:
        """True or false."""
        value = self.get(name)
        if not isinstance(value, bool):
            raise self.refuse(name, "true or false")
        return value

    def choice(self, name: str, choices: Sequence[Any]) -> Any:
        """One of these values."""
        value = self.get(name)
        if not any(type(value) is type(choice) and value == choice for choice in choices):
            raise self.refuse(name, f"one of {', '.join(map(repr, choices))}")
        return value

    def list(self, name: str, most: int = 1_000_000) -> list[Any]:
        """A list of at most so many entries, whatever they are."""
        value = self.get(name)
        if not isinstance(value, list) or len(value) > most:
            raise self.refuse(name, f"a list of at most {most:,} entries")
        return value

    def each(self, name: str, kind: type | tuple[type, ...], what: str, most: int = 1_000_000) -> list[Any]:
        """A list whose entries are all of a kind; an integer is no flag, and the other way round.

        Args:
            name: of the entry.
            kind: of each of its entries.
            what: they are called.
            most: how many.
        """
        values = self.list(name, most)
        for value in values:
            if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
                raise self.refuse(name, f"a list of {what}; {_short(value)} is none")
        return values

    def texts(self, name: str, most: int = 100_000, *, distinct: bool = False) -> list[str]:
        """A list of strings, all different ones if need be."""
        values = self.each(name, str, "texts", most)
        if distinct and len(set(values)) < len(values):
            raise self.refuse(name, "texts that differ from each other")
        return values

    def optional(self, name: str, read: Callable[..., Any], **options: Any) -> Any:
        """The entry read by one of these methods; ``None`` where it is missing or null."""
        return None if self.get(name) is None else read(name, **options)

    def inside(self, name: str) -> Entries:
        """The object that an entry is."""
        if not isinstance(self.get(name), dict):
            raise self.refuse(name, "an object")
        return Entries(self.found[name], f"{self.where}: {name:.80}")


def _short(value: Any) -> str:
    """A value as far as a message has room for it."""
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 200:
        return f"a number of {value.bit_length():,} bits"
    if isinstance(value, (list, dict)):
        return f"{'a list' if isinstance(value, list) else 'an object'} of {len(value):,} entries"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
