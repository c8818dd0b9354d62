"""Road (a): the chain of one base model, the anchor, steered by a classifier."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from sculpt.chain import Progress, Selection, Settings, run
from sculpt.checks import number, whole
from sculpt.classifier.guide import Guide
from sculpt.formula import Posterior
from sculpt.model import BaseModel, Steered, Steppable
from sculpt.roads.road import Road
from sculpt.roads.tracked import Tracked

if TYPE_CHECKING:
    from sculpt.composition import Composition

__all__ = ["Guided"]


class Guided(Road):
    """Steer by a classifier: one base network a step, for posteriors of any models.

    Args:
        classifier: from ``sculpt.fit`` on the same base models (in any order), or an exact guide.
        anchor: the observed label (or its model) whose chain is steered; by default the first. The nearer the model is to what is
            asked, the fewer samples stray.
        form: ``"anchored"`` (one base network, exact) or ``"mixture"`` (the paper's).
        strength: what the guidance is multiplied with (diffusion). A learned gradient misses a part of the true one; a little more than
            1 makes up for that in conditions that few chains keep, much more distorts the proportions. Corrected samples have the same
            distribution at any strength.
        correct: weigh and select, so that the result is exact for the anchor's chain and the terminal head; ``"densities"`` puts the
            base models' own densities in the head's place, at the cost of all of them, where they know them.
        particles: the size of the population, at least as many as samples.
        threshold: select when the effective sample size falls under this share of the particles.
        resample: ``False`` returns all particles with their weights. These three go with ``correct``.

    Example:
        >>> shubert = sculpt.load("pretrained/grid/symmetric_shubert")
        >>> sigmoid = sculpt.load("pretrained/grid/diag_sigmoid")
        >>> road = sculpt.Guided(sculpt.load("pretrained/grid/pair"), correct=True)
        >>> (shubert - sigmoid).sample(100, road, generator=seed).verdict.level
        'sound'
    """

    def __init__(
        self,
        classifier: Guide,
        *,
        anchor: int | BaseModel | None = None,
        form: Literal["anchored", "mixture"] = "anchored",
        strength: float = 1.0,
        correct: bool | Literal["densities"] = False,
        particles: int | None = None,
        threshold: float | None = None,
        resample: bool = True,
    ):
        if not isinstance(classifier, Guide):
            raise TypeError(f"Guided takes a classifier, from sculpt.fit or sculpt.load; got {classifier!r:.200}.")
        if form not in ("anchored", "mixture"):
            raise ValueError(f"form is 'anchored' or 'mixture', got {form!r:.60}.")
        if not 0 <= number("strength", strength) < math.inf:
            raise ValueError(
                f"strength multiplies the guidance, 1 leaves it as it is; expected a number from 0, got {strength}."
            )
        if not (isinstance(correct, bool) or correct == "densities"):
            raise ValueError(f"correct is True, False or 'densities', got {correct!r:.60}.")
        if correct and form != "anchored":
            raise ValueError(
                "Only the anchored form can be corrected: the mixture form has no base chain to weigh against. Use form='anchored'."
            )
        if not correct and (particles is not None or threshold is not None or not resample):
            raise ValueError(
                "particles, threshold and resample=False belong to a population with weights: add correct=True, or take sculpt.Tracked."
            )
        self.classifier, self.anchor, self.form, self.strength, self.correct = (
            classifier,
            anchor if anchor is None or isinstance(anchor, BaseModel) else whole("anchor", anchor, least=0),
            form,
            float(strength),
            correct,
        )
        self.selection = Selection(particles, threshold, resample) if correct else None

    def check(self, composition: Composition) -> None:
        self.bind(self._steered(composition))

    def bind(self, composition: Composition) -> Steered:
        """The composition with its classifier, as a base model of its family."""
        formula = composition.formula
        if not isinstance(formula, Posterior):
            raise ValueError(
                f"A classifier steers posteriors (harmonic means, contrasts, labels); {composition} is "
                f"{'weighed by a factor' if composition.own else f'a {type(formula).__name__.lower()}'}. Sample it without a classifier."
            )
        posterior, models = self.classifier.align(composition.anchored(self.anchor), composition.models)
        for model in [models[posterior.labels[0]]] if self.form == "anchored" else models:
            if not isinstance(model, Steppable):
                if model.models:
                    raise ValueError(
                        f"{model} is a composition without a classifier of its own, which cannot be stepped. Anchor on a base model "
                        "(anchor=), or bind the inner classifier: inner.guided(its_classifier)."
                    )
                raise ValueError(
                    f"{model} offers finished samples only, so there is no way to them that could be steered. Take "
                    "sculpt.Rejection(classifier)."
                )
        anchor = models[posterior.labels[0]]
        assert isinstance(anchor, Steppable)
        return anchor.guided(posterior, models, self.classifier, self.form, self.strength)

    def _steered(self, composition: Composition) -> Composition:
        """What the classifier steers: the composition, or what its factors multiply."""
        if not composition.own:
            return composition
        (operand,) = composition.models
        if not operand.models:
            raise ValueError(
                f"{operand} is one model, which no classifier steers. Sample {composition} without a road, or by sculpt.Tracked."
            )
        return operand  # type: ignore[return-value]

    def _weighed(self, guided: Steered, composition: Composition, n: int, settings: Settings) -> Iterator[Progress]:
        """The steered chain of the operand is a model, and factors weigh it."""
        alone = guided.alone
        Tracked(particles=1 if alone else None).check_factors(composition)
        chain = guided.tracked(composition.formula, [guided], settings, None, alone, composition.own)
        selection = None if alone else Selection()
        for progress in run(chain, n, str(composition), settings, composition.result, selection):
            if progress.samples is not None:
                progress.samples.diagnostics.notes.append("the classifier's own errors are not in these weights, nor in log Z")
            yield progress

    def stream(self, composition: Composition, n: int, settings: Settings) -> Iterator[Progress]:
        steered = self._steered(composition)
        guided = self.bind(steered)
        if composition.own and not self.correct:
            return self._weighed(guided, composition, n, settings)
        if self.correct:
            settings.refuse_each("here particles are selected")
        chain = guided.corrected(settings, self.correct == "densities") if self.correct else guided.chain(settings)
        if chain.log_scale is not None:
            chain.log_scale = steered.log_scale(steered.anchored(self.anchor).labels[0])
        if composition.own:
            chain.likelihood = functools.partial(_log_f, composition, guided)
            chain.road += f", weighed in the end by {', '.join(map(str, composition.own))}"
        return run(chain, n, str(composition), settings, composition.result, self.selection)


def _log_f(composition: Composition, guided: Steered, x: Tensor) -> Tensor:
    """What a composition's own factors say of finished samples of what they multiply."""
    said = [factor(guided.told(x), len(x)).to(x.device) for factor in composition.own]
    return composition.formula.value(torch.stack([torch.zeros_like(said[0]), *said], dim=1))
