"""Modules of the folders under ``pretrained``, several of which have the same names."""

import contextlib
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

PRETRAINED = Path(__file__).parents[1] / "pretrained"


@contextlib.contextmanager
def named_alike(folder: Path, *names: str) -> Iterator[None]:
    """Modules of these names may be imported from the folder; those that other folders have by the same names come back."""
    path, others = list(sys.path), {name: sys.modules.pop(name) for name in names if name in sys.modules}
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path[:] = path
        for name in names:
            sys.modules.pop(name, None)
        sys.modules.update(others)


def pretrained(folder: str, *names: str) -> list[ModuleType]:
    """The modules of these names of a folder, as it imports them itself."""
    with named_alike(PRETRAINED / folder, *names):
        return list(map(importlib.import_module, names))
