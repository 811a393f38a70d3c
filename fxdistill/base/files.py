"""Write files whole or not at all."""

import contextlib
import os
import uuid
from pathlib import Path


def write_whole(target: Path, content: str | bytes, *, durable: bool = False) -> None:
    """Write a file whole, or leave the existing one as it is; text is written as UTF-8.

    A link stays a link: the file that it names is written. ``durable``: it is on the disk when this
    returns, and not only in the system's memory; an error, or Ctrl-C, in the last wait for the disk
    comes when the new file is there already. Raises OSError or ValueError (text that UTF-8
    cannot encode) as Python's own functions do: only the caller can tell the user what the file was
    for.
    """
    data = content.encode("utf-8") if isinstance(content, str) else content
    place = Path(os.path.realpath(target))
    # In the same folder, so that replace() stays on one disk. Its name is short and not built on
    # the target's, which may already be as long as the disk allows.
    part = place.with_name(f".{uuid.uuid4().hex}.part")
    try:
        part.write_bytes(data)
        if durable:
            sync(part)
        part.replace(place)
        if durable:
            sync(place.parent)
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows opens no folders, and writes their names through
    handle = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
