"""Compositions as checkpoints: a student learns to be what a composition is, and is a base model of its own.

A family brings its :class:`Student`; the loop, its state on disk and the card are the same for all.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sculpt.model import BaseModel
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
        """How far the model is from its target, on fresh draws: what goes on its card."""

    @abc.abstractmethod
    def save(self, model: BaseModel, folder: Path, card: Row) -> None:
        """Write the model as a checkpoint that ``sculpt.load`` reads, with its card."""


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
    """
    from tqdm.auto import tqdm

    student = composition.leaves[0].student(composition, road, batch_size=batch_size, seed=seed, **options)
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
    training.resume(**student.kept)
    student.prepare(progress)
    title = f"distilling {composition}"
    for row in tqdm(training.run(student.loss, steps), title, steps, initial=training.step, disable=not progress, delay=2):
        training.curve.append({"step": training.step, "loss": float(row["loss"])})
        training.save(every=30.0)
    training.save()
    model = student.graduate(training.average)
    card = student.measure(model, torch.Generator().manual_seed(seed + 1))
    if checkpoint is not None:
        student.save(model, Path(checkpoint), card)
    return model
