"""How a composition is sampled. A road is an object with its own options; all of them lead to the same distribution."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sculpt.classifier.guide import Guide
from sculpt.roads.guided import Guided
from sculpt.roads.rejection import Rejection
from sculpt.roads.road import Road
from sculpt.roads.tracked import Tracked

__all__ = ["Guided", "Rejection", "Road", "Tracked", "as_road"]


def as_road(road: Any) -> Road:
    """A classifier stands for ``Guided(classifier)``, nothing for ``Tracked()``."""
    if road is None:
        return Tracked()
    if isinstance(road, Guide):
        return Guided(road)
    if isinstance(road, Road):
        return road
    hint = f" What is saved is loaded first: sculpt.load({road!r:.200})." if isinstance(road, str | Path) else ""
    raise TypeError(
        f"Got {road!r:.200} where a road belongs: pass a classifier, sculpt.Guided(classifier, ...), sculpt.Tracked(...) or "
        "sculpt.Rejection(...)." + hint
    )
