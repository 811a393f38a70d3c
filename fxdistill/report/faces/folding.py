"""Fold repetitions: runs of equal blocks, and pairs that differ in one number only.

Every face folds with these functions, so all of them show the same rows.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from fxdistill.graph.sections import BESIDE, ITSELF
from fxdistill.report.data import BlockLine, Facts, Pair

_NUMBER = re.compile(r"(?<![^.@\[])\d+(?![^.@:\]])")  # as a whole segment, call or index
_SHOWN = 6


_CLOSE = 0.02  # FLOPs of equal blocks may differ by this fraction, from fusion at their borders


@dataclass(frozen=True)
class Row:
    """A run of equal blocks of a model: ``count`` of them, from index ``first``."""

    label: str
    first: int
    count: int
    parameters: int
    forward: int
    backward: int
    kinds: tuple[str, ...]


@dataclass(frozen=True)
class Fold:
    """Pairs that differ only in one number of their paths.

    ``members`` are indices into the report's pairs. ``numbers`` holds, for each member, the number
    in the student's path and the one in the teacher's; it is empty for a single pair.
    """

    student: str
    teacher: str
    members: tuple[int, ...]
    numbers: tuple[tuple[int, int], ...] = ()


# ---- blocks


def rows(blocks: Sequence[BlockLine]) -> tuple[Row, ...]:
    """The blocks in order, with each run of equal blocks as one row."""
    found: list[Row] = []
    first = 0
    for end in range(1, len(blocks) + 1):
        if end == len(blocks) or not _alike(blocks[first], blocks[end]):
            found.append(_row(blocks[first:end], first))
            first = end
    return tuple(found)


def _alike(a: BlockLine, b: BlockLine) -> bool:
    """Whether two blocks have the same parts and parameters, and about the same forward FLOPs.

    The backward is not compared, because the first block of a model may have less of it.
    """
    same = _form(a.path) == _form(b.path) != a.path
    kinds = [[(_form(path), kind) for path, kind in block.kinds] for block in (a, b)]
    near = abs(a.forward - b.forward) <= _CLOSE * max(a.forward, b.forward)
    return same and kinds[0] == kinds[1] and a.parameters == b.parameters and near


def _row(blocks: Sequence[BlockLine], first: int) -> Row:
    paths = [block.path for block in blocks]
    return Row(
        label=(paths[0] or ITSELF) if len(paths) == 1 else folded(paths),
        first=first,
        count=len(blocks),
        parameters=sum(block.parameters for block in blocks),
        forward=sum(block.forward for block in blocks),
        backward=sum(block.backward for block in blocks),
        kinds=tuple(kind for _, kind in blocks[0].kinds),
    )


# ---- pairs


def folds(pairs: Sequence[Pair]) -> tuple[Fold, ...]:
    """The pairs in order of first appearance, with those that differ in one number folded."""
    groups: dict[object, list[int]] = {}
    for i, pair in enumerate(pairs):
        key = (
            pair.student_model,
            pair.teacher_model,
            _form(pair.student),
            _form(pair.teacher),
            pair.loss,
            pair.weight,
            pair.between,
            pair.student_value,
            pair.teacher_value,
        )
        groups.setdefault(key, []).append(i)
    return tuple(fold for group in groups.values() for fold in _split(pairs, group))


def _split(pairs: Sequence[Pair], group: list[int]) -> list[Fold]:
    """Fold a group of pairs by one number of each path: the one with the most values."""
    ours = [_numbers(pairs[i].student) for i in group]
    theirs = [_numbers(pairs[i].teacher) for i in group]
    at, of = _most_varied(ours), _most_varied(theirs)
    if at is None or of is None:
        return [Fold(pairs[i].student, pairs[i].teacher, (i,)) for i in group]
    parts: dict[object, list[int]] = {}
    for place in range(len(group)):
        rest = (
            ours[place][:at] + ours[place][at + 1 :],
            theirs[place][:of] + theirs[place][of + 1 :],
        )
        parts.setdefault(rest, []).append(place)
    found = []
    for places in parts.values():
        chosen = [pairs[group[place]] for place in places]
        numbers = tuple((ours[place][at], theirs[place][of]) for place in places)
        fold = Fold(
            student=folded([pair.student for pair in chosen]),
            teacher=folded([pair.teacher for pair in chosen]),
            members=tuple(group[place] for place in places),
            numbers=numbers,
        )
        found.append(fold if len(places) > 1 else replace(fold, numbers=()))
    return found


def _most_varied(numbers: Sequence[Sequence[int]]) -> int | None:
    kinds = [len(set(column)) for column in zip(*numbers, strict=True)]
    return kinds.index(max(kinds)) if kinds and max(kinds) > 1 else None


def couples(report: Facts) -> tuple[tuple[str, str], ...]:
    """The names of the models that are compared, as (student, teacher).

    Without pairs: the model called "student" or else the first that learns, and another model.
    """
    found = dict.fromkeys((pair.student_model, pair.teacher_model) for pair in report.pairs)
    if found:
        return tuple(found)
    names = [tower.name for tower in report.towers if tower.name not in BESIDE]
    learning = [t.name for t in report.towers if t.name in names and t.trainable]
    student = "student" if "student" in names else next(iter(learning), "")
    other = next((name for name in names if name != student), "")
    return ((student, other),) if student and other else ()


def models_of(report: Facts) -> tuple[str, ...]:
    """The classes of the models: students first, then their teachers, then any other."""
    named = {tower.name: tower.model for tower in report.towers}
    students, teachers = zip(*couples(report), strict=True) if couples(report) else ((), ())
    order = dict.fromkeys((*students, *teachers, *(n for n in named if n not in BESIDE)))
    return tuple(named[name] for name in order if name in named)


def mesh_of(report: Facts) -> str:
    """The mesh as text: ``dp=4, tp=8``."""
    return ", ".join(f"{name}={count}" for name, count in report.mesh.items())


def blocks_in(report: Facts, tower: str) -> tuple[BlockLine, ...]:
    """The blocks of the model called ``tower``."""
    return next((t.blocks for t in report.towers if t.name == tower), ())


def block_index(blocks: Sequence[BlockLine], path: str) -> int | None:
    """The index of the deepest block that contains a module path (with port or call)."""
    module = re.split(r"[:@]", path)[0]
    holding = [
        i for i, b in enumerate(blocks) if not b.path or f"{module}.".startswith(f"{b.path}.")
    ]
    return max(holding, key=lambda i: len(blocks[i].path), default=None)


# ---- paths


def folded(paths: Sequence[str]) -> str:
    """One text for paths that differ in a number: ``layers.{0..3}.mlp``, ``layers.{1, 4, 6}``."""
    numbers = [_numbers(path) for path in paths]
    at = _most_varied(numbers)
    if at is None:
        return paths[0]
    spans = list(_NUMBER.finditer(paths[0]))[at].span()
    inside = ranges([row[at] for row in numbers])
    return f"{paths[0][: spans[0]]}{{{inside}}}{paths[0][spans[1] :]}"


def gathered(paths: Iterable[str]) -> tuple[str, ...]:
    """Paths in order of first appearance, with those that differ in one number folded."""
    groups: dict[str, list[str]] = {}
    for path in paths:
        groups.setdefault(_form(path), []).append(path)
    return tuple(
        name
        for group in groups.values()
        for name in (group if _varied(group) > 1 else [folded(group)])
    )


def _varied(paths: Sequence[str]) -> int:
    """How many of their numbers differ between paths of one form."""
    columns = zip(*(_numbers(path) for path in paths), strict=True)
    return sum(len(set(column)) > 1 for column in columns)


def ranges(numbers: Iterable[int]) -> str:
    """Numbers in their order, as runs: ``"0..3, 7"``; of many runs, the first and the last."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    parts = [f"{run[0]}..{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs]
    if len(parts) > _SHOWN:
        return f"{', '.join(parts[:3])}, …, {parts[-1]}"
    return ", ".join(parts)


def _form(path: str) -> str:
    """A path with ``#`` in place of its numbers."""
    return _NUMBER.sub("#", path)


def _numbers(path: str) -> tuple[int, ...]:
    return tuple(int(found) for found in _NUMBER.findall(path))
