"""What notebooks show of results, as HTML."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence

__all__ = ["BOX", "SMALL", "TONES", "box", "embedded", "table"]

SMALL = "color: var(--jp-ui-font-color2, #757083); font-size: 12px; line-height: 1.4"
BOX = "border: 1px solid #d9d4e0; border-left-width: 4px; border-radius: 4px; padding: 6px 10px; line-height: 1.4"
TONES = {"good": "#2e7d32", "careful": "#a86400", "bad": "#d0463c"}
"""Colours by how far something may be trusted; as text they can be read over white and over a dark page."""


def box(text: str, trust: str, more: Sequence[str] = ()) -> str:
    """A verdict or a message; ``more`` are lines below it."""
    lines = "<br>".join(html.escape(line) for line in (text, *more))
    return f'<div style="{BOX}; border-color: {TONES[trust]}">{lines}</div>'


def table(rows: Sequence[tuple[str, str]]) -> str:
    """Names and values, in the type of a terminal."""
    lines = "\n".join(f"{name:>16}  {value}" for name, value in rows)
    return f'<pre style="font: 12px/1.35 monospace; word-break: normal">{html.escape(lines)}</pre>'


def embedded(kind: str, data: bytes, alt: str, style: str = "max-width: 480px") -> str:
    """A picture inside of a page: png, svg+xml, or plain text. ``alt`` says it to those who cannot see it."""
    if kind == "text":
        return f"<pre style='font: 12px monospace'>{html.escape(data.decode())}</pre>"
    return f'<img alt="{html.escape(alt)}" style="{style}" src="data:image/{kind};base64,{base64.b64encode(data).decode()}">'
