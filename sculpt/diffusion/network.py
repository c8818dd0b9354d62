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

    and, without noise, :math:`v \nabla \log \bigl( p(y = i | z) / p(y = j | z) \bigr) = D_i - D_j`, as a share of its square.
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
            self.weights = self.weights | {"path": 0.1, "scores": 0.3}
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

    def losses(self, classifier, teacher, size, generator, log_odds_range, device, held_out=False):
        losses = super().losses(classifier, teacher, size, generator, log_odds_range, device, held_out)
        if not self.path:
            return losses
        # Below the spread of the data it is decided what a sample will be.
        lowest, whole = min(self.std, self.s_max), math.log(self.s_max / min(self.std, self.s_max))
        batch = self._draw(size, generator, held_out, lambda u: lowest * (u * whole).exp()).to(device)
        log_odds = draw_log_odds(len(batch.x), classifier, log_odds_range, generator)
        column = torch.randint(len(classifier.set_head.sets), (len(batch.x),), generator=generator).to(device)
        shift = int(torch.randint(1, classifier.m, (), generator=generator))
        path, scores = self._gradients(
            classifier, teacher, batch, column, shift, None if log_odds is None else log_odds.to(device), not held_out
        )
        return losses | {"path": whole * path, "scores": scores}

    def _gradients(self, classifier, teacher, batch, column, shift, log_odds, train) -> tuple[Tensor, Tensor]:
        """Every other row for the path's divergence, under the label set of its column; the rest for the difference of two scores."""
        (z, s), y, rows = batch.states, batch.y, torch.arange(len(batch.y), device=batch.y.device)
        steers, v = rows % 2 == 0, s.float() ** 2
        with torch.no_grad():
            target = self._targets(batch, steers, shift)
            log_p = teacher.terminal(batch.x)
            f = teacher.set_head.target(log_p if log_odds is None else torch.log_softmax(log_p + log_odds, dim=-1))
            # Where all is noise h is its own mean, Z.
            start = teacher.network(torch.zeros_like(z[:1]), s.new_full((1,), self.s_max)).expand(len(z), -1)
            log_Z = (teacher.set_head(start, log_odds)[:, 0] + teacher.set_head.log_orderings)[rows, y, column]
            w = (f[rows, column].log() - log_Z).exp().clamp(max=20.0)
        with torch.enable_grad():
            z = z.requires_grad_(True)
            features = classifier.network(z, s)
            log_h = classifier.set_head(features, log_odds)[:, 0][rows, y, column]
            marginal = classifier.marginal_head(features).float()
            ratio = marginal[rows, y] - marginal[rows, (y + shift) % classifier.m]
            (gradient,) = torch.autograd.grad(torch.where(steers, log_h, ratio).sum(), z, create_graph=train)
            # |target - v gradient|² - |target|², over v
            change = (like(v, z) * gradient**2 - 2 * target * gradient).flatten(1).sum(1)
        path = (w * change)[steers].mean()
        size = (target[~steers] ** 2).flatten(1).sum(1) / v[~steers]
        return path, ((change[~steers] + size) / (1 + size)).mean()

    def _targets(self, batch: Batch, steers: Tensor, shift: int) -> Float[Tensor, "b *x"]:
        """:math:`x - D_i` or :math:`D_i - D_j`, each row's own model being i."""
        (z, s), m = batch.states, len(self.models)
        out = torch.empty_like(z)
        for i, model in enumerate(self.models):
            own = batch.y == i
            out[own] = -model.denoise(z[own], s[own]).to(z)
            also = own & ~steers
            out[also] = -out[also] - self.models[(i + shift) % m].denoise(z[also], s[also]).to(z)
        out[steers] += batch.x[steers]
        return out

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
