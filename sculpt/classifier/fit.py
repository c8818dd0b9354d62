"""Fitting a classifier to a set of base models: once, for all label sets, odds and compositions of them."""

from __future__ import annotations

import collections
import copy
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sculpt.bars import bar
from sculpt.checks import check_whole, each, whole
from sculpt.classifier.field import RATE, train_field
from sculpt.classifier.heads import Classifier
from sculpt.classifier.plan import Plan
from sculpt.classifier.store import Draw, Store
from sculpt.model import BaseModel, check_composable
from sculpt.training import Row, Training, cosine, seed_of_step

__all__ = ["Descent", "fit"]

WORSE = 0.01
"""Labels stop training the terminal head once its held-out loss exceeds its best by this share of log m."""


@dataclass(frozen=True)
class Descent:
    """How the losses of a classifier are brought down, and in how much memory.

    Args:
        learning_rate: of AdamW, after a warm-up and before a cosine.
        patience: stop early after this many of the 40 held-out evaluations without improvement. ``None`` trains to the end and keeps the
            last weights: the sum of held-out losses is not always least where a classifier guides best.
        mixed_precision: bfloat16 autocast; by default on a GPU only.
        memory: gigabytes for the weights of the label sets, their optimiser and the tables of a step. What takes more is refused before
            it is made.

    Example:
        >>> slower = sculpt.Descent(learning_rate=1e-4, patience=None)
        >>> classifier = sculpt.fit([left, right], steps=5, samples=100, sample_steps=8, batch_size=32, descent=slower)
    """

    learning_rate: float = 2e-3
    patience: int | None = 20
    mixed_precision: bool | None = None
    memory: float = 3.0


@torch.random.fork_rng(devices=[])
def fit(
    models: Sequence[BaseModel],
    observations: int = 2,
    odds: bool | float = False,
    *,
    network: nn.Module | None = None,
    steps: int = 4000,
    batch_size: int | None = None,
    descent: Descent | None = None,
    checkpoint: str | Path | None = None,
    seed: int = 0,
    progress: bool = True,
    **store_options: Any,
) -> Classifier:
    r"""Train a classifier for a set of base models: once, for all label sets, odds (``odds=True``) and compositions of them.

    .. code-block:: python

        classifier = sculpt.fit([p, q], steps=2000, checkpoint="p-q")
        samples = (p & q).sample(64, classifier)

    It trains where the models are. Few samples are not learned by heart: labels teach p(y|x) only while that helps on held-out samples.

    Args:
        models: the base models; their order fixes the labels, their keys are saved.
        observations: n, how many labels one sample may be conditioned on; fewer are fine later.
        odds: whether odds are an input. A number r draws log-odds from U[-r, r] (``True``: 3.5).
        network: a backbone ``(*state) -> (b, width)`` of your own, with an attribute ``width``. For images,
            ``UNetEncoder.of(model)`` begins with what a base model's UNet has learned.
        steps: of training.
        batch_size: finished samples per model and step; by default what suits the family (256 vectors, 64 images), or fewer where there
            are so many label sets that a step would take more than a gigabyte.
        descent: learning rate, early stopping and precision.
        checkpoint: a folder. The state of training is kept there, and a killed run that is called again continues.
        seed: of everything that is drawn.
        progress: show a bar.
        store_options: of the family's store of training samples: ``samples`` per model (drawn once, held in a bounded
            cache), ``data`` (your own samples, one tensor per model, instead), sampling ``steps`` as ``sample_steps``;
            ``path`` whether diffusion classifiers learn gradients too (by default for samples of more than 64 numbers);
            ``composed`` whether classifiers of action models see trajectories of compositions too: for models that overlap little;
            ``field`` whether a guidance field is fitted afterwards, see :func:`sculpt.fit_field` (diffusion).

    Returns the averaged weights with the best held-out loss (or the last); ``classifier.history`` is the training curve.

    Example:
        >>> classifier = sculpt.fit([left, right], steps=20, samples=200, sample_steps=8, batch_size=64)  # more in earnest
        >>> (left - right).sample(100, classifier).x.shape
        torch.Size([100, 2])
    """
    models, descent, field = (
        each("models", models, "base models"),
        descent or Descent(),
        bool(store_options.pop("field", False)),
    )
    _check(models, observations, steps, batch_size, store_options)
    plan = Plan(len(models), observations, _width(network), bool(odds)).check(descent.memory)  # before samples are drawn
    store = models[0].store(models, seed=seed, progress=progress, checkpoint=checkpoint, **store_options)
    if field:
        store.check_field()
    torch.default_generator.manual_seed(seed)
    backbone = store.default_network() if network is None else copy.deepcopy(network)
    plan = store.plan(replace(plan, width=_width(backbone)), backbone, batch_size).check(descent.memory)
    keys, names = [model.key for model in models], [str(model) for model in models]
    classifier = Classifier(backbone, keys, observations, bool(odds), children=plan.children, names=names).to(models[0].device)
    settings = {
        "steps": steps,
        "batch_size": plan.batch_size,
        "learning_rate": descent.learning_rate,
        "log_odds_range": 3.5 if odds is True else float(odds),
        "seed": seed,
    }
    classifier = _Fit(classifier, store, settings, descent, checkpoint).run(progress)
    if not field:
        return classifier
    of_field = {name: settings[name] for name in ("steps", "batch_size", "log_odds_range", "seed")}
    return train_field(classifier, store, of_field | {"learning_rate": RATE}, checkpoint=checkpoint, progress=progress)


