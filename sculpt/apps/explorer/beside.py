"""What stands beside samples: a preview while they are made, base models alone, and the exact answer where it is known."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from sculpt import plots
from sculpt.chain import Progress
from sculpt.composition import Composition
from sculpt.diagnostics import Diagnostics
from sculpt.gflownet.model import GFlowNet
from sculpt.model import BaseModel
from sculpt.samples import Samples, in_plane

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Known", "LogDensities", "Shown", "beside", "drawn", "known", "so_far", "width_of"]

Shown = tuple[str, str, bytes]
"""A title, the kind of a picture, and its bytes."""
LogDensities = Callable[[Tensor], Tensor]
"""From x ``(b, *x)`` to log-densities ``(b, m)``, a column for each model."""

FINE, CELLS = 96, 20_000
"""Cells a side of an exact answer in the plane, and how many states of a graph are counted."""


def drawn(samples: Samples, half_width: float, most: int | None = None, ticks: bool = True) -> tuple[str, bytes]:
    """The kind of a picture of samples, and its bytes. It has no title: the page says what it shows, by the names that it was given.

    Args:
        samples: of any model.
        half_width: of the square that is shown, of samples in the plane.
        most: images or molecules to show, by default as many as the samples show themselves.
        ticks: whether axes in the plane have numbers.
    """
    if not _plane(samples):
        own = copy.copy(samples)  # and keeps the scores of its molecules
        own.diagnostics = replace(samples.diagnostics, formula="")
        return own.picture() if most is None else own.picture(most)
    x = samples.x[:, :2]
    figure = plots.points2d(x.float() if x.is_floating_point() else x, half_width=half_width)
    if not ticks:
        figure.axes[0].set(xticks=[], yticks=[], xlabel="", ylabel="")
    return "png", _without_title(figure)


def _without_title(figure: Figure) -> bytes:
    figure.set_size_inches(3.4, 3.4)  # and no room for one
    return plots.png(figure)


def so_far(model: BaseModel, progress: Progress, most: int, half_width: float = 0.0) -> tuple[str, bytes] | None:
    """A picture of a run that goes on: denoised samples, or what has been written; ``None`` where there is none to see.

    Args:
        model: that is sampled.
        progress: of its run.
        most: particles to show.
        half_width: of the square that is shown, at least.
    """
    state = progress.state
    x = getattr(state, "states", None)
    if x is None and (x := getattr(state, "D", None)) is not None and x.ndim > len(model.shape) + 1:
        # The parts of one denoised sample add up; those of several models are as many guesses.
        x = x.mean(1) if hasattr(state, "ell") else x.sum(1)
    if x is None:
        return None
    # A preview is a courtesy: half of a molecule has no picture, and that is no error.
    with contextlib.suppress(Exception):
        samples = model.result(x[:most], None, Diagnostics(""))
        return drawn(samples, max(half_width, width_of(samples)))
    return None


class Known:
    """Log-densities on all cells of a square: of a grid, or of the plane cut into cells.

    Args:
        log_p: of each cell under each model.
        half_width: of the square.
        cell: the area of a cell; of a grid it is one.
    """

    def __init__(self, log_p: Float[Tensor, "S m"], half_width: float, cell: float = 1.0):
        self.log_p, self.half_width, self.log_cell = log_p.double().cpu(), half_width, math.log(cell)

    def picture(self, model: BaseModel, models: Sequence[BaseModel]) -> bytes:
        """The exact answer.

        Args:
            model: a composition of the models, or one of them.
            models: in the order of the columns.
        """
        density = self._log_density(model, models).exp()
        side = math.isqrt(len(density))
        figure = plots.density2d(density.view(side, side), self.half_width)
        return _without_title(figure)

    def _log_density(self, model: BaseModel, models: Sequence[BaseModel]) -> Tensor:
        if not isinstance(model, Composition):
            return self.log_p[:, next(i for i, own in enumerate(models) if own is model)]
        value = model.formula.value(torch.stack([self._log_density(part, models) for part in model.models], -1))
        return value - value.logsumexp(0) - self.log_cell


def known(models: Sequence[BaseModel], log_p: LogDensities | None, half_width: float) -> Known | None:
    """What is known exactly of these models, if anything is.

    Args:
        models: base models.
        log_p: their log-densities in the plane, where the caller knows them.
        half_width: of the square of the plane that is shown.
    """
    if log_p is not None:
        axis = (torch.arange(FINE, dtype=torch.float64) + 0.5) / FINE * 2 * half_width - half_width
        return Known(log_p(torch.cartesian_prod(axis, axis)), half_width, (2 * half_width / FINE) ** 2)
    if all(isinstance(model, GFlowNet) for model in models):
        from sculpt.gflownet import exact

        # A graph with too many states, or with states that are no cells of a square, has no such picture.
        with contextlib.suppress(ValueError):
            states = exact.dag(models[0], CELLS).states  # type: ignore[arg-type]
            side = math.isqrt(len(states))
            if states.ndim == 2 and states.shape[1] == 2 and side**2 == len(states):
                p: list[Any] = [exact.terminal_distribution(model, CELLS) for model in models]  # type: ignore[arg-type]
                return Known(torch.stack(p, -1).log(), side / 2)
    return None


def beside(alone: Mapping[str, Samples], exact: bytes | None, half_width: float) -> list[Shown]:
    """Pictures in one row: the exact answer and the base models, on the scale of the samples.

    Args:
        alone: samples of the base models, by name.
        exact: a picture.
        half_width: of the square of the plane that is shown.
    """
    shown: list[Shown] = [] if exact is None else [("exact", "png", exact)]
    for name, own in alone.items():
        most = 4 if hasattr(own, "smiles") else 12 if hasattr(own, "text") else 16  # molecules need room
        shown.append((name, *drawn(own, half_width, most, ticks=False)))
    return shown


def width_of(*samples: Samples) -> float:
    """Half the side of the square that has all points, or all cells of a grid; zero for what is no picture in the plane.

    Args:
        samples: of one composition and its base models.
    """
    widths = [0.0]
    for x in (part.x[:, :2] for part in samples if _plane(part)):
        widths.append(1.05 * float(x.abs().max().clamp(min=1e-6)) if x.is_floating_point() else (int(x.max()) + 1) / 2)
    return max(widths)


def _plane(samples: Samples) -> bool:
    x = samples.x
    return (
        type(samples) is Samples and samples.decoder is None and len(x) > 0 and x.ndim == 2 and x.shape[1] >= 2 and in_plane(x)
    )
