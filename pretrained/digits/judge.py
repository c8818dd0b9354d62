r"""The judge of coloured digits, used for scoring only: ``python pretrained/digits/judge.py [--steps n] [--state folder]``.

It tells a digit and a colour, and accepts an image as one clear digit where it is at least 90 % sure of both. So that being sure
means something, part of its training images are spoilt (two digits in one image, quarters of different digits, two colours) and have to leave it in
doubt. Its features give a Fréchet distance,

.. math:: |\mu_1 - \mu_2|^2 + \operatorname{tr} \bigl(C_1 + C_2 - 2 (C_1^{1/2} C_2 C_1^{1/2})^{1/2}\bigr)
"""

import argparse
import functools
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path += [str(folder) for folder in Path(__file__).parents[:2]]

import recipes
from coloured_mnist import CLASSES, COLOURS, LICENCE, class_index, coloured, mnist
from recipes import table

from sculpt.files import load_folder, replacing, save_folder
from sculpt.training import Row, Training, cosine

HERE = Path(__file__).parent
STEPS, BATCH, RATE = 5000, 128, 3e-3
SURE = 0.9
SPOILT = 16  # of a batch

Moments = tuple[Tensor, Tensor]


class Judge(nn.Module):
    """Images in [-1, 1] to the logits of ten digits and four colours, and to features."""

    def __init__(self, channels: tuple[int, ...] = (24, 48, 64)):
        super().__init__()
        self.channels = tuple(channels)
        self.stem = nn.Conv2d(3, channels[0], 4, stride=2, padding=1)
        pairs = list(zip((channels[0], *channels[:-1]), channels, strict=True))
        self.blocks = nn.ModuleList(Block(i, o) for i, o in pairs)
        self.digit, self.colour = nn.Linear(2 * channels[-1], 10), nn.Linear(2 * channels[-1], len(COLOURS))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = self.stem(x)
        for i, block in enumerate(self.blocks):
            h = block(F.max_pool2d(h, 2) if i else h)
        h = F.relu(torch.cat([h.mean((2, 3)), h.amax((2, 3))], -1))
        return self.digit(h).float(), self.colour(h).float(), h.float()

    @torch.no_grad()
    def score(self, x: Tensor, batch_size: int = 250) -> "Scores":
        parts = [self(part) for part in x.split(batch_size)]
        digit, colour, features = (torch.cat(column) for column in zip(*parts, strict=True))
        p_digit, p_colour = digit.softmax(-1).max(-1), colour.softmax(-1).max(-1)
        accepted = (p_digit.values >= SURE) & (p_colour.values >= SURE)
        return Scores(class_index(p_digit.indices, p_colour.indices), accepted, features)

    def save_pretrained(self, folder: Path) -> None:
        save_folder(folder, {"kind": "digit-judge", "channels": list(self.channels)}, self.state_dict())

    @classmethod
    def from_pretrained(cls, folder: Path) -> "Judge":
        config, weights = load_folder(folder, "digit-judge")
        judge = cls(config.list("channels", 10))
        judge.load_state_dict(weights)
        return judge.eval().requires_grad_(False)


class Block(nn.Module):
    def __init__(self, i: int, o: int):
        super().__init__()
        self.norms = nn.ModuleList(nn.GroupNorm(8, c) for c in (i, o, o))
        self.convs = nn.ModuleList(
            [nn.Conv2d(i, o, 3, padding=1), nn.Conv2d(o, o, 3, padding=1), nn.Conv2d(o, o, 3, padding=1)]
        )
        self.skip = nn.Conv2d(i, o, 1) if i != o else nn.Identity()

    def forward(self, h: Tensor) -> Tensor:
        y = h
        for norm, conv in zip(self.norms, self.convs, strict=True):
            y = conv(F.relu(norm(y)))
        return self.skip(h) + y


@dataclass
class Scores:
    """What the judge says of a set of images."""

    label: Tensor
    """index into ``CLASSES``, one per image"""
    accepted: Tensor
    """whether it is one clear digit"""
    features: Tensor

    @property
    def shares(self) -> Tensor:
        """The share of each class among all images, clear or not."""
        return self.weighted_shares(torch.ones(len(self.label), dtype=torch.float64))

    def weighted_shares(self, weights: Tensor) -> Tensor:
        total = torch.zeros(len(CLASSES), dtype=torch.float64).index_add_(0, self.label, weights.double())
        return total / total.sum()


# Fréchet distance


def moments(features: Tensor, weights: Tensor | None = None) -> Moments:
    """Mean and covariance, in double precision."""
    h = features.double()
    w = torch.full((len(h),), 1 / len(h), dtype=torch.float64) if weights is None else weights.double() / weights.sum()
    mean = w @ h
    centred = h - mean
    return mean, centred.T @ (centred * w[:, None])


