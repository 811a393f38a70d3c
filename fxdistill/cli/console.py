"""Exit codes, and the status line that all commands show while they work."""

import contextlib
from collections.abc import Iterator

FINE, PARTIAL, USAGE, MISFIT, TOO_LARGE, INTERNAL, INTERRUPTED, CLOSED = 0, 1, 2, 3, 4, 70, 130, 141


@contextlib.contextmanager
def working(on: str) -> Iterator[None]:
    """Show on a terminal what a command is working on."""
    from rich.console import Console

    console = Console(stderr=True)
    with console.status(f"{on} ...") if console.is_terminal else contextlib.nullcontext():
        yield
