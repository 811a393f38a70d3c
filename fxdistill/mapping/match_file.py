"""Mapping files: TOML or JSON. A file is written whole or not at all."""

import functools
import inspect
import json
import math
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from fxdistill.base.files import write_whole
from fxdistill.errors import MappingFileError, did_you_mean
from fxdistill.losses.names import FEATURE_LOSSES
from fxdistill.mapping.match import Match
from fxdistill.models.tap import port_text

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


FORMAT = 1
_TOP = ("format", "notes", "match")
_DEFAULTS = {
    name: parameter.default
    for name, parameter in inspect.signature(Match).parameters.items()
    if name not in ("student", "teacher")
}


def save(matches: Iterable[Match], notes: Sequence[str], path: str | os.PathLike[str]) -> None:
    """Write matches and notes to ``path``, as its suffix says: ``.toml`` or ``.json``."""
    target = Path(path)
    text = text_of(matches, notes, kind_of(target))
    try:
        write_whole(target, text)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise MappingFileError(f"{target} cannot be written: {reason}") from error


def text_of(matches: Iterable[Match], notes: Sequence[str], kind: str) -> str:
    """The content of a mapping file of a kind, "toml" or "json"."""
    entries = [_entry(match) for match in matches]
    if kind == "toml":
        return _toml(notes, entries)
    content = {"format": FORMAT, "notes": list(notes), "match": entries}
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def load(path: str | os.PathLike[str]) -> tuple[list[Match], list[str]]:
    """Read the matches and the notes of a file; raises MappingFileError for an unknown field."""
    source = Path(path)
    kind = kind_of(source)
    try:
        content = source.read_text(encoding="utf-8")
        data = json.loads(content) if kind == "json" else tomllib.loads(content)
    except (ValueError, OSError) as error:
        raise MappingFileError(f"{source} cannot be read as {kind}: {error}") from error
    if not isinstance(data, dict) or not isinstance(entries := _entries(data), list):
        raise MappingFileError(
            f"{source} has no list of [[match]] tables with student and teacher (format = {FORMAT} "
            "and no match is a mapping of nothing)"
        )
    if data.get("format", FORMAT) != FORMAT:
        raise MappingFileError(
            f"{source} has format {data['format']!r}; this version of fxdistill reads {FORMAT}"
        )
    for name in data:
        if name not in _TOP:
            near = did_you_mean(name, _TOP)
            raise MappingFileError(f"{source}: {name!r} is no field. Nearest: {near}.")
    notes = data.get("notes", [])
    if not isinstance(notes, list) or not all(isinstance(note, str) for note in notes):
        raise MappingFileError(f"{source}: notes are a list of texts")
    read = [_read(entry, f"{source}, match {i}") for i, entry in enumerate(entries, start=1)]
    return read, notes


def _entries(data: dict[str, Any]) -> Any:
    """The list of matches. TOML writes an empty one as nothing: then ``format`` must be there."""
    return data.get("match", [] if "format" in data else None)


def kind_of(path: Path) -> str:
    """The format that the suffix of ``path`` names; raises MappingFileError for any other."""
    kind = path.suffix.removeprefix(".").lower()
    if kind not in ("toml", "json"):
        raise MappingFileError(f"{path}: a mapping is kept in a .toml or a .json file")
    return kind


def _entry(match: Match) -> dict[str, Any]:
    entry = {"student": match.student, "teacher": match.teacher}
    for name, default in _DEFAULTS.items():
        if (value := getattr(match, name)) != default:
            entry[name] = _plain(name, value, match)
    return entry


def _plain(name: str, value: Any, match: Match) -> Any:
    """A value as a file holds it: ``None`` in a pair of layouts becomes an empty string."""
    if name == "loss":
        return _loss(value, match)
    if name.endswith("_port") and not isinstance(value, str):
        raise MappingFileError(
            f"the {name} of {match.student!r} is a function of your own, {port_text(value)}, which "
            "no file can hold: save a port that has a name, and put the function back after loading"
        )
    if isinstance(value, Tensor):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        raise MappingFileError(f"the {name} of {match.student!r} is {value}: a finite number")
    if name == "project" and not isinstance(value, str):
        raise MappingFileError(
            f"the projection of {match.student!r} is a {type(value).__name__}, and a file holds no "
            'modules: use project="linear" or "auto", or put the module back after loading'
        )
    if isinstance(value, (tuple, list)):
        return [_plain("", part, match) for part in value]
    return "" if value is None else value


