"""Tensors in safetensors files: names and shapes first, numbers when they are known to fit."""

from __future__ import annotations

import hashlib
import math
import os
import stat
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from sculpt.entries import Entries, open_plain, parse_json, read_json

__all__ = ["REAL", "WHOLE", "Shape", "Weights", "check_plain", "check_weights", "read_tensors"]

Shape = tuple[int, ...]

REAL = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
"""Types that one can calculate with; a file may have others."""

MOST_HEADER = 2**24
"""bytes of the names and shapes"""
BITS = {
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E5M2FNUZ": 8,
    "F8_E4M3FNUZ": 8,
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "U16": 16,
    "I16": 16,
    "F16": 16,
    "BF16": 16,
    "U32": 32,
    "I32": 32,
    "F32": 32,
    "U64": 64,
    "I64": 64,
    "F64": 64,
    "C64": 64,
}

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_TEXTS = (".json", ".txt", ".jinja", ".model")
MOST_TEXT = 2**26
"""of one of these"""


class Weights:
    """A safetensors file whose header was read and whose numbers were not. A file that takes its place meanwhile is not looked at.

    Args:
        path: the file.
        sha256: of the whole file, where it is known.
        most: bytes that names, shapes and what is said beside them may take.
    """

    def __init__(self, path: Path, sha256: str | None = None, most: int = MOST_HEADER):
        self.path, self.sha256, self._most = path, sha256, most
        if not path.exists():
            raise ValueError(f"There is no file {str(path)!r}. Check the path.")
        self._file = open_plain(path)
        try:
            header = Entries(self._header(), str(path))
        except OSError as error:
            raise self._damaged(f"it cannot be read: {error.strerror}") from None
        self.metadata: dict[str, str] = {}
        if "__metadata__" in header:
            told = header.inside("__metadata__")
            self.metadata = {name: told.text(name, most) for name in told.found}
        self._claimed = 0
        self.shapes: dict[str, Shape] = {name: self._shape(header, name) for name in header.found if name != "__metadata__"}
        if self._claimed != self._there:
            raise self._damaged(f"its tensors have {self._claimed:,} bytes, and {self._there:,} are there")

    def _header(self) -> dict[str, Any]:
        length, size = int.from_bytes(self._file.read(8), "little"), os.fstat(self._file.fileno()).st_size
        if not 0 < length <= min(size - 8, self._most):
            raise self._damaged(f"it has {size:,} bytes and its header {length:,}")
        self._there = size - 8 - length
        try:
            return parse_json(self._file.read(length).decode(), str(self.path))
        except ValueError:
            raise self._damaged("its header is no JSON object") from None

    def _shape(self, header: Entries, name: str) -> Shape:
        """Of one tensor, whose bytes are all in the file."""
        entry = header.inside(name)
        shape = tuple(entry.each("shape", int, "whole numbers", most=32))
        begin, end = (*entry.each("data_offsets", int, "whole numbers", most=2), 0, 0)[:2]
        bits = BITS.get(entry.text("dtype", 100))
        if bits is None or min((*shape, 0)) < 0 or math.prod(shape) * bits != 8 * (end - begin):
            raise self._damaged(f"{name:.80} has {end - begin} bytes for {entry.text('dtype')} of shape {shape!s:.80}")
        self._claimed += end - begin
        return shape

    def _damaged(self, why: str) -> ValueError:
        return ValueError(
            f"{self.path} is not a readable safetensors file: truncated or damaged ({why:.200}). Copy or download it again."
        )

    @cached_property
    def numel(self) -> int:
        """How many numbers there are."""
        return sum(map(math.prod, self.shapes.values()))

    def expect(self, shapes: Mapping[str, Shape], what: str) -> None:
        """Raise where the tensors are not just these."""
        for name in [*shapes, *self.shapes]:
            if self.shapes.get(name) != shapes.get(name):
                got, expected = self.shapes.get(name, "missing"), shapes.get(name, "no such tensor")
                raise ValueError(
                    f"{self.path} does not hold {what}: {name:.200} is {got!s:.200}, expected {expected!s:.200}. Copy or download it again."
                )

    def read(self) -> dict[str, Tensor]:
        """All tensors."""
        with self._file as file:
            file.seek(0)
            content = file.read()
        if self.sha256 is not None and hashlib.sha256(content).hexdigest() != self.sha256:
            raise ValueError(
                f"{self.path} is not the file that its config.json names (sha256): truncated or mixed up. Copy or download it again."
            )
        try:
            return load(content)
        except (SafetensorError, ValueError, KeyError, RuntimeError, OverflowError) as error:
            raise self._damaged(str(error)) from None


def read_tensors(path: Path) -> dict[str, Tensor]:
    """A safetensors file, or an error that says what is wrong with it."""
    return Weights(path).read()


# Folders of other libraries


def check_plain(folder: Path) -> None:
    """A library would wait for a pipe, and read a device without end."""
    for path in sorted(folder.rglob("*")):
        try:
            found = path.stat()
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error.strerror}. Copy or download it again.") from None
        if not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)):
            raise ValueError(f"{path} is no plain file. Copy or download it again.")
        if path.suffix in _TEXTS and found.st_size > MOST_TEXT:
            raise ValueError(f"{path} has {found.st_size:,} bytes, expected at most {MOST_TEXT:,}. Copy or download it again.")


def check_weights(folder: Path) -> list[Path]:
    """The safetensors files of a folder, all that it names; pickles are refused with the way out of them."""
    files = sorted(folder.glob("*.safetensors"))
    for path in folder.glob("*.safetensors.index*.json"):
        index = Entries(read_json(path, "sharded checkpoint"), str(path)).inside("weight_map")
        listed = {index.text(name, most=255) for name in index.found}
        if missing := sorted(listed - {file.name for file in files}):
            raise ValueError(f"{folder} lacks {', '.join(missing):.300}, named in {path.name}. Copy or download it again.")
    if not files:
        pickles = [path.name for path in sorted(folder.iterdir()) if path.suffix in _PICKLES]
        if pickles:
            raise ValueError(
                f"{folder} has its weights as {', '.join(pickles)} only. A pickle may run any code when it is read, so sculpt reads "
                "safetensors only. If you trust the file, convert it once with the library that wrote it: "
                "Model.from_pretrained(folder, use_safetensors=False).save_pretrained(folder)."
            )
        raise ValueError(f"{folder} has no weights: no .safetensors file. Copy or download it again.")
    for file in files:
        Weights(file)
    return files
