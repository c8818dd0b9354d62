r"""What a classifier of diffusion models learns from: re-noised samples.

Notation: :math:`z = x + s \varepsilon`, at all noise levels that sampling visits; a finished sample is a state without noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sculpt.classifier.plan import Plan
from sculpt.classifier.store import Batch, Draw, Pool, Store
from sculpt.diffusion.backbones import ImageNetwork, VectorNetwork
from sculpt.diffusion.clock import like, noise_range, spread
from sculpt.diffusion.regression import Regression, stratified
from sculpt.model import Steppable, randn

if TYPE_CHECKING:
    from sculpt.classifier.heads import Classifier
    from sculpt.diffusion.denoiser import Denoiser

__all__ = ["DiffusionStore"]

CANDIDATES = 2048
"""Samples of each model that a noisy state may have come from, in the losses of the gradient."""
TINY = 1e-30
"""Lower bound for denominators that may vanish."""

Levels = Callable[[Tensor], Tensor]
"""From shares of the way, in [0, 1], to noise levels."""


class DiffusionStore(Store):
    r"""Samples of every base model, drawn once and kept. Noising is known exactly, so their states need no trajectories.

    Guidance uses a classifier's gradient, and cross-entropies hardly look at it: in many dimensions a head with good probabilities can
    push the wrong way. With ``path`` two more losses train it, on samples x of model i. One is the divergence of the guided path from
    the composition's, up to a constant, with f the weight that the composition gives to x:

    .. math:: \int E \Bigl[ \tfrac{f}{Z} \bigl( |x - D_i - v \nabla \log h_i|^2 - |x - D_i|^2 \bigr) / v \Bigr] \, d \log s

    States off that path get some weight too. The other, without noise, compares
    :math:`v \nabla \log \bigl( p(y = i | z) / p(y = j | z) \bigr)` with :math:`D_i - D_j`, as a share of its square.

    Args:
        models: the base models.
        data: samples of one's own, one tensor per model.
        sample_steps: of drawing them instead.
        path: whether gradients are trained; by default for samples of more than 64 numbers.
        pool: other options of :class:`~sculpt.classifier.store.Pool`.
    """

    has_field = True

    def __init__(
        self,
        models: Sequence[Denoiser],
        *,
        data: Sequence[Tensor] | None = None,
        sample_steps: int = 64,
        path: bool | None = None,
        **pool: Any,
    ):
        self.models, self.device, (self.s_min, self.s_max) = models, models[0].device, noise_range(models)
        data = None if data is None else [x.float() for x in data]
        self.pool = Pool(models, data=data, sample_steps=sample_steps, **pool)
        large = math.prod(models[0].shape) > 64
        self.path = large and all(isinstance(model, Steppable) for model in models) if path is None else path
        self.weights: Mapping[str, float] = {**Store.weights, **({"path": 0.3, "scores": 0.3} if self.path else {})}
        self.candidates: dict[bool, list[tuple[Tensor, Tensor]]] = {}
        """By whether they are held out: samples of each model, and what the teacher's terminal head says of them."""
        everything = torch.cat([part for pair in zip(self.pool.held_out, self.pool.training, strict=True) for part in pair])
        self.mean, self.std = float(everything.mean()), max(float(everything.std()), 1e-6)

    @property
    def batch_size(self) -> int:
        return self.pool.batch_size

    def sample_bytes(self, plan: Plan) -> int:
        # The gradient's losses sum over the orders of the observations that were not made, and are differentiated twice.
        return super().sample_bytes(plan) + (3 * plan.smaller // 2 if self.path else 0)

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

    def draw(self, draw: Draw) -> Batch:
        # Over the path that the samplers step along, so no level on the way is unseen.
        return self._noised(draw, lambda u: spread(u, self.s_min, self.s_max, self.std))

    def _noised(self, draw: Draw, levels: Levels) -> Batch:
        """Samples of all models and a noised state of each, stratified over the noise levels."""
        x, y = self.pool.draw(draw)
        s = levels(stratified(len(x), draw.generator))
        z = x + like(s, x) * randn(x.shape, draw.generator, x)
        return Batch(x, y, (z, s), torch.arange(len(x)))

    def refresh(self, teacher: Classifier, generator: torch.Generator) -> None:
        if not self.path:
            return
        for held_out, pool in ((False, self.pool.training), (True, self.pool.held_out)):
            self.candidates[held_out] = []
            for x in pool:
                # Of the held-out samples the first ones, always the same.
                x = x[:CANDIDATES] if held_out else x[torch.randperm(len(x), generator=generator)[:CANDIDATES]]
                with torch.no_grad():
                    log_p = torch.cat([teacher.terminal(part.to(self.device)).float() for part in x.split(256)])
                self.candidates[held_out].append((x.to(self.device), log_p))

    def regression(self, classifier: Classifier) -> Regression:
        return Regression(self.models, self.pool, classifier, self.mean, self.std)

    def losses(self, classifier: Classifier, teacher: Classifier, draw: Draw) -> dict[str, Tensor]:
        losses = super().losses(classifier, teacher, draw)
        if not self.path:
            return losses
        # What a sample will be is decided below the spread of the data.
        lowest, whole = min(self.std, self.s_max), math.log(self.s_max / min(self.std, self.s_max))
        half, levels = replace(draw, size=max(1, draw.size // 2)), lambda u: lowest * (u * whole).exp()
        path = whole * self._path(classifier, half, levels)
        return losses | {"path": path, "scores": self._scores(classifier, half, levels)}

    def _path(self, classifier: Classifier, draw: Draw, levels: Levels) -> Tensor:
        """The divergence of the guided path from the composition's, for label sets of any size and odds."""
        sets, m = classifier.set_head, classifier.m
        parts = [self._targets(i, classifier, draw, levels) for i in range(m)]
        z, s, column, log_odds, target, weight = (torch.cat(part) for part in zip(*parts, strict=True))
        rows, y = torch.arange(len(z), device=z.device), torch.arange(m, device=z.device).repeat_interleave(draw.size)

        def steering(features: Tensor) -> Tensor:
            log_h = sets(features, log_odds if classifier.odds else None, rows, 0, y)
            return sets.with_smaller(log_h)[rows, column]

        return (weight * self._change(classifier, z, s, steering, target, not draw.held_out)).mean()

    def _targets(self, i: int, classifier: Classifier, draw: Draw, levels: Levels) -> tuple[Tensor, ...]:
        r"""States of model i with their levels, label sets and odds; where the gradient should point, and how much that counts.

        A composition may want one of a hundred samples, so every other state comes from an x that it wants. Given z, any of the
        candidates may have been x, with probability b once the composition has weighed them: the target is their mean. States off
        the path would get weight zero and no gradient; :math:`\sum b (1 - b)` gives them some where several candidates are plausible.
        """
        model, (x, log_p), device = self.models[i], self.candidates[draw.held_out][i], self.device
        sets, size, generator = classifier.set_head, draw.size, draw.generator
        column = torch.randint(len(sets.counts), (size,), generator=generator).to(device)
        odds = draw.log_odds(size, classifier)
        log_odds = torch.zeros(size, classifier.m, device=device) if odds is None else odds.to(device)
        s = levels(stratified(size, generator)).to(device)
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            f = sets.log_f(torch.log_softmax(log_p + log_odds[:, None], dim=-1), column[:, None])[..., 0].exp()
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
        return z, s, column, log_odds, target, weight

    def _scores(self, classifier: Classifier, draw: Draw, levels: Levels) -> Tensor:
        """How far the gradient of the label's marginal is from the difference of two models' scores, as a share of its square."""
        batch = self._noised(draw, levels).to(self.device)
        (z, s), y, target = batch.states, batch.y, torch.empty_like(batch.x)
        shift = int(torch.randint(1, classifier.m, (), generator=draw.generator))
        with torch.no_grad():
            for i, model in enumerate(self.models):
                own, other = y == i, self.models[(i + shift) % classifier.m]
                target[own] = (model.denoise(z[own], s[own]) - other.denoise(z[own], s[own])).to(z)

        def ratio(features: Tensor) -> Tensor:
            log_p = classifier.marginal_head(features).float()
            return (log_p.gather(1, y[:, None]) - log_p.gather(1, (y[:, None] + shift) % classifier.m))[:, 0]

        square = (target**2).flatten(1).sum(1) / s.float() ** 2
        return ((self._change(classifier, z, s, ratio, target, not draw.held_out) + square) / (1 + square)).mean()

    def _change(
        self,
        classifier: Classifier,
        z: Float[Tensor, "b *x"],
        s: Float[Tensor, "b"],
        head: Callable[[Tensor], Tensor],
        target: Float[Tensor, "b *x"],
        train: bool,
    ) -> Float[Tensor, "b"]:
        r""":math:`(|t - v g|^2 - |t|^2) / v`, with t the target and g the gradient of the head."""
        with torch.enable_grad():
            z = z.requires_grad_(True)
            (gradient,) = torch.autograd.grad(head(classifier.network(z, s)).sum(), z, create_graph=train)
            return (like(s.float() ** 2, z) * gradient**2 - 2 * target * gradient).flatten(1).sum(1)
