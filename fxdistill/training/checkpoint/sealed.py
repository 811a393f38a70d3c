"""Checksums of a checkpoint's files: a bit that a disk has flipped is no weight.

They are CRC-32, of each file in the document, and of the document in itself. Ranks share the work.
"""

import json
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fxdistill.errors import ResumeError
from fxdistill.training.checkpoint.folder import CONTENTS
from fxdistill.training.checkpoint.ranks import Party

SEAL = "crc32 of the rest"
_OTHER = "is not what was written, by its checksum"
_PIECE = 1 << 20  # bytes that are read at once


def sums(place: Path, names: Iterable[str], here: Party) -> dict[str, int]:
    """The checksums of this rank's share of the files; raises OSError."""
    return {name: _sum(place / name) for name in sorted(names)[here.rank :: here.size]}


def sealed(document: dict[str, Any]) -> dict[str, Any]:
    """The document with its own checksum."""
    return {**document, SEAL: zlib.crc32(_text(document).encode("utf-8"))}


def write_json(value: Any, path: Path) -> None:
    """Write a value as JSON; raises OSError."""
    path.write_text(_text(value), "utf-8")


def require_whole(document: dict[str, Any], place: Path, here: Party) -> None:
    """Raise ResumeError where a file, or the document, is not what it was when it was written.

    Checkpoints of versions that wrote no checksums are taken as they are.
    """
    rest = {key: value for key, value in document.items() if key != SEAL}
    if document.get(SEAL, sealed(rest)[SEAL]) != sealed(rest)[SEAL]:
        raise ResumeError(_damaged(place, f"{CONTENTS} {_OTHER}"))
    for name, size in document["files"].items():
        path = place / name
        if not path.is_file() or path.stat().st_size != size:
            is_there = f"has {path.stat().st_size}" if path.is_file() else "is missing"
            raise ResumeError(_damaged(place, f"{name} had {size} bytes and {is_there}"))
    saved = document.get("crc32", {})
    try:
        now = sums(place, saved, here)
    except OSError as error:
        raise ResumeError(f"{place} cannot be read: {error}") from error
    if wrong := [name for name in now if now[name] != saved[name]]:
        raise ResumeError(_damaged(place, f"{', '.join(wrong)} {_OTHER}"))


def _damaged(place: Path, what: str) -> str:
    return f"{place} is damaged: {what}. Load another checkpoint of {place.parent} by its path."


def _sum(path: Path) -> int:
    found = 0
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            found = zlib.crc32(piece, found)
    return found


def _text(value: Any) -> str:
    return json.dumps(value, allow_nan=False)
