"""Road (b): every particle carries its log-density under each base model, and nothing is trained."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from sculpt.chain import Chain, Progress, Selection, Settings, run
from sculpt.checks import real, whole
from sculpt.diagnostics import Diagnostics
from sculpt.factor import Factor
from sculpt.formula import Formula, Mixture, Nested
from sculpt.model import BaseModel, Steppable
from sculpt.roads.road import Road
from sculpt.samples import Samples

if TYPE_CHECKING:
    from collections.abc import Generator

    from sculpt.composition import Composition

__all__ = ["Tracked"]


class Tracked(Road):
    """Track densities: every formula, nothing to train, all base networks a step. Of a mixture it picks a model for every sample.

    Args:
        particles: the size of the population, at least as many as samples. One particle is a sample that goes its way alone, as do all
            latents by default: it is steered, and nothing is selected.
        detail: the noise level through which the observers look (diffusion). Above it densities are tracked, below it the anchor
            paints on its own. By default 0 in few dimensions, and in many where the models' log-ratio begins to spread faster than
            particles can follow; 0 for particles that go alone.
        anchor: the observed label (or its model) that paints below the detail level; by default the first. It is part of the target.
        threshold: select when the effective sample size falls under this share of the particles.
        corrector: an MCMC kernel run at every noise level (diffusion): ``sculpt.MALA()`` and its kind.
        resample: ``False`` returns all particles with their weights.

    Example:
        >>> (one & two).sample(100, sculpt.Tracked(particles=4000), generator=seed).verdict.level
        'sound'
    """

    def __init__(
        self,
        *,
        particles: int | None = None,
        detail: float | None = None,
        anchor: int | BaseModel | None = None,
        threshold: float | None = None,
        corrector: Any = None,
        resample: bool = True,
    ):
        self.selection, self.corrector = Selection(particles, threshold, resample), corrector
        self.detail = None if detail is None else real("detail", detail)
        if self.detail is not None and self.detail < 0:
            raise ValueError(f"detail is a noise level from 0, got {detail}.")
        self.anchor = anchor if anchor is None or isinstance(anchor, BaseModel) else whole("anchor", anchor, least=0)
        self._plain = particles is None and threshold is None and corrector is None and resample and detail is None

    def check(self, composition: Composition) -> None:
        if not (self._plain or _weighted(composition)):
            raise ValueError(
                f"particles, detail, threshold, corrector and resample belong to a population with weights, and {composition} is sampled without: "
                "its models are picked. Leave them out."
            )
        if self.anchor is not None:
            composition.anchored(self.anchor)
        self.check_factors(composition)
        if composition.picks_models:
            if not (self.selection.resample or composition.is_one_model):
                raise ValueError(f"resample=False: {composition} is a mixture, whose samples carry no weights. Leave it out.")
            for model in filter(_weighted, composition.models):
                self.check(model)  # type: ignore[arg-type]
        elif finished := [leaf for leaf in composition.leaves if not isinstance(leaf, Steppable)]:
            raise ValueError(
                f"{finished[0]} offers finished samples only, so no densities can be tracked on the way to them. Take sculpt.Rejection."
            )

    def check_factors(self, composition: Composition) -> None:
        """Raise where factors cannot do what is asked of them."""
        if not composition.factors:
            return
        if self.corrector is not None:
            raise ValueError(
                f"corrector moves particles by the models' densities, which say nothing of {composition.factors[0]}. Leave it out."
            )
        if self._alone_in(composition) and (blind := [factor for factor in composition.factors if not factor.gradient]):
            raise ValueError(
                f"{blind[0]} has no gradient to steer by, and particles that go alone are not selected. Pass "
                "sculpt.Tracked(particles=...) of two or more, or a factor with gradient=."
            )

    def stream(self, composition: Composition, n: int, settings: Settings) -> Iterator[Progress]:
        self.check(composition)
        if not self._alone_in(composition):
            self.selection.check(n)
        if composition.is_one_model:
            return self._one(composition, n, settings)
        return (self._pick if composition.picks_models else self._track)(composition, n, settings)

    def _alone_in(self, composition: Composition) -> bool:
        """Whether every particle is a run of its own."""
        asked = self.selection.particles
        return asked == 1 or (asked is None and self.detail is None and composition.leaves[0].alone)  # type: ignore[attr-defined]

    def formula_alone(self, composition: Composition) -> Formula:
        """The formula over the pretrained models where every sample is a run of its own, one noise level after another."""
        if self.selection.particles not in (None, 1) or self.detail or self.corrector is not None:
            raise ValueError(
                f"{self}: whoever steps from outside takes samples that go alone. Leave particles, detail and corrector out."
            )
        if composition.factors:
            raise ValueError(
                f"{composition.factors[0]} weighs finished samples, and whoever steps from outside does not show them. Sample it here."
            )
        steps = Tracked(particles=1).over_leaves(composition, Settings(), {}, self._outer(composition))
        try:
            next(steps)  # no inner composition is sampled for its log Z where samples go alone, so there is no step
        except StopIteration as done:
            return done.value
        raise AssertionError("formulas of samples that go alone take no steps")

    def _outer(self, composition: Composition) -> Formula | None:
        return None if self.anchor is None else composition.anchored(self.anchor)

    def _part(self, model: BaseModel, n: int, settings: Settings) -> Iterator[Progress]:
        """Samples of an operand. One without a population has no use for a population's options."""
        return model.stream(n, self if _weighted(model) else None, settings)

    def _one(self, composition: Composition, n: int, settings: Settings) -> Iterator[Progress]:
        """What is composed is one model: its samples are the composition's."""
        for progress in self._part(composition.models[0], n, settings):
            if progress.samples is not None:
                progress.samples.diagnostics.formula = str(composition)
            yield progress

    def _track(self, composition: Composition, n: int, settings: Settings) -> Iterator[Progress]:
        known: dict[str, Inner] = {}
        alone = self._alone_in(composition)
        if not alone:
            settings.refuse_each("here particles are selected")
        formula = yield from self.over_leaves(composition, settings, known, self._outer(composition))
        chain = self._chain(formula, composition, settings, alone)
        for progress in run(chain, n, str(composition), settings, composition.result, None if alone else self.selection):
            if progress.samples is not None:
                _rest(progress.samples.diagnostics, known.values())
            yield progress

    def _chain(self, formula: Formula, composition: Composition, settings: Settings, alone: bool = False) -> Chain:
        leaves, factors = composition.leaves, composition.factors
        more = {"factors": factors} if factors else {}  # a family from outside may know of none
        return leaves[0].tracked(formula, leaves, settings, self, alone, **more)  # type: ignore[attr-defined, no-any-return]

    def over_leaves(
        self,
        composition: Composition,
        settings: Settings,
        known: dict[str, Inner],
        outer: Formula | None = None,
    ) -> Generator[Progress, None, Formula]:
        """The formula over the pretrained models, and the factors behind them. Every inner composition is normalised by one run of its own, from the inside out."""
        outer = outer or composition.formula
        if not any(model.models for model in composition.models):
            return outer
        columns = (*composition.leaves, *composition.factors)
        parts, indices, log_z = [], [], []
        for model in composition.models:
            inner, z = Mixture([1.0]), 0.0
            if model.models:
                if model.key not in known:
                    inner = yield from self.over_leaves(model, settings, known)
                    found = None if model.picks_models else (yield from self._normaliser(model, inner, settings))
                    known[model.key] = Inner(str(model), inner, found)
                inner, z = known[model.key].formula, known[model.key].log_z
            parts.append(inner)
            indices.append([_column(columns, own) for own in (*model.leaves, *getattr(model, "factors", ()))])
            log_z.append(z)
        for factor in composition.own:
            parts.append(Mixture([1.0]))
            indices.append([_column(columns, factor)])
            log_z.append(0.0)
        return Nested(outer, parts, indices, log_z)

    def _normaliser(self, model: Composition, formula: Formula, settings: Settings) -> Generator[Progress, None, Diagnostics]:
        if self._alone_in(model):
            return Diagnostics("not sampled")
        chain = self._chain(formula, model, settings)
        selection = Selection(self.selection.particles, self.selection.threshold)
        for progress in run(chain, 1, str(model), settings, Samples, selection):
            if progress.samples is None:
                yield progress
            else:
                found = progress.samples.diagnostics
        return found

    def _pick(self, composition: Composition, n: int, settings: Settings) -> Iterator[Progress]:
        """A mixture needs no weights: a model is picked for every sample."""
        settings.refuse_each("the models of a mixture are picked")
        x, steps, notes, inner = [], 0, [], []
        choice = picks(composition, n, settings.generator)
        for i, model in enumerate(composition.models):
            if k := int((choice == i).sum()):
                for progress in self._part(model, k, settings):
                    if progress.samples is None:
                        yield progress
                    else:
                        part = progress.samples
                x.append(part.x)
                steps = max(steps, part.diagnostics.steps)
                if model.models:
                    notes.append(f"{model}: {part.verdict}")
                    inner.append(part.diagnostics)
        said = {
            "road": "a model picked per sample",
            "formula": str(composition),
            "steps": steps,
            "seed": settings.seed,
            "notes": notes,
        }
        diagnostics = Diagnostics(**said, log_z=0.0, log_z_error=0.0, parts=inner)
        samples = composition.result(in_order(x, choice), None, diagnostics)
        yield Progress(f"sampling {composition}", steps, steps or None, n, n, None, samples)


