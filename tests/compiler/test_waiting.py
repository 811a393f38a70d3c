"""Compiling is not silent: a line with stage and time, in place on a terminal, else by logging."""

import contextlib
import io
import logging
import re
import threading
import time

import pytest

import fxdistill
from fxdistill.compiler import waiting as module
from fxdistill.compiler.waiting import waiting
from toys import MAPPING, tokens, toy_pair


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def soon(monkeypatch):
    monkeypatch.setattr(module, "SILENT", 0.05)
    for name in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "COLUMNS"):  # which rich asks
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")


@contextlib.contextmanager
def terminal():
    """Within a test: pytest puts its own stream back between a fixture and the test."""
    with contextlib.redirect_stderr(Terminal()) as made:
        yield made


def test_what_takes_no_time_says_nothing(caplog):
    caplog.set_level(logging.INFO, "fxdistill")
    with terminal() as shown, waiting("capturing"):
        pass
    assert shown.getvalue() == ""
    assert not caplog.records


def test_a_terminal_gets_one_line_that_goes_again(soon):
    with terminal() as made, waiting("capturing"):
        time.sleep(0.2)
        with waiting("compiling"):
            time.sleep(1.1)
    shown = made.getvalue()
    # Each update goes back to the line's begin and clears it.
    first, second, *_ = [
        re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).strip() for text in shown.split("\r\x1b[2K")
    ]
    assert first.startswith("fxdistill: capturing ... 0 s")
    assert second.startswith("fxdistill: compiling ... 1 s")
    # In the end there is a new line, and back from it, and the line is cleared.
    assert shown.endswith(" s\n\x1b[?25h\r\x1b[1A\x1b[2K")
    assert shown.count("\n") == 1
    # The cursor is there while it compiles: a process that is killed leaves it as it is.
    assert shown.index("\x1b[?25l") < shown.index("\x1b[?25h") < shown.index("capturing")


@pytest.mark.parametrize("why", ["dumb", "quiet"])
def test_a_terminal_that_cannot_and_a_user_who_does_not_want(soon, monkeypatch, caplog, why):
    caplog.set_level(logging.INFO, "fxdistill")
    monkeypatch.setenv(*{"dumb": ("TERM", "dumb"), "quiet": ("FXDISTILL_QUIET", "1")}[why])
    with terminal() as made, waiting("capturing"):
        time.sleep(0.2)
    assert made.getvalue() == ""
    said = [record.getMessage() for record in caplog.records]
    assert said == (["capturing ... 0 s"] if why == "dumb" else [])


def test_elsewhere_a_stage_is_logged_once(soon, caplog):
    caplog.set_level(logging.INFO, "fxdistill")
    with waiting("capturing"):
        time.sleep(1.3)
    assert [record.getMessage() for record in caplog.records] == ["capturing ... 0 s"]


def fails():
    with waiting("capturing"):
        time.sleep(0.2)
        raise KeyError


def test_an_error_ends_it(soon):
    with terminal() as made, pytest.raises(KeyError):
        fails()
    assert made.getvalue().endswith("\x1b[2K")
    names = [thread.name for thread in threading.enumerate()]
    assert "fxdistill-waiting" not in names


def test_the_first_step_is_watched_and_no_other(monkeypatch):
    stages = []
    real = module._Watcher

    class Watched(real):
        def __setattr__(self, name, value):
            if name == "stage":
                stages.append(value)
            super().__setattr__(name, value)

    monkeypatch.setattr(module, "_Watcher", Watched)
    distiller = fxdistill.wrap(*toy_pair(), MAPPING, compile={"backend": "aot_eager"})
    distiller(tokens()).loss.backward()
    assert stages[:2] == ["capturing the step", "running passes"]
    assert "compiling the step" in stages
    stages.clear()
    distiller(tokens()).loss.backward()
    assert stages == []
