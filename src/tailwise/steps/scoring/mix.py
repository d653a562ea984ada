"""Mixes of scores: sums such as 0.7*z(cliploss) + 0.3*z(normsim), read without running code."""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from tailwise.errors import UserError

_WORD = re.compile(r"(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?(?!\w)|(?P<name>\w+(?:[.-]\w+)*)")  # numbers, and names
_TOKEN = re.compile(rf"{_WORD.pattern}|\S")
_OPERATORS: dict[type[ast.AST], Callable[..., Any]] = {
    ast.Add: np.add,
    ast.Sub: np.subtract,
    ast.Mult: np.multiply,
    ast.Div: np.divide,
    ast.UAdd: np.positive,
    ast.USub: np.negative,
}
MAX_LENGTH = 2000
Values = npt.NDArray[np.float64] | float


class Mix:
    """An expression of numbers, names of scores, z(NAME), + - * / and brackets. Names may hold hyphens: a minus stands between spaces.

    Attributes:
        text: the expression, with spaces about + - * / alone.
        names: of the scores, in the order of the expression.
        standardised: those that stand in z(NAME).
    """

    def __init__(self, text: str) -> None:
        """Reads the expression; a UserError says what is wrong with it."""
        self.names, self.standardised = list[str](), set[str]()
        try:
            if len(text) > MAX_LENGTH:
                raise ValueError(f"has {len(text):,} characters, more than {MAX_LENGTH:,}")
            self._tree = ast.parse(_WORD.sub(self._coded, text.strip()), mode="eval").body
            with np.errstate(all="ignore"):
                self({name: np.float64(1) for name in self.names}, dict.fromkeys(self.names, (0.0, 1.0)))
            if not self.names:
                raise ValueError("names no score")
        except (SyntaxError, ValueError, OverflowError, RecursionError, MemoryError, ZeroDivisionError) as error:
            why = "cannot be read" if type(error) is not ValueError else str(error)
            raise UserError(
                f"`mix` {text[:80]!r} {why}: use names of scores, z(NAME), numbers, + - * / and brackets, such as "
                "'0.7*z(cliploss) + 0.3*z(normsim)'"
            ) from error
        tokens = (f" {found[0]} " if found[0] in "+-*/" else found[0] for found in _TOKEN.finditer(text))
        self.text = " ".join("".join(tokens).split())

    def _coded(self, found: re.Match[str]) -> str:
        """Return a word as Python reads it: s3 for the fourth name, since names may hold hyphens."""
        name = found["name"]
        if name is None or (name == "z" and found.string[found.end() :].lstrip().startswith("(")):
            return found[0]
        if name not in self.names:
            self.names.append(name)
        return f"s{self.names.index(name)}"

    def __call__(self, values: Mapping[str, Values], moments: Mapping[str, tuple[float, float]]) -> Values:
        """Return the value of each row.

        Args:
            values: of the scores by name: float64 [n].
            moments: mean and standard deviation of those that are standardised.
        """

        def value(node: ast.AST) -> Values:
            match node:
                case ast.Constant(value=float() | int() as number) if (
                    not isinstance(number, bool) and number < math.inf
                ):
                    return float(number)
                case ast.Name(id=code) if code != "z":
                    return values[self.names[int(code[1:])]]
                case ast.Call(func=ast.Name(id="z"), args=[ast.Name(id=code)], keywords=[]) if code != "z":
                    name = self.names[int(code[1:])]
                    self.standardised.add(name)
                    mean, deviation = moments[name]
                    return (values[name] - mean) / deviation
                case ast.BinOp(left=left, op=operator, right=right) if type(operator) in _OPERATORS:
                    return _OPERATORS[type(operator)](value(left), value(right))  # type: ignore[no-any-return]
                case ast.UnaryOp(op=operator, operand=operand) if type(operator) in _OPERATORS:
                    return _OPERATORS[type(operator)](value(operand))  # type: ignore[no-any-return]
            raise ValueError("holds something else")

        return value(self._tree)
