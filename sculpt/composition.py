r"""Compositions: a formula over base models. Nothing is computed until one is sampled, by one of three roads.

=====================  ==============================================  ===========================================
road                   call                                            what it needs
=====================  ==============================================  ===========================================
(a) classifier         ``composition.sample(n, Guided(classifier))``   a classifier, fitted once per set of models
(b) tracked densities  ``composition.sample(n)``                       nothing
(c) rejection          ``composition.sample(n, Rejection(...))``       a classifier, or exact log-densities
=====================  ==============================================  ===========================================
"""

from __future__ import annotations

import functools
import hashlib
import html
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from sculpt.chain import Progress, Settings
from sculpt.checks import each, real, several, whole
from sculpt.classifier.guide import Guide
from sculpt.factor import Factor
from sculpt.formula import Formula, Mixture, Posterior, PowerMean, Product, Tilted
from sculpt.looks import target
from sculpt.model import BaseModel, Steered, check_composable, check_model, operand_names, same_model
from sculpt.operands import alpha, distinct_models, gather, one_each
from sculpt.roads import Guided, as_road

__all__ = ["Composition", "mixture", "harmonic_mean", "contrast", "posterior", "product", "power_mean"]

LEAST, MOST = 1e-6, 1e5
"""Powers lie between these, or are zero. Larger ones multiply a network's own rounding, about a millionth of a nat, beyond any use."""


class Composition(BaseModel):
    """A formula over base models. It is a base model: it composes further with ``|``, ``&``, ``-`` and the functions of this module.

    Args:
        formula: of the models' log-densities.
        models: its operands, each once.
        operator: what it was written with, if it was.
        chain: the operands as they were written, which a longer chain of the operator continues.
        own: the factors that multiply its one operand, whose formula is a ``Tilted``.

    Example:
        >>> both = one & two
        >>> str(both), both.formula.labels, both.sample(3, generator=seed).x.shape
        ('circle1 ⊗ circle2', (0, 1), torch.Size([3, 2]))
    """

    def __init__(
        self,
        formula: Formula,
        models: Sequence[BaseModel],
        operator: str | None = None,
        chain: Sequence[BaseModel] = (),
        own: Sequence[Factor] = (),
    ):
        self.formula, self.models, self.operator, self.chain = formula, tuple(models), operator, tuple(chain)
        self.own = tuple(own)
        self._known_key: tuple[list[str], str] = ([], "")
        for model in self.models:
            check_model(model)
        check_composable(self.models)
        first = self.leaves[0]
        self.shape, self.default_steps, self.samples_class = first.shape, first.default_steps, first.samples_class
        self.name = formula.write([*operand_names(models), *map(str, self.own)])

    def __str__(self) -> str:
        return self.name

    @property
    def written(self) -> str:
        """As operators write it in Python: ``p - q`` for what is printed as ``p ◑ q``. What a function made has its printed name."""
        parts = [f"({part.written})" if isinstance(part, Composition) else str(part) for part in self.chain]
        return f" {self.operator} ".join(parts) if parts else self.name

    @property
    def facts(self) -> dict[str, str]:
        return ({"written": self.written} if self.chain else {}) | super().facts

    def outline(self) -> str:
        names = [*operand_names(self.models), *map(str, self.own)]
        parts = [*(model.outline() for model in self.models), *(html.escape(repr(factor)) for factor in self.own)]
        return f"{super().outline()} &prop; {target(self.formula, names)}<ul><li>{'</li><li>'.join(parts)}</li></ul>"

    @functools.cached_property
    def leaves(self) -> tuple[BaseModel, ...]:
        """The pretrained models underneath, each once."""
        return tuple(distinct_models([leaf for model in self.models for leaf in model.leaves])[0])

    @functools.cached_property
    def factors(self) -> tuple[Factor, ...]:
        """The factors anywhere in it, each once, those of operands before those that multiply them."""
        inner = [factor for model in self.models if isinstance(model, Composition) for factor in model.factors]
        return tuple({factor.key: factor for factor in (*inner, *self.own)}.values())

    @property
    def key(self) -> str:
        """A hash of the formula and the models' keys, computed again only after a model underneath has changed."""
        leaves = [leaf.key for leaf in self.leaves]
        if self._known_key[0] != leaves:
            keys = [part.key for part in (*self.models, *self.own)]
            said = repr((self.formula.identity, keys))
            self._known_key = leaves, hashlib.sha256(said.encode()).hexdigest()
        return self._known_key[1]

    @property
    def device(self) -> torch.device:
        """The models'."""
        return self.leaves[0].device

    @property
    def knows_density(self) -> bool:
        """Whether all of the models underneath know theirs."""
        return all(leaf.knows_density for leaf in self.leaves)

    @property
    def decoder(self) -> Callable[[Tensor], Any] | None:
        return self.leaves[0].decoder

    def check_composable(self, other: BaseModel) -> None:
        check_composable([self, other])

    def store(self, models: Sequence[BaseModel], **options: Any) -> Any:
        return self.leaves[0].store(models, **options)

    def log_ratios(
        self,
        models: Sequence[BaseModel],
        x: Tensor,
        generator: torch.Generator | None = None,
        *,
        made_by: int = 0,
        **how: Any,
    ) -> Tensor:
        return self.leaves[0].log_ratios(models, x, generator, made_by=made_by, **how)

    # Roads

    def stream(self, n: int, road: Any, settings: Settings) -> Iterator[Progress]:
        return as_road(road).stream(self, n, settings)

    def guided(self, road: Guided | Guide) -> Steered:
        """The composition with its classifier, as a base model of its family: it samples, nests and can be fitted again."""
        road = as_road(road)
        if not isinstance(road, Guided):
            raise TypeError(
                f"A composition is bound to a classifier, guided(classifier) or guided(Guided(classifier, ...)); got {road}."
            )
        if road.correct:
            raise ValueError(
                f"{road} corrects a population of particles, and a bound composition samples without one. Leave correct out here, and pass it "
                "to sample(n, sculpt.Guided(classifier, correct=True))."
            )
        return road.bind(self)

    @property
    def picks_models(self) -> bool:
        """Whether samples of it are samples of its models, and need no weights."""
        return self.is_one_model or isinstance(self.formula, Mixture)

    @property
    def is_one_model(self) -> bool:
        """Whether all that is composed is the same model, which is then what comes out."""
        return isinstance(self.formula, Posterior | Mixture) and self.formula.m == 1

    def anchored(self, anchor: int | BaseModel | None) -> Posterior:
        """The posterior with the anchor's label first; by default as it is written. Odds only rescale the target when labels change places."""
        formula = self.formula
        if not isinstance(formula, Posterior):
            raise ValueError(f"Only posteriors have labels to be anchored on; {self} is a {type(formula).__name__.lower()}.")
        labels = formula.labels
        if anchor is None:
            return formula
        if isinstance(anchor, BaseModel):
            label = next((i for i, p in enumerate(self.models) if same_model(p, anchor)), None)
        else:
            label = whole("anchor", anchor, least=0)
        if label not in labels:
            raise ValueError(f"anchor={anchor} is not an observed label; {self} observes {labels}.")
        k = labels.index(label)
        return Posterior(formula.m, (label, *labels[:k], *labels[k + 1 :]), formula.odds)

    def log_scale(self, label: int) -> float:
        """Log Z as written minus log Z with this label as the anchor: the log-ratio of the two odds."""
        formula = self.anchored(None)
        return math.log(formula.odds[label]) - math.log(formula.odds[formula.labels[0]])


