"""Resolve a mapping in any of its forms to explicit matches, or raise all of its errors at once."""

import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

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
from fxdistill.mapping.attends import attention_problems
from fxdistill.mapping.match import Match
from fxdistill.mapping.matches import Matches, parse_entries
from fxdistill.mapping.patterns import Binding, Pattern, in_words, natural
from fxdistill.mapping.teachers import read_teachers
from fxdistill.models.tap import Tap, Tower, module_names, port_text

PORT = re.compile(r"(output|input)(\[\d+\]|\.\w+)*|attention(\.(q|k|v|heads))?")
_SHOWN = 6

ModulePaths = Mapping[str, Collection[str]]  # by tower


def resolve(student: nn.Module, teacher: Any, mapping: object) -> Matches:
    """Expand a mapping in any of its forms to explicit matches, in order.

    ``teacher`` is what ``wrap`` takes: a model, several in a list or a dict by name, or ``None``.
    All errors are raised together: PathError for a path that no module has, with the nearest that
    exist; CountError where the two sides of a pattern match different numbers of modules;
    PatternError for a text that is no pattern; PortError for an unknown port; DuplicateError where
    two entries claim one student value; OptionError for an entry that is not a match.
    """
    teachers = read_teachers(teacher)
    matches, problems = parse_entries(mapping)
    known: dict[Tower | None, Collection[str]] = {}
    found: list[tuple[Match, Match]] = []
    groups: dict[Tower | None, list[tuple[Match, Match]]] = {}
    for match in matches:
        before = len(problems)
        tower = gather(problems, teachers.tower_of, match)
        if len(problems) > before:
            continue
        for name, model in ((None, student), (tower, teachers.models.get(tower or ""))):
            if name not in known and model is not None:
                known[name] = _paths(model)
        paths = {"student": known[None], "teacher": known[tower]}
        pairs = [(match, pair) for pair in gather(problems, _expand, match, paths) or ()]
        found += pairs
        groups.setdefault(tower, []).extend(pairs)
    for group in groups.values():
        problems += _claimed_twice(group)
    problems += [
        DuplicateError(f"of='self': {str(m.student)!r} would be compared with itself")
        for _, m in groups.get(None, ())
        if tap_of(m, "student") == tap_of(m, "teacher")
    ]
    problems += _of_model(student, "student", [pair for _, pair in found])
    for tower, group in groups.items():
        model = student if tower is None else teachers.models[tower]
        problems += _of_model(model, "teacher", [pair for _, pair in group])
    raise_together(problems)
    notes = mapping.notes if isinstance(mapping, Matches) else ()
    return Matches([pair for _, pair in found], notes)


def _paths(model: nn.Module) -> Collection[str]:
    """The paths of a model's modules.

    They are keys of a dict: a lookup takes constant time, and patterns match in natural order.
    """
    return dict.fromkeys(sorted(module_names(model), key=natural)).keys()


def _of_model(model: nn.Module, side: str, pairs: list[Match]) -> list[FxDistillError]:
    taps = [tap_of(pair, side) for pair in pairs]
    return [
        *_one_module_twice(model, side, taps),
        *_one_name_twice(side, taps),
        *attention_problems(model, side, taps),
    ]


def tap_of(match: Match, tower: str) -> Tap:
    """The value that an explicit match reads in ``tower``."""
    path, _, call = str(getattr(match, tower)).partition("@")
    port = getattr(match, f"{tower}_port")
    return Tap(path, port_text(port), int(call or 0), None if isinstance(port, str) else port)


