"""`fxdistill modules` and `fxdistill match`: tables, files, and what is refused."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

import fxdistill
from fxdistill import Matches
from fxdistill.cli.loading import from_config

pytestmark = pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")


class TestModules:
    def test_the_table_tells_roles(self, run: Any) -> None:
        done = run("modules", "small", "--hf-config")
        lines = {line.split()[0]: line.split(maxsplit=3) for line in done.out.splitlines()}
        assert lines["model.embed_tokens"][1:] == ["Embedding", "3,072", "embedding"]
        assert lines["model.layers.1"][3] == "block"
        assert lines["model.layers.0.self_attn"][3] == "mixer: attention (head_dim = 8)"
        assert lines["model.layers.0.mlp"][3] == "mlp: MLP (inner width 96)"
        assert lines["model.norm"][3] == "norm"
        assert lines["lm_head"][3] == "logits"
        assert done.out == "\n".join(map(str.rstrip, done.out.splitlines())) + "\n"

    def test_json_has_what_a_pattern_matches(self, run: Any) -> None:
        argv = ("--hf-config", "--pattern", "model.layers.*.mlp", "--json", "-")
        done = run("modules", "small", *argv)
        data = json.loads(done.out)
        assert data["model"] == "LlamaForCausalLM"
        assert [row["path"] for row in data["modules"]] == [f"model.layers.{i}.mlp" for i in (0, 1)]
        one = {"class": "LlamaMLP", "parameters": 9216, "role": "mlp"}
        assert data["modules"][0].items() >= one.items()

    def test_json_goes_to_a_file_beside_the_table(self, run: Any) -> None:
        done = run("modules", "towers.py:student", "--json", "modules.json")
        assert "blocks.0" in done.out
        assert len(json.loads(Path("modules.json").read_text())["modules"]) == 11

    @pytest.mark.parametrize(
        ("pattern", "says"),
        [
            ("model.layer.*", "no module of small is called 'model.layer.*'. Nearest: 'model.lay"),
            ("model..mlp", "--pattern: model path 'model..mlp' is empty or has an empty segment"),
            ("{", "--pattern: model path '{': a brace is not closed"),
        ],
    )
    def test_what_matches_nothing_is_a_wrong_argument(
        self, run: Any, pattern: str, says: str
    ) -> None:
        done = run("modules", "small", "--hf-config", "--pattern", pattern)
        assert (done.code, done.out) == (2, "")
        assert says in done.err


class TestMatch:
    def test_what_is_written_is_what_is_shown_and_what_match_proposes(self, run: Any) -> None:
        argv = ("match", "small", "large", "--hf-config", "--layers", "skip", "--roles", "mlp,norm")
        done = run(*argv, "--output", "mapping.toml")
        assert done.code == 0
        models = [from_config(Path(n), torch.float32, "auto") for n in ("small", "large")]
        wanted = fxdistill.match(*models, roles=("mlp", "norm"), layers="skip")
        loaded = Matches.load("mapping.toml")
        assert loaded == wanted
        assert [m.reason for m in loaded] == [m.reason for m in wanted]
        assert all(f"{m.student:18} ← {m.teacher}\n    {m.reason}\n" in done.out for m in wanted)
        Path("other.json").write_text(run(*argv, "--json", "-").out)
        assert Matches.load("other.json") == wanted

    def test_a_mapping_is_not_replaced_unasked(self, run: Any) -> None:
        argv = ("match", "small", "large", "--hf-config", "--output", "mapping.toml")
        Path("mapping.toml").write_text("mine")
        done = run(*argv)
        assert (done.code, done.out) == (2, "")
        assert "mapping.toml exists: --force replaces it" in done.err
        assert Path("mapping.toml").read_text() == "mine"
        assert run(*argv, "--force").code == 0
        assert len(Matches.load("mapping.toml")) == 4

    @pytest.mark.slow
    @pytest.mark.parametrize("option", ["--html", "--json"])
    def test_a_report_is_not_replaced_unasked(self, run: Any, option: str) -> None:
        argv = ("report", "small", "large", "--hf-config", option, "kept")
        Path("kept").write_text("mine")
        done = run(*argv)
        assert (done.code, done.out) == (2, "")
        assert "kept exists: --force replaces it" in done.err
        assert Path("kept").read_text() == "mine"
        assert run(*argv, "--force").code == 0
        assert Path("kept").read_text() != "mine"

    @pytest.mark.slow
    def test_it_says_whether_the_step_fits(self, run: Any) -> None:
        argv = ("report", "small", "large", "--hf-config", "--batch", "2", "--length", "16")
        fits, not_so = run(*argv, "--memory", "80GB"), run(*argv, "--memory", "100kB")
        assert (fits.code, not_so.code) == (0, 4), fits.err
        assert "fits: the step needs" in fits.err
        assert "does not fit: the step needs" in not_so.err
        assert run(*argv, "--memory", "much").code == 2

    @pytest.mark.parametrize(
        ("options", "code", "says"),
        [
            (["--output", "mapping.yaml"], 2, "a .toml or a .json"),
            (["--output", "nowhere/mapping.toml"], 2, "there is no folder nowhere"),
            (["--json", "small"], 2, "--json small: cannot be written"),
            (["--output", "-"], 2, "a .toml or a .json"),
            (["--output", "m.json", "--json", "./m.json"], 2, "--output m.json name one file"),
            (["--roles", "mixer,mpl"], 2, "no role 'mpl'. Nearest: 'mlp'"),
        ],
    )
    def test_what_cannot_be_is_told(self, run: Any, options: Any, code: int, says: str) -> None:
        done = run("match", "small", "large", "--hf-config", *options)
        assert (done.code, done.out) == (code, "")
        assert says in done.err

    def test_what_is_no_file_is_not_replaced(self, run: Any) -> None:
        os.mkfifo("pipe")  # what is in /dev must outlive a failure of this test
        done = run("match", "small", "large", "--hf-config", "--json", "pipe")
        assert (done.code, done.out) == (2, "")
        assert "--json pipe: cannot be written" in done.err
        assert Path("pipe").is_fifo()

    def test_models_without_blocks_do_not_fit(self, run: Any) -> None:
        done = run("match", "towers.py:wordless", "towers.py:teacher")
        assert (done.code, done.out) == (3, "")
        assert "no repeated blocks found in the student (Linear)" in done.err