# ----------------------------------------------------------------------------------------------------------- making compositions


def mixture(*models: BaseModel, weights: Sequence[float] | None = None) -> Composition:
    r"""Either of them: :math:`\sum_i \omega_i p_i`.

    Args:
        models: two or more.
        weights: one number per model, of which only the ratios matter; equal by default.

    Example:
        >>> len(sculpt.mixture(one, two, weights=[2, 1]).sample(30))  # two of three from circle1
        30
    """
    models, given = one_each(models, weights, "weights")
    weights = Mixture(given or [1.0] * len(models)).weights  # checked as given, before those of equal models add up
    distinct, index = distinct_models(models)
    return _composed(Mixture(gather(weights, index)), distinct)


def posterior(models: Sequence[BaseModel], labels: Sequence[int], odds: float | Sequence[float] | None = None) -> Composition:
    r"""What n observations say: :math:`p_{i_1} \prod_{k \ge 2} v_{i_k} p_{i_k} / \sum_j v_j p_j`.

    Args:
        models: the base models; labels are their indices.
        labels: the observed ones, :math:`(i_1, \dots, i_n)`; the first is the anchor unless a road says otherwise.
        odds: one number v per model, of which only the ratios matter; for two models the share of the first. Equal by default.

    Example:
        >>> print(sculpt.posterior([one, two], labels=(0, 0, 1)))
        p(x | y1=circle1, y2=circle1, y3=circle2; circle1, circle2)
    """
    if isinstance(odds, BaseModel):
        raise TypeError(
            f"Got the model {odds} where odds belong. More than two models: p & q & r, or sculpt.posterior(models, labels)."
        )
    models = each("models", models, "base models")
    models, given = one_each(models, odds if odds is None or several(odds) else alpha(odds, len(models)), "odds")
    labels = Posterior(len(models), labels, given).labels  # checked against what was given, not against what is left
    distinct, index = distinct_models(models)
    merged = None if given is None and len(distinct) == len(models) else gather(given or [1.0] * len(models), index)
    return _composed(Posterior(len(distinct), [index[i] for i in labels], merged), distinct)


