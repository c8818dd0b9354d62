"""What all pictures share: figures that belong to no window, panels, colours, files."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from sculpt.files import replace_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

__all__ = ["DARK", "FAINT", "INK", "Result", "colours", "empty", "frame", "heat", "one", "panels_of", "png", "save"]

INK, FAINT, DARK = "#2b2135", "#8c8698", "#5b2a86"


@runtime_checkable
class Result(Protocol):
    """Samples, which pictures show and do not import: they draw themselves with them."""

    diagnostics: Any

    def decode(self) -> Any: ...


def png(figure: Figure) -> bytes:
    """The bytes of a ``figure`` as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def save(figure: Figure, path: str | Path) -> None:
    """Write a ``figure`` as a PNG file with this ``path``: all of it or nothing."""
    replace_file(Path(path), png(figure))


def empty(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure  # without pyplot: no window, no global state, any backend

    return Figure(figsize=(width, height), dpi=160, layout="constrained")


def one(width: float, height: float, title: str) -> tuple[Figure, Axes]:
    """A figure of one panel."""
    figure = empty(width, height)
    axes = figure.add_subplot()
    axes.set_title(textwrap.fill(title, max(20, round(12 * width))), fontsize=10, color=INK)
    return figure, axes


def panels_of(n: int, columns: int, size: tuple[float, float], title: str, **shared: Any) -> tuple[Figure, Sequence[Axes]]:
    """n panels, row by row; what is left of the last row stays empty."""
    figure = empty(*size)
    grid = figure.subplots(math.ceil(n / columns), columns, squeeze=False, **shared).flatten()
    for axes in grid[n:]:
        axes.set_axis_off()
    if title:
        figure.suptitle(title, fontsize=12.5, color=INK)
    return figure, grid[:n]


def colours() -> Colormap:
    """Magma upside down, its pale end faded to white: no density is no ink."""
    import matplotlib
    from matplotlib.colors import LinearSegmentedColormap

    share = torch.linspace(0, 1, 256)
    colors = torch.tensor(matplotlib.colormaps["magma_r"](share.numpy() * 0.92))
    fade = ((0.18 - share) / 0.18).clamp(0, 1)[:, None]
    return LinearSegmentedColormap.from_list("magma_white", (colors + (1 - colors) * fade).tolist())


def heat(axes: Axes, values: Tensor, half_width: float, top: float | None = None) -> None:
    extent = (-half_width, half_width) * 2
    axes.imshow(values.T.numpy(), origin="lower", extent=extent, cmap=colours(), vmin=0, vmax=top, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    frame(axes)


def frame(axes: Axes) -> None:
    axes.tick_params(labelsize=7, colors=FAINT, length=2)
    for spine in axes.spines.values():
        spine.set_color("#d9d4e0")
        spine.set_linewidth(0.8)
