"""The examples of trainers run to their end with the real libraries, and leave a student."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import LlamaForCausalLM

EXAMPLES = Path(__file__).parents[2] / "examples"
# What each leaves, below its folder.
LEFT = {
    "with_trainer": "trainer/checkpoint-4/student",
    "with_accelerate": "student",
    "with_lightning": "student",
    "with_trl": "student",
    "lora": "adapters",
}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Where the tokens of the text are kept: they are made once."""
    return tmp_path_factory.mktemp("text")


@pytest.mark.parametrize("name", LEFT)
def test_a_quick_run_leaves_a_student(name, text, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    pair = importlib.import_module("code_pair")
    load = pair.load
    monkeypatch.setattr(pair, "load", lambda folder, size: load(text, size))
    importlib.import_module(name).main(["--quick", "--out", str(tmp_path)])
    assert capsys.readouterr().out
    folder = tmp_path / LEFT[name]
    if name == "lora":
        assert (folder / "adapter_model.safetensors").is_file()
    else:
        student = LlamaForCausalLM.from_pretrained(folder)
        assert student.config.num_hidden_layers == 2


@pytest.mark.parametrize("name", LEFT)
def test_an_example_fits_a_screen_or_two(name):
    assert len((EXAMPLES / f"{name}.py").read_text("utf-8").splitlines()) < 80


@pytest.mark.slow
def test_two_ranks_share_the_batches_of_accelerate(tmp_path):
    """Each rank has half of them, and both wait for the state that the first one writes."""
    launcher = ["torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    example = str(EXAMPLES / "with_accelerate.py")
    command = [*launcher, "--nproc-per-node", "2", example, "--quick", "--out", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", *command],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    steps = [line.split()[0] for line in done.stdout.splitlines() if line[:1].isdigit()]
    assert steps == ["0", "1", "2", "3"]
    assert LlamaForCausalLM.from_pretrained(tmp_path / "student").config.num_hidden_layers == 2
