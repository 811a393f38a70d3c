"""Patterns: many matches in one line, expanded to explicit ones.

``*`` stands for one path segment (or a part of one), ``**`` for any number of them, ``{i}`` for a
number that the other side may compute with: ``"layers.{i}.mlp": "layers.{2*i+1}.mlp"``. What ``*``
and ``**`` match pairs in natural order (numbers as numbers), for each value of the ``{}``.
"""

import ast
import operator
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from torch import nn

from fxdistill.errors import (
    CountError,
    DuplicateError,
    FxDistillError,
    PathError,
    PatternError,
    PortError,
    did_you_mean,
    gather,
    raise_together,
)
from fxdistill.matching import Match, Matches, as_matches, module_names
from fxdistill.taps import Tap

PORT = re.compile(r"output(\[\d+\]|\.\w+)?|input(\[\d+\]|\.\w+)?")
_TOKEN = re.compile(r"\{[^{}]*\}|\*\*|\*|[^{}*]+|[{}]")
_SHOWN = 6

Binding = tuple[tuple[str, int], ...]
Paths = Mapping[str, Collection[str]]  # of each tower


@dataclass(frozen=True)
class Pattern:
    """One side of a match. ``call`` is what follows ``@``."""

    path: str
    call: int = 0
    tower: str = "student"

    @classmethod
    def parse(cls, text: str, tower: str) -> "Pattern":
        """Check and take apart; raises PatternError where ``text`` is no pattern."""
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
        if {"{", "}"} & set(_TOKEN.findall(path)):
            raise PatternError(f"{tower} path {text!r}: a brace is not closed, as in {{i}}")
        return pattern

    @cached_property
    def expressions(self) -> tuple[str, ...]:
        """What stands in braces."""
        return tuple(
            t[1:-1].strip() for t in _TOKEN.findall(self.path) if len(t) > 1 and t[0] == "{"
        )

    @property
    def is_plain(self) -> bool:
        """Whether this is simply a path."""
        return "*" not in self.path and "{" not in self.path

    @property
    def names(self) -> set[str]:
        """The variables that appear."""
        return set().union(*(_names(e) for e in self.expressions))

    @property
    def bare(self) -> set[str]:
        """The variables that stand alone in braces somewhere: matching gives their value."""
        return {e for e in self.expressions if e.isidentifier()}

    def found(self, paths: Collection[str], known: Mapping[str, int]) -> dict[Binding, list[str]]:
        """The paths that match, in the order of ``paths``, by the values of the variables.

        Variables in ``known`` have that value; the others take whatever number matches.
        """
        if self.is_plain:
            return {tuple(sorted(known.items())): [self.path]} if self.path in paths else {}
        regex = re.compile(self._regex(known))
        result: dict[Binding, list[str]] = {}
        for path in paths:
            if (match := regex.fullmatch(path)) is None:
                continue
            binding = {
                **known,
                **{k: int(v) for k, v in match.groupdict().items() if k in self.bare},
            }
            computed = {k: v for k, v in match.groupdict().items() if k.startswith("_")}
            wanted = [evaluate(e, binding) for e in self.expressions if not e.isidentifier()]
            if not known and [int(v) for v in computed.values()] != wanted:
                continue
            result.setdefault(tuple(sorted(binding.items())), []).append(path)
        return result

    def _regex(self, known: Mapping[str, int]) -> str:
        parts, seen, computed = [], set(known), 0
        for token in _TOKEN.findall(self.path):
            if token == "**":
                parts.append(".*")
            elif token == "*":
                parts.append(r"[^.]+")
            elif token[0] != "{":
                parts.append(re.escape(token))
            elif known:
                parts.append(str(evaluate(token[1:-1].strip(), known)))
            elif (expression := token[1:-1].strip()).isidentifier():
                parts.append(
                    f"(?P={expression})" if expression in seen else rf"(?P<{expression}>\d+)"
                )
                seen.add(expression)
            else:
                parts.append(rf"(?P<_{computed}>\d+)")
                computed += 1
        # `**` stands for no segment, too, and then takes its dot with it.
        return "".join(parts).replace(r".*\.", r"(?:.*\.)?").replace(r"\..*", r"(?:\..*)?")

    def filled(self, known: Mapping[str, int]) -> str:
        """The pattern with values in place of braces, for messages."""
        fill = lambda t: str(evaluate(t[1:-1].strip(), known)) if t[0] == "{" else t  # noqa: E731
        return "".join(map(fill, _TOKEN.findall(self.path)))


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
    """An index expression over whole numbers: names, numbers, ``+ - * // %``, parentheses."""

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

    try:
        return value(ast.parse(expression, mode="eval").body)
    except ZeroDivisionError:
        given = _values(tuple(values.items()))
        raise PatternError(f"{{{expression}}} divides by zero for {given}") from None


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