def _is_simple(value: Any) -> bool:
    """Whether a file holds an option of a loss: a number, a text, or pairs of heads."""
    if isinstance(value, (tuple, list)):
        return all(map(_is_simple, value))
    return isinstance(value, (int, float, str, bool))


def _loss(loss: Any, match: Match) -> Any:
    if isinstance(loss, str):
        return loss
    name = next((n for n, f in FEATURE_LOSSES.items() if f is getattr(loss, "func", loss)), None)
    options = getattr(loss, "keywords", {}) if isinstance(loss, functools.partial) else {}
    simple = all(map(_is_simple, options.values()))
    positional = loss.args if isinstance(loss, functools.partial) else ()
    if name is None or not simple or positional:
        raise MappingFileError(
            f"the loss of {match.student!r} is a function of your own, which no file can hold: "
            f"name one of {', '.join(FEATURE_LOSSES)} (with options: functools.partial), or put "
            "the function back after loading"
        )
    options = {key: _plain("", value, match) for key, value in options.items()}
    return {"name": name, **options} if options else name


def _read(entry: Any, where: str) -> Match:
    if not isinstance(entry, Mapping) or not {"student", "teacher"} <= set(entry):
        raise MappingFileError(f"{where}: needs student and teacher")
    for name in entry:
        if name not in _DEFAULTS and name not in ("student", "teacher"):
            near = did_you_mean(name, _DEFAULTS)
            raise MappingFileError(f"{where}: {name!r} is no field. Nearest: {near}.")
    values = {name: _value(value) for name, value in entry.items()}
    for name, value in values.items():
        kinds = _KINDS.get(name, (str,))
        if not isinstance(value, kinds) or isinstance(value, bool):
            wanted = " or ".join(kind.__name__ for kind in kinds)
            raise MappingFileError(f"{where}: {name} = {value!r} is not a {wanted}")
    if values.get("tokens") == "":
        values["tokens"] = None
    if "loss" in entry:
        values["loss"] = _known_loss(entry["loss"], where)
    return Match(**values)


_KINDS: dict[str, tuple[type, ...]] = {
    "weight": (int, float),
    "loss": (str, Mapping),
    "rearrange": (str, tuple),
    "reduce": (tuple,),
    "of": (str, int),
}


def _known_loss(loss: Any, where: str) -> Any:
    """The loss of a name, or of a table with options; raises MappingFileError for unknown ones."""
    name = loss.get("name") if isinstance(loss, Mapping) else loss
    if name not in FEATURE_LOSSES:
        near = did_you_mean(str(name), FEATURE_LOSSES)
        what = (
            f"the loss {dict(loss)} has no name" if name is None else f"there is no loss {name!r}"
        )
        raise MappingFileError(f"{where}: {what}. Nearest: {near}.")
    if not isinstance(loss, Mapping):
        return loss
    options = {key: value for key, value in loss.items() if key != "name"}
    known = inspect.signature(FEATURE_LOSSES[name]).parameters.values()
    taken = [p.name for p in known if p.kind is inspect.Parameter.KEYWORD_ONLY]
    for option in options:
        if option not in taken:
            near = did_you_mean(option, taken)
            raise MappingFileError(f"{where}: loss {name!r} has no option {option!r}: {near}.")
    return functools.partial(FEATURE_LOSSES[name], **options)


def _value(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_value(part) or None for part in value)
    return value


def _toml(notes: Sequence[str], entries: list[dict[str, Any]]) -> str:
    lines = [f"format = {FORMAT}"]
    if notes:
        lines.append(f"notes = {_toml_value(list(notes))}")
    for entry in entries:
        lines += [
            "",
            "[[match]]",
            *(f"{key} = {_toml_value(value)}" for key, value in entry.items()),
        ]
    return "\n".join(lines) + "\n"


def _toml_value(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_toml_value(v)}" for key, v in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml_value, value)) + "]"
    # TOML reads the texts, numbers and truth values that JSON writes, except for this character.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
