"""Base models: the abstract contract that both families fill, and the operators that compose."""

from __future__ import annotations

import abc
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from sculpt.composition import Composition
    from sculpt.particles import Diagnostics, Samples
    from sculpt.training import Replay

__all__ = ["BaseModel", "check_composable", "operand_names", "randn", "same_model"]


class BaseModel(abc.ABC):
    """A pretrained iterative sampler. Union ``|``, intersection ``&`` and difference ``-`` compose base models."""

    family: ClassVar[str]
    """``"diffusion"`` or ``"gflownet"``: the package whose samplers run this model."""

    name: str
    """How the model is called in formulas and messages."""

    @property
    @abc.abstractmethod
    def key(self) -> str:
        """Identity: a hash of weights and configuration, or the user's name. Equal keys are one model."""

    @property
    @abc.abstractmethod
    def device(self) -> torch.device:
        """Where states of this model live."""

    @abc.abstractmethod
    def sample(self, n: int, **options) -> Samples:
        """n samples of this model alone."""

    @abc.abstractmethod
    def check_composable(self, other: BaseModel) -> None:
        """Raise a ``ValueError`` that names both sides where the two have no common states."""

    def decode(self, x: Tensor) -> Any:
        """What a person looks at; by default the samples as they are."""
        return x

    def result(self, x: Tensor, log_weights: Tensor | None = None, diagnostics: Diagnostics | None = None) -> Samples:
        """Samples of this model as its user gets them: every sampler ends here."""
        from sculpt.particles import Samples

        return Samples(x, log_weights, diagnostics, self.decode)

    @property
    def leaves(self) -> tuple[BaseModel, ...]:
        """The pretrained models underneath: itself, or those of a composition."""
        return (self,)

    @abc.abstractmethod
    def replay(self, models: Sequence[BaseModel], **options) -> Replay:
        """The source of training states for a classifier of these models."""

    def __or__(self, other: BaseModel) -> Composition:
        return self._compose("|", other)

    def __and__(self, other: BaseModel) -> Composition:
        return self._compose("&", other)

    def __sub__(self, other: BaseModel) -> Composition:
        return self._compose("-", other)

    def _compose(self, operator: str, other: BaseModel) -> Composition:
        if not isinstance(other, BaseModel):
            return NotImplemented
        from sculpt.composition import operate  # composition stands above this module

        return operate(operator, self, other)

    def __str__(self) -> str:
        return self.name


def check_composable(models: Sequence[BaseModel]) -> None:
    """Raise where the pretrained models underneath have no common states."""
    first, *others = [leaf for model in models for leaf in model.leaves]
    for leaf in others:
        first.check_composable(leaf)


def same_model(p: BaseModel, q: BaseModel) -> bool:
    """Whether two objects are the same distribution as far as their keys can tell."""
    return p is q or (type(p) is type(q) and p.key == q.key)


def operand_names(models: Sequence[BaseModel]) -> list[str]:
    """The models' names as operands of a formula: what is more than one word or a power goes into parentheses."""
    return [f"({model})" if re.search(r"[ ^]", str(model)) else str(model) for model in models]


def randn(shape: Sequence[int], generator: torch.Generator | None, like: Tensor) -> Tensor:
    """Standard normal noise of the dtype and on the device of ``like``, drawn where the generator lives."""
    device = like.device if generator is None else generator.device
    return torch.randn(tuple(shape), generator=generator, device=device, dtype=like.dtype).to(like.device)
