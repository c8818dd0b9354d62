"""Compositions in text, as the command line and the explorer have them: ``"(a | b) - c"``. Nothing is evaluated."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Collection, Mapping
from typing import Any

__all__ = ["FUNCTIONS", "TextFormula", "compose"]

FUNCTIONS = ("mixture", "harmonic_mean", "contrast", "posterior", "product", "power_mean")
OPERATORS = {ast.BitOr: operator.or_, ast.BitAnd: operator.and_, ast.Sub: operator.sub}

Models = Mapping[str, Any]


class TextFormula:
    """A composition in text: models by name, ``|``, ``&``, ``-`` and sculpt's functions. It is checked here, and composed when there are models.

    Args:
        text: for example ``"a & b"``.
        known: the names that it may use; ``None`` takes any.
    """

    def __init__(self, text: str, known: Collection[str] | None = None):
        self.text, self.known = text.strip(), known
        self.names: list[str] = []
        """The models that it names, in the order in which they come."""
        try:
            tree = ast.parse(self.text, mode="eval").body
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise ValueError(
                f"The formula {text!r} is not complete: {getattr(error, 'msg', error)}. Write for example 'a & b' or '(a | b) - c'."
            ) from None
        self.is_one_model = isinstance(tree, ast.Name)
        self._composed = self._model(tree)

    def compose(self, models: Models) -> Any:
        """The composition of these models.

        Args:
            models: by name.
        """
        return self._composed(models)

    # Every part is read into a function from models to what it stands for.

    def _model(self, node: ast.expr) -> Callable[[Models], Any]:
        if isinstance(node, ast.BinOp):
            if type(node.op) not in OPERATORS:
                raise self._wrong(node, f"the operator {type(node.op).__name__} has no meaning here.")
            join, left, right = OPERATORS[type(node.op)], self._model(node.left), self._model(node.right)
            return lambda models: join(left(models), right(models))
        if isinstance(node, ast.Name):
            if node.id in FUNCTIONS or (self.known is not None and node.id not in self.known):
                raise self._wrong(node, "no such model.")
            self.names += [] if node.id in self.names else [node.id]
            return operator.itemgetter(node.id)
        if isinstance(node, ast.Call):
            return self._call(node)
        raise self._wrong(node, "it is not a model.")

    def _call(self, node: ast.Call) -> Callable[[Models], Any]:
        if not (isinstance(node.func, ast.Name) and node.func.id in FUNCTIONS):
            raise self._wrong(node, "no such function.")
        if any(keyword.arg is None for keyword in node.keywords):
            raise self._wrong(node, "** has no meaning here.")
        name, arguments = node.func.id, [self._argument(a) for a in node.args]
        options = {str(keyword.arg): self._argument(keyword.value) for keyword in node.keywords}

        def call(models: Models) -> Any:
            from sculpt import composition  # torch is loaded with it: not for a slip in the formula

            given = {key: option(models) for key, option in options.items()}
            return getattr(composition, name)(*(argument(models) for argument in arguments), **given)

        return call

    def _argument(self, node: ast.expr) -> Callable[[Models], Any]:
        if isinstance(node, ast.List | ast.Tuple):
            elements = [self._argument(element) for element in node.elts]
            return lambda models: [element(models) for element in elements]
        try:
            number = ast.literal_eval(node)
        except ValueError:
            return self._model(node)
        if isinstance(number, int | float) and not isinstance(number, bool):
            return lambda models: number
        raise self._wrong(node, "it is neither a number nor a model.")

    def _wrong(self, node: ast.expr, what: str) -> ValueError:
        part = ast.get_source_segment(self.text, node) or self.text
        models = "models" if self.known is None else f"the models {', '.join(self.known)}"
        return ValueError(
            f"Cannot read {part!r} in the formula {self.text!r}: {what} Expected {models} joined by |, & and -, parentheses, and "
            f"{', '.join(FUNCTIONS)}."
        )


def compose(text: str, models: Models) -> Any:
    """The composition that a text names.

    Args:
        text: for example ``"a & b"``.
        models: by name.
    """
    return TextFormula(text, models).compose(models)
