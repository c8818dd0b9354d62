r"""Classifier backbones for noisy samples, and the re-noised samples they are trained on.

Notation: :math:`z = x + s \varepsilon`, all noise levels that sampling visits; a finished sample is a state without noise.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from einops import rearrange
from jaxtyping import Float
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F

from sculpt.base import BaseModel, randn
from sculpt.classifier import Batch
from sculpt.diffusion.model import Denoiser
from sculpt.diffusion.sampler import noise_range, spread
from sculpt.diffusion.schedule import like
from sculpt.files import read_tensors, replace_file
from sculpt.training import Replay, draw_log_odds

__all__ = ["VectorNetwork", "ImageNetwork", "DiffusionReplay"]

CACHE_BYTES = 2**30
CANDIDATES = 2048
"""Samples of each model that a noisy state may have come from, in the losses of the gradient."""
TINY = 1e-30
"""Under what divides, where a sample cannot be of the composition at all."""


class NoisyNetwork(nn.Module):
    """What both backbones share: inputs scaled to unit variance, and the features of the noise level."""

    def __init__(self, mean: float, std: float, s_min: float, width: int):
        super().__init__()
        self.mean, self.std, self.s_min, self.width = mean, std, s_min, width

    def inputs(self, z: Float[Tensor, "b *x"], s: Float[Tensor, "*b"] | None) -> tuple[Tensor, Tensor]:
        # A finished sample counts as noised to half the least noise level: log s stays finite and the level is its own.
        s = torch.full((), self.s_min / 2, dtype=torch.float64) if s is None else s
        s = (s.to(z.device).float() / self.std).expand(len(z))
        scale = (1 + s**2).rsqrt().reshape(-1, *[1] * (z.ndim - 1))
        angles = (s.log() / 2)[:, None] * 2.0 ** torch.arange(-2, 4, device=z.device)
        features = (z.float() - self.mean) / self.std * scale, torch.cat([angles.sin(), angles.cos()], dim=-1)
        return tuple(part.to(next(self.parameters()).dtype) for part in features)


class VectorNetwork(NoisyNetwork):
    """For samples of one axis: a perceptron over the coordinates, their sines and cosines, and the noise level."""

    def __init__(self, d: int, mean: float = 0.0, std: float = 1.0, s_min: float = 0.01, width: int = 256, depth: int = 3):
        super().__init__(mean, std, s_min, width)
        self.config = {"d": d, "mean": mean, "std": std, "s_min": s_min, "width": width, "depth": depth}
        # The scaled coordinates crowd together at low noise: a few frequencies each tell close points apart.
        self.register_buffer("frequencies", math.pi / 4 * 2.0 ** torch.arange(4 if d <= 8 else 0), persistent=False)
        sizes = [d * (1 + 2 * len(self.frequencies)) + 12, *[width] * depth]
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in itertools.pairwise(sizes))

    def forward(self, z: Float[Tensor, "b d"], s: Float[Tensor, "*b"] | None = None) -> Float[Tensor, "b w"]:
        z, level = self.inputs(z, s)
        angles = rearrange(z[:, :, None] * self.frequencies, "b d f -> b (d f)")
        h = F.silu(self.layers[0](torch.cat([z, angles.sin(), angles.cos(), level], dim=-1)))
        for layer in self.layers[1:]:
            h = h + F.silu(layer(h))
        return h


class ImageNetwork(NoisyNetwork):
    """For images and latents: a residual convolutional pyramid, the noise level scaling and shifting its channels."""

    def __init__(
        self,
        shape: Sequence[int],
        mean: float = 0.0,
        std: float = 1.0,
        s_min: float = 0.01,
        channels: Sequence[int] = (32, 64, 96, 128),
        width: int = 256,
    ):
        super().__init__(mean, std, s_min, width)
        self.config = {
            "shape": list(shape),
            "mean": mean,
            "std": std,
            "s_min": s_min,
            "channels": list(channels),
            "width": width,
        }
        self.stem = nn.Conv2d(shape[0], channels[0], 3, padding=1)
        self.level = nn.Sequential(nn.Linear(12, width), nn.SiLU())
        pairs = list(zip([channels[0], *channels[:-1]], channels, strict=True))
        self.blocks = nn.ModuleList(_Block(i, o, width) for i, o in pairs)
        self.out = nn.Linear(channels[-1] * 2, width)

    def forward(self, z: Float[Tensor, "b c h w"], s: Float[Tensor, "*b"] | None = None) -> Float[Tensor, "b w2"]:
        z, level = self.inputs(z, s)
        h, level = self.stem(z), self.level(level)
        for i, block in enumerate(self.blocks):
            h = block(F.avg_pool2d(h, 2) if i > 0 and min(h.shape[-2:]) > 1 else h, level)
        return F.silu(self.out(torch.cat([h.mean((2, 3)), h.amax((2, 3))], dim=-1)))


class _Block(nn.Module):
    def __init__(self, i: int, o: int, width: int):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(8, i), nn.GroupNorm(8, o)
        self.conv1, self.conv2 = nn.Conv2d(i, o, 3, padding=1), nn.Conv2d(o, o, 3, padding=1)
        self.skip = nn.Conv2d(i, o, 1) if i != o else nn.Identity()
        self.film = nn.Linear(width, 2 * o)

    def forward(self, h: Tensor, level: Tensor) -> Tensor:
        scale, shift = self.film(level)[:, :, None, None].chunk(2, dim=1)
        y = self.conv1(F.silu(self.norm1(h)))
        return self.skip(h) + self.conv2(F.silu(self.norm2(y) * (1 + scale) + shift))


class DiffusionReplay(Replay):
    r"""Samples of every base model, drawn once and kept; their states are made by noising, which is known exactly.

    Guidance uses a classifier's gradient, which cross-entropies hardly look at: in many dimensions a head with good
    probabilities can push the wrong way. With ``path`` two more losses train it, on samples x of model i and :math:`z = x + s \varepsilon`.
    The divergence of the guided path from the composition's, up to a constant, with f the weight that the composition gives to x:

    .. math:: \int E \Bigl[ \tfrac{f}{Z} \bigl( |x - D_i - v \nabla \log h_i|^2 - |x - D_i|^2 \bigr) / v \Bigr] \, d \log s

    with about as much again where f is small, for chains that stray; and, without noise,
    :math:`v \nabla \log \bigl( p(y = i | z) / p(y = j | z) \bigr) = D_i - D_j`, as a share of its square.
    """

    def __init__(
        self,
        models: Sequence[BaseModel],
        *,
        samples: int | None = None,
        data: Sequence[Tensor] | None = None,
        sample_steps: int = 64,
        held_out: float = 0.1,
        path: bool | None = None,
        checkpoint: str | Path | None = None,
        seed: int = 0,
        progress: bool = True,
    ):
        self.models = models
        self.s_min, self.s_max = noise_range(models)
        numbers = math.prod(models[0].shape)
        most = CACHE_BYTES // (4 * numbers * len(models))
        if data is None:
            samples = min(samples or (50_000 if numbers <= 64 else 5_000), most)
            x = [self._drawn(model, i, samples, sample_steps, checkpoint, seed, progress) for i, model in enumerate(models)]
        else:
            x = [self._own(model, part, most) for model, part in zip(models, self._one_each(data), strict=True)]
        if min(map(len, x)) < 10:
            raise ValueError(f"A classifier needs at least 10 samples of each base model, got {[len(part) for part in x]}.")
        held = [max(1, int(len(part) * held_out)) for part in x]
        self.held_out = [part[:k] for part, k in zip(x, held, strict=True)]
        self.training = [part[k:] for part, k in zip(x, held, strict=True)]
        self.path = numbers > 64 and all(isinstance(model, Denoiser) for model in models) if path is None else path
        if self.path:
            self.weights = self.weights | {"path": 0.3, "scores": 0.3}
        self.known: list[list[tuple[Tensor, Tensor]]] = [[], []]
        everything = torch.cat(x)
        self.mean, self.std = float(everything.mean()), max(float(everything.std()), 1e-6)

    def _one_each(self, data: Sequence[Tensor]) -> Sequence[Tensor]:
        if len(data) != len(self.models):
            raise ValueError(
                f"data holds {len(data)} sets of samples for {len(self.models)} base models. Pass one tensor per model, in order."
            )
        return data

    def _own(self, model: Denoiser, x: Tensor, most: int) -> Tensor:
        if tuple(x.shape[1:]) != model.shape:
            raise ValueError(f"The data for {model} has samples of shape {tuple(x.shape[1:])}, the model makes {model.shape}.")
        if not x.isfinite().all():
            raise ValueError(f"The data for {model} has entries that are not finite numbers.")
        return x[:most].float().cpu()

    def _drawn(self, model, i, samples, steps, checkpoint, seed, progress) -> Tensor:
        """Samples of one base model; kept beside the training's checkpoint, so that a killed run does not draw them again."""
        path = None
        if checkpoint is not None:
            identity = hashlib.sha256(repr((model.key, samples, steps, seed)).encode()).hexdigest()[:16]
            path = Path(checkpoint) / "training" / f"samples-{identity}.safetensors"
            if path.exists():
                return read_tensors(path)["x"]
        generator = torch.Generator().manual_seed(seed * 1_000 + i)
        drawn = model.sample(samples, steps=steps, generator=generator, progress=progress).x.float().cpu()
        if path is not None:
            replace_file(path, save({"x": drawn.contiguous()}))
        return drawn

    @property
    def batch_size(self):
        return 256 if len(self.models[0].shape) == 1 else 64

    def draw(self, size, generator, held_out=False):
        # Over the path that the samplers step along, so no level on the way is unseen.
        return self._draw(size, generator, held_out, lambda u: spread(u, self.s_min, self.s_max, self.std))

    def _draw(self, size: int, generator: torch.Generator, held_out: bool, level: Callable[[Tensor], Tensor]) -> Batch:
        """Samples of all models and a noised state of each, the shares u of the way stratified over the batch."""
        pool = self.held_out if held_out else self.training
        x = torch.cat([part[torch.randint(len(part), (size,), generator=generator)] for part in pool])
        y = torch.arange(len(pool)).repeat_interleave(size)
        u = (torch.randperm(len(x), generator=generator) + torch.rand(len(x), generator=generator)) / len(x)
        s = level(u.double())
        z = x + like(s, x) * randn(x.shape, generator, x)
        return Batch(x, y, (z, s), torch.arange(len(x)))

    def refresh(self, teacher, generator, device):
        """Sample anew what the losses of the gradient take their candidates from, and what the terminal head says of it."""
        if not self.path:
            return
        for held_out, pool in enumerate((self.training, self.held_out)):
            known = []
            for x in pool:
                # Of the held-out samples the first ones, always the same.
                x = x[:CANDIDATES] if held_out else x[torch.randperm(len(x), generator=generator)[:CANDIDATES]]
                with torch.no_grad():
                    log_p = torch.cat([teacher.terminal(part.to(device)).float() for part in x.split(256)])
                known.append((x.to(device), log_p))
            self.known[held_out] = known

    def losses(self, classifier, teacher, size, generator, log_odds_range, device, held_out=False):
        losses = super().losses(classifier, teacher, size, generator, log_odds_range, device, held_out)
        if not self.path:
            return losses
        # Below the spread of the data it is decided what a sample will be.
        lowest, whole = min(self.std, self.s_max), math.log(self.s_max / min(self.std, self.s_max))
        common = max(1, size // 2), generator, held_out, lambda u: lowest * (u * whole).exp()
        path = self._path(classifier, *common, log_odds_range, device)
        return losses | {"path": whole * path, "scores": self._scores(classifier, *common, device)}

    def _path(self, classifier, size, generator, held_out, level, log_odds_range, device) -> Tensor:
        r"""The divergence of the guided path from the composition's, for models, label sets of any size and odds drawn alike,
        ``size`` of each model.

        A composition can want one of a hundred samples, so every other row takes its x as often as the composition would. Given z,
        any of the candidates may have been x, with probability b once the composition has weighed them: the target is their mean.
        Where the composition's path never is, its divergence has no weight, and a chain that strays there would not be called back:
        to the path's own weight :math:`\sum b (1 - b)` is added, which is one where many candidates know the way and zero where one does.
        """
        m, sets, rows = classifier.m, classifier.set_head, []
        for i, (model, (x, log_p)) in enumerate(zip(self.models, self.known[held_out], strict=True)):
            column = torch.randint(len(sets.counts), (size,), generator=generator).to(device)
            log_odds = draw_log_odds(size, classifier, log_odds_range, generator)
            log_odds = torch.zeros(size, m, device=device) if log_odds is None else log_odds.to(device)
            u = (torch.randperm(size, generator=generator) + torch.rand(size, generator=generator)) / size
            s = level(u.double()).to(device)
            with torch.no_grad(), torch.autocast(device.type, enabled=False):
                f = sets.log_f(torch.log_softmax(log_p + log_odds[:, None], dim=-1))
                f = f[torch.arange(size, device=device), :, column].exp()
                f = f / f.mean(1, keepdim=True).clamp(min=TINY)
                q = (1 + f) / 2
                z = x[torch.multinomial(q.cpu(), 1, generator=generator)[:, 0].to(device)]
                z = z + like(s, z) * randn(z.shape, generator, z)
                square = torch.cdist(z.flatten(1), x.flatten(1)).square()
                b = torch.softmax(q.log() - square / (2 * s[:, None].float() ** 2), dim=1) * f / q
                weight = b.sum(1)
                b = b / weight[:, None].clamp(min=TINY)
                target = (b @ x.flatten(1)).view_as(z) - model.denoise(z, s).to(z)
                weight = weight + (b * (1 - b)).sum(1)
            rows.append((z, s, torch.full_like(column, i), column, log_odds, target, weight))
        z, s, y, column, log_odds, target, weight = (torch.cat(parts) for parts in zip(*rows, strict=True))

        def steering(features: Tensor) -> Tensor:
            log_h = sets.with_smaller(sets(features, log_odds if classifier.odds else None)[:, 0])
            return log_h[torch.arange(len(y), device=device), y, column]

        return (weight * self._change(classifier, z, s, steering, target, not held_out)).mean()

    def _scores(self, classifier, size, generator, held_out, level, device) -> Tensor:
        """How far the gradient of the label's marginal is from the difference of two models' scores, as a share of its square."""
        batch = self._draw(size, generator, held_out, level).to(device)
        (z, s), y, target = batch.states, batch.y, torch.empty_like(batch.x)
        shift = int(torch.randint(1, classifier.m, (), generator=generator))
        with torch.no_grad():
            for i, model in enumerate(self.models):
                own, other = y == i, self.models[(i + shift) % classifier.m]
                target[own] = (model.denoise(z[own], s[own]) - other.denoise(z[own], s[own])).to(z)

        def ratio(features: Tensor) -> Tensor:
            log_p = classifier.marginal_head(features).float()
            return (log_p.gather(1, y[:, None]) - log_p.gather(1, (y[:, None] + shift) % classifier.m))[:, 0]

        size = (target**2).flatten(1).sum(1) / s.float() ** 2
        return ((self._change(classifier, z, s, ratio, target, not held_out) + size) / (1 + size)).mean()

    def _change(self, classifier, z, s, head: Callable[[Tensor], Tensor], target, train: bool) -> Float[Tensor, "b"]:
        r""":math:`(|t - v g|^2 - |t|^2) / v`, t the target and g the gradient of what the head says"""
        with torch.enable_grad():
            z = z.requires_grad_(True)
            (gradient,) = torch.autograd.grad(head(classifier.network(z, s)).sum(), z, create_graph=train)
            return (like(s.float() ** 2, z) * gradient**2 - 2 * target * gradient).flatten(1).sum(1)

    def default_network(self) -> nn.Module:
        shape = self.models[0].shape
        if len(shape) == 1:
            return VectorNetwork(shape[0], self.mean, self.std, self.s_min)
        if len(shape) == 3:
            return ImageNetwork(shape, self.mean, self.std, self.s_min)
        raise ValueError(
            f"There is no default classifier network for samples of shape {shape}. "
            "Pass network=, a module (z, s=None) -> (b, width) with an attribute width; s=None means a finished sample."
        )
