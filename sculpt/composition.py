r"""Compositions: a formula over base models, and the three roads to samples of it.

=====================  =======================================  ==========================================
road                   call                                     what it needs
=====================  =======================================  ==========================================
(a) classifier         ``composition.sample(n, classifier)``    a classifier, fitted once per set of models
(b) tracked densities  ``composition.sample(n)``                nothing
(c) rejection          ``sculpt.reject(composition, n, ...)``   a classifier, or exact log-densities
=====================  =======================================  ==========================================
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import inspect
import math
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from sculpt.base import BaseModel, check_composable, operand_names, same_model
from sculpt.classifier import Guide
from sculpt.formula import Formula, Mixture, Nested, Posterior, PowerMean, Product
from sculpt.particles import Diagnostics, Samples

__all__ = ["Composition", "mixture", "harmonic_mean", "contrast", "posterior", "product", "power_mean"]


class Composition(BaseModel):
    """A formula over base models of one family. Nothing is computed until it is sampled.

    It is a base model: it composes further with ``|``, ``&``, ``-`` and the functions of this module.
    """

    def __init__(self, formula: Formula, models: Sequence[BaseModel], operator: str | None = None):
        self.formula, self.models, self.operator = formula, tuple(models), operator
        for model in self.models:
            if not isinstance(model, BaseModel):
                raise TypeError(
                    f"Only base models compose, got {model!r}. Wrap a network in sculpt.Diffusion or sculpt.GFlowNet."
                )
        check_composable(self.models)
        self.family = self.leaves[0].family

    @property
    def name(self) -> str:
        """The formula over the models' names."""
        return self.formula.write(operand_names(self.models))

    def __repr__(self) -> str:
        return str(self)

    @functools.cached_property
    def leaves(self) -> tuple[BaseModel, ...]:
        """The pretrained models underneath, each once."""
        found: list[BaseModel] = []
        for model in self.models:
            found += [leaf for leaf in model.leaves if not any(same_model(leaf, other) for other in found)]
        return tuple(found)

    @property
    def key(self) -> str:
        return hashlib.sha256(repr((self.formula.identity, [model.key for model in self.models])).encode()).hexdigest()

    @property
    def device(self) -> torch.device:
        return self.leaves[0].device

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one sample (diffusion)."""
        return self.leaves[0].shape

    def check_composable(self, other: BaseModel) -> None:
        for leaf in other.leaves:
            self.leaves[0].check_composable(leaf)

    def replay(self, models: Sequence[BaseModel], **options):
        return self.leaves[0].replay(models, **options)

    def decode(self, x: Tensor) -> Any:
        return self.leaves[0].decode(x)

    def result(self, x: Tensor, log_weights: Tensor | None = None, diagnostics: Diagnostics | None = None) -> Samples:
        return self.leaves[0].result(x, log_weights, diagnostics)

    # ------------------------------------------------------------------------------------------------------------ sampling

    def sample(
        self,
        n: int,
        classifier: Guide | None = None,
        *,
        steps: int | None = None,
        solver: Any | None = None,
        particles: int | None = None,
        threshold: float | None = None,
        anchor: int | BaseModel | None = None,
        form: str | None = None,
        strength: float | int | None = None,
        correct: bool | str | None = None,
        corrector: Any | None = None,
        resample: bool | None = None,
        batch_size: int | None = None,
        generator: torch.Generator | None = None,
        progress: bool | None = None,
    ) -> Samples:
        """n samples of the composition, with diagnostics: guided by a classifier, or without one by tracked densities.

        Args:
            n: how many.
            classifier: from ``sculpt.fit`` on the same base models (in any order), or an exact guide.
            steps: noise levels (diffusion), each one call of the network.
            solver: a diffusers scheduler to step with instead of the second-order stochastic solver (guided diffusion).
            particles: the size of the population, at least n (tracked densities and ``correct``).
            threshold: resample when the effective sample size falls under this share of the particles.
            anchor: the observed label (or its model) whose chain is steered; by default the first (guided). The nearer the model is to
                what is asked, the fewer samples stray.
            form: ``"anchored"`` (one base network, exact) or ``"mixture"`` (the paper's) (guided).
            strength: what the guidance is multiplied with, 1 by default (guided diffusion). A learned gradient misses a part of the true
                one; a little more than 1 makes up for that in conditions that few chains keep, much more distorts the proportions.
                Corrected samples have the same distribution at any strength.
            correct: weigh and select, so that the result is exact for the anchor's chain and the terminal head (guided);
                ``"densities"`` puts the base models' own densities in the head's place, at the cost of all of them (GFlowNets).
            corrector: an MCMC kernel run at every noise level (tracked densities, diffusion).
            resample: ``False`` returns all particles with their weights.
            batch_size: how many states go through a network at once; the population stays one.
            generator: source of randomness; it may live on the CPU while the models are on a GPU.
            progress: show a bar where it takes longer than two seconds.
        """
        if n < 1:
            raise ValueError(f"The number of samples has to be at least 1, got n={n}.")
        options = {
            "steps": steps,
            "solver": solver,
            "particles": particles,
            "threshold": threshold,
            "correct": correct,
            "corrector": corrector,
            "resample": resample,
            "batch_size": batch_size,
            "generator": generator,
            "progress": progress,
        }
        options = {name: value for name, value in options.items() if value is not None}
        if classifier is None:
            if anchor is not None or form is not None or strength is not None or correct:
                raise ValueError(
                    "anchor, form, strength and correct belong to guided sampling: pass the classifier, composition.sample(n, classifier)."
                )
            options.pop("correct", None)
            samples = self._sample_alone(n, options)
        else:
            how = {"anchor": anchor, "form": form or "anchored", "strength": 1.0 if strength is None else strength}
            guided = self.guided(classifier, **how)
            samples = call_road(self._engine.sample, "the classifier road", guided, n, **options)
            if samples.log_z is not None:
                samples.diagnostics.log_z += self._rescale(self._anchored(anchor).labels[0])
        samples.diagnostics.formula = str(self)
        return samples

    def guided(
        self,
        classifier: Guide,
        *,
        anchor: int | BaseModel | None = None,
        form: str = "anchored",
        strength: float | int = 1.0,
    ) -> BaseModel:
        """The composition with its classifier, as a base model of its family: it samples, nests and can be fitted again."""
        formula = self.formula
        if isinstance(formula, Mixture) and self.operator == "|" or not isinstance(formula, Posterior):
            raise ValueError(
                f"A classifier steers posteriors (harmonic means, contrasts, labels); {self} is a {type(formula).__name__.lower()}. "
                "Sample it without a classifier."
            )
        formula = self._anchored(anchor)
        aligned, models = classifier.align(formula, self.models)
        options = {"form": form} if strength == 1 else {"form": form, "strength": strength}
        return call_road(
            self._engine.guide, f"a guided composition of {self.family} models", aligned, models, classifier, **options
        )

    def _anchored(self, anchor: int | BaseModel | None) -> Posterior:
        """The posterior with the anchor's label first. Odds only rescale the target when labels change places."""
        labels = self.formula.labels
        if anchor is None:
            return self.formula
        label = (
            anchor if isinstance(anchor, int) else next((i for i, p in enumerate(self.models) if same_model(p, anchor)), anchor)
        )
        if label not in labels:
            raise ValueError(f"anchor={anchor} is not an observed label; {self} observes {labels}.")
        k = labels.index(label)
        return Posterior(self.formula.m, (label, *labels[:k], *labels[k + 1 :]), self.formula.odds)

    def _rescale(self, label: int) -> float:
        """What log Z as written is more than with this label as the anchor: the log-ratio of the two odds."""
        return math.log(self.formula.odds[label]) - math.log(self.formula.odds[self.formula.labels[0]])

    @property
    def _is_one_model(self) -> bool:
        return isinstance(self.formula, Posterior) and self.formula.m == 1

    @property
    def _engine(self) -> ModuleType:
        return importlib.import_module(f"sculpt.{self.family}.sampler")

    def _sample_alone(self, n: int, options: dict[str, Any]) -> Samples:
        if isinstance(self.formula, Mixture):
            return self._pick(n, options)
        if self._is_one_model:
            return call_road(self.models[0].sample, f"sampling {self.models[0]}", n, **options)
        formula, notes = self._over_leaves(options)
        samples = call_road(self._engine.track, "the road of tracked densities", formula, self.leaves, n, **options)
        samples.diagnostics.notes += notes
        return samples

    def _pick(self, n: int, options: dict[str, Any]) -> Samples:
        """A mixture needs no weights: pick a model for every sample."""
        if options.get("resample") is False:
            raise ValueError(f"resample=False: {self} is a mixture, whose samples carry no weights.")
        notes: list[str] = []
        plain = options
        if any(isinstance(model, Composition) for model in self.models):  # then a population's options are meant for those
            plain = {
                name: value
                for name, value in options.items()
                if name not in ("particles", "threshold", "resample", "corrector")
            }

        def draw(i: int, k: int) -> Tensor:
            model = self.models[i]
            part = call_road(model.sample, f"sampling {model}", k, **(options if isinstance(model, Composition) else plain))
            notes.extend([f"{model}: {part.diagnostics.verdict}"] if isinstance(model, Composition) else [])
            return part.x

        x = self.pick(n, draw, options.get("generator"))
        diagnostics = Diagnostics(
            road="a model picked per sample", steps=options.get("steps", 0), log_z=0.0, log_z_error=0.0, notes=notes
        )
        return self.result(x, None, diagnostics)

    def pick(self, n: int, draw: Callable[[int, int], Tensor], generator: torch.Generator | None) -> Tensor:
        """n samples of a mixture in random order; ``draw(i, k)`` gives k of its part i."""
        device = "cpu" if generator is None else generator.device
        weights = torch.tensor(self.formula.weights, dtype=torch.float64, device=device)
        choice = torch.multinomial(weights, n, replacement=True, generator=generator).cpu()
        parts = [(choice == i).nonzero()[:, 0] for i in range(len(self.models))]
        x = torch.cat([draw(i, len(rows)) for i, rows in enumerate(parts) if len(rows)])
        return x[torch.cat(parts).argsort().to(x.device)]

    def _over_leaves(self, options: dict[str, Any]) -> tuple[Formula, list[str]]:
        """The formula over the pretrained models; inner compositions are normalised by a run of their own."""
        if not any(isinstance(model, Composition) for model in self.models):
            return self.formula, []
        leaves, parts, indices, log_z, notes = self.leaves, [], [], [], []
        for model in self.models:
            inner, z = Mixture([1.0]), 0.0
            if isinstance(model, Composition):
                inner, inner_notes = model._over_leaves(options)
                notes += inner_notes
                if not isinstance(model.formula, Mixture) and not model._is_one_model:
                    settings = {name: value for name, value in options.items() if name not in ("resample",)}
                    z = model.sample(1, **settings).log_z or 0.0
                    notes.append(f"log Z of {model}: {z:.3f}")
            parts.append(inner)
            indices.append([next(i for i, leaf in enumerate(leaves) if same_model(leaf, own)) for own in model.leaves])
            log_z.append(z)
        return Nested(self.formula, parts, indices, log_z), notes

    # -------------------------------------------------------------------------------------------------------------- exports

    def as_unet(
        self,
        classifier: Guide,
        scheduler: Any | None = None,
        *,
        anchor: int | BaseModel | None = None,
        form: str = "anchored",
        strength: float | int = 1.0,
    ):
        """The guided composition as a diffusers UNet, in the coordinates of ``scheduler`` (by default the anchor's own)."""
        if self.family != "diffusion":
            raise ValueError(f"as_unet is for diffusion models; {self} is a composition of {self.family}s. Use as_estimator.")
        from sculpt.diffusion.model import Diffusion
        from sculpt.diffusion.unet import DenoiserUNet

        guided = self.guided(classifier, anchor=anchor, form=form, strength=strength)
        if scheduler is None and not isinstance(guided.anchor, Diffusion):
            raise ValueError(
                f"The anchor {guided.anchor} has no diffusers scheduler of its own: pass scheduler=, the one the loop steps with."
            )
        return DenoiserUNet(guided, scheduler or guided.anchor.scheduler)

    def as_estimator(self, classifier: Guide, *, anchor: int | BaseModel | None = None, form: str = "anchored"):
        """The guided composition as a torchgfn policy estimator."""
        if self.family != "gflownet":
            raise ValueError(f"as_estimator is for GFlowNets; {self} is a composition of {self.family} models. Use as_unet.")
        return self.guided(classifier, anchor=anchor, form=form).policy


def call_road(function: Callable, road: str, *args: Any, **options: Any) -> Any:
    """Call a road with the options that it has, and name those that it has not."""
    known = {name for name, p in inspect.signature(function).parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}
    options = {name: value for name, value in options.items() if name in known or name != "progress"}
    if unknown := sorted(set(options) - known):
        raise ValueError(f"{', '.join(unknown)}: not an option of {road}, which has {', '.join(sorted(known))}.")
    return function(*args, **options)


# ----------------------------------------------------------------------------------------------------------- making compositions


def mixture(*models: BaseModel, weights: Sequence[float] | None = None) -> Composition:
    r""":math:`\sum_i \omega_i p_i`; equal weights by default, and only their ratios matter."""
    _check_one_each(models, weights, "weights")
    weights = Mixture(weights or [1.0] * len(models)).weights  # checked as given, before those of equal models add up
    distinct, index = _distinct(models)
    return Composition(Mixture(_gather(weights, index)), distinct)


def posterior(models: Sequence[BaseModel], labels: Sequence[int], odds: float | Sequence[float] | None = None) -> Composition:
    r""":math:`p_{i_1} \prod_{k \ge 2} v_{i_k} p_{i_k} / \sum_j v_j p_j` for observed labels :math:`(i_1, \dots, i_n)` and odds v."""
    if isinstance(odds, BaseModel):
        raise TypeError(
            f"Got the model {odds} where odds belong. More than two models: p & q & r, or sculpt.posterior(models, labels)."
        )
    if isinstance(odds, int | float):
        odds = _alpha(odds, len(models))
    _check_one_each(models, odds, "odds")
    Posterior(len(models), labels, odds)  # labels and odds are checked against what was given, not against what is left
    distinct, index = _distinct(models)
    merged = None if odds is None and len(distinct) == len(models) else _gather(odds or [1.0] * len(models), index)
    return Composition(Posterior(len(distinct), [index[i] for i in labels], merged), distinct)


def harmonic_mean(p: BaseModel, q: BaseModel, odds: float | Sequence[float] | None = None) -> Composition:
    r""":math:`p \, q / (\alpha p + (1 - \alpha) q)`: likely under both."""
    return posterior([p, q], (0, 1), odds)


def contrast(p: BaseModel, q: BaseModel, odds: float | Sequence[float] | None = None) -> Composition:
    r""":math:`p^2 / (\alpha p + (1 - \alpha) q)`: likely under p and not under q."""
    return posterior([p, q], (0, 0), odds)


def product(models: Sequence[BaseModel], powers: Sequence[float]) -> Composition:
    r""":math:`\prod_i p_i^{\gamma_i}`: a negative power negates, a single one tempers."""
    _check_one_each(models, powers, "powers")
    distinct, index = _distinct(models)
    return Composition(Product(_gather(powers, index)), distinct)


def power_mean(models: Sequence[BaseModel], exponent: float, weights: Sequence[float] | None = None) -> Composition:
    r""":math:`(\sum_i \omega_i p_i^r)^{1/r}`: r = 1 the mixture, 0 the geometric mean, -1 the harmonic."""
    _check_one_each(models, weights, "weights")
    weights = PowerMean(exponent, weights or [1.0] * len(models)).weights  # checked as given
    distinct, index = _distinct(models)
    return Composition(PowerMean(exponent, _gather(weights, index)), distinct)


def operate(operator: str, p: BaseModel, q: BaseModel) -> Composition:
    """``p & q``, ``p | q`` or ``p - q``. Chains of one operator flatten, and equal operands count as one model."""

    def operands(model: BaseModel) -> tuple[BaseModel, ...]:
        return model.chain if isinstance(model, Composition) and model.operator == operator else (model,)

    # p - (q - r) takes less away than p - q - r: only the left operand of a difference continues the chain.
    chain = operands(p) + (operands(q) if operator != "-" else (q,))
    distinct, index = _distinct(chain)
    formula = {
        "|": lambda: Mixture([1.0] * len(distinct)),
        "&": lambda: Posterior(len(distinct), index),
        "-": lambda: Posterior(len(distinct), [0] * len(chain)),
    }[operator]()
    composition = Composition(formula, distinct, operator)
    composition.chain = chain
    return composition


def _distinct(models: Sequence[BaseModel]) -> tuple[list[BaseModel], list[int]]:
    """The different models, and for each of the given ones its index among them."""
    for model in models:
        if not isinstance(model, BaseModel):
            raise TypeError(f"Only base models compose, got {model!r}. Wrap a network in sculpt.Diffusion or sculpt.GFlowNet.")
    distinct: list[BaseModel] = []
    index = []
    for model in models:
        known = next((i for i, other in enumerate(distinct) if same_model(model, other)), None)
        index.append(len(distinct) if known is None else known)
        if known is None:
            distinct.append(model)
    return distinct, index


def _gather(numbers: Sequence[float], index: Sequence[int]) -> list[float]:
    """Weights, odds or powers of equal models add up: the target stays what was written."""
    total = [0.0] * (1 + max(index))
    for number, i in zip(numbers, index, strict=True):
        total[i] += number
    return total


def _alpha(alpha: float, m: int) -> tuple[float, float]:
    if m != 2:
        raise ValueError(f"One number is the odds of two models, got odds={alpha} for {m}. Pass {m} positive numbers.")
    if not 0 < alpha < 1:
        raise ValueError(f"odds is a number alpha between 0 and 1 for two models, got {alpha}.")
    return alpha, 1 - alpha


def _check_one_each(models: Sequence[BaseModel], numbers: Sequence[float] | None, what: str) -> None:
    if not models:
        raise ValueError("A composition needs at least one base model, got none.")
    if numbers is not None and len(numbers) != len(models):
        raise ValueError(f"Got {len(numbers)} {what} for {len(models)} base models. Pass one number per model.")
