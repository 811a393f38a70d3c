"""The fields of a report are written down: a change of them is a change of the schema's version.

As a program, this file writes them down again.
"""

import dataclasses
import json
import typing
from pathlib import Path

import pytest

from fxdistill.report import data

GOLDEN = Path(__file__).with_name(f"schema_{data.SCHEMA.partition('.')[0]}.txt")
AGAIN = (
    "bump SCHEMA in fxdistill/report/data.py and regenerate with"
    " `.venv/bin/python tests/report/test_schema.py`"
)


def schema():
    """The version, then each dataclass that a report holds with its fields and their types."""
    lines = [data.SCHEMA]
    waiting, seen = [data.Facts], {data.Facts}
    while waiting:
        kind = waiting.pop(0)
        lines += ["", kind.__name__]
        hints = typing.get_type_hints(kind)
        for field in dataclasses.fields(kind):
            lines.append(f"    {field.name}: {written(hints[field.name])}")
            inner = [t for t in parts(hints[field.name]) if dataclasses.is_dataclass(t)]
            waiting += [t for t in dict.fromkeys(inner) if t not in seen]
            seen.update(inner)
    return "\n".join([*lines, ""])


def parts(hint):
    """A type, and the types in its brackets."""
    return [hint, *(inner for part in typing.get_args(hint) for inner in parts(part))]


def written(hint):
    text = hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)
    return text.replace("fxdistill.report.data.", "")


def stale(golden, now):
    """What is wrong with what is written down, or nothing."""
    if golden == now:
        return None
    if golden.partition("\n")[0] == now.partition("\n")[0]:
        return f"fields of a report changed, its version did not: {AGAIN}"
    return f"{GOLDEN.name} is of version {golden.partition(chr(10))[0]}: {AGAIN}"


def test_fields_change_with_the_version():
    assert GOLDEN.exists(), f"{GOLDEN.name} is not there: {AGAIN}"
    assert stale(GOLDEN.read_text(), schema()) is None, stale(GOLDEN.read_text(), schema())


def test_a_change_without_a_version_is_seen():
    changed = schema().replace("    peak: int\n", "    peak: float\n")
    assert "bump SCHEMA in fxdistill/report/data.py" in stale(schema(), changed)


def test_every_class_of_the_data_is_in_a_report():
    classes = {n for n, c in vars(data).items() if dataclasses.is_dataclass(c)}
    assert classes == {line for line in schema().splitlines()[1:] if line and line[0] != " "}


@pytest.mark.parametrize("name", ["small", "large", "mesh", "partial", "nasty"])
def test_json_and_dictionary_say_the_same(name):
    import report_samples as samples

    report = samples.ALL[name]()
    assert json.loads(report.to_json()) == report.to_dict()
    assert json.loads(report.to_json(None)) == report.to_dict()
    assert report.to_dict()["schema"] == data.SCHEMA


if __name__ == "__main__":
    if GOLDEN.exists() and "did not" in (stale(GOLDEN.read_text(), schema()) or ""):
        raise SystemExit("Fields changed: bump SCHEMA in fxdistill/report/data.py first.")
    GOLDEN.write_text(schema())
