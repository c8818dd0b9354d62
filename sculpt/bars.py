"""How far something is: a bar where somebody is looking, a few plain lines where a file keeps them."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any

__all__ = ["Lines", "bar"]

FIRST, MOST = 5.0, 300.0
"""Seconds before the first line, and between lines at most; each takes twice as long as the one before."""


def bar(
    things: Iterable[Any] | None = None, title: str = "", total: int | None = None, *, show: bool = True, **form: Any
) -> Any:
    """A progress bar, which appears after two seconds; plain lines where the output is no terminal and no notebook.

    Args:
        things: what is gone through, where it is not counted by ``update``.
        title: what is done.
        total: how many there are.
        show: whether anything is shown.
        form: what else tqdm takes.
    """
    if show and not (sys.stderr.isatty() or "ipykernel" in sys.modules):
        return Lines(things, title, total, form.get("initial", 0))
    from tqdm.auto import tqdm

    return tqdm(things, title, total, disable=not show, **({"delay": 2} | form))


class Lines:
    """What of a tqdm bar is used here, as lines on standard error.

    Args:
        things: what is gone through.
        title: what is done.
        total: how many there are.
        initial: how many were done before.
    """

    def __init__(self, things: Iterable[Any] | None = None, title: str = "", total: int | None = None, initial: int = 0):
        self.things, self.title, self.total, self.n = things, title, total, initial
        self._said, self._started, self._wait = "", time.monotonic(), FIRST
        self._next, self._last = self._started + FIRST, -1

    def update(self, k: float = 1) -> None:
        """k more are done."""
        self.n += k
        if (now := time.monotonic()) >= self._next:
            self._wait = min(2 * self._wait, MOST)
            self._next = now + self._wait
            self._write()

    def set_postfix(self, **said: Any) -> None:
        """What else there is to say."""
        self.set_postfix_str(", ".join(f"{name}={value}" for name, value in said.items()))

    def set_postfix_str(self, said: str, refresh: bool = True) -> None:
        """The same as a text."""
        self._said = said

    def close(self) -> None:
        """Say how it ended, where anything was said before."""
        if 0 <= self._last != self.n:
            self._write()

    def _write(self) -> None:
        self._last = self.n
        of = "" if self.total is None else f" of {self.total:,}"
        said = f", {self._said}" if self._said else ""
        print(f"{self.title}: {self.n:,}{of}{said}, {time.monotonic() - self._started:.0f} s", file=sys.stderr, flush=True)

    def __iter__(self) -> Iterator[Any]:
        try:
            for thing in self.things or ():
                yield thing
                self.update()
        finally:
            self.close()

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
