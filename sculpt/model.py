"""What a base model is: something that samples. One that can be stepped offers chains, and so every road.

A family is a class of its own file: it fills :class:`BaseModel` (samples can be drawn), :class:`Steppable` (and the way to them can
be steered), or, for chains that write their samples action by action, :class:`sculpt.actions.ActionModel`.
"""

from __future__ import annotations

import abc
import re
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sculpt.chain import Chain, Progress, Settings, check_count, run
from sculpt.diagnostics import Diagnostics, printable
from sculpt.generators import randn
from sculpt.habits import Habits, checked
from sculpt.progress import watch
from sculpt.samples import Samples
from sculpt.state import finite

if TYPE_CHECKING:
    from sculpt.classifier.guide import Guide
    from sculpt.composition import Composition
    from sculpt.distillation import Student
    from sculpt.factor import Factor
    from sculpt.formula import Formula, Posterior
    from sculpt.roads import Road, Tracked

__all__ = ["BaseModel", "Steppable", "Steered", "check_composable", "check_model", "operand_names", "randn", "same_model"]


LONGEST = 200
"""Characters of a name in formulas and messages."""


class BaseModel(Habits, abc.ABC):
    """A pretrained sampler. Union ``|``, intersection ``&`` and difference ``-`` compose base models.

    Example:
        >>> isinstance(one, sculpt.BaseModel), (one | two).sample(3, generator=seed).x.shape
        (True, torch.Size([3, 2]))
    """

    name: str
    """How the model is called in formulas and messages."""

    key: str
    """Identity: a hash of weights and configuration, or the user's name. Equal keys are one model."""

    device: torch.device
    """Where states of this model live."""

    shape: tuple[int, ...]
    """Of one sample."""

    default_steps: int | None = None
    """How many steps it takes if nobody says. ``None`` says that its samples decide, and that ``steps`` is no option."""

    models: tuple[BaseModel, ...] = ()
    """The operands of a composition; a pretrained model has none."""

    samples_class: type[Samples] = Samples
    """What its samples are."""

    knows_density: bool = False
    """Whether :meth:`log_ratios` are the model's own and not an approximation."""

    alone: bool = False
    """Whether its samples are so large that each is a run of its own unless a population is asked for."""

    has_referee: bool = False
    """Whether :meth:`log_ratios` can stand for a classifier, though they are an approximation."""

    @abc.abstractmethod
    def stream(self, n: int, road: Any, settings: Settings) -> Iterator[Progress]:
        """Sample; yield where the run is, as often as a caller should be able to look or to stop. The last one has the samples."""

    @abc.abstractmethod
    def check_composable(self, other: BaseModel) -> None:
        """Raise a ``ValueError`` that names both sides where the two have no common states."""

    def store(self, models: Sequence[BaseModel], **options: Any) -> Any:
        """Where a classifier of these models learns from; by default it learns to tell finished samples apart, and nothing on the way."""
        from sculpt.classifier.store import SampleStore

        return SampleStore(models, **options)

    def log_ratios(
        self,
        models: Sequence[BaseModel],
        x: Tensor,
        generator: torch.Generator | None = None,
        *,
        made_by: int = 0,
        detail: float | None = None,
        paths: int | None = None,
    ) -> Tensor:
        """Log-densities ``(b, m)`` of all models at finished samples x of model ``made_by``, up to a constant common to all; with a
        detail level, of x seen through noise of that level; averaged over so many paths, where several lead to one x."""
        raise ValueError(f"{self} does not know log-densities of finished samples: pass a classifier, or a function that does.")

    def student(self, composition: BaseModel, road: Any, **options: Any) -> Student:
        """What learns to be a composition of this family."""
        raise ValueError(
            f"{type(self).__name__} does not say how its compositions are distilled: define student(composition, road, **options)."
        )

    def ratio_source(self, models: Sequence[BaseModel]) -> tuple[str, int]:
        """What :meth:`log_ratios` of these models are, in words, and how often each model is called for a sample at most."""
        return "the models' own densities" if all(
            model.knows_density for model in models
        ) else "tracked densities, an approximation,", 1

    @property
    def decoder(self) -> Callable[[Tensor], Any] | None:
        """From samples to what a person looks at; ``None`` where that is the samples themselves."""
        return None

    def decode(self, x: Tensor) -> Any:
        """What a person looks at."""
        return x if self.decoder is None else self.decoder(x)

    def told(self, x: Tensor) -> Any:
        """What a factor's function gets of samples: what a person looks at."""
        return self.decode(x)

    def result(self, x: Tensor, log_weights: Tensor | None, diagnostics: Diagnostics) -> Samples:
        """Samples of this model as its user gets them: every run ends here."""
        if not (known := finite(x)).all():
            raise FloatingPointError(
                f"{int((~known).sum())} of {len(x)} samples of {diagnostics.formula} are not finite numbers after {diagnostics.steps} steps "
                f"({diagnostics.road}). Check the networks' weights and dtype (float16 overflows early), the guidance's strength and the steps."
            )
        return self.samples_class(x, log_weights, diagnostics, self.decoder)

    @property
    def leaves(self) -> tuple[BaseModel, ...]:
        """The pretrained models underneath: itself, or those of a composition."""
        return (self,)

    def compose(self, formula: Formula, models: Sequence[BaseModel], *how: Any) -> Composition:
        """A composition of models of this family; ``how`` it was written is :class:`sculpt.Composition`'s own."""
        from sculpt.composition import Composition  # composition stands above this module

        return Composition(formula, models, *how)

    # Sampling

    @checked
    def run(
        self,
        n: int,
        road: Road | Guide | None = None,
        *,
        steps: int | None = None,
        solver: Any | None = None,
        batch_size: int | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: Tensor | None = None,
    ) -> Iterator[Progress]:
        """:meth:`sample` as a generator: it yields where the run is after every step, with the ``state`` of its samples to look at, and
        the last one has the ``samples``.

        Leave it and the run ends.
        """
        n = check_count(n)
        settings = Settings(steps, solver, batch_size, generator, latents)
        if road is not None and not self.models:
            raise ValueError(
                f"{self} is one model, and roads lead to compositions; got {road!r:.200}. Sample it without one, {self}.sample({n})."
            )
        if self.default_steps is None:
            settings.refuse(f"{self}, whose samples decide how many steps they take", "steps", "solver", "latents")
            settings.refuse_each("its chains are as long as they happen to be")
        return self.stream(n, road, settings)

    @checked
    def sample(
        self,
        n: int,
        road: Road | Guide | None = None,
        *,
        steps: int | None = None,
        solver: Any | None = None,
        batch_size: int | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: Tensor | None = None,
        callback: Callable[[Progress], Any] | None = None,
        progress: bool = True,
    ) -> Samples:
        """n samples, with diagnostics.

        Args:
            n: how many.
            road: how a composition is sampled: ``Guided(classifier)``, for which the classifier itself will do, ``Tracked()``, which is
                what a composition takes without one, or ``Rejection(...)``. A single model needs none.
            steps: noise levels (diffusion), each one call of the network.
            solver: a diffusers scheduler to step with instead of the second-order stochastic solver (diffusion).
            batch_size: how many states go through a network at once; the population stays one.
            generator: source of randomness; it may live on the CPU while the models are on a GPU. A list has one for each sample, where
                samples go alone.
            latents: the noise to start from, ``(n, *shape)`` standard normal numbers (diffusion).
            callback: called after every step with where the run is, the ``state`` of its samples among it.
            progress: show a bar where it takes longer than two seconds.
        """
        options = {"steps": steps, "solver": solver, "batch_size": batch_size, "generator": generator, "latents": latents}
        return watch(self.run(n, road, **options), show=progress, callback=callback)

    # Operators

    def __or__(self, other: BaseModel) -> Composition:
        return self._operate("|", other)

    def __and__(self, other: BaseModel) -> Composition:
        return self._operate("&", other)

    def __sub__(self, other: BaseModel) -> Composition:
        return self._operate("-", other)

    def __mul__(self, factor: Factor) -> Composition:
        from sculpt.composition import tilted  # composition stands above this module
        from sculpt.factor import Factor

        if isinstance(factor, Factor):
            return tilted(self, factor)
        if isinstance(factor, BaseModel):
            raise TypeError(
                f"{self} * {factor}: models multiply by sculpt.product([p, q], powers=[1, 1]); * takes a sculpt.Factor."
            )
        return NotImplemented

    def _operate(self, operator: str, other: BaseModel) -> Composition:
        if not isinstance(other, BaseModel):
            return NotImplemented
        from sculpt.composition import operate  # composition stands above this module

        return operate(operator, self, other)

    def __str__(self) -> str:
        return printable(self.name, LONGEST) or "''"