def _check(
    models: Sequence[BaseModel], observations: int, steps: int, batch_size: int | None, store_options: Mapping[str, Any]
) -> None:
    if len(models) < 2:
        raise ValueError(f"A classifier tells base models apart, got {len(models)}. Pass two or more.")
    check_composable(models)
    for p, q in itertools.combinations(models, 2):
        if p.key == q.key:
            raise ValueError(f"{p} and {q} are the same base model (equal keys). Pass different ones.")
    whole("observations", observations, least=2)
    whole("steps", steps)
    check_whole("batch_size", batch_size)
    if misplaced := [field.name for field in fields(Descent) if field.name in store_options]:
        told = ", ".join(f"{name}={store_options[name]!r}" for name in misplaced)
        raise TypeError(f"{', '.join(misplaced)} belong to the descent: sculpt.fit(models, descent=sculpt.Descent({told})).")


def _width(network: nn.Module | None) -> int:
    """Of a backbone, or the least where it is not known."""
    width = getattr(network, "width", None)
    return width if isinstance(width, int) else 1


class _Fit:
    """A classifier in training: its average, the best average so far, and the teacher, which gives the targets."""

    def __init__(
        self, classifier: Classifier, store: Store, settings: dict[str, Any], descent: Descent, checkpoint: str | Path | None
    ):
        self.store, self.classifier, self.settings, self.patience = store, classifier, settings, descent.patience
        device, steps = next(classifier.parameters()).device, settings["steps"]
        config = {key: value for key, value in classifier.config.items() if key not in ("history", "names")}
        self.training = Training(
            classifier,
            torch.optim.AdamW(classifier.parameters(), lr=descent.learning_rate, weight_decay=1e-4),
            None if checkpoint is None else Path(checkpoint) / "training",
            identity={**settings, "classifier": config},
            rate=cosine(steps, warm_up=max(1, steps // 20), least=0.02),
            clip=1.0,
            seed=settings["seed"],
            bfloat16=device.type == "cuda" if descent.mixed_precision is None else descent.mixed_precision,
        )
        self.checkpoint, self.average = checkpoint, self.training.average
        self.best, self.best_teacher = copy.deepcopy(self.average), copy.deepcopy(self.average)
        self.judge = _Judge(store.weights, classifier.m, steps, keep_last=descent.patience is None)
        self.every = max(1, steps // 40)
        self.training.resume(best=self.best, teacher=self.best_teacher, store=store)
        for row in self.training.curve:
            if missing := {"step", *(f"held_out_{name}" for name in store.weights)} - set(row):
                raise ValueError(f"{checkpoint}: a row of the training curve lacks {min(missing)}. Give another folder.")
            self.judge.look(row)

    @property
    def teacher(self) -> Classifier:
        """The average gives the targets, and learns from labels itself as long as that helps on held-out samples.

        An overfitted head gives all samples of a model one target; from then on the best average is the teacher.
        """
        return self.best_teacher if self.judge.settled else self.average

    def run(self, progress: bool) -> Classifier:
        """Train to the end, or until nothing gets better any more."""
        training, steps, seed = self.training, self.settings["steps"], self.settings["seed"]
        rows = training.run(self.loss, steps)
        with bar(title="fitting the classifier", total=steps, initial=training.step, show=progress, mininterval=1) as done:
            while training.step < steps and not self.impatient:
                # States are saved at these steps, so a resumed training begins with one of them.
                if training.step % self.every == 0:
                    generator = torch.Generator().manual_seed(seed_of_step(seed + 1, training.step))
                    self.store.refresh(self.teacher, generator)
                row = next(rows)
                done.update()
                if training.step % self.every == 0 or training.step == steps:
                    self.record({name: float(row[name]) for name in row if name not in ("loss", "norm")} | self.evaluate())
                    done.set_postfix(held_out=f"{self.judge.last:.4f}", best=f"{self.judge.best:.4f}")
        if not math.isfinite(self.judge.best):
            raise FloatingPointError(
                f"The losses of the classifier's best weights come to {self.judge.best}: nothing was learned. Check the samples for numbers "
                "far out of range, take a smaller learning rate, and another folder than this training's, if it has one."
            )
        self.best.history = training.curve
        if self.checkpoint is not None:
            self.best.save_pretrained(self.checkpoint)
        return self.best

    @property
    def impatient(self) -> bool:
        """Whether nothing has got better for too long."""
        return self.patience is not None and self.judge.stale >= self.patience

    def loss(self, seed: int) -> tuple[Tensor, Row]:
        """The weighted sum of the store's losses."""
        step, generator = self.training.step, torch.Generator().manual_seed(seed)
        draw = self.draw(generator, step=step, follow=self.judge.settled)
        losses = self.store.losses(self.classifier, self.teacher, draw)
        # The targets come from a terminal head that knows nothing at first: what rests on them is ramped in.
        ramp = dict.fromkeys(("joint", "path"), min(1.0, step / (0.1 * self.settings["steps"])))
        total = sum(ramp.get(name, 1.0) * self.store.weights[name] * loss for name, loss in losses.items())
        return total, {name: loss.detach() for name, loss in losses.items()}

    def draw(self, generator: torch.Generator, **which: Any) -> Draw:
        """A batch of this training."""
        return Draw(self.settings["batch_size"], generator, log_odds_range=self.settings["log_odds_range"], **which)

    @torch.no_grad()
    def evaluate(self) -> Row:
        """The held-out losses, of the same states and odds every time, so that the curve has no noise of its own."""
        draw = self.draw(torch.Generator().manual_seed(self.settings["seed"] + 1), held_out=True)
        batches = max(1, min(8, self.every // 4))  # a short training is not spent on looking at itself
        totals: dict[str, float] = collections.defaultdict(float)
        for _ in range(batches):
            for name, loss in self.store.losses(self.average, self.teacher, draw).items():
                totals[f"held_out_{name}"] += float(loss) / batches
        return dict(totals)

    def record(self, row: Row) -> None:
        """Put an evaluation into the curve, keep the weights if they are the best, and save the state now and then."""
        training, row = self.training, {"step": self.training.step, **row}
        training.curve.append(row)
        is_best, teaches = self.judge.look(row)
        for copied, wanted in ((self.best, is_best), (self.best_teacher, teaches)):
            if wanted:
                copied.load_state_dict(self.average.state_dict())
        training.save(every=0.0 if training.step == self.settings["steps"] or self.judge.stale else 30.0)


class _Judge:
    """What the curve says so far: which row's weights are the best, and whether labels have begun to harm the terminal head."""

    def __init__(self, weights: Mapping[str, float], m: int, steps: int, keep_last: bool):
        self.weights, self.steps, self.keep_last, self.slack = weights, steps, keep_last, WORSE * math.log(m)
        self.best = self.last = self.best_terminal = math.inf
        self.settled, self.stale = False, 0
        self.kept: Row = {}

    def look(self, row: Row) -> tuple[bool, bool]:
        """Whether this row's weights are the best, and whether its terminal head is."""
        terminal = row["held_out_terminal"]
        teaches = terminal <= self.best_terminal
        if teaches:
            self.best_terminal, self.settled = terminal, False
        elif terminal > self.best_terminal + self.slack:
            self.settled = True
        self.last = sum(weight * row[f"held_out_{name}"] for name, weight in self.weights.items())
        # While the ramp is on, the targets themselves still move: no judgement yet.
        is_best = self.last < self.best or math.isnan(self.best) or row["step"] < 0.15 * self.steps or self.keep_last
        if is_best:
            self.best, self.stale = self.last, 0
            self.kept.pop("kept", None)
            self.kept = row
            row["kept"] = True
        else:
            self.stale += 1
        return is_best, teaches
