"""Base models in closed form at every noise level: what toys are made of."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sculpt.diffusion.denoiser import Denoiser

__all__ = ["Boxes", "Closed", "Corners", "log_probs"]


class _Seen(nn.Module):
    """A density as a network, so that what goes through it can be counted."""

    def __init__(self, density: nn.Module):
        super().__init__()
        self.density = density

    def forward(self, z: Tensor, s: Tensor) -> Tensor:
        """The denoised samples."""
        return self.density.denoise(z, s)


class Closed(Denoiser):
    """The diffusion model of a density that is known at every noise level.

    Args:
        name: of the model, and its key.
        density: with ``log_prob(z, v)`` and ``denoise(z, s)``.
        d: its dimension.
        s_min: the least noise level.
    """

    def __init__(self, name: str, density: nn.Module, d: int, s_min: float = 0.01):
        self.name = self.key = name
        self.density, self.model = density, _Seen(density)
        self.shape, self.s_min, self.s_max, self.device = (d,), s_min, 80.0, torch.device("cpu")

    def denoise(self, z: Tensor, s: Tensor) -> Tensor:
        """See :class:`Denoiser`."""
        return self.model(z, s)


def log_probs(models: Sequence[Closed], z: Tensor, v: Tensor | float) -> Tensor:
    """The log-densities ``(N, m)`` of all ``models`` at z, noised to the variance v."""
    return torch.stack([model.density.log_prob(z, v) for model in models], dim=-1)


class Corners(nn.Module):
    r"""Equal Gaussians around corners of the cube :math:`\{-2, 2\}^d`: all of them, or those where some coordinates are positive.

    Args:
        d: the dimension.
        sigma: the width of a Gaussian.
        positive: the coordinates that are.
    """

    MU = 2.0

    def __init__(self, d: int, sigma: float, positive: Sequence[int] = ()):
        super().__init__()
        self.c = sigma**2
        self.fixed = torch.zeros(d, dtype=torch.bool)
        self.fixed[list(positive)] = True

    def log_prob(self, z: Tensor, v: Tensor | float = 0.0) -> Tensor:
        """The log-density of z, noised to the variance v."""
        c = self.c + torch.as_tensor(v, dtype=torch.float64)
        up, down = (-((z.double() - mu) ** 2) / (2 * c) for mu in (self.MU, -self.MU))
        each = torch.where(self.fixed, up, torch.logaddexp(up, down) - math.log(2))
        return (each - 0.5 * (2 * math.pi * c).log()).sum(-1)

    def denoise(self, z: Tensor, s: Tensor) -> Tensor:
        """The denoised samples."""
        v = torch.as_tensor(s, dtype=torch.float64) ** 2
        mean = self.MU * torch.where(self.fixed, torch.ones(()).double(), torch.tanh(self.MU * z.double() / (self.c + v)))
        return (mean + self.c / (self.c + v) * (z.double() - mean)).to(z.dtype)


class Boxes(nn.Module):
    """A density that is even in each of some boxes of the plane.

    Args:
        boxes: ``(x from, x to, y from, y to)`` of each.
        weights: of each; by default its area.
    """

    def __init__(self, boxes: Sequence[Sequence[float]], weights: Sequence[float] | None = None):
        super().__init__()
        self.boxes = torch.tensor(boxes, dtype=torch.float64)
        self.area = (self.boxes[:, 1] - self.boxes[:, 0]) * (self.boxes[:, 3] - self.boxes[:, 2])
        w = self.area if weights is None else torch.tensor(weights, dtype=torch.float64)
        self.weights = w / w.sum()

    def log_prob(self, z: Tensor, v: Tensor | float = 0.0) -> Tensor:
        """The log-density of z, noised to the variance v, which is more than none."""
        s = torch.as_tensor(v, dtype=torch.float64).clamp(min=1e-12).sqrt()
        sides = [_log_between(z.double()[:, None, i], *self.boxes[:, 2 * i : 2 * i + 2].T, s) for i in (0, 1)]
        return (sum(sides) + (self.weights / self.area).log()).logsumexp(-1)

    def denoise(self, z: Tensor, s: Tensor) -> Tensor:
        """The denoised samples, by Tweedie's formula."""
        v = torch.as_tensor(s, dtype=torch.float64) ** 2
        with torch.enable_grad():
            at = z.detach().double().requires_grad_(True)
            (score,) = torch.autograd.grad(self.log_prob(at, v).sum(), at)
        return (z + v * score).to(z.dtype)

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        """Exact samples."""
        k = torch.multinomial(self.weights, n, True, generator=generator)
        u = torch.rand(n, 2, generator=generator, dtype=torch.float64)
        low, high = self.boxes[k][:, ::2], self.boxes[k][:, 1::2]
        return low + (high - low) * u


def _log_between(x: Tensor, low: Tensor, high: Tensor, s: Tensor) -> Tensor:
    r""":math:`\log \bigl( \Phi(\tfrac{b - x}{s}) - \Phi(\tfrac{a - x}{s}) \bigr)`, by the tails that are on one side."""
    a, b = (low - x) / s, (high - x) / s
    # Mirrored, so that both ends are left of the middle or on different sides of it: nothing is lost in the difference.
    a, b = torch.where(a > 0, -b, a), torch.where(a > 0, -a, b)
    log_a, log_b = torch.special.log_ndtr(a), torch.special.log_ndtr(b)
    return log_b + torch.log1p(-(log_a - log_b).exp().clamp(max=1 - 1e-15))


def cells(rows: Sequence[str], half_width: float) -> list[tuple[float, float, float, float]]:
    """The boxes of a pattern over a square of this ``half_width``: ``rows`` of text from top to bottom, ``#`` where there is a box."""
    n = len(rows)
    edge = [half_width * (2 * k / n - 1) for k in range(n + 1)]
    marked = itertools.product(range(n), range(n))
    return [(edge[i], edge[i + 1], edge[n - 1 - j], edge[n - j]) for j, i in marked if rows[j][i] == "#"]
