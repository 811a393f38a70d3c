"""Plain text of what ``rich`` renders."""

import os
import shutil
import sys
from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.measure import Measurement

NARROW, WIDE = 80, 200


def text(renderable: Any, width: int) -> str:
    """Render with ``rich``, as plain text of at most ``width`` columns."""
    console = _console(width)
    with console.capture() as capture:
        console.print(renderable)
    return "\n".join(line.rstrip() for line in capture.get().rstrip().splitlines())


def fitting(renderable: Any, parts: Iterable[Any]) -> str:
    """Plain text in which none of these ``parts`` has to fold: in 80 columns, or up to 200.

    Where the text goes to a terminal, or ``COLUMNS`` is set, there are no more than these.
    """
    limit = WIDE
    if "COLUMNS" in os.environ or (sys.stdout is not None and sys.stdout.isatty()):
        limit = shutil.get_terminal_size((NARROW, 0)).columns
    console = _console(WIDE)
    widths = (Measurement.get(console, console.options, part).maximum for part in parts)
    return text(renderable, max(NARROW, min(limit, max(widths, default=NARROW))))


def _console(width: int) -> Console:
    return Console(width=width, force_terminal=False, color_system=None, highlight=False)
