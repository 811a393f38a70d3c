"""Files that are written whole or not at all."""

import contextlib
import os
import uuid
from pathlib import Path


def write_whole(target: Path, content: str | bytes) -> None:
    """Write a file, or leave what is there as it is; a text is written as UTF-8.

    A link stays a link: the file that it names is written. Raises OSError or ValueError (a text
    that UTF-8 cannot hold), as Python's own functions do; the caller knows what the file was for.
    """
    data = content.encode("utf-8") if isinstance(content, str) else content
    place = Path(os.path.realpath(target))
    # On the same disk, so that it can move. Short: names that just fit have no room for more.
    part = place.with_name(f".{uuid.uuid4().hex}.part")
    try:
        part.write_bytes(data)
        part.replace(place)
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
