"""Molecules as trees of fragments or as SMILES: the environment, the policy network, results, what a molecule is worth and what it is like."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sculpt.molecules.chemistry import Vocabulary
    from sculpt.molecules.druglike import Patterns, alerts, passes, profile, properties, valid, within
    from sculpt.molecules.network import FragmentNetwork
    from sculpt.molecules.results import Molecules
    from sculpt.molecules.rewards import QED, SA
    from sculpt.molecules.seh import SEH
    from sculpt.molecules.smiles import Smiles
    from sculpt.molecules.trees import FragmentTrees

_CONTENTS = {
    "FragmentTrees": "trees",
    "Vocabulary": "chemistry",
    "SEH": "seh",
    "SA": "rewards",
    "QED": "rewards",
    "FragmentNetwork": "network",
    "Molecules": "results",
    "Smiles": "smiles",
    **dict.fromkeys(("Patterns", "alerts", "passes", "profile", "properties", "valid", "within"), "druglike"),
}

__all__ = [
    "FragmentNetwork",
    "FragmentTrees",
    "Molecules",
    "Patterns",
    "QED",
    "SA",
    "SEH",
    "Smiles",
    "Vocabulary",
    "alerts",
    "passes",
    "profile",
    "properties",
    "valid",
    "within",
]


def __getattr__(name: str) -> Any:
    if name in _CONTENTS:
        return getattr(importlib.import_module(f"sculpt.molecules.{_CONTENTS[name]}"), name)
    raise AttributeError(f"sculpt.molecules has no {name!r}; its public names are {', '.join(__all__)}.")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
