"""Faults that are injected: a job is run once for each of its operations on the disk, and each time that operation goes wrong.

Every operation of this process that changes a file or a folder under a root is counted, whoever asks for it: Python's files, ``os``,
``pathlib``, ``shutil``, and safetensors, whose writer is no Python. Processes are forked, and those that are killed are killed.
"""

import builtins
import contextlib
import errno
import hashlib
import io
import os
import re
import shutil
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import safetensors
import safetensors.torch

KINDS = ("killed before", "killed after", "killed half way", "disk full", "no permission")
GROWING = ("create", "write", "to disk", "mkdir", "link")
"""What a full disk refuses."""

FAILED, UGLY = 3, 4


# The disk


class Disk:
    """Counts what changes under a root while it is entered, and lets operation ``at`` go wrong. A full disk stays full, and a folder closed.

    Args:
        root: the folder.
        kind: of the fault; ``None`` for none.
        at: the operation.
    """

    def __init__(self, root: Path, kind: str | None = None, at: int = 0):
        self.root, self.kind, self.at = os.path.realpath(root), kind, at
        self.log: list[str] = []
        self.half: list[int] = []
        """the operations that have a middle"""
        self.unsafe: list[str] = []
        """moves of what a power cut could still take"""
        self._volatile: set[str] = set()
        self._open, self._os = io.open, {name: getattr(os, name) for name in _CALLS}
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "Disk":
        patches = {name: _os_call(self, name, *_CALLS[name]) for name in _CALLS}
        self._stack.enter_context(mock.patch.multiple(os, **patches))
        self._stack.enter_context(mock.patch.object(io, "open", self._opened))
        self._stack.enter_context(mock.patch.object(builtins, "open", self._opened))
        self._stack.enter_context(mock.patch.object(safetensors.torch, "serialize_file", self._serialized))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _inside(self, path: str) -> bool:
        return path == self.root or path.startswith(self.root + os.sep)

    def act(self, name: str, paths: list[str], do: Callable[[], object], half: Callable[[], object] | None = None) -> object:
        """One operation on absolute paths."""
        if not any(map(self._inside, paths)):
            return do()
        k = len(self.log)
        self.log.append(" ".join([name, *(os.path.relpath(path, self.root) for path in paths)]))
        self.half += [k] if half is not None else []
        if self.kind == "disk full" and k >= self.at and name in GROWING:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), paths[-1])
        if self.kind == "no permission" and k >= self.at:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), paths[-1])
        if self.kind == "killed before" and k == self.at:
            _killed()
        if self.kind == "killed half way" and k == self.at:
            half()
            _killed()
        try:
            result = do()
            self._follow(name, paths)
        finally:
            if self.kind == "killed after" and k == self.at:
                _killed()
        return result

    def _follow(self, name: str, paths: list[str]) -> None:
        """What a power cut could take: contents of files and entries of folders since they last went to the disk."""
        volatile, path = self._volatile, paths[-1]
        below = {one for one in volatile if one == paths[0] or one.startswith(paths[0] + os.sep)}
        if name == "to disk":
            volatile -= {path, f"{path} commit"}
            return
        if name in ("replace", "rename", "link"):
            parent, saved = os.path.split(os.path.dirname(paths[0]))
            # Files must not move before the commit that lets them.
            if below or (saved == ".saved" and f"{parent} commit" in volatile):
                self.unsafe.append(self.log[-1])
            volatile -= {one for one in volatile if one == path or one.startswith(path + os.sep)}
            volatile |= {path + one.removeprefix(paths[0]) for one in below}
        if name in ("replace", "rename", "unlink", "rmdir"):
            volatile -= below
        if name in ("create", "write", "mkdir"):
            volatile.add(path)
        if name != "write":
            volatile |= {os.path.dirname(one) for one in paths}
        if name == "rename" and os.path.basename(path) == ".saved":
            volatile.add(f"{os.path.dirname(path)} commit")

    # Files

    def _opened(self, file, mode="r", *args, **options):
        """In place of ``open``."""
        if isinstance(file, int) or not set(mode) & set("wax+"):
            return self._open(file, mode, *args, **options)
        path = _absolute(file)
        if not self._inside(path):
            return self._open(file, mode, *args, **options)
        opened = self.act("create", [path], lambda: self._open(file, mode, *args, **options))
        return _File(self, path, opened)

    def _serialized(self, tensors, filename, metadata=None):
        """In place of safetensors' own writer, whose errors are of a class of its own."""
        try:
            with self._opened(filename, "wb") as file:
                file.write(safetensors.serialize(tensors, metadata))
        except OSError as error:
            raise safetensors.SafetensorError(f"Error while serializing: {error}") from None


