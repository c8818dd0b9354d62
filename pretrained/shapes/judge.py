r"""The judge of scenes, which learns nothing: ``python pretrained/shapes/judge.py``.

It lays every shape, at many positions and sizes, over every quarter of a picture, and in every colour; an empty quarter is one more
pattern. With T a pattern's coverage, d its colour less the ground's, and r the picture less the ground, what is left over is

.. math:: |r - T d|^2 = |r|^2 - 2 \langle T, \langle r, d \rangle \rangle + |T|^2 |d|^2,

and is counted in pixels, :math:`|d|^2` each. The pattern with the least names what is in the quarter. A picture is clear, and accepted,
if in no quarter more than ``LEFT`` pixels are left over, and the next best kind would leave ``MARGIN`` times as many.
"""

import functools
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

sys.path += [str(folder) for folder in Path(__file__).parents[:2]]

import scenes
from scenes import CELL, COLOURS, GROUND, RADIUS, SHAPES, SHIFT

LEFT, MARGIN = 4.0, 2.0


@dataclass
class Reading:
    """What the judge sees in pictures: their scenes ``(b, 4)``, which of them are clear, and what is left over of the worst quarter."""

    scenes: Tensor
    accepted: Tensor
    left: Tensor

    @property
    def rows(self) -> Tensor:
        """Of the accepted ones in ``scenes.scenes()``."""
        return scenes.row(self.scenes[self.accepted])


@functools.cache
def _patterns(device: torch.device) -> Tensor:
    """Coverages, ``(shapes, patterns, pixels)``."""
    at = torch.linspace(-SHIFT - 0.25, SHIFT + 0.25, 6, device=device)
    radius = torch.linspace(*RADIUS, 4, device=device)
    grid = torch.cartesian_prod(at, at, radius).T
    return torch.stack([scenes.coverage(shape, *grid).flatten(1) for shape in range(len(SHAPES))])


@torch.no_grad()
def read(pictures: Tensor, batch_size: int = 500) -> Reading:
    """Read pictures ``(b, 3, 32, 32)`` in [0, 1]."""
    parts = [_read(part.float()) for part in pictures.split(batch_size)]
    return Reading(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _read(pictures: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    b = len(pictures)
    cells = (pictures - GROUND).reshape(b, 3, 2, CELL, 2, CELL).permute(0, 2, 4, 1, 3, 5).reshape(4 * b, 3, CELL * CELL)
    colours = torch.tensor(list(COLOURS.values()), device=pictures.device) - GROUND
    weight, T = colours.square().sum(-1), _patterns(pictures.device)
    toward = torch.einsum("n c p, k c -> n k p", cells, colours) / weight[:, None]
    size, whole = T.square().sum(-1), cells.square().sum((1, 2))
    fit = torch.stack([(size[i] - 2 * toward @ T[i].T).amin(-1) for i in range(len(SHAPES))], -1)
    left = (whole[:, None, None] / weight[:, None] + fit).flatten(1)
    empty = whole[:, None] / weight.min()
    best, kinds = torch.cat([empty, left], -1).clamp(min=0).topk(2, -1, largest=False)
    found, worst = kinds[:, 0].view(b, 4), best[:, 0].view(b, 4).amax(-1)
    sure = (best[:, 1] >= MARGIN * best[:, 0]).view(b, 4).all(-1)
    return found, (worst <= LEFT) & sure & (scenes.row(found) >= 0), worst


# What it is worth


def spoilt(x: Tensor) -> dict[str, Tensor]:
    """Pictures that are no longer clear."""
    other = x.roll(1, 0)
    half = x.clone()
    half[..., : CELL // 2] = GROUND
    half[..., CELL : CELL + CELL // 2] = GROUND
    line = torch.exp(-torch.arange(-4, 5).square() / 2)
    kernel = (line[:, None] * line / line.sum() ** 2).expand(3, 1, -1, -1)
    blurred = F.conv2d(F.pad(x, [4] * 4, mode="replicate"), kernel, groups=3)
    return {
        "half of one and half of another": (x + other) / 2,
        "three quarters of one and a quarter of another": 0.75 * x + 0.25 * other,
        "blurred by one pixel": blurred,
        "left halves missing": half,
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    x = scenes.draw(20_000, generator)
    pictures = scenes.paint(x, generator)
    reading = read(pictures)
    right = reading.accepted & (reading.scenes == x).all(-1)
    print(f"drawn: {100 * right.double().mean():.2f} % accepted and read rightly, left over at most {reading.left.max():.2f}")
    some = pictures[:2000]
    for noise in (0.02, 0.05, 0.1):
        noisy = read(some + noise * torch.randn(some.shape, generator=generator))
        right = (noisy.scenes == x[:2000]).all(-1)
        print(
            f"noise {noise}: {100 * noisy.accepted.double().mean():.1f} % accepted, {100 * right.double().mean():.2f} % read rightly"
        )
    for how, pictures in spoilt(some).items():
        print(f"{how}: {100 * read(pictures).accepted.double().mean():.1f} % accepted")