class Steppable(BaseModel):
    """A base model whose way to a sample can be followed and steered: it offers a chain for every road.

    Example:
        >>> isinstance(left, sculpt.Steppable), max(progress.step for progress in left.run(3, steps=4))
        (True, 4)
    """

    @abc.abstractmethod
    def chain(self, settings: Settings) -> Chain:
        """This model alone."""

    @abc.abstractmethod
    def tracked(
        self,
        formula: Formula,
        models: Sequence[Steppable],
        settings: Settings,
        road: Tracked | None = None,
        alone: bool = False,
        factors: Sequence[Factor] = (),
    ) -> Chain:
        """A formula of these models' densities, which every particle carries along.

        Args:
            formula: of the models' log-densities.
            models: these; this model is the first.
            settings: of the run.
            road: whose options the chain has to know or to refuse: ``corrector`` and ``detail``.
            alone: every particle is a run of its own, without weights between them.
            factors: likelihoods whose logarithms the formula takes behind the models' log-densities.
        """

    @abc.abstractmethod
    def guided(
        self, posterior: Posterior, models: Sequence[BaseModel], classifier: Guide, form: str, strength: float
    ) -> Steered:
        """A posterior of these models, steered by a classifier; this model is its anchor."""

    def store(self, models: Sequence[BaseModel], **options: Any) -> Any:
        raise ValueError(
            f"{type(self).__name__} does not say what a classifier learns from on the way to its samples: define store(models, **options), "
            "which gives a sculpt.classifier.store.Store. A SampleStore is enough for rejection and overlap, not for guidance."
        )

    def stream(self, n: int, road: Any, settings: Settings) -> Iterator[Progress]:
        return run(self.chain(settings), n, str(self), settings, self.result)


