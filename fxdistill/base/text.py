"""Plain text of what ``rich`` renders."""

from typing import Any

from rich.console import Console


def text(renderable: Any, width: int) -> str:
    """Render with ``rich``, as plain text of at most ``width`` columns."""
    console = Console(width=width, force_terminal=False, color_system=None, highlight=False)
    with console.capture() as capture:
        console.print(renderable)
    return "\n".join(line.rstrip() for line in capture.get().rstrip().splitlines())
