r"""Scenes of one to three coloured shapes, 32×32, and the prompts that name one of a scene's objects.

A scene is drawn so: one, two or three objects, each number as likely; as many of the four places, none twice; a colour and a shape for
each. So there are 17,984 scenes. Then a prompt names one of the objects, each as likely, by its colour, its shape, its place (a half or
a quarter of the picture) or several of these. With r(c, x) the share of the objects of scene x that prompt c fits,

.. math:: p(x | c) \propto p(x) \, r(c, x),

and the empty prompt is p(x) itself. Where exactly in its place an object is, and how large, is drawn anew for every picture and depends
on nothing. So compositions of p(· | c) have the same proportions for pictures as for scenes, and here they are summed up exactly.
"""

import functools
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

COLOURS = {"red": (0.85, 0.15, 0.15), "green": (0.10, 0.62, 0.25), "blue": (0.15, 0.30, 0.90), "yellow": (0.95, 0.75, 0.10)}
SHAPES = ("circle", "square", "triangle", "cross")
PLACES = {
    "left": (0, 2),
    "right": (1, 3),
    "top": (0, 1),
    "bottom": (2, 3),
    "top left": (0,),
    "top right": (1,),
    "bottom left": (2,),
    "bottom right": (3,),
}
"""The quarters that each place covers."""
GROUND = 0.94
SIZE, CELL = 32, 16
RADIUS, SHIFT = (4.7, 5.7), 1.0
"""Of an object, in pixels: the range of its radius, and how far its centre may be from the middle of its quarter."""
KINDS = len(COLOURS) * len(SHAPES)
"""A quarter holds 0, nothing, or 1 + 4 · colour + shape. A scene is the four of them."""


def name(colour: str = "", shape: str = "", place: str = "") -> str:
    """A prompt: ``a red circle at the left``, ``a thing at the top left``; where nothing is named, the empty one."""
    if not (colour or shape or place):
        return ""
    return " ".join(word for word in ("a", colour, shape or "thing", place and f"at the {place}") if word)


PROMPTS = [name(*words) for words in itertools.product(("", *COLOURS), ("", *SHAPES), ("", *PLACES))]
"""All of them; the first is empty."""
WORDS = sorted({word for prompt in PROMPTS for word in prompt.split()})


# What is exact


@functools.cache
def scenes() -> Tensor:
    """Every scene, ``(17984, 4)``."""
    every = torch.cartesian_prod(*[torch.arange(1 + KINDS)] * 4)
    objects = (every > 0).sum(-1)
    return every[(objects > 0) & (objects < 4)]


@functools.cache
def prior() -> Tensor:
    """Their probabilities."""
    objects = (scenes() > 0).sum(-1)
    return (1 / 3 / objects.bincount().double())[objects]


@functools.cache
def _rows() -> Tensor:
    rows = torch.full(((1 + KINDS) ** 4,), -1)
    rows[_number(scenes())] = torch.arange(len(scenes()))
    return rows


def _number(x: Tensor) -> Tensor:
    return (x * torch.tensor([(1 + KINDS) ** i for i in (3, 2, 1, 0)], device=x.device)).sum(-1)


def row(x: Tensor) -> Tensor:
    """The row of each scene in :func:`scenes`; -1 for what is none."""
    return _rows().to(x.device)[_number(x)]


@functools.cache
def fitting() -> Tensor:
    """Whether a prompt fits an object: ``(prompts, quarters, kinds)``."""
    each = []
    for colour, shape, place in itertools.product(("", *COLOURS), ("", *SHAPES), ("", *PLACES)):
        kinds = [colour in ("", c) and shape in ("", s) for c, s in itertools.product(COLOURS, SHAPES)]
        quarters = [not place or quarter in PLACES[place] for quarter in range(4)]
        each.append(torch.tensor(quarters)[:, None] & torch.tensor([False, *kinds]))
    return torch.stack(each)


def fits(prompt: str | Tensor, x: Tensor) -> Tensor:
    """Which objects of each scene a prompt (of each scene, by its number) fits: ``(b, 4)``."""
    c = torch.tensor(PROMPTS.index(prompt)) if isinstance(prompt, str) else prompt
    return fitting().to(x.device)[c.to(x.device)[..., None], torch.arange(4, device=x.device), x]


@functools.cache
def conditional(prompt: str) -> Tensor:
    """p(scene | prompt), one number a row of :func:`scenes`."""
    share = fits(prompt, scenes()).double().mean(-1) / (scenes() > 0).double().mean(-1)
    return normalised(prior() * share)


def normalised(p: Tensor) -> Tensor:
    if not (p.isfinite().all() and p.sum() > 0):
        raise ValueError("No scene has what is asked for, or a negative power makes one infinitely likely.")
    return p / p.sum()


def posterior(prompts: Sequence[str], labels: Sequence[int], odds: Sequence[float] | None = None) -> Tensor:
    r"""p(scene | labels) ∝ :math:`p_{y_1} \prod_{k \ge 2} v_{y_k} p_{y_k} / \sum_j v_j p_j`, with the odds v, by default equal."""
    p = torch.stack([conditional(prompt) for prompt in prompts])
    seen = p * (torch.ones(len(p)) if odds is None else torch.tensor(odds))[:, None].double()
    total = seen.sum(0)
    return normalised(p[labels[0]] * (seen / torch.where(total > 0, total, 1.0))[list(labels[1:])].prod(0))


