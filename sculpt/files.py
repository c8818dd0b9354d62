"""Checkpoint folders: a JSON description and a safetensors file, replaced atomically, never unpickled."""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor

__all__ = ["load_folder", "read_json", "read_tensors", "read_tensors_and_metadata", "replace_file", "save_folder"]

FORMAT = 1


def replace_file(path: Path, content: bytes) -> None:
    """Write all of it or nothing: a reader sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{uuid.uuid4().hex[:12]}")  # of this process, thread and call
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def save_folder(folder: str | Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """``config.json`` (with ``kind``) and ``model.safetensors``.

    The config carries the weights' hash and goes last: a reader sees the old pair, the new pair or an error, never a mixture.
    """
    folder = Path(folder)
    weights = save({name: value.detach().cpu().contiguous() for name, value in tensors.items()})
    config = {"format": FORMAT, **config, "sha256": hashlib.sha256(weights).hexdigest()}
    replace_file(folder / "model.safetensors", weights)
    replace_file(folder / "config.json", (json.dumps(config, indent=2) + "\n").encode())


def load_folder(folder: str | Path, kind: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What ``save_folder`` wrote, after checking that it is whole and of this kind."""
    folder = Path(folder)
    config = read_json(folder / "config.json", f"a {kind} of sculpt")
    if config.get("kind") != kind:
        got = config.get("kind") or config.get("_class_name") or "another kind of checkpoint"
        raise ValueError(f"{folder} holds a {got}, expected a {kind} of sculpt. sculpt.load picks the right class by itself.")
    if config.get("format") != FORMAT:
        raise ValueError(f"{folder} has format {config.get('format')}, this sculpt reads format {FORMAT}. Update sculpt.")
    path = folder / "model.safetensors"
    if not path.is_file():
        raise ValueError(f"{folder} is no {kind} of sculpt: model.safetensors is missing. Copy or download it again.")
    weights = path.read_bytes()
    if hashlib.sha256(weights).hexdigest() != config["sha256"]:
        raise ValueError(
            f"{path} is not the file that its config.json names (sha256): truncated or mixed up. Copy or download it again."
        )
    return config, load(weights)


def read_json(path: Path, what: str) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{path.parent} is no {what}: {path.name} is missing.") from None
    except ValueError:
        raise ValueError(f"{path} is not readable JSON: truncated or damaged. Copy or download it again.") from None


def read_tensors(path: Path) -> dict[str, Tensor]:
    """A safetensors file, or an error that says what is wrong with it."""
    try:
        return load(path.read_bytes())
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not a readable safetensors file: truncated or damaged ({error}). Copy or download it again."
        ) from None


def read_tensors_and_metadata(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A safetensors file with what its header says, or an error that says what is wrong with it."""
    if not path.is_file():
        raise ValueError(f"There is no file {str(path)!r}. Check the path.")
    tensors = read_tensors(path)
    with safe_open(path, "pt") as file:
        return tensors, file.metadata() or {}
