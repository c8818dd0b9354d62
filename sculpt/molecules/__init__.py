"""Molecules as trees of fragments: the environment, what a molecule is worth, the policy network."""

import importlib

_CONTENTS = {
    "FragmentTrees": "fragments",
    "Vocabulary": "chemistry",
    "SEH": "rewards",
    "SA": "rewards",
    "QED": "rewards",
    "FragmentNetwork": "network",
    "Molecules": "results",
    "generate": "shards",
    "Library": "shards",
}

__all__ = [*_CONTENTS]


def __getattr__(name: str):
    if name in _CONTENTS:
        return getattr(importlib.import_module(f"sculpt.molecules.{_CONTENTS[name]}"), name)
    raise AttributeError(f"sculpt.molecules has no {name!r}; its public names are {', '.join(__all__)}.")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
