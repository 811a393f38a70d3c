"""``examples/tensor_parallel.py`` as its users start it: two ranks print one process's losses."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLE = Path(__file__).parents[2] / "examples" / "tensor_parallel.py"
# A free port, and no look at the machine's name, which need not be one that resolves.
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
STEPS = 4
TIMEOUT = 400  # seconds for one run

# Two ranks run Inductor at once, which takes minutes where others use the machine, too.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def printed(*launcher: str, options: list[str]) -> str:
    """What the example printed. It must end well, and in time, with all of its ranks."""
    sizes = ["--steps", str(STEPS), "--layers", "1"]
    command = [sys.executable, *launcher, str(EXAMPLE), *sizes, *options]
    with subprocess.Popen(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            output, errors = process.communicate(timeout=TIMEOUT)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)  # torchrun's ranks with it
            raise
    assert process.returncode == 0, errors
    return output


def curves(output: str) -> torch.Tensor:
    """Loss and gradient norm of every step."""
    found = re.findall(r"^step +\d+ +loss ([\d.]+) +norm ([\d.]+)", output, re.MULTILINE)
    assert len(found) == STEPS, output
    return torch.tensor([[float(number) for number in line] for line in found])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the text and the teacher are kept: made once, by the first run."""
    return tmp_path_factory.mktemp("tensor_parallel")


@pytest.fixture(scope="module")
def alone(folder: Path) -> torch.Tensor:
    """The curves of one process, eager."""
    return curves(printed(options=["--no-compile", "--out", str(folder)]))


@pytest.mark.parametrize(
    ("mesh", "compile", "places"),
    [
        ("tp", "--compile", ["Shard(dim=0)", "Shard(dim=1)", "Replicate()"]),
        ("dp", "--no-compile", ["Shard(dim=0)"]),
    ],
)
def test_two_ranks_print_the_curves_of_one_process(
    mesh: str, compile: str, places: list[str], folder: Path, alone: torch.Tensor
) -> None:
    options = ["--mesh", mesh, compile, "--out", str(folder)]
    output = printed(*TORCHRUN, "--nproc-per-node", "2", options=options)

    torch.testing.assert_close(curves(output), alone, rtol=1e-4, atol=0)
    assert alone[-1, 0] < alone[0, 0]  # curves that go somewhere
    assert set(re.findall(r"  (\w+\(.*?\))$", output, re.MULTILINE)) == set(places)
