"""Patterns: one line that stands for many matches.

``*`` stands for one path segment (or a part of one), ``**`` for any number of segments, and ``{i}``
for a number that the other side may compute with: ``"layers.{i}.mlp": "layers.{2*i+1}.mlp"``. For
each value of the variables in braces, the paths that ``*`` and ``**`` match on the two sides are
paired in natural order (``layers.10`` after ``layers.9``).
"""

import ast
import operator
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property

from fxdistill.errors import PatternError

_TOKEN = re.compile(r"\{[^{}]*\}|\*\*|\*|[^{}*]+|[{}]")
_COMPUTED = "fxdistill_computed_"  # prefix of regex groups that no variable's name begins with

Binding = tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Pattern:
    """One side of a match. ``call`` is the number after ``@``."""

    path: str
    call: int = 0
    tower: str = "student"

    @classmethod
    def parse(cls, text: str, tower: str) -> "Pattern":
        """Parse and check ``text``; raises PatternError where it is not a pattern."""
        path, at, call = text.partition("@")
        if at and not call.isdigit():
            raise PatternError(
                f"{tower} path {text!r}: after @ comes the number of the call, as in 'a@1'"
            )
        if not path.strip() or any(not segment.strip() for segment in path.split(".")):
            raise PatternError(
                f"{tower} path {text!r} is empty or has an empty segment: write the path of a "
                "module, as in 'model.layers.0.mlp', or a pattern, as in 'model.layers.*.mlp'"
            )
        pattern = cls(path, int(call or 0), tower)
        for expression in pattern.expressions:
            _check_expression(expression, text, tower)
        if any("**" in segment and segment != "**" for segment in path.split(".")):
            raise PatternError(
                f"{tower} path {text!r}: ** stands for whole segments, as in 'model.**.mlp'; * for "
                "a part of one"
            )
        if {"{", "}"} & set(_TOKEN.findall(path)):
            raise PatternError(f"{tower} path {text!r}: a brace is not closed, as in {{i}}")
        return pattern

    @cached_property
    def expressions(self) -> tuple[str, ...]:
        """The expressions in braces."""
        return tuple(
            t[1:-1].strip() for t in _TOKEN.findall(self.path) if len(t) > 1 and t[0] == "{"
        )

    @property
    def is_plain(self) -> bool:
        """Whether this is a path without ``*`` and braces."""
        return "*" not in self.path and "{" not in self.path

    @property
    def names(self) -> set[str]:
        """The variables of all expressions."""
        return set().union(*(_names(e) for e in self.expressions))

    @property
    def bare(self) -> set[str]:
        """The variables that stand alone in braces somewhere: a matching path gives their value."""
        return {e for e in self.expressions if e.isidentifier()}

    def found(self, paths: Collection[str], known: Mapping[str, int]) -> dict[Binding, list[str]]:
        """The matching paths, in the order of ``paths``, for each binding of the variables.

        A variable in ``known`` has the value given there; any other takes the number that matches.
        """
        if self.is_plain:
            return {tuple(sorted(known.items())): [self.path]} if self.path in paths else {}
        regex = re.compile(self._regex(known))
        result: dict[Binding, list[str]] = {}
        for path in paths:
            if (match := regex.fullmatch(path)) is None:
                continue
            groups = {name: int(number) for name, number in match.groupdict().items()}
            binding = {**known, **{k: v for k, v in groups.items() if k in self.bare}}
            computed = [number for name, number in groups.items() if name not in self.bare]
            wanted = [self._value(e, binding) for e in self.expressions if not e.isidentifier()]
            if not known and computed != wanted:
                continue
            result.setdefault(tuple(sorted(binding.items())), []).append(path)
        return result

    def _regex(self, known: Mapping[str, int]) -> str:
        parts, seen, computed = [], set(known), 0
        for found in _TOKEN.finditer(self.path):
            token, around = found[0], self.path[: found.start()][-1:] + self.path[found.end() :][:1]
            if token == "**":
                parts.append(".*")
            elif token == "*":  # part of a segment may be empty, a whole segment may not
                parts.append("[^.]+" if not around.strip(".") else "[^.]*")
            elif token[0] != "{":
                parts.append(re.escape(token))
            elif known:
                parts.append(str(self._value(token[1:-1].strip(), known)))
            elif (expression := token[1:-1].strip()).isidentifier():
                again = expression in seen
                parts.append(f"(?P={expression})" if again else rf"(?P<{expression}>\d+)")
                seen.add(expression)
            else:
                parts.append(rf"(?P<{_COMPUTED}{computed}>\d+)")
                computed += 1
        # `**` may stand for no segment: then its dot goes as well.
        return "".join(parts).replace(r".*\.", r"(?:.*\.)?").replace(r"\..*", r"(?:\..*)?")

    def _value(self, expression: str, known: Mapping[str, int]) -> int:
        try:
            return evaluate(expression, known)
        except ZeroDivisionError:
            raise PatternError(
                f"{self.tower} path {self.path!r}: {{{expression}}} divides by zero for "
                f"{in_words(tuple(known.items()))}. Write an expression that holds for every "
                "number that is matched."
            ) from None

    def filled(self, known: Mapping[str, int]) -> str:
        """The pattern with values in place of its expressions, for messages."""

        def fill(token: str) -> str:
            return str(self._value(token[1:-1].strip(), known)) if token[0] == "{" else token

        return "".join(map(fill, _TOKEN.findall(self.path)))

    def range(self, paths: Collection[str]) -> str:
        """The range of numbers that ``paths`` have in place of the last braces, for messages."""
        stars = {"*": "[^.]*", "**": ".*"}
        tokens = _TOKEN.findall(self.path)
        parts = [r"(\d+)" if t[0] == "{" else stars.get(t, re.escape(t)) for t in tokens]
        found = (re.fullmatch("".join(parts), path) for path in paths)
        numbers = sorted({int(match.groups()[-1]) for match in found if match is not None})
        return f"there are {numbers[0]} to {numbers[-1]}" if len(numbers) > 1 else "there is none"


