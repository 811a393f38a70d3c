"""Which student value is compared with which teacher value.

A mapping is explicit in the end: one ``Match`` for every pair of module calls. Patterns are a way
of writing many at once: ``*`` stands for one path segment, and the matches of both sides pair in
natural order (numbers as numbers).
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from fxdistill.errors import CountError, OptionError, PathError, PortError, did_you_mean
from fxdistill.losses import Loss
from fxdistill.taps import Tap

_PORT = re.compile(r"(output|input)(\[\d+\]|\.\w+)?")


@dataclass(frozen=True)
class Match:
    """Compare one value of the student with one of the teacher.

    ``student`` and ``teacher`` are module paths or patterns; ``path@k`` is the k-th further call of
    a module that runs more than once. A port is ``"output"`` (of a tuple, dict or dataclass: its
    first tensor), ``"output[i]"``, ``"output.field"``, ``"input"`` or ``"input[i]"``. ``loss`` is a
    name or a callable ``(student, teacher, weights) -> scalar``. ``project`` maps the student's
    value to the teacher's width: a module.
    """

    student: str | None = None
    teacher: str | None = None
    loss: str | Callable[..., Tensor] | None = None
    weight: float = 1.0
    project: str | nn.Module | None = None
    student_port: str = "output"
    teacher_port: str = "output"


@dataclass(frozen=True)
class Pair:
    """A resolved match: two taps."""

    student: Tap
    teacher: Tap
    loss: str | Loss | None
    weight: float
    project: str | nn.Module | None


Mapped = Mapping[str, str | Match] | Sequence[Match] | None


def as_matches(mapping: Mapped) -> list[Match]:
    """The mapping in any of its forms, as a list."""
    if mapping is None:
        return []
    if isinstance(mapping, Mapping):
        return [_from_item(student, value) for student, value in mapping.items()]
    for entry in mapping:
        if not isinstance(entry, Match) or entry.student is None or entry.teacher is None:
            raise OptionError(f"a list mapping holds Match(student, teacher, ...), not {entry!r}")
    return list(mapping)


def _from_item(student: str, value: Any) -> Match:
    if isinstance(value, str):
        return Match(student, value)
    if isinstance(value, Match):
        if value.student not in (None, student):
            raise OptionError(
                f"mapping key {student!r} holds a Match for student {value.student!r}: in the dict "
                "form the key is the student"
            )
        if value.teacher is None:
            raise OptionError(f"mapping[{student!r}] names no teacher: Match(teacher=...)")
        return replace(value, student=student)
    raise OptionError(f"mapping[{student!r}] is a teacher path or a Match, not {value!r}")


def resolve_pairs(student: nn.Module, teacher: nn.Module, mapping: Mapped) -> list[Pair]:
    """Expand patterns to explicit pairs, in order.

    Raises PathError for a path that does not exist, naming the nearest that do, and for one module
    under two paths; CountError where the two sides of a pattern match different numbers of modules;
    PortError for an unknown port.
    """
    s_paths, t_paths = module_names(student), module_names(teacher)
    pairs = []
    for match in as_matches(mapping):
        assert match.student is not None
        assert match.teacher is not None
        s_taps = _expand(match.student, match.student_port, s_paths, "student")
        t_taps = _expand(match.teacher, match.teacher_port, t_paths, "teacher")
        if len(s_taps) != len(t_taps):
            raise CountError(_unequal(match, s_taps, t_taps))
        pairs += [
            Pair(s, t, match.loss, match.weight, match.project)
            for s, t in zip(s_taps, t_taps, strict=True)
        ]
    _require_distinct(student, "student", [pair.student for pair in pairs])
    _require_distinct(teacher, "teacher", [pair.teacher for pair in pairs])
    return pairs


def _require_distinct(model: nn.Module, tower: str, taps: list[Tap]) -> None:
    """Two paths to one module would both read the module's first call."""
    first: dict[tuple[int, str, int], str] = {}
    for tap in taps:
        key = (id(model.get_submodule(tap.path)), tap.port, tap.call)
        if (other := first.setdefault(key, tap.path)) != tap.path:
            raise PathError(
                f"{tower} paths {other!r} and {tap.path!r} are one module, and both mean its call "
                f"{tap.call}. Name its further calls: {other + '@1'!r}, {other + '@2'!r}, ..."
            )


def module_names(module: nn.Module) -> list[str]:
    """The paths of all submodules of ``module``, in order: what a mapping can name."""
    return [name for name, _ in module.named_modules(remove_duplicate=False) if name]


def natural(path: str) -> list[tuple[int, int | str]]:
    """A sort key under which ``layers.10`` comes after ``layers.9``."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in re.split(r"(\d+)", path)]


def _expand(pattern: str, port: str, paths: list[str], tower: str) -> list[Tap]:
    if not _PORT.fullmatch(port):
        raise PortError(
            f"{tower}_port={port!r}: a port is 'output', 'output[i]', 'output.field', 'input' or "
            "'input[i]'"
        )
    path, at, call = pattern.partition("@")
    if at and not call.isdigit():
        raise PathError(
            f"{tower} path {pattern!r}: after @ comes the number of the call, as in 'a@1'"
        )
    if "*" in path:
        regex = re.compile(re.escape(path).replace(r"\*", r"[^.]+"))
        found = sorted((p for p in paths if regex.fullmatch(p)), key=natural)
    else:
        found = [path] if path in paths else []
    if not found:
        raise PathError(
            f"no module of the {tower} matches {pattern!r}. Nearest: {did_you_mean(path, paths)}. "
            f"fxdistill.module_names({tower}) lists them all."
        )
    return [Tap(p, port, int(call or 0)) for p in found]


def _unequal(match: Match, s_taps: list[Tap], t_taps: list[Tap]) -> str:
    return (
        f"student {match.student!r} matches {len(s_taps)} modules ({_ends(s_taps)}) and teacher "
        f"{match.teacher!r} {len(t_taps)} ({_ends(t_taps)}). Both sides of a pattern must match "
        "equally many; name the pairs, or a pattern that selects as many on both sides."
    )


def _ends(taps: Iterable[Tap]) -> str:
    names = [str(tap) for tap in taps]
    return names[0] if len(names) == 1 else f"{names[0]} ... {names[-1]}"
