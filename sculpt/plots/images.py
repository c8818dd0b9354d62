"""Pictures of images: grids, panels side by side, and what they show beside what they ought to."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sculpt.plots.frames import DARK, FAINT, INK, Result, empty, frame, one, panels_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from sculpt.samples import Samples

__all__ = ["distinct", "image_grid", "image_panels", "image_shares"]


def image_grid(images: Tensor | Samples, columns: int | None = None, title: str = "") -> Figure:
    """Images edge to edge.

    Args:
        images: ``(n, c, h, w)`` in [0, 1] with one or three channels, or samples of an image model.
        columns: images in a row; by default as many as there are rows.
        title: above them; samples bring their formula.
    """
    if isinstance(images, Result):
        title = title or images.diagnostics.formula
    canvas, columns = _tiles(images, columns)
    width = min(12.0, max(3.0, columns * 0.9))
    figure, axes = one(width, width * canvas.shape[0] / canvas.shape[1] + (0.4 if title else 0.0), title)
    _picture(axes, canvas)
    return figure


def image_panels(
    panels: Mapping[str, Tensor | Samples],
    columns: int = 3,
    *,
    across: int = 6,
    captions: Mapping[str, str] | None = None,
    title: str = "",
) -> Figure:
    """Grids of images side by side, such as base models and what was composed of them.

    Args:
        panels: images in [0, 1], or samples of image models, by the title of their panel.
        columns: panels in a row.
        across: images in a row of each panel.
        captions: a line for below a panel, by its title.
        title: above all of them.
    """
    if not panels:
        raise ValueError("There is nothing to draw: pass images by title, {'p': images, ...}.")
    tiles = {name: _tiles(images, across)[0] for name, images in panels.items()}
    shape = max(canvas.shape[0] / canvas.shape[1] for canvas in tiles.values())
    size = 3.0 * columns, (3.0 * shape + 0.5) * math.ceil(len(tiles) / columns) + (0.3 if title else 0.0)
    figure, grid = panels_of(len(tiles), columns, size, title)
    for axes, (name, canvas) in zip(grid, tiles.items(), strict=False):
        axes.set_title(name, fontsize=10, color=INK)
        _picture(axes, canvas)
        axes.text(
            0.5, -0.02, (captions or {}).get(name, ""), transform=axes.transAxes, fontsize=8, color=FAINT, ha="center", va="top"
        )
    return figure


def image_shares(rows: Sequence[Mapping[str, Any]], *, across: int = 8, title: str = "") -> Figure:
    """Images, and beside them how often each kind of image comes and how often it ought to.

    Args:
        rows: each with a ``title``, its ``images`` (in [0, 1], or samples), and its ``shares``: for each kind of image by name,
            the expected share and the one obtained. A ``caption`` stands below the images.
        across: images in a row.
        title: above all of them.
    """
    if not rows:
        raise ValueError("There is nothing to draw: pass rows, [{'title': 'p', 'images': images, 'shares': {...}}, ...].")
    canvases = [_tiles(row["images"], across)[0] for row in rows]
    heights = [5.0 * canvas.shape[0] / canvas.shape[1] + 0.55 for canvas in canvases]
    figure = empty(9.5, sum(heights) + (0.45 if title else 0.0))
    grid = figure.subplots(len(rows), 2, squeeze=False, width_ratios=(5, 4), height_ratios=heights)
    for (left, right), row, canvas in zip(grid, rows, canvases, strict=True):
        _picture(left, canvas)
        left.set_title(row["title"], fontsize=10.5, color=INK, loc="left")
        left.text(0, -0.03, row.get("caption", ""), transform=left.transAxes, fontsize=8, color=FAINT, va="top")
        _bars(right, row["shares"], named=row is rows[0])
    if title:
        figure.suptitle(title, fontsize=12.5, color=INK)
    return figure


def _bars(axes: Axes, shares: Mapping[str, tuple[float, float]], named: bool) -> None:
    """Expected shares as outlines, obtained ones as bars within them."""
    at, (expected, obtained) = range(len(shares)), zip(*shares.values(), strict=True)
    axes.bar(at, obtained, 0.55, color=DARK, alpha=0.75, label="obtained")
    axes.bar(at, expected, 0.85, fill=False, edgecolor=INK, linewidth=1.1, label="expected")
    axes.set_xticks(list(at), list(shares))
    axes.set_xlim(-0.6, max(len(shares), 6) - 0.4)  # a few bars stay slim
    axes.set_ylim(0, 1.15 * max(*expected, *obtained, 0.05))
    axes.yaxis.set_major_formatter("{x:.0%}")
    axes.locator_params(axis="y", nbins=4)
    frame(axes)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=7.5, colors=INK)
    if named:
        axes.legend(fontsize=8, frameon=False, loc="upper right", ncols=2, bbox_to_anchor=(1, 1.22))


def distinct(images: Tensor | Samples, n: int, least: float = 0.4) -> Tensor:
    """Images without the near-copies among them, in their order: for display only, because leaving some out changes proportions.

    Args:
        images: in [0, 1], or samples of an image model.
        n: how many at most.
        least: a near-copy is nearer to an image before it than this share of the median distance.
    """
    images = images.decode() if isinstance(images, Result) else images
    x = images.detach().float().cpu().flatten(1)
    apart = torch.cdist(x, x)
    near = least * float(apart[apart > 0].median()) if bool((apart > 0).any()) else 0.0
    kept: list[int] = []
    for i in range(len(x)):
        if len(kept) < n and not (kept and float(apart[i, kept].min()) <= near):
            kept.append(i)
    return images[kept]


def _tiles(images: Tensor | Samples, columns: int | None) -> tuple[Tensor, int]:
    """The images on one white canvas ``(height, width, channels)``, and how many stand in a row."""
    images = images.decode() if isinstance(images, Result) else images
    if not (isinstance(images, Tensor) and images.ndim == 4 and images.shape[1] in (1, 3)):
        got = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(f"Images are shown from tensors (n, 1 or 3, height, width), got {got}. Latents need decode().")
    n, c, h, w = images.shape
    columns = columns or math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    gap = max(1, round(h / 24))
    canvas = torch.ones(c, rows * (h + gap) - gap, columns * (w + gap) - gap)
    for k, image in enumerate(images.detach().float().cpu().clamp(0, 1)):
        top, left = k // columns * (h + gap), k % columns * (w + gap)
        canvas[:, top : top + h, left : left + w] = image
    return canvas.permute(1, 2, 0), columns


def _picture(axes: Axes, canvas: Tensor) -> None:
    axes.imshow(canvas.squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.set_axis_off()
