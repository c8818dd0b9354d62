"""``sculpt.explore``: turn the knobs of a composition in a notebook, and see its samples.

:mod:`~sculpt.apps.explorer.session` is the logic: what can be chosen, the code that says it, and runs in the background.
:mod:`~sculpt.apps.explorer.view` shows a session with ipywidgets.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

from sculpt import preview
from sculpt.apps.explorer.beside import LogDensities
from sculpt.apps.explorer.session import Session
from sculpt.apps.explorer.view import View
from sculpt.classifier.guide import Guide
from sculpt.model import BaseModel

__all__ = ["Notice", "explore"]


def explore(
    models: BaseModel | Sequence[BaseModel] | Mapping[str, BaseModel] | Any,
    classifier: Guide | Any | None = None,
    *,
    log_p: LogDensities | None = None,
) -> View | Notice:
    """Compose models by clicking, in JupyterLab or Voilà: formula, odds, road, steps; samples, diagnostics, and the code for them.

    Args:
        models: two or more base models of one family, or by name, ``{"p": model, "q": model}``. Without names they are called
            as the variables that hold them.
        classifier: of these models, for the guided roads.
        log_p: of models in the plane whose log-densities are known, from x ``(b, 2)`` to ``(b, m)``: the exact answer is shown beside
            the samples. Small grids need none.

    What is wrong with them stands in the cell instead of the explorer. Needs ipywidgets, ``pip install 'compositional-sculpting[notebook]'``.
    """
    try:
        return View(Session(models, classifier, _scope(inspect.currentframe()), log_p))
    except (ImportError, TypeError, ValueError) as error:
        return Notice(str(error))


def _scope(frame: FrameType | None) -> dict[str, Any]:
    """What the caller of a function, which has this frame, can name."""
    caller = None if frame is None else frame.f_back
    return {} if caller is None else {**caller.f_globals, **caller.f_locals}


@dataclass(frozen=True)
class Notice:
    """A message where an explorer would have been."""

    message: str

    def __repr__(self) -> str:
        return f"sculpt.explore: {self.message}"

    def _repr_html_(self) -> str:
        return preview.box("sculpt.explore", "bad", [self.message])
