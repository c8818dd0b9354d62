"""Operands of compositions: the different ones of what was written, and a number for each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sculpt.checks import each, number
from sculpt.model import BaseModel, check_model, same_model

__all__ = ["alpha", "distinct_models", "gather", "one_each"]


def distinct_models(models: Sequence[BaseModel]) -> tuple[list[BaseModel], list[int]]:
    """The different models, and for each of the given ones its index among them."""
    for model in models:
        check_model(model)
    distinct: list[BaseModel] = []
    index = []
    for model in models:
        known = next((i for i, other in enumerate(distinct) if same_model(model, other)), None)
        index.append(len(distinct) if known is None else known)
        if known is None:
            distinct.append(model)
    return distinct, index


def gather(numbers: Sequence[float], index: Sequence[int]) -> list[float]:
    """Weights, odds or powers of equal models add up: the target stays what was written."""
    total = [0.0] * (1 + max(index))
    for value, i in zip(numbers, index, strict=True):
        total[i] += value
    return total


def alpha(odds: Any, m: int) -> tuple[float, float]:
    """One number as the odds of two models."""
    odds = number("odds", odds)
    if m != 2:
        raise ValueError(f"One number is the odds of two models, got odds={odds} for {m}. Pass {m} positive numbers.")
    if not 0 < odds < 1:
        raise ValueError(f"odds is a number alpha between 0 and 1 for two models, got {odds}.")
    return odds, 1 - odds


def one_each(models: Any, numbers: Any, what: str) -> tuple[list[BaseModel], list[float] | None]:
    """The models, and a number for each where there are any."""
    models, given = each("models", models, "base models"), None if numbers is None else each(what, numbers)
    if not models:
        raise ValueError("A composition needs at least one base model, got none.")
    if given is not None and len(given) != len(models):
        raise ValueError(f"Got {len(given)} {what} for {len(models)} base models. Pass one number per model.")
    return models, None if given is None else [number(f"one of the {what}", value) for value in given]
