"""A guidance field for a fitted classifier: what the gradient of its log h is a poor guess of, learned by a network of its own."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sculpt.bars import bar
from sculpt.checks import check_whole, each, whole
from sculpt.classifier.guide import Guide
from sculpt.classifier.heads import Classifier
from sculpt.classifier.store import Draw, Store
from sculpt.formula import Posterior
from sculpt.identity import weights
from sculpt.model import BaseModel
from sculpt.training import Row, Training, cosine, halved

__all__ = ["RATE", "fit_field", "train_field"]

RATE = 1e-3
"""of learning"""


@torch.random.fork_rng(devices=[])
def fit_field(
    classifier: Guide,
    models: Sequence[BaseModel],
    *,
    network: nn.Module | None = None,
    steps: int = 4000,
    batch_size: int | None = None,
    learning_rate: float = RATE,
    checkpoint: str | Path | None = None,
    seed: int = 0,
    progress: bool = True,
    **store_options: Any,
) -> Classifier:
    r"""The classifier with a guidance field: one more network, which says what the composition adds to the anchor's denoised samples.

    ``Guided`` then steers by it, two forward passes a step, and keeps the classifier's heads for weights and correction. It trains where
    the models are, on a GPU in bfloat16. (``sculpt.fit(models, field=True)`` does both, one after the other.)

    Args:
        classifier: of ``sculpt.fit``; what it says of finished samples is what the field learns, and it is not changed.
        models: the same base models, in any order.
        network: a field of your own, a :class:`sculpt.diffusion.field.Field`; by default it begins as the first UNet or transformer among
            the base models that can be told a composition, or as one that suits the samples.
        steps: of training.
        batch_size: samples of each model and step; by default what suits the family.
        learning_rate: of AdamW, after a warm-up and before a cosine.
        checkpoint: a folder. The state of training is kept there, and a killed run that is called again continues.
        seed: of everything that is drawn.
        progress: show a bar.
        store_options: of the family's store of samples, as for ``sculpt.fit``.

    Example:
        >>> short = {"steps": 5, "samples": 100, "sample_steps": 8, "batch_size": 32}  # more in earnest
        >>> classifier = sculpt.fit_field(sculpt.fit([left, right], **short), [left, right], **short)
        >>> (left & right).sample(10, classifier).x.shape
        torch.Size([10, 2])
    """
    if not isinstance(classifier, Classifier):
        raise TypeError(f"A field is fitted to a classifier of sculpt.fit, got {classifier!r:.200}.")
    whole("steps", steps)
    check_whole("batch_size", batch_size)
    models = each("models", models, "base models")
    given = [model.key for model in models]
    _, models = classifier.align(Posterior(len(models), (0,)), models)
    if store_options.get("data") is not None:  # in the order of the models, as they were given
        store_options["data"] = [store_options["data"][given.index(model.key)] for model in models]
    classifier = copy.deepcopy(classifier).to(models[0].device)
    store = models[0].store(models, seed=seed, progress=progress, checkpoint=checkpoint, **store_options)
    store.check_field()
    settings = {
        "steps": steps,
        "batch_size": batch_size or store.batch_size,
        "learning_rate": learning_rate,
        "log_odds_range": 3.5 if classifier.odds else 0.0,
        "seed": seed,
    }
    return train_field(classifier, store, settings, network, checkpoint, progress)


def train_field(
    classifier: Classifier,
    store: Store,
    settings: dict[str, Any],
    network: nn.Module | None = None,
    checkpoint: str | Path | None = None,
    progress: bool = True,
) -> Classifier:
    """The same from a store that has its samples.

    Args:
        classifier: with its models in the store's order.
        store: of the samples.
        settings: steps, batch_size, learning_rate, log_odds_range and seed.
        network: a field, or ``None`` for the default one.
        checkpoint: a folder.
        progress: show a bar.
    """
    classifier = copy.deepcopy(classifier)
    classifier.vector_field = None
    fitting = _Fitting(classifier, store, settings, network, checkpoint)
    training, steps = fitting.training, settings["steps"]
    rows = training.run(fitting.loss, steps)
    looked = bar(rows, "fitting the field", steps, initial=training.step, show=progress, mininterval=1)
    for _ in looked:
        if training.step % fitting.every == 0 or training.step == steps:
            looked.set_postfix(held_out=f"{fitting.evaluate():.4f}", best=f"{fitting.least:.4f}")
    if not math.isfinite(fitting.least):
        raise FloatingPointError("The held-out loss of the field was never a number. Take a smaller learning_rate.")
    # What is kept is what is saved.
    classifier.vector_field = halved(fitting.best).eval().requires_grad_(False)
    if checkpoint is not None:
        classifier.save_pretrained(checkpoint)
    return classifier


class _Fitting:
    """A field in training, and the best average so far."""

    def __init__(
        self,
        classifier: Classifier,
        store: Store,
        settings: dict[str, Any],
        network: nn.Module | None,
        checkpoint: str | Path | None,
    ):
        self.regression, self.settings = store.regression(classifier), settings
        torch.default_generator.manual_seed(settings["seed"])
        field = self.regression.default_field() if network is None else copy.deepcopy(network)
        self.regression.check(field)
        device = next(classifier.parameters()).device
        field = field.float().requires_grad_(True).to(device)
        steps = settings["steps"]
        self.training = Training(
            field,
            torch.optim.AdamW(field.parameters(), lr=settings["learning_rate"], weight_decay=1e-4),
            None if checkpoint is None else Path(checkpoint) / "field",
            identity={**settings, "classifier": weights(classifier), "field": field.config},
            rate=cosine(steps, warm_up=max(1, steps // 20), least=0.02),
            clip=1.0,
            seed=settings["seed"],
            bfloat16=device.type == "cuda",
        )
        self.best, self.every = copy.deepcopy(self.training.average), max(1, steps // 40)
        self.training.resume(best=self.best)
        self.least = min((float(row["held_out"]) for row in self.training.curve), default=math.inf)

    def draw(self, seed: int, held_out: bool = False) -> Draw:
        """Which batch."""
        generator, odds = torch.Generator().manual_seed(seed), self.settings["log_odds_range"]
        return Draw(self.settings["batch_size"], generator, held_out=held_out, log_odds_range=odds)

    def loss(self, seed: int) -> tuple[Tensor, Row]:
        """Of the batch of a step."""
        return self.regression.loss(self.training.network, self.draw(seed)), {}

    @torch.no_grad()
    def evaluate(self) -> float:
        """The held-out loss of the average, of the same draws every time; the state is saved now and then."""
        training, draw = self.training, self.draw(self.settings["seed"] + 1, held_out=True)
        batches = max(1, min(8, self.every // 4))
        held_out = sum(float(self.regression.loss(training.average, draw)) for _ in range(batches)) / batches
        training.curve.append({"step": training.step, "held_out": held_out})
        if held_out < self.least:
            self.least = held_out
            self.best.load_state_dict(training.average.state_dict())
        training.save(every=0.0 if training.step == self.settings["steps"] else 30.0)
        return held_out
