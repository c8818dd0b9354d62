"""Compositions in text, as a command line has them: ``"(a | b) - c"``. Nothing is evaluated."""

from __future__ import annotations

import ast
from typing import Any

__all__ = ["FUNCTIONS", "compose", "operands"]

FUNCTIONS = ("mixture", "harmonic_mean", "contrast", "posterior", "product", "power_mean")


def compose(formula: str, models: dict[str, Any]) -> Any:
    """The composition that a formula names, over models by name. Names, ``|``, ``&``, ``-`` and sculpt's functions; nothing is evaluated.

    With ``None`` in place of the models only the formula is checked.
    """
    import sculpt

    dry = all(model is None for model in models.values())

    def wrong(node: ast.AST, what: str) -> ValueError:
        part = ast.get_source_segment(formula, node) or formula
        return ValueError(
            f"Cannot read {part!r} in the formula {formula!r}: {what} Expected the models {', '.join(models)} joined by |, & and -, "
            f"parentheses, and {', '.join(FUNCTIONS)}."
        )

    def value(node: ast.AST) -> Any:
        if isinstance(node, ast.BinOp):
            operators = {ast.BitOr: lambda p, q: p | q, ast.BitAnd: lambda p, q: p & q, ast.Sub: lambda p, q: p - q}
            if type(node.op) not in operators:
                raise wrong(node, f"the operator {type(node.op).__name__} has no meaning here.")
            sides = value(node.left), value(node.right)
            return None if dry else operators[type(node.op)](*sides)
        if isinstance(node, ast.Name):
            if node.id not in models:
                raise wrong(node, "no such model.")
            return models[node.id]
        if isinstance(node, ast.Call):
            if not (isinstance(node.func, ast.Name) and node.func.id in FUNCTIONS):
                raise wrong(node, "no such function.")
            if any(keyword.arg is None for keyword in node.keywords):
                raise wrong(node, "** has no meaning here.")
            arguments, options = [argument(a) for a in node.args], {k.arg: argument(k.value) for k in node.keywords}
            return None if dry else getattr(sculpt, node.func.id)(*arguments, **options)
        raise wrong(node, "it is not a model.")

    def argument(node: ast.AST) -> Any:
        if isinstance(node, ast.List | ast.Tuple):
            return [argument(element) for element in node.elts]
        try:
            number = ast.literal_eval(node)
        except ValueError:
            return value(node)
        if isinstance(number, int | float) and not isinstance(number, bool):
            return number
        raise wrong(node, "it is neither a number nor a model.")

    return value(_parse(formula))


def operands(formula: str) -> list[str]:
    """The models that a formula names, in the order in which they come."""
    names = [node for node in ast.walk(_parse(formula)) if isinstance(node, ast.Name) and node.id not in FUNCTIONS]
    return list(dict.fromkeys(node.id for node in sorted(names, key=lambda node: (node.lineno, node.col_offset))))


def _parse(formula: str) -> ast.expr:
    try:
        return ast.parse(formula.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(
            f"The formula {formula!r} is not complete: {getattr(error, 'msg', error)}. Write for example 'a & b' or '(a | b) - c'."
        ) from None