class Steered(Steppable):
    """A composition with its classifier: a base model again, whose chain can be corrected."""

    @abc.abstractmethod
    def corrected(self, settings: Settings, densities: bool) -> Chain:
        """Its chain with weights that select: exact for the terminal head, or (``densities``) for the models' own densities."""


def check_composable(models: Sequence[BaseModel]) -> None:
    """Raise where some of these are no models, or where those underneath have no common states."""
    for model in models:
        check_model(model)
    leaves = [leaf for model in models for leaf in model.leaves]
    for i, leaf in enumerate(leaves):
        for other in leaves[i + 1 :]:
            leaf.check_composable(other)


def check_model(model: Any) -> None:
    """Raise where this is no base model."""
    if not isinstance(model, BaseModel):
        raise TypeError(
            f"Only base models compose, got {model!r:.200}. Load one with sculpt.load, or wrap a network of yours in a base model."
        )


def same_model(p: BaseModel, q: BaseModel) -> bool:
    """Whether two objects are the same distribution as far as their keys can tell."""
    return p is q or (type(p) is type(q) and p.key == q.key)


def operand_names(models: Sequence[BaseModel]) -> list[str]:
    """The models' names as operands of a formula: what is more than a word goes into parentheses."""
    names = [str(model) for model in models]
    return [name if re.fullmatch(r"[\w./:@~#+=\[\],-]+", name) else f"({name})" for name in names]
