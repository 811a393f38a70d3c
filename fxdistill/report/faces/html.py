"""A report as one HTML file that needs no network, fonts or other files.

The file contains the report as JSON. The templates lie in this folder: ``page.html`` is the frame,
``page.css`` the style, and ``page*.js`` draw the JSON. They insert every text as text, never as
markup.
"""

import dataclasses
import html as markup
import json
import re
from importlib import resources
from pathlib import Path
from typing import Any

from fxdistill.base.files import write_whole
from fxdistill.report.data import Facts, as_json
from fxdistill.report.faces.folding import (
    block_index,
    blocks_in,
    couples,
    folds,
    gathered,
    models_of,
    rows,
)

_SCRIPTS = ("page.js", "page_towers.js", "page_charts.js", "page_sections.js")  # in this order
_PLACE = re.compile(r"\{\{(\w+)\}\}")


def html(report: Facts) -> str:
    """The HTML of the whole page."""
    filled = {
        "title": markup.escape(_title(report)),
        "style": _file("page.css"),
        "report": _json(as_json(report)),
        "folded": _json(_folded(report)),
        "script": "\n".join(_file(name) for name in _SCRIPTS),
    }
    # Fill all places in one pass: a text that is filled in may itself look like a place.
    return _PLACE.sub(lambda found: filled[found[1]], _file("page.html"))


def write(report: Facts, path: Path) -> Path:
    """Write the page to ``path``, whole or not at all, and return ``path``. A link stays a link."""
    write_whole(path, html(report))
    return path


def _title(report: Facts) -> str:
    return " ← ".join(models_of(report)) or "fxdistill"


def _file(name: str) -> str:
    return resources.files("fxdistill.report.faces").joinpath(name).read_text(encoding="utf-8")


def _json(value: Any) -> str:
    """``value`` as JSON that cannot end the script element around it."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c")


def _folded(report: Facts) -> dict[str, Any]:
    """Runs of equal blocks, folded pairs and outputs, and the blocks that each pair joins."""
    sides = next(iter(couples(report)), ("student", "teacher"))  # the page draws one couple
    students, teachers = (blocks_in(report, side) for side in sides)
    ends = [
        (block_index(students, pair.student), block_index(teachers, pair.teacher))
        if (pair.student_model, pair.teacher_model) == sides
        else (None, None)
        for pair in report.pairs
    ]
    return {
        "sides": sides,
        "rows": {t.name: [dataclasses.asdict(r) for r in rows(t.blocks)] for t in report.towers},
        "folds": [dataclasses.asdict(fold) for fold in folds(report.pairs)],
        "ends": ends,
        "exposed": [gathered(line.exposed) for line in report.passes],
    }
