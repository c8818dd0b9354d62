"""The names of models: as they were given, and as code can say them."""

from __future__ import annotations

import itertools
import keyword
import re
from collections.abc import Mapping, Sequence
from typing import Any

from sculpt.apps.formulas import FUNCTIONS
from sculpt.model import BaseModel

__all__ = ["named", "variables"]

TAKEN = ("sculpt", "torch", "samples", *FUNCTIONS)
"""the words of the code"""


def variables(scope: Mapping[str, Any]) -> dict[int, str]:
    """The names of values, by their identity.

    Args:
        scope: variables by name.
    """
    return {id(value): name for name, value in scope.items() if not name.startswith("_") and name not in TAKEN}


def named(models: Any, scope: Mapping[str, Any]) -> tuple[list[Any], list[str], list[str], list[str]]:
    """Models, a name for each in code, the names as they were given, and the lines of code that make the models known.

    Args:
        models: as the caller of the explorer gave them.
        scope: the caller's variables.
    """
    if isinstance(models, BaseModel):
        models = list(models.leaves)
    elif not isinstance(models, Mapping | Sequence) or isinstance(models, str):
        raise TypeError(f"explore takes a list of base models, or a dictionary of them by name; got {models!r:.200}.")
    values = list(models.values()) if isinstance(models, Mapping) else list(models)
    known = variables(scope)
    own = [known.get(id(model), "") for model in values]
    if isinstance(models, Mapping):
        wished = [str(name) for name in models]
    else:
        wished = own if all(own) and len(set(own)) == len(own) else [str(model) for model in values]
    names: list[str] = []
    for wish in wished:
        name = re.sub(r"\W", "_", wish)
        if not name.isidentifier() or keyword.iskeyword(name) or name in TAKEN:
            name = f"p_{name}"[:24]
        candidates = itertools.chain([name], (f"{name}_{k}" for k in itertools.count(2)))
        names.append(next(candidate for candidate in candidates if candidate not in names))
    if own == names:
        return values, names, wished, []
    whole = known.get(id(models))
    if whole is None:
        return values, names, wished, [f"# {', '.join(names)}: the models that sculpt.explore was given"]
    return values, names, wished, [f"{', '.join(names)} = {whole}" + ".values()" * isinstance(models, Mapping)]