def harmonic_mean(p: BaseModel, q: BaseModel, odds: float | Sequence[float] | None = None) -> Composition:
    r"""Likely under both: :math:`p \, q / (\alpha p + (1 - \alpha) q)`.

    Args:
        p: a base model.
        q: another.
        odds: :math:`\alpha`, between 0 and 1, or two numbers of which only the ratio matters; equal by default.

    Example:
        >>> print(sculpt.harmonic_mean(one, two))  # one & two
        circle1 ⊗ circle2
    """
    return posterior([p, q], (0, 1), odds)


def contrast(p: BaseModel, q: BaseModel, odds: float | Sequence[float] | None = None) -> Composition:
    r"""Likely under p and not under q: :math:`p^2 / (\alpha p + (1 - \alpha) q)`.

    Args:
        p: a base model.
        q: another.
        odds: as for :func:`harmonic_mean`.

    Example:
        >>> print(sculpt.contrast(one, two))  # one - two
        circle1 ◑ circle2
    """
    return posterior([p, q], (0, 0), odds)


def product(models: Sequence[BaseModel], powers: Sequence[float]) -> Composition:
    r""":math:`\prod_i p_i^{\gamma_i}`: a negative power negates, a single one tempers.

    Args:
        models: one or more.
        powers: one number :math:`\gamma` per model; their sum has to be positive.

    Example:
        >>> print(sculpt.product([one, two], [1.5, -0.5]))
        circle1^1.5 · circle2^-0.5
    """
    models, given = one_each(models, each("powers", powers), "powers")
    distinct, index = distinct_models(models)
    formula = Product(gather([real("a power", g) for g in given], index))
    if not all(g == 0 or LEAST <= abs(g) <= MOST for g in (*formula.powers, formula.degree)):
        raise ValueError(
            f"Powers and their sum lie between {LEAST:g} and {MOST:g} in size, got {formula.powers} with the sum {formula.degree:g}. "
            "A model to the power 0 is ignored."
        )
    return _composed(formula, distinct)


def power_mean(models: Sequence[BaseModel], exponent: float, weights: Sequence[float] | None = None) -> Composition:
    r""":math:`(\sum_i \omega_i p_i^r)^{1/r}`: r = 1 the mixture, 0 the geometric mean, -1 the harmonic.

    Args:
        models: one or more.
        exponent: r.
        weights: one number :math:`\omega` per model, of which only the ratios matter; equal by default.

    Example:
        >>> sculpt.power_mean([one, two], 0).sample(3, generator=seed).x.shape  # the geometric mean
        torch.Size([3, 2])
    """
    models, given = one_each(models, weights, "weights")
    weights = PowerMean(exponent, given or [1.0] * len(models)).weights  # checked as given
    distinct, index = distinct_models(models)
    return _composed(PowerMean(exponent, gather(weights, index)), distinct)


def tilted(model: BaseModel, factor: Factor) -> Composition:
    """``p * factor``. Factors of one model are one composition, whatever their order."""
    check_model(model)
    operand, factors = model, [factor]
    if isinstance(model, Composition) and model.own:
        (operand,), factors = model.models, [*model.own, factor]
    powers: dict[str, float] = {}
    for one in factors:
        powers[one.key] = powers.get(one.key, 0.0) + one.power
    if not all(powers.values()):
        raise ValueError(f"The powers of {factor} cancel in {model} * {factor!r}. Leave it out.")
    own = {one.key: one for one in factors}
    return operand.leaves[0].compose(Tilted(list(powers.values())), [operand], "*", (), list(own.values()))


def operate(operator: str, p: BaseModel, q: BaseModel) -> Composition:
    """``p & q``, ``p | q`` or ``p - q``. Chains of one operator flatten, and equal operands count as one model."""

    def operands(model: BaseModel) -> tuple[BaseModel, ...]:
        return model.chain if isinstance(model, Composition) and model.operator == operator else (model,)

    # p - (q - r) takes less away than p - q - r: only the left operand of a difference continues the chain.
    chain = operands(p) + (operands(q) if operator != "-" else (q,))
    distinct, index = distinct_models(chain)
    formula = {
        "|": lambda: Mixture([1.0] * len(distinct)),
        "&": lambda: Posterior(len(distinct), index),
        "-": lambda: Posterior(len(distinct), [0] * len(chain)),
    }[operator]()
    return _composed(formula, distinct, operator, chain)


def _composed(
    formula: Formula, models: Sequence[BaseModel], operator: str | None = None, chain: Sequence[BaseModel] = ()
) -> Composition:
    """A composition of the class that the models' family has for it."""
    return models[0].leaves[0].compose(formula, models, operator, chain)
