"""What a classifier learns from: samples of the base models, and the training batches made of them.

Every family has a :class:`Store` of its own. :class:`SampleStore` is for models that offer finished samples and nothing on the way to
them: it trains the terminal head alone.
"""

from __future__ import annotations

import abc
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from safetensors.torch import save
from torch import Tensor, nn

from sculpt.classifier.losses import cross_entropies, terminal_cross_entropy
from sculpt.classifier.plan import STEP, Plan
from sculpt.files import replace_file
from sculpt.weights import REAL, WHOLE, Weights

if TYPE_CHECKING:
    from sculpt.classifier.heads import Classifier
    from sculpt.model import BaseModel

__all__ = ["Batch", "Draw", "Pool", "SampleStore", "Store"]

CACHE_BYTES = 2**30
"""How much memory the finished samples of all models may take."""


@dataclass
class Batch:
    """Finished samples with their labels, and states of the trajectories that ended in them."""

    x: Tensor
    """finished samples, first axis ``b``"""
    y: Int[Tensor, "b"]
    """index of the base model that made each x"""
    states: tuple[Tensor, ...]
    """states on the way, first axis ``c``: what the network takes"""
    owner: Int[Tensor, "c"]
    """row of x in which each state's trajectory ended"""
    child: Int[Tensor, "c"] | None = None
    """with a head over children: which child of the state the trajectory went to"""

    def to(self, device: torch.device) -> Batch:
        """The batch on another device."""
        child = None if self.child is None else self.child.to(device)
        states = tuple(state.to(device) for state in self.states)
        return Batch(self.x.to(device), self.y.to(device), states, self.owner.to(device), child)


@dataclass(frozen=True)
class Draw:
    """Which batch is wanted, and how it is learned from."""

    size: int
    """finished samples of each model, about"""
    generator: torch.Generator
    step: int = 0
    """of the training"""
    held_out: bool = False
    """whether it comes from the part that nothing is trained on"""
    follow: bool = False
    """whether the terminal head learns from the teacher, and not from labels"""
    log_odds_range: float = 0.0

    def log_odds(self, n: int, classifier: Classifier) -> Float[Tensor, "n m"] | None:
        """Log-odds to train with, from U[-range, range] each; ``None`` where the classifier takes none."""
        if not classifier.odds:
            return None
        log_odds = self.log_odds_range * (2 * torch.rand(n, classifier.m, generator=self.generator) - 1)
        # Of two models only the ratio counts; it is to cover the range evenly.
        return torch.stack([log_odds[:, 0], -log_odds[:, 0]], dim=-1) / 2 if classifier.m == 2 else log_odds


