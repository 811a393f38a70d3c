"""The examples run as users run them, at sizes that take seconds."""

import importlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def run_example(name: str, *options: str) -> str:
    """The output of an example in a process of its own, which must end well."""
    command = [sys.executable, str(EXAMPLES / name), *options]
    # One thread: sizes this small gain nothing from more, and lose much on a busy machine.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_smoke_runs_leave_a_plot_and_finite_losses_and_share_one_teacher(tmp_path: Path) -> None:
    def run(*options: str) -> dict[str, int]:
        """The files that it keeps for the next run, and when each was written."""
        run_example("distill_language_model.py", "--smoke", "--out", str(tmp_path), *options)
        return {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.pt")}

    kept = run()
    assert len(kept) == 2  # the text and the teacher
    assert (tmp_path / "distill_language_model.png").read_bytes().startswith(b"\x89PNG")
    assert "<html" in (tmp_path / "report.html").read_text()
    saved = json.loads((tmp_path / "distill_language_model.json").read_text())
    heldout = {name: found["heldout"] for name, found in saved["results"].items()}
    assert set(heldout) == {"teacher", "labels", "labels, logits", "labels, logits, activations"}
    assert all(map(math.isfinite, heldout.values()))
    assert run("--no-compile") == kept


def test_a_curve_meets_a_loss_between_two_of_its_points(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    Run = importlib.import_module("comparison").Run
    run = Run([(10, 6.0), (20, 5.0), (30, 4.0)], seconds=1.0)
    assert run.steps_to(4.25) == 27.5
    assert run.steps_to(7.0) == 10  # where it starts
    assert run.steps_to(3.9) == math.inf
