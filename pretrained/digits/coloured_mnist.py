"""MNIST in colours: what the models of this folder are trained on, and the class proportions that follow from it.

A data set is a choice of digits and of colours. Its digits come as often as MNIST has them, its colours equally often, and the
two are independent. Images are 3×32×32 in [-1, 1]: the grey digit, padded from 28 to 32 pixels, times its colour on black.
"""

import gzip
import hashlib
import os
import urllib.request
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sculpt.files import replace_file
from sculpt.formula import Formula

COLOURS = {"cyan": (0.0, 1.0, 1.0), "beige": (0.95, 0.85, 0.6), "red": (1.0, 0.0, 0.0), "green": (0.0, 1.0, 0.0)}
DATA = {
    "cyan": (range(10), ("cyan",)),
    "zero-one": ((0, 1), ("cyan", "beige")),
    "zero-two": ((0, 2), ("cyan", "beige")),
    "red-green": ((0,), ("red", "green")),
    "green": ((0, 1), ("green",)),
}
SETS = {"triple": ("cyan", "zero-one", "zero-two"), "pair": ("red-green", "green")}
CLASSES = [(digit, colour) for digit in range(10) for colour in COLOURS]
"""The 40 kinds of image, in the order of every table of proportions."""

COUNTS = (5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949)
"""How often MNIST's training images show each digit."""

FILES = {
    "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
    "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
    "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
    "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
}
MIRROR = "https://ossci-datasets.s3.amazonaws.com/mnist/"
LICENCE = "MNIST: Yann LeCun and Corinna Cortes, CC BY-SA 3.0. The weights are the project's."


# Files


def read(name: str) -> bytes:
    """One of MNIST's files: from ``$SCULPT_DATA/mnist``, else downloaded once into ``~/.cache/sculpt``; checked either way."""
    folders = [Path(os.environ["SCULPT_DATA"])] if "SCULPT_DATA" in os.environ else []
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "sculpt"
    path = next((folder / "mnist" / name for folder in [*folders, cache] if (folder / "mnist" / name).is_file()), None)
    if path is None:
        path = cache / "mnist" / name
        try:
            with urllib.request.urlopen(MIRROR + name, timeout=60) as answer:
                content = answer.read()
        except OSError as error:
            raise RuntimeError(
                f"Cannot download {MIRROR + name} ({error}). Put MNIST's four files into a folder mnist/ and set SCULPT_DATA to the one above it."
            ) from error
        _check(content, name, MIRROR + name)
        replace_file(path, content)
    content = path.read_bytes()
    _check(content, name, path)
    return gzip.decompress(content)


def _check(content: bytes, name: str, origin: Path | str) -> None:
    got = hashlib.md5(content).hexdigest()
    if got != FILES[name]:
        raise ValueError(f"{origin} has md5 {got}, expected {FILES[name]}: damaged or not MNIST. Delete it and get it again.")


def mnist(split: str) -> tuple[Tensor, Tensor]:
    """``"train"`` or ``"t10k"`` (held out): grey images ``(b, 32, 32)`` as bytes, and their digits."""
    # The headers are 16 and 8 bytes long.
    grey = np.frombuffer(read(f"{split}-images-idx3-ubyte.gz"), np.uint8, offset=16).reshape(-1, 28, 28)
    digits = np.frombuffer(read(f"{split}-labels-idx1-ubyte.gz"), np.uint8, offset=8)
    return torch.from_numpy(np.pad(grey, ((0, 0), (2, 2), (2, 2)))), torch.from_numpy(digits.astype(np.int64))


# Colours


def coloured(grey: Tensor, colour: Tensor) -> Tensor:
    """Bytes ``(b, 32, 32)`` and indices of colours to images ``(b, 3, 32, 32)`` in [-1, 1]."""
    rgb = torch.tensor(list(COLOURS.values()), device=grey.device)[colour]
    return grey[:, None].float() / 255 * rgb[:, :, None, None] * 2 - 1


def rows(name: str, digits: Tensor) -> Tensor:
    """Which of MNIST's images a data set uses."""
    return torch.isin(digits, torch.tensor(list(DATA[name][0]))).nonzero()[:, 0]


def draw_colours(name: str, n: int, generator: torch.Generator) -> Tensor:
    """Indices of colours, each of the data set's equally likely."""
    allowed = torch.tensor([list(COLOURS).index(colour) for colour in DATA[name][1]], device=generator.device)
    return allowed[torch.randint(len(allowed), (n,), generator=generator, device=generator.device)]


# Proportions


def proportions(name: str) -> Tensor:
    """The share of each of the 40 classes in a data set."""
    digits, colours = DATA[name]
    share = torch.tensor([COUNTS[d] if d in digits and c in colours else 0 for d, c in CLASSES], dtype=torch.float64)
    return share / share.sum()


def composed(formula: Formula, shares: list[Tensor]) -> Tensor:
    """Class shares of a posterior over models with these class shares, if all of them draw a class's images alike."""
    return torch.softmax(formula.value(torch.stack(shares, -1).log()), 0)


def class_index(digit: Tensor, colour: Tensor) -> Tensor:
    return digit * len(COLOURS) + colour


def written(share: Tensor, least: float = 0.005) -> str:
    """Class shares in words, the largest first."""
    order = share.argsort(descending=True, stable=True)
    return ", ".join(f"{CLASSES[i][1]} {CLASSES[i][0]} {100 * share[i]:.1f} %" for i in order.tolist() if share[i] >= least)
