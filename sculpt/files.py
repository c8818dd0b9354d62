"""Files that survive: one commit point for a file or a folder, and nothing that is read before it is checked. Never unpickled.

A file is written beside its place and put there by one replacement. The files of a folder are written into a folder inside of it,
``.saved`` once it is whole: that renaming is the commit. What is in there then moves to its place, and whoever reads or saves next
moves what a killed process left in it. So a folder holds the old files or the new ones, whenever its writer was stopped.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from sculpt.entries import Entries, read_json
from sculpt.weights import Weights

__all__ = [
    "cache",
    "create_file",
    "load_folder",
    "open_folder",
    "remove_debris",
    "replace_file",
    "replacing",
    "save_folder",
    "settled",
]

FORMAT = 1
SAVED = ".saved"
"""The folder of files that are saved, and may not be in their places yet."""
DAY = 86_400

_HOST = re.sub(r"[^0-9A-Za-z-]", "-", socket.gethostname())[:40] or "host"
_READING: ContextVar[frozenset[str]] = ContextVar("reading", default=frozenset())
_TEMPORARY = re.compile(r"\..*\.(?P<host>[\w-]+)\.[0-9a-f]{12}\.part", re.DOTALL)


def cache() -> Path:
    """``$SCULPT_CACHE``, by default the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("SCULPT_CACHE") or Path(base) / "sculpt")


def replace_file(path: Path, content: bytes) -> None:
    """Write all of it or nothing: a reader sees the old file or the new one."""
    with _written(path, content) as new:
        os.replace(new, path)


def create_file(path: Path, content: bytes) -> None:
    """Write a file that is not there yet, all of it or nothing; where several do so at once, one of them is first and stays."""
    with _written(path, content) as new:
        try:
            os.link(new, path)  # a link replaces nothing
        except FileExistsError:
            pass
        except OSError:  # a file system without links
            os.replace(new, path)


@contextlib.contextmanager
def _written(path: Path, content: bytes) -> Iterator[Path]:
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_debris(path.parent)
    with _beside(path, Path.touch) as new:
        new.write_bytes(content)
        _to_disk(new)
        yield new


