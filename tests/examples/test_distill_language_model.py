"""The examples run as users run them, at sizes that take seconds."""

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
class TestDistillLanguageModel:
    def test_smoke_run_leaves_a_plot_and_three_finite_losses(self, tmp_path: Path) -> None:
        run_example("distill_language_model.py", "--smoke", "--out", str(tmp_path))

        assert (tmp_path / "distill_language_model.png").read_bytes().startswith(b"\x89PNG")
        assert "<html" in (tmp_path / "report.html").read_text()
        saved = json.loads((tmp_path / "distill_language_model.json").read_text())
        heldout = {name: run["heldout"] for name, run in saved["results"].items()}
        assert set(heldout) == {
            "teacher",
            "labels",
            "labels, logits",
            "labels, logits, activations",
        }
        assert all(math.isfinite(loss) for loss in heldout.values())

    def test_a_second_run_takes_the_teacher_from_the_disk(self, tmp_path: Path) -> None:
        options = ("--smoke", "--no-compile", "--out", str(tmp_path))
        run_example("distill_language_model.py", *options)
        before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.pt")}
        run_example("distill_language_model.py", *options)

        assert len(before) == 2  # the text and the teacher
        assert before == {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.pt")}
