"""The examples run, and leave what they promise."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_distill_language_model(tmp_path):
    command = [sys.executable, str(EXAMPLES / "distill_language_model.py"), "--smoke"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path)], capture_output=True, text=True, timeout=270, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "ExposeOutputs" in done.stdout
    assert (tmp_path / "distill_language_model.png").stat().st_size > 10_000
    results = json.loads((tmp_path / "distill_language_model.json").read_text())["results"]
    assert len(results) == 4
    assert all(math.isfinite(run["heldout"]) for run in results.values())
