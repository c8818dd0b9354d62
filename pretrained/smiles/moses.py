"""MOSES, the drug-like molecules that the models of this folder learn from: Polykovskiy et al. (2020), MIT licence.

Each molecule is one SMILES, canonical by the RDKit of its authors. Ours would write one in ten thousand otherwise.
"""

import functools
import gzip
import hashlib
import os
import urllib.request
from pathlib import Path

from rdkit import Chem, rdBase
from tokens import decode, encode
from torch import Tensor

from sculpt.files import replace_file

FILES = {
    "train": "786f0313aa6b9ba5514df685f885742a70ea8d86f1a4fa48115f7f80a634265c",
    "test": "f896fbf3764f88d94670b9959e5872c600c12152a18233823e820761b7a791b2",
}
MIRROR = "https://media.githubusercontent.com/media/molecularsets/moses/master/moses/dataset/data/"


def smiles(split: str) -> list[str]:
    """The strings of ``"train"`` (1,584,663) or ``"test"`` (176,074)."""
    return read(split).decode().split()[1:]


def read(split: str) -> bytes:
    """A table with one column: from ``$SCULPT_DATA/moses``, else downloaded once into ``~/.cache/sculpt``; checked either way."""
    name = f"{split}.csv.gz"
    folders = [Path(os.environ["SCULPT_DATA"])] if "SCULPT_DATA" in os.environ else []
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "sculpt"
    path = next((folder / "moses" / name for folder in [*folders, cache] if (folder / "moses" / name).is_file()), None)
    if path is None:
        path = cache / "moses" / name
        try:
            with urllib.request.urlopen(MIRROR + name, timeout=60) as answer:
                content = answer.read()
        except OSError as error:
            raise RuntimeError(
                f"Cannot download {MIRROR + name} ({error}). Put {name} into a folder moses/ and set SCULPT_DATA to the one above it."
            ) from error
        _check(content, split, MIRROR + name)
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, content)
    content = path.read_bytes()
    _check(content, split, path)
    return gzip.decompress(content)


def _check(content: bytes, split: str, origin: Path | str) -> None:
    got = hashlib.sha256(content).hexdigest()
    if got != FILES[split]:
        raise ValueError(
            f"{origin} has sha256 {got}, expected {FILES[split]}: damaged or not MOSES. Delete it and get it again."
        )


def strings(split: str) -> Tensor:
    """MOSES as tokens."""
    return encode(read(split).split(b"\n", 1)[1])


# What strings are, beside it


def canonical(smiles: list[str]) -> list[str]:
    """The canonical strings of those that are molecules."""
    with rdBase.BlockLogs():
        molecules = [Chem.MolFromSmiles(s) for s in smiles]
    return [Chem.MolToSmiles(molecule) for molecule in molecules if molecule is not None and molecule.GetNumAtoms()]


@functools.cache
def known() -> frozenset[str]:
    """MOSES' training set."""
    return frozenset(smiles("train"))


def quality(x: Tensor) -> dict[str, float]:
    """Shares: molecules of all strings, different ones of these, new ones of those; and molecules not written canonically."""
    drawn = decode(x)
    valid = canonical(drawn)
    distinct = set(valid)
    written = set(drawn)
    return {
        "valid": len(valid) / len(x),
        "unique": len(distinct) / max(1, len(valid)),
        "novel": len(distinct - known()) / max(1, len(distinct)),
        "other": 1 - sum(s in written for s in distinct) / max(1, len(distinct)),
    }
