"""Pictures: densities and samples in two dimensions, grids of images, and how a population of particles fared.

Every function returns a matplotlib ``Figure`` that belongs to no window: ``figure.savefig(path)``, or let a notebook show it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from sculpt.plots.frames import DARK, FAINT, INK, Result, colours, frame, heat, one, panels_of, png, save
from sculpt.plots.images import distinct, image_grid, image_panels, image_shares

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from sculpt.diagnostics import Diagnostics
    from sculpt.samples import Samples

__all__ = [
    "compare2d",
    "density2d",
    "distinct",
    "ess_curve",
    "image_grid",
    "image_panels",
    "image_shares",
    "molecule_density",
    "png",
    "points2d",
    "save",
]


@runtime_checkable
class _Scored(Protocol):
    """Samples that know their scores: molecules."""

    def table(self, rewards: Sequence[str]) -> Mapping[str, Any]: ...


def density2d(values: Tensor, half_width: float, title: str = "") -> Figure:
    """A density on a square grid of side ``2 * half_width``, below its ``title``: ``values[i, j]`` at the i-th x and the j-th y."""
    figure, axes = one(3.2, 3.4, title)
    heat(axes, values, half_width)
    return figure


def points2d(x: Tensor, title: str = "", half_width: float | None = None) -> Figure:
    """Samples in the plane: a heat map where they are integers (the cells of a grid), else points.

    Args:
        x: the samples ``(n, 2)``.
        title: above them.
        half_width: show the square of side ``2 * half_width``, of points around the origin; by default the least that has all.
    """
    figure, axes = one(3.4, 3.6, title)
    x = x.cpu()
    if x.is_floating_point():
        half_width = half_width or 1.05 * float(x.abs().max().clamp(min=1e-6))
        size = min(9.0, max(0.5, 4000 / len(x)))
        axes.scatter(x[:, 0].numpy(), x[:, 1].numpy(), s=size, color=DARK, alpha=0.5, linewidths=0)
        axes.set(xlim=(-half_width, half_width), ylim=(-half_width, half_width), aspect="equal")
        frame(axes)
    else:
        side = round(2 * half_width) if half_width else int(x.max()) + 1
        counts = torch.bincount(x[:, 0] * side + x[:, 1], minlength=side**2).view(side, side)
        axes.imshow(counts.T.numpy(), origin="lower", cmap=colours(), vmin=0, interpolation="nearest")
        axes.set(xticks=range(0, side, -(-side // 8)), yticks=range(0, side, -(-side // 8)))
        frame(axes)
    axes.set_xlabel("x0", fontsize=8, color=INK)
    axes.set_ylabel("x1", fontsize=8, color=INK)
    return figure


def compare2d(
    rows: Sequence[Mapping[str, Any]],
    half_width: float,
    columns: Sequence[str],
    *,
    outlines: Mapping[str, Tensor] | None = None,
    title: str = "",
    bins: int = 42,
    own_scale: bool = False,
) -> Figure:
    """Samples beside their target, a row for each.

    Args:
        rows: each with a ``title``, its panels by the name of their column (a density on a square grid, samples ``(n, 2)``,
            or ``None`` for an empty place), and under ``captions`` a line for below each panel.
        half_width: every panel shows the square of side ``2 * half_width`` around the origin.
        columns: their names, left to right.
        outlines: densities by name, drawn as the line where they fall to half of their peak.
        title: above all of them.
        bins: samples are counted on a grid of so many cells a side.
        own_scale: let each panel have its own scale of colours; by default a row shares that of its first density.
    """
    side = 1.75
    size = side * len(columns) + 0.45, (side + 0.3) * len(rows) + (0.65 if title else 0.35)
    figure, grid = panels_of(len(rows) * len(columns), len(columns), size, title)
    for k, row in enumerate(rows):
        line = grid[k * len(columns) : (k + 1) * len(columns)]
        # Counts and density share their colours: both are mass per area, and the row's target sets the scale.
        target = next((p for p in (row.get(name) for name in columns) if isinstance(p, Tensor) and _is_density(p)), None)
        top = None if target is None or own_scale else 1.15 * float(target.max()) / float(target.mean())
        for name, axes in zip(columns, line, strict=True):
            panel = row.get(name)
            if panel is None:
                axes.set_axis_off()
            else:
                values = panel if _is_density(panel) else _counts(panel, half_width, bins)
                heat(axes, values / values.mean().clamp(min=1e-12), half_width, top)
                _outline(axes, outlines or {}, half_width, named=row is rows[0] and name == columns[0])
            if row is rows[0]:
                axes.set_title(name, fontsize=9.5, color=INK, pad=6)
            axes.set_xlabel(row.get("captions", {}).get(name, ""), fontsize=7.5, color=FAINT, labelpad=3)
        line[0].set_ylabel(row["title"], fontsize=10.5, color=INK, labelpad=8)
    return figure


def ess_curve(diagnostics: Diagnostics | Samples) -> Figure:
    """The effective share of the particles along the way, from samples or their ``diagnostics``. Jumps upwards are resamplings."""
    diagnostics = diagnostics.diagnostics if isinstance(diagnostics, Result) else diagnostics
    if not (diagnostics.particles and diagnostics.ess):
        raise ValueError(
            f"No particles were weighted on this road ({diagnostics.road or 'unknown'}): there is no curve to draw."
        )
    figure, axes = one(5.0, 2.6, diagnostics.formula)
    share = [ess / diagnostics.particles for ess in diagnostics.ess]
    axes.plot(range(1, len(share) + 1), share, color=DARK, linewidth=1.6)
    axes.set(xlim=(1, len(share)), ylim=(0, 1.03))
    axes.set_xlabel("weighting", fontsize=9, color=FAINT)
    axes.set_ylabel("effective share of particles", fontsize=9, color=FAINT)
    axes.tick_params(labelsize=8, colors=FAINT)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    return figure


def molecule_density(
    panels: Mapping[str, Any],
    x: str = "seh",
    y: str = "sa",
    *,
    high: tuple[float, float] | None = (0.5, 0.6),
    columns: int | None = None,
    title: str = "",
) -> Figure:
    """How molecules are spread over two rewards: a panel for each base model or composition, side by side on the same axes.

    Args:
        panels: by title, the samples of molecule models, or tables with columns x and y (and ``weight`` or ``count``), such as data frames.
        x, y: the rewards.
        high: from where on each is called high. Lines are drawn there, and each panel tells the share beyond both.
        columns: panels in a row; by default all of them, at most four.
        title: above all of them.
    """
    if not panels:
        raise ValueError("There is nothing to draw: pass samples by title, {'seh': samples, ...}.")
    tables = {}
    for name, panel in panels.items():
        table = panel.table([x, y]) if isinstance(panel, _Scored) else panel
        weight = next((table[key] for key in ("weight", "count") if key in table), torch.ones(len(table[x])))
        tables[name] = [torch.tensor(list(column), dtype=torch.float64) for column in (table[x], table[y], weight)]
    tops = [max(1.0, max(float(table[k].quantile(0.999)) for table in tables.values())) for k in (0, 1)]
    columns = columns or min(len(tables), 4)
    size = 2.35 * columns + 0.4, 2.5 * math.ceil(len(tables) / columns) + (0.65 if title else 0.3)
    figure, grid = panels_of(len(tables), columns, size, title, sharex=True, sharey=True)
    for axes, (name, (p, q, w)) in zip(grid, tables.items(), strict=False):
        axes.imshow(_smooth(p / tops[0], q / tops[1], w).T.numpy(), origin="lower", extent=(0, tops[0], 0, tops[1]), cmap=colours(),
                    vmin=0, aspect="auto", interpolation="bilinear")  # fmt: skip
        axes.set_title(name, fontsize=10, color=INK, pad=15 if high else 6)
        frame(axes)
        if high is not None:
            axes.axvline(high[0], color=FAINT, linewidth=0.7, linestyle="dashed")
            axes.axhline(high[1], color=FAINT, linewidth=0.7, linestyle="dashed")
            share = float(w[(p >= high[0]) & (q >= high[1])].sum() / w.sum())
            axes.text(0.5, 1.025, f"{share:.0%} high in both", transform=axes.transAxes, fontsize=7.5, color=FAINT, ha="center")
    figure.supxlabel(_REWARDS.get(x, x), fontsize=9, color=INK)
    figure.supylabel(_REWARDS.get(y, y), fontsize=9, color=INK)
    return figure


_REWARDS = {"seh": "sEH reward: predicted binding", "sa": "SA reward: ease of synthesis", "qed": "QED: drug-likeness"}


def _is_density(panel: Tensor) -> bool:
    return panel.ndim == 2 and panel.shape[0] == panel.shape[1] != 2


def _counts(x: Tensor, half_width: float, bins: int) -> Tensor:
    cells = ((x.double().cpu() + half_width) / (2 * half_width) * bins).floor().long()
    cells = cells[((cells >= 0) & (cells < bins)).all(-1)]
    return torch.bincount(cells[:, 0] * bins + cells[:, 1], minlength=bins**2).double().view(bins, bins)


def _smooth(x: Tensor, y: Tensor, w: Tensor, bins: int = 96) -> Tensor:
    """The density of weighted points in the unit square, smoothed by a Gaussian of Scott's width, which is mirrored at the edges."""
    w = w / w.sum()
    effective = 1 / float((w**2).sum())
    cells = [(value.clamp(0, 1) * bins).long().clamp(max=bins - 1) for value in (x, y)]
    density = torch.zeros(bins**2, dtype=torch.float64).index_add_(0, cells[0] * bins + cells[1], w).view(bins, bins)
    for side, value in enumerate((x, y)):
        spread = float((w * (value - (w * value).sum()) ** 2).sum().sqrt())
        width = max(bins * spread * effective ** (-1 / 6), 0.8)
        at = torch.arange(bins, dtype=torch.float64)
        mirrors = [(at[:, None] - image) for image in (at, -1 - at, 2 * bins - 1 - at)]
        kernel = sum((-0.5 * (distance / width) ** 2).exp() for distance in mirrors)
        density = torch.tensordot(kernel / kernel.sum(0), density, dims=([1], [side]))
        density = density if side == 0 else density.T
    return density


def _outline(axes: Axes, outlines: Mapping[str, Tensor], half_width: float, named: bool) -> None:
    from matplotlib.patheffects import withStroke

    for name, density in outlines.items():
        axis = (torch.arange(len(density)) + 0.5) / len(density) * 2 * half_width - half_width
        level = [float(density.max()) / 2]
        axes.contour(axis.numpy(), axis.numpy(), density.T.numpy(), level, colors=[FAINT], linewidths=0.6, linestyles="dashed")
        if named:
            x, y = (float((axis * density.sum(side)).sum() / density.sum()) for side in (1, 0))
            said = axes.text(1.75 * x, 1.75 * y, name, fontsize=9, style="italic", color=INK, ha="center", va="center")
            said.set_path_effects([withStroke(linewidth=2, foreground="white")])  # to be read on dark ground
