"""One line while a step compiles: which stage, and for how long. Nothing for what takes no time.

On a terminal rich keeps the line up to date, in place; elsewhere the logger ``fxdistill.compiler``
is told at level INFO when a stage has begun to take long. ``FXDISTILL_QUIET=1`` silences both.
"""

import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator

from rich.console import Console
from rich.live import Live
from rich.text import Text

SILENT = 2.0  # seconds before anything is said
_LOG = logging.getLogger("fxdistill.compiler")


class _Stage(threading.local):
    watcher: "_Watcher | None" = None


_current = _Stage()


def is_quiet() -> bool:
    """Whether the user wants no lines about progress: ``FXDISTILL_QUIET`` is set, and not to 0."""
    return os.environ.get("FXDISTILL_QUIET", "0") not in ("", "0")


@contextlib.contextmanager
def waiting(stage: str) -> Iterator[None]:
    """Say that this takes its time, if it does; within another one, name its next stage."""
    if is_quiet():
        yield
        return
    if (outer := _current.watcher) is not None:
        before, outer.stage = outer.stage, stage
        try:
            yield
        finally:
            outer.stage = before
        return
    watcher = _current.watcher = _Watcher(stage)
    watcher.start()
    try:
        yield
    finally:
        _current.watcher = None
        watcher.end()


class _Watcher(threading.Thread):
    """Looks once a second at how long it has taken."""

    def __init__(self, stage: str) -> None:
        super().__init__(name="fxdistill-waiting", daemon=True)
        self.stage = stage
        self.over = threading.Event()
        self.begun = time.monotonic()
        self.line: Live | None = None  # the terminal's, once it is shown
        self.logged = ""  # the stage that was logged last

    def run(self) -> None:
        """Wait in silence, then tell until it is over."""
        if self.over.wait(SILENT):
            return
        self._tell()
        while not self.over.wait(1.0):
            self._tell()

    def end(self) -> None:
        """Stop, and take the line off the terminal."""
        self.over.set()
        self.join()
        if self.line is not None:
            self.line.stop()

    def _tell(self) -> None:
        seconds = time.monotonic() - self.begun
        if self.line is None:
            self.line = _line()
        if self.line is not None:
            text = (("fxdistill", "bold"), f": {self.stage} ... {seconds:.0f} s")
            self.line.update(Text.assemble(*text, no_wrap=True, overflow="ellipsis"), refresh=True)
        elif self.stage != self.logged:
            _LOG.info("%s ... %.0f s", self.stage, seconds)
            self.logged = self.stage


def _line() -> Live | None:
    """A line of the terminal that can be rewritten; ``None`` where stderr is no such terminal."""
    console = Console(stderr=True)
    if not (sys.stderr.isatty() and console.is_terminal) or console.is_dumb_terminal:
        return None
    # Python's streams stay as they are: a thread that exchanges them would race with the user's.
    line = Live(
        console=console,
        auto_refresh=False,
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
    )
    line.start()
    console.show_cursor()  # rich hides it, and a process that is killed could not bring it back
    return line
