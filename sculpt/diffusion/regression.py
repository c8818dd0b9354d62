r"""What a guidance field learns from: the regression of finished samples, weighted with what the terminal head says of them.

.. math:: D(z, s) = \frac{E[x \, f(x) \mid z]}{E[f(x) \mid z]}, \qquad f(x) = \Pi_{k \ge 2} \, p_v(y_k \mid x), \quad z = x + s \varepsilon

where x is a sample of the anchor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sculpt.classifier.store import Draw, Pool
from sculpt.diffusion.clock import like, noise_range, spread
from sculpt.diffusion.field import Field, VectorField
from sculpt.model import randn

if TYPE_CHECKING:
    from sculpt.classifier.heads import Classifier
    from sculpt.diffusion.denoiser import Denoiser

__all__ = ["Regression", "stratified"]

AT_ONCE = 500
"""Samples that the terminal head judges at once."""
COMPOSITIONS = 16
"""Label sets and odds of an anchor in a batch."""
CANDIDATES = 2048
"""Other samples that a noisy one may have come from."""


class Regression:
    r"""Noisy samples with the denoised ones that a composition wants of them.

    A batch has as many rows of each anchor, in a few compositions; every row has an x of its own, drawn in proportion to f. Of that x
    and some others of the pool any may have been noised to z, with a probability that is known: the target is their mean, which has the
    same expected gradient as x and less noise.

    Args:
        models: the base models, in the order of the labels.
        pool: their samples.
        classifier: whose terminal head gives f.
        mean: of the data.
        std: the spread of the data.
    """

    def __init__(self, models: Sequence[Denoiser], pool: Pool, classifier: Classifier, mean: float, std: float):
        self.models, self.classifier, self.mean, self.std = models, classifier, mean, std
        self.device, (self.s_min, self.s_max) = models[0].device, noise_range(models)
        self.parts = {
            held_out: [self._judged(x) for x in parts] for held_out, parts in ((False, pool.training), (True, pool.held_out))
        }

    @torch.no_grad()
    def _judged(self, x: Tensor) -> tuple[Tensor, Float[Tensor, "n m"]]:
        """Samples, and log p(y | x) of each."""
        x = x.to(self.device)
        return x, torch.cat([self.classifier.terminal(part).float() for part in x.split(AT_ONCE)])

    def default_field(self) -> Field:
        """A base model's own network where it has one that can be told what to do, or one that suits its samples."""
        m, odds, shape = self.classifier.m, self.classifier.odds, self.models[0].shape
        if len(shape) == 1:
            return VectorField(m, odds, shape[0], self.mean, self.std, self.s_min)
        from sculpt.diffusion.diffusers.field import NetworkField

        own = next((model for model in self.models if NetworkField.fits(model)), None)
        if own is not None:
            return NetworkField.of(own, m, odds, self.std)
        if len(shape) == 3:
            return NetworkField.new(shape, m, odds, self.std)
        raise ValueError(
            f"There is no default field for samples of shape {shape}. Pass network=, a sculpt.diffusion.field.Field of your own."
        )

    def check(self, field: nn.Module) -> None:
        """Raise where this is no field for these compositions."""
        if not isinstance(field, Field):
            raise TypeError(
                f"network is a sculpt.diffusion.field.Field, got a {type(field).__name__}. Leave it out for the default one."
            )
        own, wanted = ((thing.m, "with" if thing.odds else "without") for thing in (field, self.classifier))
        if own != wanted:
            raise ValueError(
                f"This field is told of {own[0]} base models {own[1]} odds, and this classifier has {wanted[0]} {wanted[1]} odds. "
                "Leave network out, or make it for these."
            )

    def loss(self, field: Field, draw: Draw) -> Tensor:
        r"""The mean of :math:`(1 + \sigma^2 / s^2) \, (|D + c G - x|^2 - |D - x|^2) / \sigma^2`, in which D is the anchor's: what guidance changes."""
        parts = [self._targets(i, field, draw) for i in range(len(self.models))]
        z, s, told, target = (torch.cat(part) for part in zip(*parts, strict=True))
        added = field.added(z, s, told)
        weight = 1 / s**2 + 1 / self.std**2
        return (weight * (added * (added - 2 * target)).flatten(1).double().mean(1)).mean()

    @torch.no_grad()
    def _targets(self, i: int, field: Field, draw: Draw) -> tuple[Tensor, ...]:
        """States of anchor i, their levels, compositions, and what is to be added to the anchor's denoised sample."""
        x, log_p = self.parts[draw.held_out][i]
        sets, n, generator, device = self.classifier.set_head, draw.size, draw.generator, self.device
        each = min(n, COMPOSITIONS)
        column, log_odds = torch.randint(len(sets.counts), (each,), generator=generator), draw.log_odds(each, self.classifier)
        which = torch.randint(each, (n,), generator=generator).to(device)
        s = spread(stratified(n, generator), self.s_min, self.s_max, self.std).to(device)
        u, others = torch.rand(n, generator=generator), torch.randperm(len(x), generator=generator)[:CANDIDATES]
        if log_odds is not None:
            log_odds = log_odds.to(device)
            log_p = torch.log_softmax(log_p + log_odds[:, None], dim=-1)
        counts = sets.counts[column.to(device)]
        with torch.autocast(device.type, enabled=False):
            log_f = sets.log_f(log_p.expand(each, -1, -1), column.to(device)[:, None])[..., 0]
            own = drawn(log_f, which, u.to(device))
            z = x[own] + like(s, x) * randn((n, *x.shape[1:]), generator, x)
            wanted = _mean(z, s, x, log_f, which, own, others.to(device))
        told = field.tell(torch.full((each,), i, device=device), counts, log_odds)[which]
        return z, s, told, wanted - self.models[i].denoise(z, s).to(z)


