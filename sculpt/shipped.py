"""The shipped checkpoints by name: ``sculpt/digits-cyan`` is ``pretrained/digits/cyan`` of the repository, wherever the package is.

A manifest in the package has the SHA-256 of every file. What is found, in a clone around the package, in the cache or on the Hub, is used
only if it is what the manifest says.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import shutil
from pathlib import Path
from typing import Any

from sculpt.entries import read_json
from sculpt.files import cache, replacing, settled

__all__ = ["CLONE", "MANIFEST", "Missing", "described", "find", "folder_of", "shelf"]

OWNER = "sculpt"
MANIFEST = Path(__file__).with_name("shipped.json")
CLONE = Path(__file__).resolve().parents[1] / "pretrained"
"""The checkpoints, where the package is in a clone of the repository."""


class Missing(ValueError):
    """A shipped checkpoint that is not here and cannot be fetched."""


@functools.cache
def _manifest() -> dict[str, dict[str, str]]:
    """Folder, as ``digits/cyan`` -> file -> SHA-256."""
    return read_json(MANIFEST, "manifest of sculpt")


def described(root: Path) -> dict[str, dict[str, str]]:
    """The manifest of checkpoints in folders of folders.

    Args:
        root: ``pretrained/`` of the repository.
    """
    folders = sorted(path.parent for name in ("config.json", "model_index.json") for path in root.glob(f"*/*/{name}"))
    return {folder.relative_to(root).as_posix(): _hashes(folder) for folder in folders if not folder.is_symlink()}


def _hashes(folder: Path) -> dict[str, str]:
    files = sorted(path for ending in ("json", "safetensors") for path in folder.rglob(f"*.{ending}"))
    inside = {path.relative_to(folder).as_posix(): path for path in files}
    return {
        name: hashlib.sha256(path.read_bytes()).hexdigest()
        for name, path in inside.items()
        if not name.startswith(("training", "."))
    }


def folder_of(name: str) -> str | None:
    """``digits/cyan`` of ``sculpt/digits-cyan``; ``None`` for names of another owner.

    Args:
        name: as :func:`sculpt.load` takes it.
    """
    owner, _, short = name.partition("/")
    if owner != OWNER:
        return None
    known = {folder.replace("/", "-", 1): folder for folder in _manifest()}
    if short not in known:
        close = difflib.get_close_matches(short, known, n=3) or list(known)
        raise ValueError(
            f"No shipped checkpoint is called {name!r:.100}. There is {', '.join(f'{OWNER}/{one}' for one in close)}."
        )
    return known[short]


def find(name: str) -> Path:
    """The folder of a shipped checkpoint: in the repository, in the cache, or else fetched from the Hub into the cache.

    Args:
        name: for example ``sculpt/digits-cyan``.
    """
    folder = folder_of(name)
    if folder is None:
        raise ValueError(f"{name!r:.100} is no shipped checkpoint, whose names begin with {OWNER}/.")
    if (CLONE / folder).is_dir():
        if wrong := _wrong(CLONE / folder, folder):
            raise ValueError(
                f"{CLONE / folder} is not what this sculpt was shipped with: {', '.join(wrong[:3])} is missing or differs. If it was trained "
                "anew, python pretrained/manifest.py writes down what it is now."
            )
        return CLONE / folder
    kept = cache() / "pretrained" / folder
    if not kept.is_dir() or _wrong(kept, folder):
        _fetch(name, folder, kept)
    return kept


def shelf(part: str) -> Path:
    """The folder around all shipped checkpoints of one part, ``digits`` or ``molecules``: all of them are there.

    Args:
        part: of the shipped ones.
    """
    names = [folder for folder in _manifest() if folder.startswith(f"{part}/")]
    if not names:
        raise ValueError(f"Nothing of {part!r:.60} is shipped.")
    return [find(f"{OWNER}/{name.replace('/', '-', 1)}").parent for name in names][0]


def _wrong(where: Path, folder: str) -> list[str]:
    """Files that are missing in a folder, or are not what was shipped."""
    with settled(where):
        there = {name: where / name for name in _manifest()[folder] if (where / name).is_file()}
        found = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in there.items()}
    return [name for name, sha256 in _manifest()[folder].items() if found.get(name) != sha256]


def _fetch(name: str, folder: str, kept: Path) -> None:
    """Fetch a checkpoint into the cache: all of it, as it was shipped, or nothing."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError

    options: dict[str, Any] = {"allow_patterns": list(_manifest()[folder])}
    try:
        with replacing(kept) as new:
            snapshot_download(name, local_dir=new, **options)
            shutil.rmtree(new / ".cache", ignore_errors=True)  # the Hub's own notes
            if wrong := _wrong(new, folder):
                raise ValueError(
                    f"What the Hub has as {name} is not what this sculpt was shipped with, and was not kept: {', '.join(wrong[:3])} is missing or "
                    f"differs. Take pretrained/{folder} from sculpt's repository, and load that folder."
                )
    except RepositoryNotFoundError:
        why = "the Hub has no such public repository"
    except OSError as error:  # whatever can be wrong with a network, or with a disk
        why = f"the Hub cannot be reached ({type(error).__name__})"
    else:
        return
    raise Missing(
        f"{name} is not here: the package is not in a clone of sculpt's repository, the cache has no whole copy, and {why}. Go online once; or take "
        f"pretrained/{folder} from the repository and load that folder, or put it at {kept}."
    ) from None