class _File:
    """A file whose writes are operations, each on the disk when it returns."""

    def __init__(self, disk: Disk, path: str, file: io.IOBase):
        self._disk, self._path, self._file = disk, path, file

    def write(self, data) -> int:
        def put(part):
            self._file.write(part)
            self._file.flush()
            return len(data)

        return self._disk.act("write", [self._path], lambda: put(data), lambda: put(data[: len(data) // 2]))

    def writelines(self, lines) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> object:
        return getattr(self._file, name)

    def __enter__(self) -> "_File":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


_CALLS = {
    "replace": ("replace", 2),
    "rename": ("rename", 2),
    "link": ("link", 2),
    "symlink": ("link", -1),
    "unlink": ("unlink", 1),
    "remove": ("unlink", 1),
    "rmdir": ("rmdir", 1),
    "mkdir": ("mkdir", 1),
    "truncate": ("write", 1),
    "fsync": ("to disk", 1),
    "write": ("write", 1),
    "open": ("create", 1),
}
"""Calls of ``os``: the kind of operation, and how many paths come first; -1 for the second alone."""


def _os_call(disk: Disk, call: str, name: str, paths: int) -> Callable:
    original = disk._os[call]

    def wrapped(*args, dir_fd=None, **options):
        options |= {} if dir_fd is None else {"dir_fd": dir_fd}
        if call == "open" and not args[1] & (os.O_CREAT | os.O_TRUNC):
            return original(*args, **options)
        at = [_absolute(one, dir_fd) for one in (args[:paths] if paths > 0 else args[1:2])]
        half = (lambda: original(args[0], args[1][: len(args[1]) // 2])) if call == "write" else None
        return disk.act(name, at, lambda: original(*args, **options), half)

    return wrapped


def _absolute(path: object, dir_fd: int | None = None) -> str:
    """Without a link in its folders; of a handle, the path that it was opened with."""
    if isinstance(path, int):
        return os.readlink(f"/proc/self/fd/{path}")
    folder, name = os.path.split(os.path.join("" if dir_fd is None else _absolute(dir_fd), os.fsdecode(path)))
    return os.path.join(os.path.realpath(folder), name) if name not in ("", ".", "..") else os.path.realpath(path)


def _killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


# Scenarios


@dataclass
class Scenario:
    """A job that leaves files in a folder, and what a reader finds there."""

    name: str
    job: Callable[[Path], object]
    load: Callable[[Path], object]
    """Something whose ``repr`` tells the content; a ``ValueError`` where there is nothing to read yet."""
    old: Callable[[Path], object] = lambda root: None
    """Writes what is there before."""
    steps: list[tuple[type, str]] = field(default_factory=list)
    """Methods that leave a content of its own each time: a training saves many states."""
    repeats: bool = True
    """Whether the job, run once more when it was done, changes nothing; if not, it is only read then."""


@dataclass
class Tally:
    """What became of the faults of a scenario."""

    scenario: str
    operations: int
    faults: int = 0
    ends: Counter = field(default_factory=Counter)
    resumed: int = 0
    wrong: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        ends = " | ".join(str(self.ends[end]) for end in ("old", "between", "new", "neither"))
        return f"| {self.scenario} | {self.operations} | {self.faults} | {ends} | {self.resumed} |"


HEAD = "| scenario | operations | faults | ended old | between | new | neither | same hash after resuming |\n|" + "---|" * 8


class Trial:
    """A scenario, run once without a fault, and then with one.

    Args:
        scenario: the scenario.
        folder: an empty one to work in.
    """

    def __init__(self, scenario: Scenario, folder: Path):
        self.scenario, self.folder = scenario, folder
        self.template, whole = folder / "old" / "files", folder / "whole" / "files"
        self.template.mkdir(parents=True)
        scenario.old(self.template)
        shutil.copytree(self.template, whole)
        self.before = self.loaded(self.template)
        self.between: set[str] = set()
        with contextlib.ExitStack() as stack:
            for cls, method in scenario.steps:
                stack.enter_context(mock.patch.object(cls, method, self._noting(getattr(cls, method), whole)))
            scenario.job(whole)
        self.end, self.after = hashes(whole), self.loaded(whole)
        assert self.end != hashes(self.template) and not debris(whole), f"{scenario.name}: the job leaves {debris(whole)}"
        # Again, and now nothing is imported for the first time.
        counted = self._fresh()
        self.disk = Disk(counted)
        with self.disk:
            scenario.job(counted)
        assert hashes(counted) == self.end, f"{scenario.name}: two runs differ in {differing(self.end, hashes(counted))}"

    def _noting(self, method: Callable, whole: Path) -> Callable:
        def noted(*args, **options):
            result = method(*args, **options)
            self.between.add(self.loaded(whole))
            return result

        return noted

    def _fresh(self, source: Path | None = None, name: str = "run") -> Path:
        root = self.folder / name / "files"  # the same name: checkpoints may be named by their folder
        shutil.rmtree(root.parent, ignore_errors=True)
        shutil.copytree(source or self.template, root, symlinks=True)
        return root

    def loaded(self, root: Path) -> str:
        """The content that a reader gets of a copy; one who finds nothing has to say so."""
        copy = self._fresh(root, "read")
        try:
            return hashlib.sha256(repr(self.scenario.load(copy)).encode()).hexdigest()
        except ValueError as error:
            if not re.search("There is no|is no checkpoint|is no folder|is not finished|is missing", str(error)):
                raise
            return "nothing"

    @property
    def cases(self) -> list[tuple[str, int]]:
        """All faults of all operations."""
        return [
            (kind, k) for k in range(len(self.disk.log)) for kind in KINDS if kind != "killed half way" or k in self.disk.half
        ]

    def run(self, most: int | None = None) -> Tally:
        """All faults, or so many of them, evenly among the operations."""
        cases, tally = self.cases, Tally(self.scenario.name, len(self.disk.log))
        if most is not None and most < len(cases):
            cases = [cases[i * len(cases) // most] for i in range(most)]
        for kind, k in cases:
            tally.faults += 1
            try:
                self._case(kind, k, tally)
            except Exception as error:
                tally.wrong.append(f"{kind}, operation {k} ({self.disk.log[k]}): {type(error).__name__}: {error}")
        return tally

    def _case(self, kind: str, k: int, tally: Tally) -> None:
        root = self._fresh()
        code = forked(lambda: self._faulty(root, kind, k))
        assert code in ((-signal.SIGKILL,) if kind.startswith("killed") else (0, FAILED)), f"ended with {code}"
        if kind == "disk full":
            left = set(debris(root)) - set(debris(self.template))
            assert not left, f"left {sorted(left)}"
        ends = {self.before: "old", self.after: "new"}
        try:
            found = self.loaded(root)
            end = ends.get(found, "between" if found in self.between else "neither")
        except Exception:
            tally.ends["neither"] += 1
            raise
        tally.ends[end] += 1
        assert end != "neither", "what is there is neither old nor new"
        assert code != 0 or end == "new", f"said nothing, and left what is {end}"
        again = self.scenario.load if end == "new" and not self.scenario.repeats else self.scenario.job
        assert forked(lambda: again(root)) == 0, "cannot be resumed"
        assert not debris(root), f"the resumed run leaves {debris(root)}"
        assert hashes(root) == self.end, f"the resumed run differs in {differing(self.end, hashes(root))}"
        tally.resumed += 1

    def _faulty(self, root: Path, kind: str, k: int) -> None:
        with Disk(root, kind, k):
            self.scenario.job(root)


def forked(job: Callable[[], object], seconds: int = 120) -> int:
    """The exit status of a job in a process of its own: 0, that it failed clearly, that it did not, or minus a signal."""
    sys.stdout.flush()
    process = os.fork()
    if not process:
        signal.alarm(seconds)
        code = UGLY
        try:
            job()
            code = 0
        except (OSError, ValueError, safetensors.SafetensorError):
            code = FAILED
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def hashes(root: Path) -> dict[str, str]:
    """Every file and folder."""
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in sorted(root.rglob("*"))
    }


def differing(one: dict[str, str], two: dict[str, str]) -> list[str]:
    """The names of what is not the same."""
    return sorted(name for name in {**one, **two} if one.get(name) != two.get(name))


def debris(root: Path) -> list[str]:
    """What no finished job leaves."""
    return [name for name in hashes(root) if re.search(r"\.part(/|$)|(^|/)\.saved(/|$)", name)]