class Store(abc.ABC):
    """Samples of a set of base models, and the training batches made of them.

    What a store draws depends on its seed and the given :class:`Draw` alone, so that a resumed training sees what an uninterrupted one
    would have. Whatever else it depends on belongs into :meth:`state_dict`.
    """

    weights: Mapping[str, float] = {"terminal": 1.0, "marginal": 1.0, "joint": 1.0}
    """How much each loss counts."""

    @abc.abstractmethod
    def draw(self, draw: Draw) -> Batch:
        """A training batch."""

    @abc.abstractmethod
    def default_network(self) -> nn.Module:
        """A backbone for these states, with ``width`` and, so that it can be saved, a JSON ``config``."""

    @property
    def batch_size(self) -> int:
        """Finished samples per model and step that suit the family, where the caller does not say and memory allows."""
        return 256

    def sample_bytes(self, plan: Plan) -> int:
        """What a finished sample of each model adds to the tables of a step: three of a state's outputs, two of them for the way back."""
        return 3 * plan.m * plan.row

    def plan(self, plan: Plan, network: nn.Module, batch_size: int | None = None) -> Plan:
        """The plan with the children that the head scores, the batch and what a step of it takes.

        Args:
            plan: so far: models, observations and width.
            network: the backbone.
            batch_size: that the caller wants.
        """
        each = self.sample_bytes(plan)
        batch_size = batch_size or max(1, min(self.batch_size, STEP // each))
        return replace(plan, batch_size=batch_size, step=batch_size * each, least=each)

    def refresh(self, teacher: Classifier, generator: torch.Generator) -> None:  # noqa: B027
        """Recompute whatever is cached from the teacher; called before the first step and now and then."""

    def losses(self, classifier: Classifier, teacher: Classifier, draw: Draw) -> dict[str, Tensor]:
        """The losses on a new batch, each of which has a weight. A family that knows better ones overrides this.

        Args:
            classifier: what learns.
            teacher: what gives the targets.
            draw: which batch.
        """
        batch = self.draw(draw).to(next(classifier.parameters()).device)
        log_odds = draw.log_odds(len(batch.owner), classifier)
        log_odds = None if log_odds is None else log_odds.to(batch.owner.device)
        return cross_entropies(classifier, batch, teacher, log_odds, follow=draw.follow)

    has_field: bool = False
    """Whether there is a guidance field for these samples."""

    def regression(self, classifier: Classifier) -> Any:
        """What a guidance field of this classifier learns from: ``default_field()``, ``check(field)`` and ``loss(field, draw)``."""
        raise NotImplementedError

    def check_field(self) -> None:
        """Raise where there is no guidance field for these samples."""
        if not self.has_field:
            raise ValueError(
                "A guidance field moves samples that are denoised, and these models write theirs otherwise. Leave field out: their guidance is "
                "exact for the classifier as it is."
            )

    def state_dict(self) -> dict[str, Tensor]:
        """What cannot be drawn again, and is saved with the training."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor], /) -> None:  # noqa: B027
        """Take it back."""


class Pool:
    """Finished samples of every base model, drawn once and kept; some of each are held out.

    Args:
        models: the base models.
        samples: how many to draw of each; by default 50,000 small ones or 5,000 large ones, in bounded memory.
        data: samples of one's own instead, one tensor per model.
        sample_steps: of drawing them, where the models take steps.
        held_out: the share that nothing is trained on.
        checkpoint: a folder to keep drawn samples in, so that a killed training does not draw them again.
        seed: of drawing them.
        progress: show a bar.
    """

    def __init__(
        self,
        models: Sequence[BaseModel],
        *,
        samples: int | None = None,
        data: Sequence[Tensor] | None = None,
        sample_steps: int | None = None,
        held_out: float = 0.1,
        checkpoint: str | Path | None = None,
        seed: int = 0,
        progress: bool = True,
    ):
        numbers = math.prod(models[0].shape)
        most = CACHE_BYTES // (4 * numbers * len(models))
        if data is None:
            n = min(samples or (50_000 if numbers <= 64 else 5_000), most)
            folder = None if checkpoint is None else Path(checkpoint) / "training"
            x = [_drawn(model, seed, i, n, sample_steps, folder, progress) for i, model in enumerate(models)]
        elif len(data) != len(models):
            raise ValueError(
                f"data holds {len(data)} sets of samples for {len(models)} base models. Pass one tensor per model, in order."
            )
        else:
            x = [_own(model, part, most) for model, part in zip(models, data, strict=True)]
        if min(map(len, x)) < 10:
            raise ValueError(f"A classifier needs at least 10 samples of each base model, got {[len(part) for part in x]}.")
        held = [max(1, int(len(part) * held_out)) for part in x]
        self.held_out = [part[:k] for part, k in zip(x, held, strict=True)]
        self.training = [part[k:] for part, k in zip(x, held, strict=True)]

    def draw(self, draw: Draw) -> tuple[Tensor, Int[Tensor, "b"]]:
        """Samples of every model, and their labels."""
        parts = self.held_out if draw.held_out else self.training
        x = torch.cat([part[torch.randint(len(part), (draw.size,), generator=draw.generator)] for part in parts])
        return x, torch.arange(len(parts)).repeat_interleave(draw.size)

    @property
    def batch_size(self) -> int:
        """How many samples of each model suit a step: fewer of images than of vectors."""
        return 256 if self.training[0].ndim == 2 else 64


class SampleStore(Store):
    """For models that offer finished samples and nothing else: the terminal head learns to tell them apart, and no other head does.

    There is no default backbone: pass ``network=`` to ``sculpt.fit``.

    Args:
        models: the base models.
        pool: options of :class:`Pool`.
    """

    weights: Mapping[str, float] = {"terminal": 1.0}

    def __init__(self, models: Sequence[BaseModel], **pool: Any):
        self.model, self.pool = models[0], Pool(models, **pool)

    @property
    def batch_size(self) -> int:
        return self.pool.batch_size

    def default_network(self) -> nn.Module:
        raise ValueError(
            f"There is no default classifier network for samples of {self.model}. Pass network=, a module from finished samples "
            f"(b, {', '.join(map(str, self.model.shape))}) to features (b, width) with an attribute width."
        )

    def draw(self, draw: Draw) -> Batch:
        return Batch(*self.pool.draw(draw), (), torch.empty(0, dtype=torch.long))

    def losses(self, classifier: Classifier, teacher: Classifier, draw: Draw) -> dict[str, Tensor]:
        batch = self.draw(draw).to(next(classifier.parameters()).device)
        with torch.no_grad():
            taught = teacher.terminal(batch.x) if draw.follow else None
        return {"terminal": terminal_cross_entropy(classifier, batch, taught)}


def _own(model: BaseModel, x: Tensor, most: int) -> Tensor:
    if tuple(x.shape[1:]) != model.shape:
        raise ValueError(f"The data for {model} has samples of shape {tuple(x.shape[1:])}, the model makes {model.shape}.")
    if not x.isfinite().all():
        raise ValueError(f"The data for {model} has entries that are not finite numbers.")
    return _kept(x[:most])


def _drawn(model: BaseModel, seed: int, i: int, n: int, steps: int | None, folder: Path | None, progress: bool) -> Tensor:
    identity = hashlib.sha256(repr((model.key, n, steps, seed)).encode()).hexdigest()[:16]
    path = None if folder is None else folder / f"samples-{identity}.safetensors"
    if path is not None and path.exists():
        return _read(path, model, n)
    generator = torch.Generator().manual_seed(seed * 1_000 + i)
    x = _kept(model.sample(n, steps=steps, generator=generator, progress=progress).x)
    if path is not None:
        replace_file(path, save({"x": x.contiguous()}))
    return x


def _read(path: Path, model: BaseModel, n: int) -> Tensor:
    """Samples that were drawn before."""
    weights = Weights(path)
    weights.expect({"x": (n, *model.shape)}, f"{n} samples of {model}")
    x = weights.read()["x"]
    if x.dtype not in (*REAL, *WHOLE) or not x.isfinite().all():
        raise ValueError(f"{path} has entries that are no finite numbers. Delete it: its samples are then drawn again.")
    return _kept(x)


def _kept(x: Tensor) -> Tensor:
    return x.float().cpu() if x.is_floating_point() else x.cpu()