def in_words(binding: Binding) -> str:
    """The values of the variables, for messages."""
    return ", ".join(f"{name}={value}" for name, value in binding)


def natural(path: str) -> list[tuple[int, int | str]]:
    """A sort key under which ``layers.10`` comes after ``layers.9``."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in re.split(r"(\d+)", path)]


_OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}


def evaluate(expression: str, values: Mapping[str, int]) -> int:
    """The value of an index expression: names, whole numbers, ``+ - * // %``, parentheses."""

    def value(node: ast.expr) -> int:
        if isinstance(node, ast.Constant):
            return int(node.value)  # type: ignore[arg-type] # _check_expression let whole numbers through
        if isinstance(node, ast.Name):
            return values[node.id]
        if isinstance(node, ast.UnaryOp):
            return -value(node.operand)
        assert isinstance(node, ast.BinOp)
        result: int = _OPERATORS[type(node.op)](value(node.left), value(node.right))
        return result

    return value(ast.parse(expression, mode="eval").body)


def _names(expression: str) -> set[str]:
    return {n.id for n in ast.walk(ast.parse(expression, mode="eval")) if isinstance(n, ast.Name)}


def _check_expression(expression: str, text: str, tower: str) -> None:
    try:
        tree = ast.parse(expression, mode="eval").body
    except SyntaxError:
        tree = None
    allowed = (ast.BinOp, ast.UnaryOp, ast.USub, ast.Name, ast.Load, ast.Constant, *_OPERATORS)
    for node in [None] if tree is None else ast.walk(tree):
        number = not isinstance(node, ast.Constant) or type(node.value) is int
        if not isinstance(node, allowed) or not number:
            raise PatternError(
                f"{tower} path {text!r}: {{{expression}}} is no index expression. Whole numbers, "
                "names, + - * // % and parentheses are, as in {i} or {2*i+1}."
            )
