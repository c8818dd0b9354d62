r"""How near samples of a prompted model are to what the program draws.

A picture of prompt c is as asked where the judge accepts it and c fits one of its objects. Distributions are compared in coarse classes:
how many objects there are; what the objects are that c fits, and where; what the others are. Their distance is the total variation,
:math:`\frac12 \sum |p - q|`, to the sum over all scenes; as many exact draws have one too, which is the best that can be expected.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import judge
import scenes
import torch
from scenes import KINDS, PLACES, PROMPTS, SHAPES
from torch import Tensor

KIND_NAMES = ("colour", "shape", "colour, shape", "place", "colour, place", "shape, place", "colour, shape, place")


def kind(prompt: Tensor) -> Tensor:
    """Which attributes a prompt names, by its number: 0 none, otherwise 1 + the place in ``KIND_NAMES``."""
    colour, rest = prompt // ((1 + len(SHAPES)) * (1 + len(PLACES))), prompt % ((1 + len(SHAPES)) * (1 + len(PLACES)))
    return (colour > 0) + 2 * (rest // (1 + len(PLACES)) > 0) + 4 * (rest % (1 + len(PLACES)) > 0)


def classes(prompt: str | Tensor, x: Tensor) -> dict[str, Tensor]:
    """The coarse classes of scenes ``(b, 4)``: of each scene, how often each class is in it."""
    named = scenes.fits(prompt, x)
    others = (x > 0) & ~named
    one_hot = torch.nn.functional.one_hot(x, 1 + KINDS)[..., 1:].double()
    share = named.double() / named.sum(-1, keepdim=True).clamp(min=1)
    return {
        "how many": torch.nn.functional.one_hot((x > 0).sum(-1), 5)[:, 1:4].double(),
        "what is named": torch.einsum("b q, b q k -> b k", share, one_hot),
        "where it is": share,
        "what else": torch.einsum("b q, b q k -> b k", others.double(), one_hot),
    }


@functools.cache
def exact(prompt: int) -> dict[str, Tensor]:
    """What is expected of them under a prompt."""
    p = scenes.conditional(PROMPTS[prompt])
    return {name: p @ value for name, value in classes(PROMPTS[prompt], scenes.scenes()).items()}


@dataclass
class Measures:
    """Shares of pictures, and distances."""

    accepted: float
    asked: float
    by_kind: dict[str, float]
    distances: dict[str, float]


def measure(prompt: Tensor, reading: judge.Reading) -> Measures:
    """What pictures of prompts (by their numbers) are worth."""
    named = scenes.fits(prompt, reading.scenes).any(-1)
    asked, kinds = named & reading.accepted, kind(prompt)
    by_kind = {name: float(asked[kinds == k].double().mean()) for k, name in enumerate(KIND_NAMES, 1) if (kinds == k).any()}
    good = reading.accepted
    return Measures(
        float(reading.accepted.double().mean()),
        float(asked.double().mean()),
        by_kind,
        distances(prompt[good], reading.scenes[good]) if good.any() else {},
    )


def distances(prompt: Tensor, x: Tensor) -> dict[str, float]:
    """The total variation between the classes of scenes and what is expected under their prompts."""
    found = {name: value.sum(0) for name, value in classes(prompt, x).items()}
    number = prompt.bincount(minlength=len(PROMPTS))
    expected = {name: sum(n * exact(c)[name] for c, n in enumerate(number.tolist()) if n) for name in found}
    # Without a prompt everything is named, and there is nothing else.
    kept = {name: p for name, p in expected.items() if p.sum() > 0 and found[name].sum() > 0}
    return {name: 0.5 * float((found[name] / found[name].sum() - p / p.sum()).abs().sum()) for name, p in kept.items()}


def floor(prompt: Tensor, generator: torch.Generator) -> dict[str, float]:
    """The distances of exact draws, one a prompt."""
    rows = torch.empty_like(prompt)
    for c in prompt.unique().tolist():
        at = prompt == c
        rows[at] = scenes.conditional(PROMPTS[c]).multinomial(int(at.sum()), True, generator=generator)
    return distances(prompt, scenes.scenes()[rows])


def composed(prompts: Sequence[str], x: Tensor) -> dict[str, Tensor]:
    """The classes by which compositions of prompts are compared, of scenes ``(b, 4)``: how often each class is in each scene."""
    fit = torch.stack([scenes.fits(prompt, x).any(-1) for prompt in prompts], -1)
    pattern = (fit.long() * 2 ** torch.arange(len(prompts), device=x.device)).sum(-1)
    kinds = 2 ** len(prompts)
    number = kinds * (x > 0).sum(-1) + pattern
    one_hot = torch.nn.functional.one_hot(x, 1 + KINDS)[..., 1:].double()
    return {
        "how many, and which prompts fit": torch.nn.functional.one_hot(number, 5 * kinds).double(),
        "what is where": one_hot.flatten(1),
    }


def composed_distances(prompts: Sequence[str], x: Tensor, target: Tensor) -> dict[str, float]:
    """The total variation between the classes of scenes and those of a distribution over :func:`scenes.scenes`."""
    found = {name: value.mean(0) for name, value in composed(prompts, x).items()}
    expected = {name: target @ value for name, value in composed(prompts, scenes.scenes()).items()}
    return {name: 0.5 * float((p / p.sum() - expected[name] / expected[name].sum()).abs().sum()) for name, p in found.items()}


def pictures(paint: Callable[[list[str]], Tensor], prompt: Tensor, batch_size: int = 50) -> judge.Reading:
    """The judge's reading of what a function from prompts to pictures makes."""
    return judge.read(torch.cat([paint([PROMPTS[c] for c in part.tolist()]) for part in prompt.split(batch_size)]))
