"""Formulas as a page shows them: what a density is in proportion to."""

from __future__ import annotations

import functools
import html
from collections import Counter
from collections.abc import Sequence

from sculpt.formula import Formula, Mixture, Posterior, PowerMean, Product, Tilted

__all__ = ["target"]


@functools.singledispatch
def target(formula: Formula, names: Sequence[str]) -> str:
    """What the formula's density is in proportion to, as HTML. Formulas that are not known here are written in their own notation.

    Args:
        formula: of the operands' densities.
        names: of the operands.
    """
    return html.escape(formula.write(names))


@target.register
def _mixture(formula: Mixture, names: Sequence[str]) -> str:
    return _sum(formula.weights, names)


@target.register
def _posterior(formula: Posterior, names: Sequence[str]) -> str:
    above = _product(Counter(formula.labels), names)
    return f"{above} / ({_sum(formula.odds, names)}){_power(len(formula.labels) - 1)}" if len(formula.labels) > 1 else above


@target.register
def _powers(formula: Product, names: Sequence[str]) -> str:
    return _product(dict(enumerate(formula.powers)), names)


@target.register
def _tilted(formula: Tilted, names: Sequence[str]) -> str:
    return _product(dict(enumerate((1.0, *formula.powers))), names)


@target.register
def _power_mean(formula: PowerMean, names: Sequence[str]) -> str:
    r = formula.exponent
    if r == 0 or abs(r) == float("inf"):
        return html.escape(formula.write(names))
    return f"({_sum(formula.weights, [_power_of(name, r) for name in names], safe=True)})<sup>1/{r:.3g}</sup>"


def _sum(weights: Sequence[float], names: Sequence[str], safe: bool = False) -> str:
    """Weights that are equal go without saying."""
    terms = list(names) if safe else [html.escape(name) for name in names]
    if len(set(weights)) > 1:
        terms = [f"{w:.3g}&nbsp;{term}" for w, term in zip(weights, terms, strict=True)]
    return " + ".join(terms)


def _product(powers: dict[int, float], names: Sequence[str]) -> str:
    return " &middot; ".join(_power_of(names[i], power) for i, power in powers.items())


def _power_of(name: str, power: float) -> str:
    return html.escape(name) + _power(power)


def _power(power: float) -> str:
    return "" if power == 1 else f"<sup>{power:.3g}</sup>"