@contextlib.contextmanager
def replacing(folder: str | Path) -> Iterator[Path]:
    """A folder to write files and folders into: when the block ends, all of them are in ``folder``, or none where it failed.

    Files and folders of the same names go; what else the folder has stays.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file, expected a folder to save into. Pass another path.")
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    remove_debris(folder)
    try:
        with _beside(folder / SAVED, Path.mkdir) as stage:
            new = stage / folder.resolve().name  # of its own: who writes may lock it
            new.mkdir()
            yield new
            for path in (*new.rglob("*"), new):
                if path.is_file() or path.is_dir():
                    _to_disk(path)
            _commit(new, folder)
            _finish(folder)
    except BaseException:
        if is_new:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


@contextlib.contextmanager
def settled(folder: str | Path) -> Iterator[Path]:
    """The folder with everything in its place, while nobody of this machine saves into it."""
    folder, place = Path(folder), os.path.realpath(folder)
    if place in _READING.get():  # by the caller: whoever saves waits for it
        yield folder
        return
    remove_debris(folder)
    while True:
        if _pending(folder):
            try:
                _finish(folder)
            except OSError as error:
                raise ValueError(
                    f"{folder} was saved by a process that was stopped before all files were in their places, and they cannot be put "
                    f"there now ({error}). Read it once where you may write."
                ) from None
        with _locked(folder, shared=True):
            if not _pending(folder):
                before = _READING.set(_READING.get() | {place})
                try:
                    yield folder
                finally:
                    _READING.reset(before)
                return


def _pending(folder: Path) -> bool:
    # A link could lead out of the folder.
    return (folder / SAVED).is_dir() and not (folder / SAVED).is_symlink()


def _commit(new: Path, folder: Path) -> None:
    """Save beside whoever reads. From then on nobody begins to read before it is finished, so readers do not keep a writer waiting."""
    while True:
        try:
            with _locked(folder, shared=True):
                return os.rename(new, folder / SAVED)
        except NotADirectoryError:
            (folder / SAVED).unlink(missing_ok=True)  # a file or a link of this name was saved by nobody
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            _finish(folder)  # what somebody else has saved


def _finish(folder: Path) -> None:
    """Move what is saved to its place, as soon as nobody reads. It may be stopped anywhere and started again."""
    while _pending(folder):
        try:
            with _locked(folder, wait=False):
                if _pending(folder):
                    _move(folder)
        except BlockingIOError:
            time.sleep(0.01)


def _move(folder: Path) -> None:
    with contextlib.suppress(OSError):  # the commit goes to the disk before the first file moves
        _to_disk(folder)
    for new in sorted((folder / SAVED).iterdir()):
        place = folder / new.name
        if place.is_dir() or (new.is_dir() and os.path.lexists(place)):  # no renaming replaces a folder that is not empty
            old = _name_beside(place)
            os.rename(place, old)
            os.replace(new, place)
            _remove(old)
        else:
            os.replace(new, place)
    (folder / SAVED).rmdir()


@contextlib.contextmanager
def _locked(path: Path, shared: bool = False, wait: bool = True) -> Iterator[bool]:
    """One at a time, of all threads and processes of this machine, and whether it is so: some systems and file systems have no locks.

    Who does not wait gets a ``BlockingIOError`` where somebody else is at it.
    """
    with contextlib.ExitStack() as stack:
        try:
            import fcntl

            handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
            stack.callback(os.close, handle)
            fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
            stack.callback(fcntl.flock, handle, fcntl.LOCK_UN)  # a child of this process may have got the handle too
        except BlockingIOError:
            raise
        except (ImportError, OSError):
            yield False
        else:
            yield True


def _to_disk(path: Path) -> None:
    """A replacement that reaches the disk before the content would be half a file after a power cut."""
    if os.name != "posix":  # elsewhere a folder cannot be opened, nor a file written through a handle that reads
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):  # a full disk may be noticed here only
            raise
    finally:
        os.close(handle)


# What writers leave behind


@contextlib.contextmanager
def _beside(path: Path, make: Callable[[Path], None]) -> Iterator[Path]:
    """A new file or folder beside a path, locked while its writer lives. It is gone in the end, if it has not moved."""
    new = _name_beside(path)
    with contextlib.ExitStack() as stack:
        stack.callback(_remove, new)
        with _locked(path.parent, shared=True):  # whoever looks for debris comes before it or after its lock
            make(new)
            stack.enter_context(_locked(new))
        yield new


def _name_beside(path: Path) -> Path:
    """A name of this machine and call, not too long for any file system."""
    return path.with_name(f".{path.name[:20]}.{_HOST}.{uuid.uuid4().hex[:12]}.part")


def remove_debris(folder: str | Path) -> None:
    """Remove what killed processes of this machine were about to write, and whatever of that kind is older than a day."""
    with contextlib.suppress(OSError):
        found = [(entry, match) for entry in os.scandir(folder) if (match := _TEMPORARY.fullmatch(entry.name))]
        if not found:
            return
        with _locked(Path(folder), wait=False) as alone:
            for entry, match in found:
                with contextlib.suppress(OSError):
                    old = time.time() - entry.stat(follow_symlinks=False).st_mtime > DAY
                    # A lock ends with its process; other machines may not see it.
                    with _locked(Path(entry.path), wait=False) as left:
                        if old or (alone and left and match["host"] == _HOST):
                            _remove(Path(entry.path))


def _remove(path: Path) -> None:
    """A file, a link or a folder, as far as it can be removed."""
    with contextlib.suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()


# Checkpoints of two files


def save_folder(folder: str | Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """``config.json`` (with ``kind``, and the hash of the weights) and ``model.safetensors``, both or neither."""
    with replacing(folder) as new:
        write_folder(new, config, tensors)


def write_folder(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """The same inside of a folder that is being replaced."""
    weights = save({name: value.detach().cpu().contiguous() for name, value in tensors.items()})
    config = {"format": FORMAT, **config, "sha256": hashlib.sha256(weights).hexdigest()}
    (folder / "model.safetensors").write_bytes(weights)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


@contextlib.contextmanager
def open_folder(folder: str | Path, kind: str) -> Iterator[tuple[Entries, Weights]]:
    """What ``save_folder`` wrote: the config, of this kind and format, and weights that are not read yet."""
    with settled(_existing(folder, kind)) as folder:
        config = Entries(read_json(folder / "config.json", f"a {kind} of sculpt"), str(folder / "config.json"))
        found = config.get("kind")
        if found != kind:
            got = found or config.get("_class_name") or "another kind of checkpoint"
            raise ValueError(
                f"{folder} holds a {got!s:.80}, expected a {kind} of sculpt. sculpt.load picks the right class by itself."
            )
        if config.get("format") != FORMAT:
            raise ValueError(
                f"{folder} has format {config.get('format')!s:.80}, this sculpt reads format {FORMAT}. Update sculpt."
            )
        path = folder / "model.safetensors"
        if not path.exists():
            raise ValueError(f"{folder} is no {kind} of sculpt: model.safetensors is missing. Copy or download it again.")
        yield config, Weights(path, sha256=config.text("sha256", most=64))


def load_folder(folder: str | Path, kind: str) -> tuple[Entries, dict[str, Tensor]]:
    """The config and all weights at once, for kinds whose reader checks the weights itself."""
    with open_folder(folder, kind) as (config, weights):
        return config, weights.read()


def _existing(folder: str | Path, kind: str) -> Path:
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"There is no folder {str(folder)!r} with a {kind} of sculpt. Check the path.")
    return folder
