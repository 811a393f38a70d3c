"""The command line: how it starts, what it prints and where, its exit codes."""

import importlib.metadata
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import fxdistill
from fxdistill.cli.main import main, parser
from fxdistill.losses.names import FEATURE_LOSSES, LABEL_LOSSES, LOGIT_LOSSES

pytestmark = pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")


def process(*argv: str, **options: Any) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "fxdistill", *argv]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


class TestStart:
    def test_help_and_version_take_no_time(self) -> None:
        seconds = []
        for _ in range(5):  # the fastest: other processes share this machine
            start = time.perf_counter()
            done = process("--help")
            seconds.append(time.perf_counter() - start)
        assert done.returncode == 0
        assert "130  interrupted" in done.stdout
        assert min(seconds) < 0.3

    def test_arguments_are_read_without_torch_and_rich(self) -> None:
        program = (
            "import sys; from fxdistill.cli.main import main; main(['report', '--help']); "
            "main(['modules']); sys.exit(any(m in sys.modules for m in ('torch', 'rich')))"
        )
        assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0

    def test_version(self, run: Any) -> None:
        assert run("--version").out == f"fxdistill {fxdistill.__version__}\n"

    def test_the_command_is_installed(self) -> None:
        (entry,) = importlib.metadata.entry_points(group="console_scripts", name="fxdistill")
        assert entry.load() is main

    @pytest.mark.parametrize(
        ("argv", "says"),
        [
            ([], "arguments are required: COMMAND"),
            (["reprot"], "choose from 'report', 'modules', 'match'"),
            (["report", "a"], "required: TEACHER"),
            (["report", "a", "b", "--batch", "0"], "'0' is no number from 1"),
            (["report", "a", "b", "--batch", f"1{30 * '0'}"], "no number from 1 to 1099511627776"),
            (["report", "a", "b", "--length", 5000 * "9"], "no number from 1 to 1099511627776"),
            (["report", "a", "b", "--eager", "--regional"], "not allowed with argument --eager"),
            (["match", "a", "b", "--layers", "unifrom"], "choose from 'uniform'"),
        ],
    )
    def test_wrong_arguments_are_told_on_one_line(self, run: Any, argv: Any, says: str) -> None:
        done = run(*argv)
        assert (done.code, done.out) == (2, "")
        assert says in done.err
        assert done.err.count("\n") == 1

    def test_the_guide_shows_commands_that_exist(self) -> None:
        page = Path(__file__).parents[2] / "docs" / "cli.md"
        lines = [line.removeprefix("$ ") for line in page.read_text("utf-8").splitlines()]
        shown = [shlex.split(line)[1:] for line in lines if line.startswith("fxdistill ")]
        told = [argv for argv in shown if not argv[0].endswith(":")]
        assert len(told) == 7
        assert {parser().parse_args(argv).command for argv in told} == {
            "report",
            "match",
            "modules",
        }


class TestErrors:
    def test_an_interrupt_has_its_code(self, run: Any) -> None:
        done = run("modules", "towers.py:stopped")
        assert (done.code, done.out) == (130, "")
        assert done.err.endswith("fxdistill modules: interrupted\n")

    def test_what_nobody_foresaw_has_its_code(
        self, run: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("fxdistill.cli.commands.load_model", lambda *args, **options: 1 / 0)
        done = run("modules", "small")
        assert done.code == 70
        assert done.err == (
            "fxdistill modules: unforeseen ZeroDivisionError: division by zero "
            "(--debug shows where)\n"
        )

    def test_debug_shows_the_traceback(self, run: Any) -> None:
        done = run("modules", "towers.py:broken", "--debug")
        assert done.code == 2
        assert 'raise ValueError("no\\nway")' in done.err
        assert "Traceback" not in run("modules", "towers.py:broken").err

    @pytest.mark.filterwarnings("default:look out")
    def test_a_warning_is_one_line(self, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        done = run("modules", "towers.py:warning", "--json", "-")
        assert json.loads(done.out)
        assert done.err == "printed by the file\nUserWarning: look out\n"


@pytest.mark.slow
class TestProcesses:
    @pytest.mark.parametrize(
        ("argv", "code"),
        [
            (["modules", "small", "--hf-config"], 0),
            (["modules", "towers.py:nothing"], 2),
            (["match", "towers.py:wordless", "towers.py:teacher"], 3),
            (["modules", "towers.py:stopped"], 130),
        ],
    )
    def test_exit_codes(self, argv: Any, code: int) -> None:
        done = process(*argv)
        assert done.returncode == code
        assert bool(done.stdout) == (code == 0)
        assert "Traceback" not in done.stderr

    def test_only_json_on_standard_output(self) -> None:
        done = process("match", "towers.py:student", "towers.py:teacher", "--json", "-")
        assert len(json.loads(done.stdout)["match"]) == 2
        assert "printed by a factory" in done.stderr

    def test_what_an_encoding_lacks_is_escaped(self) -> None:
        environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
        argv = ("match", "small", "large", "--hf-config", "--roles", "norm")
        assert "\\u2190" in process(*argv, env=environment).stdout
        read = json.loads(process(*argv, "--json", "-", env=environment).stdout)
        assert "←" in read["match"][0]["reason"]

    def test_a_reader_that_leaves_is_no_error(self) -> None:
        command = [sys.executable, "-m", "fxdistill", "modules", "small", "--hf-config"]
        reading, writing = os.pipe()
        os.close(reading)
        with os.fdopen(writing, "w") as stdout:
            done = subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, check=False)
        # torchao says at its import what it cannot load here; of a broken pipe nobody speaks.
        said = [line for line in done.stderr.decode().splitlines() if "torchao" not in line]
        said = [line for line in said if not re.match(r"W\d{4} .*_pytree", line)]
        assert (done.returncode, said) == (141, [])


def test_losses_are_listed_with_formula_and_options(run: Callable[..., SimpleNamespace]) -> None:
    told = run("losses")
    assert told.code == 0
    rows = {line.split()[0]: line for line in told.out.splitlines() if line.startswith("  ")}
    assert rows.keys() == {*FEATURE_LOSSES, *LOGIT_LOSSES, *LABEL_LOSSES}
    assert "(1/D) Σ (s - t)²" in rows["mse"]
    assert rows["jsd"].rstrip().endswith("beta=0.5")
    assert "normalize='mean'" in rows["distance_wise"]