def resolve(student: nn.Module, teacher: nn.Module, mapping: object) -> Matches:
    """Expand a mapping in any of its forms to explicit matches, in order.

    All that is wrong is reported together: PathError for what does not exist, naming the nearest
    that does; CountError where the two sides of a pattern match different numbers of modules;
    PatternError for what is no pattern; PortError for an unknown port; DuplicateError where two
    entries claim one student value.
    """
    models = {"student": student, "teacher": teacher}
    # The keys of a dict: looked up at once, and in natural order for patterns.
    paths = {
        tower: dict.fromkeys(sorted(module_names(model), key=natural)).keys()
        for tower, model in models.items()
    }
    problems: list[FxDistillError] = []
    found: list[tuple[Match, Match]] = []
    for match in as_matches(mapping):
        found += [(match, pair) for pair in gather(problems, _expand, match, paths) or ()]
    problems += _claimed_twice(found)
    for tower, model in models.items():
        problems += _one_module_twice(model, tower, [tap_of(pair, tower) for _, pair in found])
    raise_together(problems)
    notes = mapping.notes if isinstance(mapping, Matches) else ()
    return Matches([pair for _, pair in found], notes)


def tap_of(match: Match, tower: str) -> Tap:
    """The value that an explicit match reads in ``tower``."""
    path, _, call = str(getattr(match, tower)).partition("@")
    return Tap(path, getattr(match, f"{tower}_port"), int(call or 0))


def _expand(match: Match, paths: Paths) -> list[Match]:
    for tower in ("student", "teacher"):
        if not PORT.fullmatch(port := getattr(match, f"{tower}_port")):
            raise PortError(
                f"{tower}_port={port!r}: a port is 'output', 'output[i]', 'output.field', "
                "'input', 'input[i]' or 'input.name'"
            )
    sides = [Pattern.parse(str(getattr(match, t)), t) for t in ("student", "teacher")]
    names = sides[0].names | sides[1].names
    source = next((side for side in sides if names <= side.bare), None)
    if source is None:
        raise PatternError(_unbound(sides, names))
    other = sides[1] if source is sides[0] else sides[0]
    groups = source.found(paths[source.tower], {})
    if not groups:
        problems: list[FxDistillError] = [_missing(source, paths)]
        if not other.names and not other.found(paths[other.tower], {}):
            problems.append(_missing(other, paths))
        raise_together(problems)
    counterparts = {b: _counterpart(other, dict(b), paths) for b in groups}
    if all(not found for found in counterparts.values()):
        raise _missing(other, paths, next(iter(groups)))
    pairs: list[tuple[str, str]] = []
    for binding, mine in groups.items():
        theirs = counterparts[binding]
        if not theirs:
            raise PathError(_out_of_range(match, source, other, counterparts, paths))
        if len(mine) != len(theirs):
            raise CountError(_unequal(sides, source, dict(binding), mine, theirs))
        pairs += zip(mine, theirs, strict=True)
    swap = source is sides[1]
    return [
        replace(match, student=_at(s, sides[0].call), teacher=_at(t, sides[1].call))
        for s, t in ((pair[::-1] if swap else pair) for pair in pairs)
    ]


def _counterpart(side: Pattern, known: dict[str, int], paths: Paths) -> list[str]:
    found = side.found(paths[side.tower], known)
    return [path for group in found.values() for path in group]


def _at(path: str, call: int) -> str:
    return f"{path}@{call}" if call else path