@dataclass(frozen=True)
class Inner:
    """A composition inside another one, and the run that found its log Z; mixtures need none."""

    name: str
    formula: Formula
    found: Diagnostics | None

    @property
    def log_z(self) -> float:
        return 0.0 if self.found is None or self.found.log_z is None else self.found.log_z


def _rest(diagnostics: Diagnostics, inner: Iterable[Inner]) -> None:
    """What is composed of compositions is as uncertain as their log Z, and no more trusted than they are."""
    for part in inner:
        if (found := part.found) is None:
            continue
        if found.log_z is None:
            diagnostics.notes.append(f"log Z of {part.name} was not estimated, and is taken as 0")
            continue
        diagnostics.notes.append(f"log Z of {part.name}: {found.log_z:.3f} ± {found.log_z_error:.2g}")
        diagnostics.log_z_error = math.hypot(diagnostics.log_z_error or 0.0, found.log_z_error or 0.0)
        if found.verdict.trust != "good" and not diagnostics.doubt:
            diagnostics.doubt = f"it rests on log Z of {part.name}, which is {found.verdict}"


def _column(columns: Sequence[BaseModel | Factor], one: BaseModel | Factor) -> int:
    """Where this model, or this factor, is among all."""
    return next(i for i, other in enumerate(columns) if type(other) is type(one) and other.key == one.key)


def _weighted(model: BaseModel) -> bool:
    """Whether sampling this takes a population with weights, anywhere in it."""
    if not model.models:
        return False
    return any(map(_weighted, model.models)) if model.picks_models else True  # type: ignore[attr-defined]


def picks(composition: BaseModel, n: int, generator: torch.Generator | None) -> torch.Tensor:
    """Which model of a mixture each of n samples is from."""
    device = "cpu" if generator is None else generator.device
    weights = torch.tensor(composition.formula.weights, dtype=torch.float64, device=device)  # type: ignore[attr-defined]
    return torch.multinomial(weights, n, replacement=True, generator=generator).cpu()


def in_order(parts: list[torch.Tensor], choice: torch.Tensor) -> torch.Tensor:
    """The samples of the parts, which come model by model, in the order of the choices."""
    x = torch.cat(parts)
    return x[choice.argsort(stable=True).argsort().to(x.device)]
