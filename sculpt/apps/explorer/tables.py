"""Samples that are read rather than looked at, as a table: texts with their log-densities, molecules with their properties."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from sculpt.samples import Samples

__all__ = ["listed"]

MOST = 12
STYLE = (
    "<style>.sculpt-rows td, .sculpt-rows th { text-align: left; padding: 1px 10px 1px 0; font-size: 12px; line-height: 1.4; "
    "vertical-align: top; } .sculpt-rows td { min-width: 180px; overflow-wrap: anywhere; } "
    ".sculpt-rows th, .sculpt-rows td + td { min-width: 0; white-space: nowrap; }</style>"
)


def listed(samples: Samples) -> str:
    """The first different texts or molecules, as HTML; empty for samples that are neither.

    Args:
        samples: of any model.
    """
    if hasattr(samples, "smiles"):
        return _table(_molecules(samples))
    if hasattr(samples, "text"):
        return _table(_texts(samples))
    return ""


def _texts(samples: Any) -> dict[str, Sequence[Any]]:
    few = samples[: 4 * MOST]
    table = few.table()
    first = {text: i for i, text in reversed(list(enumerate(table["text"])))}
    rows = sorted(first.values())[:MOST]
    return {name: [values[i] for i in rows] for name, values in table.items() if name != "weight"}


def _molecules(samples: Any) -> dict[str, Sequence[Any]]:
    from sculpt.molecules.druglike import alerts, properties
    from sculpt.molecules.scores import at_hand, title

    table = samples[: 2 * MOST].table(at_hand(), progress=False)
    smiles = table["smiles"][:MOST].tolist()
    columns = {"SMILES": smiles} | {
        title(name): values[:MOST] for name, values in table.items() if name not in ("smiles", "count", "weight")
    }
    told, found = properties(smiles), alerts(smiles)
    columns |= {"MW": told["mw"], "logP": told["logp"], "TPSA": told["tpsa"]}
    return columns | {"alerts": [", ".join(name for name in found if found[name][i]) or "none" for i in range(len(smiles))]}


def _table(columns: Mapping[str, Sequence[Any]]) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in columns)
    rows = "".join(
        f"<tr>{''.join(f'<td>{html.escape(_said(value))}</td>' for value in row)}</tr>"
        for row in zip(*columns.values(), strict=True)
    )
    # What is wider than the window is scrolled, by the arrow keys too.
    return f'{STYLE}<div tabindex="0" style="overflow-x: auto"><table class="sculpt-rows"><tr>{head}</tr>{rows}</table></div>'


def _said(value: Any) -> str:
    if isinstance(value, str):
        return value if len(value) <= 160 else f"{value[:159]}…"
    return f"{value:.2f}" if isinstance(value, float) else str(value)
