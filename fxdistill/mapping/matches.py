"""``Matches``: which student value is compared with which teacher value.

Every mapping ends up explicit: one ``Match`` for each pair of module calls, in a ``Matches`` that
prints, can be edited like a list or a dict, and can be saved and loaded. A pattern
(``patterns.py``) writes many matches at once; ``match`` (``propose.py``) proposes all of them.
"""

from collections.abc import Iterable, Iterator, Mapping, MutableSequence
from dataclasses import replace
from typing import Any, overload

from rich.console import Console, ConsoleOptions, RenderResult
from rich.padding import Padding
from rich.text import Text

from fxdistill.base.text import text
from fxdistill.errors import FxDistillError, OptionError, did_you_mean, gather
from fxdistill.mapping import match_file
from fxdistill.mapping.match import ACCEPTED, Match
from fxdistill.models.tap import port_text


class Matches(MutableSequence[Match]):
    """A mapping: an editable list of ``Match``, which can also be indexed by the student's path.

    ``matches[0]``, ``matches["model.layers.0.mlp"]``, ``del matches[...]``, ``append``, and
    ``matches["model.layers.0.mlp"] = "model.layers.1.mlp"`` (or a ``Match``) all work. It prints in
    80 columns. ``save`` and ``load`` keep it as TOML or JSON. Where several matches have the same
    student path, the path selects the first of them.
    """

    def __init__(self, matches: Iterable[Match] = (), notes: Iterable[str] = ()) -> None:
        self._matches = [_match(entry) for entry in matches]
        self.notes = tuple(notes)

    def _index(self, key: int | str) -> int:
        if isinstance(key, int):
            return key
        if not isinstance(key, str):
            raise TypeError(f"matches[{key!r}]: a place or the student's path, not {type(key)}")
        for index, match in enumerate(self._matches):
            if match.student == key:
                return index
        near = did_you_mean(key, self.keys())
        raise KeyError(f"no match of student {key!r}. Nearest: {near}.")

    @overload
    def __getitem__(self, key: int | str) -> Match: ...
    @overload
    def __getitem__(self, key: slice) -> "Matches": ...
    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, slice):
            return Matches(self._matches[key], self.notes)
        return self._matches[self._index(key)]

    def __setitem__(self, key: Any, value: Any) -> None:
        if isinstance(key, slice):
            self._matches[key] = [_match(entry) for entry in value]
        elif isinstance(key, str):
            match = _from_item(key, value)
            if key in self.keys():
                self._matches[self._index(key)] = match
            else:
                self._matches.append(match)
        else:
            self._matches[key] = _match(value)

    def __delitem__(self, key: Any) -> None:
        del self._matches[key if isinstance(key, slice) else self._index(key)]

    def __len__(self) -> int:
        return len(self._matches)

    def __iter__(self) -> Iterator[Match]:
        return iter(self._matches)

    def __contains__(self, entry: object) -> bool:
        if isinstance(entry, str):
            return entry in self.keys()
        return any(match == entry for match in self._matches)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Matches) and self._matches == other._matches

    def insert(self, index: int, value: Match) -> None:
        """Insert a match before ``index``."""
        self._matches.insert(index, _match(value))

    def keys(self) -> list[str]:
        """The student path of each match, in order."""
        return [str(match.student) for match in self._matches]

    def items(self) -> list[tuple[str, Match]]:
        """``(student path, match)``, in order."""
        return list(zip(self.keys(), self._matches, strict=True))

    def save(self, path: Any) -> None:
        """Write the matches to ``path`` (``.toml`` or ``.json``), whole or not at all.

        Raises MappingFileError where a loss or a projection is an object that no file can hold, or
        where the file cannot be written.
        """
        match_file.save(self._matches, self.notes, path)

    @classmethod
    def load(cls, path: Any) -> "Matches":
        """Read a file that ``save`` wrote, or one written by hand in the same form.

        Raises MappingFileError where it cannot be read or names something unknown.
        """
        return cls(*match_file.load(path))

    def __repr__(self) -> str:
        return f"Matches({self._matches!r})"

    def __str__(self) -> str:
        return text(self, 80)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """A line for each pair, under it the reason and the options, and the notes at the end."""
        width = max((len(_path(m, "student")) for m in self), default=0)
        longest = max((len(_path(m, "teacher")) for m in self), default=0)
        apart = width + longest + len(" ← ") > options.max_width
        for match in self:
            s, t = _path(match, "student"), _path(match, "teacher")
            yield Text(s if apart else f"{s:{width}} ← {t}", overflow="fold")
            below = "; ".join(part for part in (match.reason, match.options) if part)
            for line in ([f"← {t}"] if apart else []) + ([below] if below else []):
                yield Padding(Text(line, style="dim", overflow="fold"), (0, 0, 0, 4))
        yield from (Text(f"note: {note}", overflow="fold") for note in self.notes)


def _path(match: Match, tower: str) -> str:
    path, port = getattr(match, tower), port_text(getattr(match, f"{tower}_port"))
    return str(path) if port == "output" else f"{path}:{port}"


Mapped = Mapping[str, str | Match] | Iterable[Match | Mapping[str, str | Match]] | None


def parse_entries(mapping: Any) -> tuple[list[Match], list[FxDistillError]]:
    """The entries of a mapping in any form, patterns unexpanded, and the errors of the others."""
    problems: list[FxDistillError] = []
    if mapping is None:
        return [], problems
    if isinstance(mapping, Mapping):
        items = mapping.items()
        found = [gather(problems, _from_item, student, value) for student, value in items]
        return [match for match in found if match is not None], problems
    if isinstance(mapping, (str, Match)) or not isinstance(mapping, Iterable):
        return [], [OptionError(f"mapping={mapping!r}: a mapping is {ACCEPTED}")]
    matches: list[Match] = []
    for entry in mapping:
        if isinstance(entry, (Mapping, Matches)):  # a list may also hold whole mappings
            inner, wrong = parse_entries(entry)
            matches += inner
            problems += wrong
        elif (match := gather(problems, _match, entry)) is not None:
            matches.append(match)
    return matches, problems


def _match(entry: Any) -> Match:
    if isinstance(entry, (tuple, list)) and len(entry) == 2:
        return _from_item(*entry)
    if not isinstance(entry, Match) or entry.student is None or entry.teacher is None:
        raise OptionError(
            "a list mapping holds Match(student, teacher, ...), pairs (student, teacher) or "
            f"dicts, not {entry!r}"
        )
    return entry


def _from_item(student: Any, value: Any) -> Match:
    if not isinstance(student, str):
        raise OptionError(f"mapping key {student!r}: the key is a path of the student, as text")
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