def drawn(log_f: Float[Tensor, "k N"], rows: Int[Tensor, "n"], u: Float[Tensor, "n"]) -> Int[Tensor, "n"]:
    """An index in proportion to f for each uniform number u, from the distribution of its row."""
    (k, N), cumulated = log_f.shape, torch.softmax(log_f.double(), dim=1).cumsum(1)
    # All distributions in one line, each from its row's number to the next.
    line = (cumulated / cumulated[:, -1:] + torch.arange(k, device=log_f.device)[:, None]).flatten()
    found = torch.searchsorted(line, rows + u.double(), right=True) - rows * N
    return found.clamp(0, N - 1)


def _mean(
    z: Float[Tensor, "n *x"],
    s: Float[Tensor, "n"],
    x: Float[Tensor, "N *x"],
    log_f: Float[Tensor, "k N"],
    rows: Int[Tensor, "n"],
    own: Int[Tensor, "n"],
    others: Int[Tensor, "c"],
) -> Float[Tensor, "n *x"]:
    """Of what z may have been noised from: its own x, or one of the others."""
    own_square = (z - x[own]).flatten(1).square().sum(1, keepdim=True)
    square = torch.cat([own_square, torch.cdist(z.flatten(1), x[others].flatten(1)).square()], dim=1)
    log_b = torch.cat([log_f[rows, own][:, None], log_f[:, others][rows]], dim=1) - square / (2 * s[:, None].float() ** 2)
    log_b[:, 1:].masked_fill_(others == own[:, None], -math.inf)  # it is there already
    b = torch.softmax(log_b, dim=1)
    return (b[:, :1] * x[own].flatten(1) + b[:, 1:] @ x[others].flatten(1)).view_as(z)


def stratified(n: int, generator: torch.Generator) -> Float[Tensor, "n"]:
    """Uniform numbers, one in each nth of [0, 1], in random order."""
    order = torch.randperm(n, generator=generator)
    return ((order + torch.rand(n, generator=generator)) / n).double()
