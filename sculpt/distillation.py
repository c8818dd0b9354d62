"""Compositions as checkpoints: a student learns to be what a composition is, and is a base model of its own.

A family brings its :class:`Student`; the loop, its state on disk and the card are the same for all.
"""

from __future__ import annotations

import abc
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sculpt.bars import bar
from sculpt.checks import check_whole, real
from sculpt.files import replacing
from sculpt.model import BaseModel, check_model
from sculpt.training import Kept, Row, Training, cosine

__all__ = ["Student", "distill"]


class Student(abc.ABC):
    """What a family brings to distillation: a network that learns, from what, and what becomes of it."""

    network: nn.Module
    steps: int
    """of training, unless the caller says otherwise"""
    learning_rate: float
    clip: ClassVar[float] = 1.0

    @property
    @abc.abstractmethod
    def identity(self) -> dict[str, Any]:
        """JSON values that the result depends on, beside what the caller of ``distill`` says."""

    @property
    def kept(self) -> Mapping[str, Kept]:
        """What belongs to the state of a training beside the networks, such as samples that were drawn."""
        return {}

    def check_saving(self) -> None:  # noqa: B027  most models can be saved
        """Raise where the model could not be saved in the end: asked before anything is drawn or learned."""

    def prepare(self, progress: bool) -> None:  # noqa: B027  nothing to draw is the usual case
        """Draw what is learned from, where it is not there yet. A training that goes on has it already."""

    @abc.abstractmethod
    def loss(self, seed: int) -> tuple[Tensor, Row]:
        """Of one batch, drawn with the seed of its step."""

    @abc.abstractmethod
    def graduate(self, network: nn.Module) -> BaseModel:
        """The base model that these weights are."""

    @abc.abstractmethod
    def measure(self, model: BaseModel, generator: torch.Generator) -> Row:
        """How far the model is from its target, on fresh draws: JSON values by name, for its card."""

    @abc.abstractmethod
    def save(self, model: BaseModel, folder: Path) -> None:
        """Write the model as a checkpoint that ``sculpt.load`` reads. The card is written beside it."""

    def leave(self) -> None:  # noqa: B027  most students have networks of their own
        """Leave what is the caller's as it was found: no model will come of this one."""

    def __enter__(self) -> Student:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self.leave()

    def usage(self, name: str) -> str:
        """Lines for the card: how the folder of this name is read.

        Args:
            name: of the folder.
        """
        return f"model = sculpt.load({name!r})\nsamples = model.sample(100)"


@torch.random.fork_rng(devices=[])
def distill(
    composition: BaseModel,
    road: Any = None,
    *,
    checkpoint: str | Path | None = None,
    steps: int | None = None,
    batch_size: int | None = None,
    learning_rate: float | None = None,
    seed: int = 0,
    progress: bool = True,
    **options: Any,
) -> BaseModel:
    """The composition as a base model of its own: one network a step, composed again, saved and loaded as any other.

    Args:
        composition: what the student is to be.
        road: how the composition is sampled for the student to learn from; by default what the family finds best.
        checkpoint: a folder for the model. Training is kept there as it goes, and the same call continues a run that was stopped.
        steps: of training.
        batch_size: samples a step.
        learning_rate: of the optimiser at its highest.
        seed: of everything that is drawn.
        progress: show bars.
        options: of the family.

    Example:
        >>> copy = sculpt.distill(one - two, steps=20)  # more in earnest
        >>> copy.sample(3, generator=seed).x.shape
        torch.Size([3, 2])
    """
    check_model(composition)
    check_whole("steps", steps)
    check_whole("batch_size", batch_size)
    if learning_rate is not None and real("learning_rate", learning_rate) <= 0:
        raise ValueError(f"learning_rate has to be positive, got {learning_rate}.")
    with composition.leaves[0].student(composition, road, batch_size=batch_size, seed=seed, **options) as student:
        if checkpoint is not None:
            student.check_saving()
        steps, rate = steps or student.steps, learning_rate or student.learning_rate
        training = Training(
            student.network,
            torch.optim.AdamW(student.network.parameters(), lr=rate, weight_decay=0.0),
            None if checkpoint is None else Path(checkpoint) / "training",
            identity={"composition": composition.key, "steps": steps, "learning_rate": rate, "seed": seed} | student.identity,
            rate=cosine(steps, warm_up=max(1, steps // 20), least=0.02),
            clip=student.clip,
            seed=seed,
        )
        going_on = training.resume(**student.kept)
        student.prepare(progress)
        if not going_on:
            training.save()  # what was drawn may have taken long
        title, every = f"distilling {composition}", max(1, steps // 200)
        for row in bar(training.run(student.loss, steps), title, steps, initial=training.step, show=progress):
            if training.step % every == 0:
                training.curve.append({"step": training.step} | {name: float(value) for name, value in row.items()})
            training.save(every=30.0)
        training.save()
        model = student.graduate(training.average)
        if checkpoint is not None:
            measured = student.measure(model, torch.Generator().manual_seed(seed + 1))
            about = {"composition": str(composition), "steps": steps, "seconds": round(training.seconds), "measured": measured}
            with replacing(checkpoint) as new:
                student.save(model, new)
                (new / "distillation.json").write_text(json.dumps(about, indent=1) + "\n")
                (new / "README.md").write_text(_card(name := Path(checkpoint).resolve().name, student.usage(name), about))
        return model


def _card(name: str, usage: str, about: Row) -> str:
    """What a model is a copy of, and how far it is from it."""
    rows = "".join(f"| {what} | {_said(value)} |\n" for what, value in about["measured"].items())
    return (
        f"# {name}\n\n`{about['composition']}` as a base model of its own, by `sculpt.distill`: {about['steps']:,} steps, "
        f"{about['seconds'] / 60:.3g} minutes of training.\n\n```python\n{usage}\n```\n\n"
        f"Measured on fresh draws:\n\n| | |\n|---|---|\n{rows}"
    )


def _said(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