def _expand(match: Match, paths: ModulePaths) -> list[Match]:
    for tower in ("student", "teacher"):
        port = getattr(match, f"{tower}_port")
        if not (PORT.fullmatch(port) if isinstance(port, str) else callable(port)):
            raise PortError(
                f"{tower}_port={port!r}: a port is 'output', 'output[i]', 'output.field', "
                "'input', 'input[i]' or 'input.name'; of attention 'attention', 'attention.q', "
                "'attention.k', 'attention.v' or 'attention.heads'; or a callable (module, args, "
                "kwargs, output) -> tensor"
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
        if other.names <= other.bare and not other.found(paths[other.tower], {}):
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


def _counterpart(side: Pattern, known: dict[str, int], paths: ModulePaths) -> list[str]:
    found = side.found(paths[side.tower], known)
    return [path for group in found.values() for path in group]


def _at(path: str, call: int) -> str:
    return f"{path}@{call}" if call else path


def _claimed_twice(found: list[tuple[Match, Match]]) -> list[FxDistillError]:
    """The errors where entries claim one student value by mistake.

    A student value may be matched again on purpose, by explicit paths or with another loss. Two
    patterns that give it different teacher values, or a pair that occurs twice, are mistakes.
    """
    first: dict[Tap, list[tuple[Match, Match]]] = {}
    problems: dict[tuple[int, int], FxDistillError] = {}
    for source, pair in found:
        earlier = first.setdefault(tap_of(pair, "student"), [])
        for other, before in earlier:
            text = _conflict(source, pair, other, before)
            if text is not None:
                problems.setdefault((id(other), id(source)), DuplicateError(text))
        earlier.append((source, pair))
    return list(problems.values())


def _conflict(source: Match, pair: Match, other: Match, before: Match) -> str | None:
    """The message for two entries that claim one student value; ``None`` where both may do so."""
    if replace(before, weight=pair.weight) == pair:
        return (
            f"student {pair.student!r} is matched with teacher {pair.teacher!r} twice, with the "
            f"same loss, by {other.student!r} and {source.student!r}: remove one of them, or "
            "give it another loss."
        )
    texts = (str(t) for m in (source, other) for t in (m.student, m.teacher))
    patterns = any("*" in t or "{" in t for t in texts)
    if not patterns or tap_of(before, "teacher") == tap_of(pair, "teacher"):
        return None
    if other is source:
        return (
            f"{source.student!r} -> {source.teacher!r} claims student {pair.student!r} for teacher "
            f"{before.teacher!r} and {pair.teacher!r}. Let it match one teacher, or name the pairs "
            "by their paths if several are meant."
        )
    return (
        f"{other.student!r} and {source.student!r} both claim student {pair.student!r}, for "
        f"teacher {before.teacher!r} and {pair.teacher!r}. Narrow one of them; or name both "
        "pairs by their paths if both are meant."
    )


def _one_module_twice(model: nn.Module, tower: str, taps: list[Tap]) -> list[FxDistillError]:
    """The errors where two paths lead to one module: both would read its first call."""
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


def _one_name_twice(tower: str, taps: list[Tap]) -> list[FxDistillError]:
    """The errors where two functions of one name are ports of one module: a port is its name."""
    first: dict[Tap, Tap] = {}
    return [
        PortError(
            f"{tower} {tap.path!r} has two ports called {tap.port!r}, which are different "
            "functions: give each a name of its own (def, or __name__)."
        )
        for tap in taps
        if first.setdefault(tap, tap).reads != tap.reads
    ]


# ---- messages


def _missing(side: Pattern, paths: ModulePaths, binding: Binding | None = None) -> PathError:
    asked = side.path if binding is None else side.filled(dict(binding))
    near = did_you_mean(asked, paths[side.tower])
    return PathError(
        f"no module of the {side.tower} matches {side.path!r}. Nearest: {near}. "
        f"fxdistill.module_names({side.tower}) lists them all."
    )


def _unbound(sides: list[Pattern], names: set[str]) -> str:
    student, teacher = (f"{side.path!r}" for side in sides)
    every = " and ".join(f"{{{name}}}" for name in sorted(names))
    return (
        f"{student} -> {teacher}: no side gives the value of {every} by itself. Write every name "
        "bare on one side, as in 'layers.{i}.mlp' -> 'layers.{2*i+1}.mlp'."
    )


def _out_of_range(
    match: Match,
    source: Pattern,
    other: Pattern,
    counterparts: Mapping[Binding, list[str]],
    paths: ModulePaths,
) -> str:
    missing = [b for b, found in counterparts.items() if not found]
    fitting = [b for b, found in counterparts.items() if found]
    asked = [f"{other.filled(dict(b))!r} for {in_words(b)}" for b in missing]
    more = f" and {len(asked) - _SHOWN} more" if len(asked) > _SHOWN else ""
    near = did_you_mean(other.filled(dict(missing[0])), paths[other.tower])
    fits = ", ".join(in_words(b) for b in fitting[:_SHOWN])
    return (
        f"{match.student!r} -> {match.teacher!r} matches by half: the {other.tower} has no "
        f"{', '.join(asked[:_SHOWN])}{more}; {other.range(paths[other.tower])}. Nearest: {near}. "
        f"It fits for {fits}{' ...' if len(fitting) > _SHOWN else ''}: name those pairs one by "
        "one, change the expression, or let fxdistill.match(student, teacher) choose the layers."
    )


def _unequal(
    sides: list[Pattern], source: Pattern, known: dict[str, int], mine: list[str], theirs: list[str]
) -> str:
    by_tower = {source.tower: mine, ("teacher" if source is sides[0] else "student"): theirs}
    s, t = by_tower["student"], by_tower["teacher"]
    where = f", for {in_words(tuple(known.items()))}" if known else ""
    advice = (
        "Both sides of a pattern must match equally many: name the pairs, say which with {i}, as "
        "in 'layers.{i}.mlp' -> 'layers.{2*i+1}.mlp', or let fxdistill.match(student, teacher) "
        "choose the layers."
    )
    if known and any("{" not in side.path for side in sides):
        advice = (
            "What * matches is paired for each value in braces: write {i} on both sides, or * on "
            "both."
        )
    return (
        f"student {sides[0].path!r} matches {len(s)} modules ({_ends(s)}) and teacher "
        f"{sides[1].path!r} {len(t)} ({_ends(t)}){where}. {advice}"
    )


def _ends(paths: list[str]) -> str:
    return paths[0] if len(paths) == 1 else f"{paths[0]} ... {paths[-1]}"