def frechet(one: Moments, two: Moments) -> float:
    root = _sqrt(one[1])
    cross = torch.linalg.eigvalsh(root @ two[1] @ root).clamp(min=0).sqrt().sum()
    return float((one[0] - two[0]).square().sum() + one[1].trace() + two[1].trace() - 2 * cross)


def _sqrt(c: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(c)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T  # rounding makes tiny negative eigenvalues


def reference(judge: Judge, share: Tensor, split: str = "t10k") -> Moments:
    """Moments of real digits whose classes come in these shares; held-out ones unless said otherwise."""
    digits, colours, features = _real(judge, split)
    weights = torch.zeros(len(digits), dtype=torch.float64)
    for i in share.nonzero()[:, 0].tolist():
        own = class_index(digits, colours) == i
        weights[own] = share[i] / own.sum()
    return moments(features, weights)


@functools.lru_cache(maxsize=4)
def _real(judge: Judge, split: str) -> tuple[Tensor, Tensor, Tensor]:
    """Ten thousand real digits in each of the colours, and the judge's features of them."""
    grey, digits = mnist(split)
    grey, digits = grey[-10_000:], digits[-10_000:]
    colours = torch.arange(len(COLOURS)).repeat_interleave(len(grey))
    features = [judge.score(coloured(grey, colours[colours == c])).features for c in range(len(COLOURS))]
    return digits.repeat(len(COLOURS)), colours, torch.cat(features)


# Training


class Recipe:
    """How the judge is trained."""

    name = "judge"

    def __init__(self, steps: int, state: Path):
        torch.manual_seed(0)
        self.steps, (self.grey, self.digits), judge = steps, mnist("train"), Judge()
        optimizer = torch.optim.AdamW(judge.parameters(), lr=RATE, betas=(0.9, 0.99), weight_decay=1e-2, fused=True)
        identity, rate = {"name": self.name, "steps": steps, "batch": BATCH}, cosine(steps, 200, 0.01)
        self.training = Training(judge, optimizer, state / self.name, identity=identity, rate=rate, clip=1.0)
        self.training.resume()

    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Images with the probabilities of their digits and colours; the first of them are spoilt."""
        at = torch.randint(len(self.grey), (size,), generator=generator)
        colour = torch.randint(len(COLOURS), (size,), generator=generator)
        x = warped(coloured(self.grey[at], colour), generator)
        digit, colour = F.one_hot(self.digits[at], 10).float(), F.one_hot(colour, len(COLOURS)).float()
        spoil(x, digit, colour, generator)
        return x, digit, colour

    def loss(self, seed: int) -> tuple[Tensor, Row]:
        x, digit, colour = self.batch(BATCH, torch.Generator().manual_seed(seed))
        digit_logits, colour_logits, _ = self.training.network(x)
        own = F.cross_entropy(digit_logits, digit, reduction="none")[SPOILT:].mean()
        return F.cross_entropy(digit_logits, digit) + F.cross_entropy(colour_logits, colour), {"digit": own.detach()}

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        return quality(self.training.average)


def warped(x: Tensor, generator: torch.Generator) -> Tensor:
    """Turned, scaled and shifted a little. The background is black, -1."""
    b = len(x)
    u = 2 * torch.rand(5, b, generator=generator) - 1
    angle, shear, scale = 0.2 * u[0], 0.15 * u[1], 1 + 0.12 * u[2]
    A = torch.stack([angle.cos() * scale, shear - angle.sin() * scale, angle.sin() * scale, angle.cos() * scale], -1).view(
        b, 2, 2
    )
    shift = 2 / 32 * 2 * u[3:].T
    grid = F.affine_grid(torch.cat([A, shift[:, :, None]], -1), list(x.shape), align_corners=False)
    noise = 0.05 * torch.rand(b, 1, 1, 1, generator=generator) * torch.randn(x.shape, generator=generator)
    return F.grid_sample(x + 1, grid, align_corners=False) - 1 + noise


def spoil(x: Tensor, digit: Tensor, colour: Tensor, generator: torch.Generator) -> None:
    """The first images of a batch, in place: what is not one digit, or not one colour, belongs to all classes alike."""
    k, grey = SPOILT // 4, ((x + 1) / 2).amax(1)
    other = torch.arange(SPOILT, SPOILT + 2 * k)
    tint = colour @ torch.tensor(list(COLOURS.values()))
    shapes = grey[: 2 * k].clone()
    shapes[:k] = torch.maximum(grey[:k], grey[other[:k]].roll(6, -1))
    rows, columns = (torch.arange(32) < 16)[:, None], (torch.arange(32) < 16)[None]
    shapes[k:] = torch.where(rows ^ columns, grey[k : 2 * k], grey[other[k:]])
    different = (digit[: 2 * k].argmax(-1) != digit[other].argmax(-1))[:, None, None]
    # Of one and the same digit two halves may still be that digit.
    shapes = torch.where(different, shapes, grey[: 2 * k])
    x[: 2 * k] = shapes[:, None] * tint[: 2 * k, :, None, None] * 2 - 1
    digit[: 2 * k] = torch.where(different[:, 0], torch.full((1, 10), 0.1), digit[: 2 * k])
    two = colour[2 * k : 4 * k].argmax(-1) != colour[other].argmax(-1)
    stripes = (torch.rand(2 * k, 1, 32, 1, generator=generator) < 0.5) | (
        torch.rand(2 * k, 1, 1, 32, generator=generator) < 0.2
    )
    mixed = torch.where(stripes, tint[2 * k : 4 * k, :, None, None], tint[other][:, :, None, None])
    x[2 * k : 4 * k] = torch.where(two[:, None, None, None], grey[2 * k : 4 * k, None] * mixed * 2 - 1, x[2 * k : 4 * k])
    colour[2 * k : 4 * k] = torch.where(two[:, None], torch.full((1, len(COLOURS)), 1 / len(COLOURS)), colour[2 * k : 4 * k])


@torch.no_grad()
def quality(judge: Judge) -> dict[str, float]:
    """On MNIST's 10,000 held-out digits, the colours in turn."""
    device = next(judge.parameters()).device
    grey, digits = mnist("t10k")
    colours = torch.arange(len(grey)) % len(COLOURS)
    scores = judge.score(coloured(grey, colours).to(device))
    label = scores.label.cpu()
    return {
        "digits": float((label // len(COLOURS) == digits).double().mean()),
        "colours": float((label % len(COLOURS) == colours).double().mean()),
        "accepted": float(scores.accepted.double().mean()),
    }


@torch.no_grad()
def doubts(judge: Judge, n: int = 2000) -> dict[str, float]:
    """The share that is accepted of images that are no clear digit, made from held-out ones."""
    grey, digits = mnist("t10k")
    generator = torch.Generator().manual_seed(0)
    one, two = torch.randint(len(grey), (2, 2 * n), generator=generator)
    one, two = (at[digits[one] != digits[two]][:n] for at in (one, two))
    colour = torch.arange(len(one)) % len(COLOURS)
    spoilt = {
        "two digits at once": torch.maximum(grey[one], grey[two]),
        "left half of one digit, right half of another": torch.where(torch.arange(32) < 16, grey[one], grey[two]),
        "blurred to 4×4": F.interpolate(F.avg_pool2d(grey[one][:, None].float(), 8), scale_factor=8)[:, 0],
        "noise of a digit's brightness": torch.rand(len(one), 32, 32, generator=generator) * 2 * grey[one].float().mean(),
    }
    return {name: float(judge.score(coloured(part, colour)).accepted.double().mean()) for name, part in spoilt.items()}


def finish(training: Training, folder: Path) -> None:
    """The averaged weights and their card."""
    with replacing(folder) as new:
        training.average.save_pretrained(new)
        (new / "README.md").write_text(card(training, new))


def card(training: Training, folder: Path) -> str:
    judge = Judge.from_pretrained(folder)
    q, share = quality(judge), torch.full((len(CLASSES),), 1 / len(CLASSES), dtype=torch.float64)
    floor = frechet(reference(judge, share, "train"), reference(judge, share))
    sure = f"accepted as one clear digit: at least {100 * SURE:.0f} % sure of digit and of colour"
    rows = {
        "digit right": f"{100 * q['digits']:.2f} % (target 99.5 %)",
        "colour right": f"{100 * q['colours']:.2f} %",
        sure: f"{100 * q['accepted']:.2f} % (target 99 %)",
        "Fréchet distance of 10,000 training digits to the held-out ones": f"{floor:.4f}",
    }
    spoilt = [(name, f"{100 * value:.1f} %") for name, value in doubts(judge).items()]
    size, features = sum(p.numel() for p in judge.parameters()), 2 * judge.channels[-1]
    return recipes.card(
        folder,
        f"Tells the digit (0 to 9) and the colour ({', '.join(COLOURS)}) of a 32×32 image. It scores samples and is never used to make any.",
        """
from judge import Judge  # pretrained/digits/judge.py

scores = Judge.from_pretrained("pretrained/digits/judge").score(images)  # in [-1, 1]
scores.shares, scores.accepted.float().mean()
""",
        {
            "data": "MNIST's training images, coloured, turned, scaled and shifted a little; an eighth of them spoilt",
            "network": f"residual convolutions, {size:,} parameters, {features} features",
            "recipe": f"`python pretrained/digits/judge.py`: {training.step:,} steps of {BATCH} images, averaged weights",
            "cost": f"{training.seconds / 60:.0f} CPU minutes",
        },
        measured=table(("on MNIST's 10,000 held-out digits, coloured", ""), rows.items())
        + "\n\n"
        + table(("no clear digit, made from held-out ones", "accepted"), spoilt),
        licence=LICENCE,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--state", type=Path, default=Path("train_state/digits"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    recipe, folder = Recipe(options.steps, options.state), HERE / "judge"
    recipes.train(recipe, check=500)
    finish(recipe.training, folder)