def harmonic_mean(*prompts: str) -> Tensor:
    """Every prompt observed once."""
    return posterior(prompts, range(len(prompts)))


def contrast(prompt: str, *others: str) -> Tensor:
    """The first prompt observed once for every model, the others never."""
    return posterior((prompt, *others), [0] * (1 + len(others)))


def product(*prompts: str, powers: Sequence[float] | None = None) -> Tensor:
    r"""p ∝ :math:`p(x) \prod_k (p(x | c_k) / p(x))^{\gamma_k}`, the powers by default 1: the prompts pick objects independently."""
    p = prior()
    for prompt, power in zip(prompts, powers or [1.0] * len(prompts), strict=True):
        p = p * (conditional(prompt) / prior()) ** power
    return normalised(p)


def mixture(*distributions: Tensor) -> Tensor:
    """Any of them, each as likely."""
    return torch.stack(distributions).mean(0)


def without(prompt: str) -> Tensor:
    """p(x) where the prompt fits nothing. A product with a negative power of p(x | c) is infinite there, and of all that it could come
    to this is the one where only p tells scenes apart."""
    return normalised(prior() * ~fits(prompt, scenes()).any(-1))


# What is drawn


def draw(n: int, generator: torch.Generator) -> Tensor:
    """n scenes, on the generator's device."""
    how = {"generator": generator, "device": generator.device}
    objects = torch.randint(1, 4, (n, 1), **how)
    rank = torch.rand(n, 4, **how).argsort(-1)
    return torch.where(rank < objects, torch.randint(1, 1 + KINDS, (n, 4), **how), 0)


def prompted(x: Tensor, generator: torch.Generator, empty: float = 0.0) -> Tensor:
    """A prompt for each scene, by its number. A share of them is empty; the others name each combination of attributes as often."""
    how = {"generator": generator, "device": x.device}
    n = len(x)
    quarter = torch.where(x > 0, torch.rand(n, 4, **how), -1.0).argmax(-1)
    kind = x.gather(-1, quarter[:, None])[:, 0] - 1
    what = torch.randint(1, 12, (n,), **how) * (torch.rand(n, **how) >= empty)
    half = torch.where(torch.rand(n, **how) < 0.5, 1 + quarter % 2, 3 + quarter // 2)
    colour = torch.where(what % 2 == 1, 1 + kind // len(SHAPES), 0)
    shape = torch.where(what // 2 % 2 == 1, 1 + kind % len(SHAPES), 0)
    place = torch.where(what // 4 == 1, half, torch.where(what // 4 == 2, 5 + quarter, 0))
    return (colour * (1 + len(SHAPES)) + shape) * (1 + len(PLACES)) + place


def distance(shape: int, x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    """How far a pixel is outside of a shape about the origin, in pixels; inside it is negative."""
    if shape == 0:
        return (x**2 + y**2).sqrt() - radius
    if shape == 1:
        return torch.maximum(x.abs(), y.abs()) - 0.92 * radius
    if shape == 2:
        low = y - 0.8 * radius
        return torch.maximum(low, 0.866 * x.abs() - 0.5 * (y + 1.2 * radius))
    small, large = torch.minimum(x.abs(), y.abs()), torch.maximum(x.abs(), y.abs())
    return torch.maximum(small - 0.36 * radius, large - 1.1 * radius)


def coverage(shape: int, at_x: Tensor, at_y: Tensor, radius: Tensor) -> Tensor:
    """How much of each pixel of a quarter an object covers: ``(..., 16, 16)``. ``at_x`` and ``at_y`` count from the middle."""
    pixel = torch.arange(CELL, device=radius.device) - (CELL - 1) / 2
    x, y = pixel - at_x[..., None, None], pixel[:, None] - at_y[..., None, None]
    return (0.5 - distance(shape, x, y, radius[..., None, None])).clamp(0, 1)


def paint(x: Tensor, generator: torch.Generator) -> Tensor:
    """A picture of each scene, ``(b, 3, 32, 32)`` in [0, 1]."""
    how = {"generator": generator, "device": x.device}
    at = SHIFT * (2 * torch.rand(2, *x.shape, **how) - 1)
    radius = RADIUS[0] + (RADIUS[1] - RADIUS[0]) * torch.rand(x.shape, **how)
    every = torch.stack([coverage(shape, *at, radius) for shape in range(len(SHAPES))])
    kind = (x - 1).clamp(min=0)
    shape, palette = kind % len(SHAPES), torch.tensor(list(COLOURS.values()), device=x.device)
    covered = sum(every[i] * ((shape == i) & (x > 0))[..., None, None] for i in range(len(SHAPES)))
    cells = GROUND + covered[:, :, None] * (palette[kind // len(SHAPES)] - GROUND)[..., None, None]
    return cells.unflatten(1, (2, 2)).permute(0, 3, 1, 4, 2, 5).reshape(len(x), 3, SIZE, SIZE)