def _claimed_twice(found: list[tuple[Match, Match]]) -> list[FxDistillError]:
    """A student value may be matched again on purpose: by explicit paths, or by another loss.

    Two patterns that meet in one value with different teachers, and the same pair twice, are not on
    purpose.
    """
    first: dict[Tap, list[tuple[Match, Match]]] = {}
    problems: dict[tuple[int, int], FxDistillError] = {}
    for source, pair in found:
        earlier = first.setdefault(tap_of(pair, "student"), [])
        for other, before in earlier:
            same = replace(before, weight=pair.weight, reason="") == replace(pair, reason="")
            from_pattern = source.student != pair.student or other.student != before.student
            elsewhere = tap_of(before, "teacher") != tap_of(pair, "teacher")
            if same or (from_pattern and elsewhere):
                problems.setdefault(
                    (id(other), id(source)),
                    DuplicateError(
                        f"{other.student!r} and {source.student!r} both claim student "
                        f"{pair.student!r}, for teacher {before.teacher!r} and {pair.teacher!r}. "
                        "Narrow one of them; or name both pairs by their paths if both are meant."
                    ),
                )
        earlier.append((source, pair))
    return list(problems.values())


def _one_module_twice(model: nn.Module, tower: str, taps: list[Tap]) -> list[FxDistillError]:
    """Two paths to one module would both read the module's first call."""
    first: dict[tuple[int, str, int], str] = {}
    problems: list[FxDistillError] = []
    for tap in taps:
        key = (id(model.get_submodule(tap.path)), tap.port, tap.call)
        if (other := first.setdefault(key, tap.path)) != tap.path:
            problems.append(
                PathError(
                    f"{tower} paths {other!r} and {tap.path!r} are one module, and both mean its "
                    f"call {tap.call}. Name its further calls: {other + '@1'!r}, {other + '@2'!r}, "
                    "..."
                )
            )
    return problems


# ---- messages


def _missing(side: Pattern, paths: Paths, binding: Binding | None = None) -> PathError:
    asked = side.path if binding is None else side.filled(dict(binding))
    near = did_you_mean(asked, paths[side.tower])
    return PathError(
        f"no module of the {side.tower} matches {side.path!r}. Nearest: {near}. "
        f"fxdistill.module_names({side.tower}) lists them all."
    )


def _unbound(sides: list[Pattern], names: set[str]) -> str:
    student, teacher = (f"{side.path!r}" for side in sides)
    unknown = names - (sides[0].bare | sides[1].bare) or names
    loose = " and ".join(f"{{{name}}}" for name in sorted(unknown))
    return (
        f"{student} -> {teacher}: neither side gives the value of {loose} by itself. Write every "
        "name bare on one side, as in 'layers.{i}.mlp' -> 'layers.{2*i+1}.mlp'."
    )


def _out_of_range(
    match: Match,
    source: Pattern,
    other: Pattern,
    counterparts: Mapping[Binding, list[str]],
    paths: Paths,
) -> str:
    missing = [b for b, found in counterparts.items() if not found]
    fitting = [b for b, found in counterparts.items() if found]
    asked = [f"{other.filled(dict(b))!r} for {_values(b)}" for b in missing]
    more = f" and {len(asked) - _SHOWN} more" if len(asked) > _SHOWN else ""
    near = did_you_mean(other.filled(dict(missing[0])), paths[other.tower])
    fits = ", ".join(_values(b) for b in fitting[:_SHOWN])
    return (
        f"{match.student!r} -> {match.teacher!r} matches by half: the {other.tower} has no "
        f"{', '.join(asked[:_SHOWN])}{more}. Nearest: {near}. It fits for {fits}"
        f"{' ...' if len(fitting) > _SHOWN else ''}: name those pairs one by one, "
        "change the expression, or let fxdistill.match(student, teacher) choose the layers."
    )


def _values(binding: Binding) -> str:
    return ", ".join(f"{name}={value}" for name, value in binding)


def _unequal(
    sides: list[Pattern], source: Pattern, known: dict[str, int], mine: list[str], theirs: list[str]
) -> str:
    by_tower = {source.tower: mine, ("teacher" if source is sides[0] else "student"): theirs}
    s, t = by_tower["student"], by_tower["teacher"]
    where = f" (for {_values(tuple(known.items()))})" if known else ""
    return (
        f"student {sides[0].path!r} matches {len(s)} modules ({_ends(s)}) and teacher "
        f"{sides[1].path!r} {len(t)} ({_ends(t)}){where}. Both sides of a pattern must match "
        "equally many: name the pairs, say which with {i}, as in 'layers.{i}.mlp' -> "
        "'layers.{2*i+1}.mlp', or let fxdistill.match(student, teacher) choose the layers."
    )


def _ends(paths: list[str]) -> str:
    return paths[0] if len(paths) == 1 else f"{paths[0]} ... {paths[-1]}"
