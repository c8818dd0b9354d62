"""Compositions in text, as the command line and the explorer have them: ``"(a | b) - c"``. Nothing is evaluated."""

from __future__ import annotations

import ast
import inspect
import operator
import sys
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

__all__ = ["FUNCTIONS", "TextFormula", "compose"]

FUNCTIONS = ("mixture", "harmonic_mean", "contrast", "posterior", "product", "power_mean")
OPERATORS = {ast.BitOr: operator.or_, ast.BitAnd: operator.and_, ast.Sub: operator.sub}
SIGNS = {ast.UAdd: operator.pos, ast.USub: operator.neg}

LONGEST, DEEPEST = 10_000, 100
"""How many characters a formula may have, and how many parts within each other. The first of ``a & b & c`` is two deep."""

Models = Mapping[str, Any]
T = TypeVar("T")


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
        self._depth = 0
        if len(self.text) > LONGEST:
            raise ValueError(f"The formula {self.text:.40}… has {len(self.text)} characters; expected {LONGEST} at most.")
        try:
            tree = ast.parse(self.text, mode="eval").body
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise ValueError(
                f"The formula {_said(self.text)} is not complete: {getattr(error, 'msg', error) or 'it is nested too deeply'}. "
                "Write for example 'a & b' or '(a | b) - c'."
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
            join = OPERATORS[type(node.op)]
            left, right = self._within(self._model, node, node.left), self._within(self._model, node, node.right)
            return lambda models: join(left(models), right(models))
        if isinstance(node, ast.Name):
            if node.id in FUNCTIONS or (self.known is not None and node.id not in self.known):
                raise self._wrong(node, "no such model.")
            self.names += [] if node.id in self.names else [node.id]
            return operator.itemgetter(node.id)
        if isinstance(node, ast.Call):
            return self._call(node)
        if isinstance(node, ast.BoolOp):
            raise self._wrong(node, "and, or compose nothing: write & (likely under both) or | (either).")
        raise self._wrong(node, "it is not a model.")

    def _call(self, node: ast.Call) -> Callable[[Models], Any]:
        if not (isinstance(node.func, ast.Name) and node.func.id in FUNCTIONS):
            raise self._wrong(node, "no such function.")
        if any(keyword.arg is None for keyword in node.keywords):
            raise self._wrong(node, "** has no meaning here.")
        name, arguments = node.func.id, [self._within(self._argument, node, argument) for argument in node.args]
        options = {str(keyword.arg): self._within(self._argument, node, keyword.value) for keyword in node.keywords}
        if len(options) < len(node.keywords):
            raise self._wrong(node, "an option is there twice.")

        def call(models: Models) -> Any:
            from sculpt import composition  # torch is loaded with it: not for a slip in the formula

            function = getattr(composition, name)
            given = {key: option(models) for key, option in options.items()}
            try:
                bound = inspect.signature(function).bind(*(argument(models) for argument in arguments), **given)
            except TypeError as error:
                raise self._wrong(node, f"{error}.") from None
            return function(*bound.args, **bound.kwargs)

        return call

    def _argument(self, node: ast.expr) -> Callable[[Models], Any]:
        if isinstance(node, ast.List | ast.Tuple):
            elements = [self._within(self._argument, node, element) for element in node.elts]
            return lambda models: [element(models) for element in elements]
        if isinstance(node, ast.UnaryOp | ast.Constant):
            number = self._number(node)
            return lambda models: number
        return self._model(node)

    def _number(self, node: ast.expr) -> float:
        if isinstance(node, ast.UnaryOp) and type(node.op) in SIGNS:
            return SIGNS[type(node.op)](self._within(self._number, node, node.operand))
        value = node.value if isinstance(node, ast.Constant) else None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._wrong(node, "it is neither a number nor a model.")
        if abs(value) > sys.float_info.max:
            raise self._wrong(node, "the number is too large.")
        return value

    def _within(self, read: Callable[[ast.expr], T], node: ast.expr, part: ast.expr) -> T:
        """Read a part of a node."""
        if self._depth == DEEPEST:
            raise self._wrong(node, f"more than {DEEPEST} parts are within each other.")
        self._depth += 1
        found = read(part)
        self._depth -= 1
        return found

    def _wrong(self, node: ast.expr, what: str) -> ValueError:
        part = ast.get_source_segment(self.text, node) or self.text
        models = "models" if self.known is None else f"the models {', '.join(self.known)}"
        return ValueError(
            f"Cannot read {_said(part)} in the formula {_said(self.text)}: {what} Expected {models} joined by |, & and -, parentheses, and "
            f"{', '.join(FUNCTIONS)}."
        )


def _said(text: str) -> str:
    """Text in a message: on one line, and no endless one."""
    return repr(text if len(text) <= 200 else f"{text[:200]}…")


def compose(text: str, models: Models) -> Any:
    """The composition that a text names.

    Args:
        text: for example ``"a & b"``.
        models: by name.
    """
    return TextFormula(text, models).compose(models)
