"""Write files whole or not at all."""

import contextlib
import os
import uuid
from pathlib import Path


def write_whole(target: Path, content: str | bytes) -> None:
    """Write a file whole, or leave the existing one as it is; text is written as UTF-8.

    A link stays a link: the file that it names is written. Raises OSError or ValueError (text that
    UTF-8 cannot encode) as Python's own functions do: only the caller can tell the user what the
    file was for.
    """
    data = content.encode("utf-8") if isinstance(content, str) else content
    place = Path(os.path.realpath(target))
    # In the same folder, so that replace() stays on one disk. Its name is short and not built on
    # the target's, which may already be as long as the disk allows.
    part = place.with_name(f".{uuid.uuid4().hex}.part")
    try:
        part.write_bytes(data)
        part.replace(place)
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
