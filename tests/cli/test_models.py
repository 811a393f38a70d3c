"""What the command line takes for models, and which inputs it gives them."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from families import FAMILIES
from fxdistill.cli.example_inputs import example_inputs
from fxdistill.cli.loading import from_config

pytestmark = pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")


class TestModels:
    @pytest.mark.parametrize(
        ("model", "says"),
        [
            ("towers.py", "is not file.py:factory or package.module:factory; it defines Block,"),
            ("unreadable.py", "it is no Python"),
            ("unreadable.py:x", "importing unreadable.py raised SyntaxError"),
            ("towers.py:studnt", "towers.py has no 'studnt'. Nearest: 'student'"),
            ("tower.py:student", "no file tower.py. Nearest in its folder: 'towers.py'"),
            ("towers.py:number", "returns a int, not an nn.Module"),
            ("towers.py:needs", "needs width: a factory is called without arguments"),
            ("towers.py:broken", "towers.py:broken raised ValueError: no way (--debug: where)"),
            ("towers.py:leaving", "towers.py:leaving raised SystemExit: 0"),
            ("towers.py:text", "is a str, not a function"),
            ("nowhere.towers:student", "no module 'nowhere'"),
            ("json.nowhere:student", "no module 'json.nowhere'"),
            ("a..b:x", "no module 'a..b': between two dots there is a name"),
            ("json..decoder:x", "no module 'json..decoder'"),
            ("builtins:dict", "builtins:dict returns a dict, not an nn.Module"),
            ("builtins:int", "builtins:int returns a int, not an nn.Module"),
            ("torch:zeros", "torch:zeros raised TypeError: zeros() missing"),
            ("towers.py:big", "towers.py:big returns a dict, not an nn.Module"),
            ("small", "for a configuration, --hf-config"),
            ("small/config.json", "for a configuration, --hf-config"),
        ],
    )
    def test_a_model_that_is_none_is_a_wrong_argument(
        self, run: Any, model: str, says: str
    ) -> None:
        done = run("modules", model)
        assert (done.code, done.out) == (2, "")
        told = [line for line in done.err.splitlines() if not line.startswith("printed")]
        assert len(told) == 1
        assert told[0].startswith("fxdistill modules: ")
        assert says in told[0]

    @pytest.mark.parametrize(
        ("change", "says"),
        [
            ({"model_type": "lama"}, "knows no model_type 'lama'. Nearest: 'llama'"),
            ({"architectures": ["LamaForCausalLM"]}, "no class 'LamaForCausalLM'. Nearest: 'Llama"),
            ({"num_attention_heads": "four"}, "refused by transformers: "),
            ({"architectures": [5]}, "config.json: architectures is [5]: a list of names of"),
            ({"architectures": {"a": 1}}, 'architectures is {"a": 1}: a list of names of classes'),
            ({"architectures": "LamaForCausalLM"}, "no class 'LamaForCausalLM'. Nearest: 'Llama"),
        ],
    )
    def test_a_configuration_that_is_none_is_a_wrong_argument(
        self, run: Any, here: Path, llama: Any, change: Any, says: str
    ) -> None:
        (here / "config.json").write_text(json.dumps({**llama, **change}))
        done = run("modules", "config.json", "--hf-config")
        assert (done.code, done.out) == (2, "")
        assert says in done.err
        assert done.err.count("\n") == 1

    def test_architectures_may_be_one_name(self, run: Any, here: Path, llama: Any) -> None:
        named = {**llama, "architectures": "LlamaForSequenceClassification"}
        (here / "small" / "config.json").write_text(json.dumps({**named, "num_hidden_layers": 1}))
        done = run("modules", "small", "--hf-config", "--json", "-")
        assert (done.code, done.err) == (0, "")
        assert json.loads(done.out)["model"] == "LlamaForSequenceClassification"

    def test_a_file_that_is_not_there_or_no_json_is_a_wrong_argument(
        self, run: Any, here: Path
    ) -> None:
        assert "Nearest in its folder: 'small'" in run("modules", "smal", "--hf-config").err
        (here / "config.json").write_text("{")
        assert "cannot be read as JSON" in run("modules", "config.json", "--hf-config").err

    @pytest.mark.parametrize("model", ["towers.py:student", "towers:student", "towers.py:ready"])
    def test_a_file_may_import_what_lies_beside_it(self, run: Any, model: str) -> None:
        before = list(sys.path)
        assert run("modules", model).code == 0
        assert sys.path == before

    def test_a_factory_stays_a_factory_with_hf_config(self, run: Any) -> None:
        assert run("modules", "towers.py:student", "--hf-config").code == 0

    @pytest.mark.filterwarnings("default:config.json")
    def test_quantisation_is_left_out_and_told(self, run: Any, here: Path, llama: Any) -> None:
        (here / "config.json").write_text(json.dumps({**llama, "quantization_config": {}}))
        done = run("modules", "config.json", "--hf-config")
        assert done.code == 0
        assert "weights are torch.bfloat16, quantization_config is left out" in done.err

    @pytest.mark.parametrize("named", [True, False], ids=["architectures", "task"])
    @pytest.mark.parametrize("name", ["gemma2", "mamba2", "bert_mlm", "t5", "whisper", "vit"])
    def test_a_configuration_gives_the_model_without_weights(
        self, here: Path, name: str, named: bool
    ) -> None:
        model = FAMILIES[name]().student
        model.config.architectures = [type(model).__name__] if named else None
        model.config.save_pretrained(here)
        made = from_config(here, torch.bfloat16, "auto")
        assert type(made) is type(model)
        shapes = {key: value.shape for key, value in model.state_dict().items()}
        assert {key: value.shape for key, value in made.state_dict().items()} == shapes
        assert {(p.dtype, p.is_meta) for p in made.parameters()} == {(torch.bfloat16, True)}


class TestInputs:
    @pytest.mark.parametrize(
        ("name", "shapes"),
        [
            ("llama", {"input_ids": (2, 64), "attention_mask": (2, 64), "labels": (2, 64)}),
            ("t5", {"input_ids": (2, 2048), "attention_mask": (2, 2048), "labels": (2, 2048)}),
            (
                "distilbert_classifier",
                {"input_ids": (2, 64), "attention_mask": (2, 64), "labels": (2,)},
            ),
            ("vit", {"pixel_values": (2, 3, 16, 16), "labels": (2,)}),
        ],
    )
    def test_inputs_are_what_forward_takes(self, name: str, shapes: Any) -> None:
        model = FAMILIES[name]().student
        found = example_inputs(model, model, 2, None, "auto")
        assert {name: tuple(value.shape) for name, value in found.items()} == shapes

    def test_what_the_model_cannot_take_is_a_wrong_argument(self, run: Any) -> None:
        done = run("report", "small", "large", "--hf-config", "--length", "65")
        assert done.code == 2
        assert "--length 65: the student's configuration says 64 positions at most" in done.err

    def test_positions_that_are_relative_have_no_end(self) -> None:
        model = FAMILIES["t5"]().student
        model.config.n_positions = 512
        assert model.config.relative_attention_num_buckets > 0
        for asked, length in ((None, 2048), (1024, 1024)):
            found = example_inputs(model, model, 1, asked, "auto")
            assert found["input_ids"].shape == (1, length)
        model.config.max_position_embeddings = 256  # MPNet has both, and this one ends
        assert example_inputs(model, model, 1, None, "auto")["input_ids"].shape == (1, 256)

    def test_sizes_that_no_memory_holds_are_wrong_arguments(self, run: Any, here: Path) -> None:
        models = ("towers.py:student", "towers.py:teacher")
        done = run("report", *models, "--batch", "1099511627776", "--length", "4")
        assert (done.code, done.out) == (2, "")
        assert "1099511627776 × 4 has 4398046511104 numbers, and one with 2147483648" in done.err
        FAMILIES["vit"]().student.config.save_pretrained(here)
        done = run("report", ".", ".", "--hf-config", "--batch", "1099511627776")
        assert (done.code, "1099511627776 × 3 × 16 × 16 has" in done.err) == (2, True)

    def test_sizes_that_say_nothing_are_wrong_arguments(self, run: Any, here: Path) -> None:
        given = ("--inputs", "towers.py:inputs", "--batch", "2")
        done = run("report", "towers.py:student", "towers.py:teacher", *given)
        assert (done.code, "--inputs brings its own" in done.err) == (2, True)
        FAMILIES["vit"]().student.config.save_pretrained(here)
        done = run("report", ".", ".", "--hf-config", "--length", "2")
        assert (done.code, "--length 2: ViTForImage" in done.err) == (2, True)

    def test_unknown_inputs_are_asked_for(self, run: Any) -> None:
        # A mapping, since there is nothing to propose.
        Path("none.toml").write_text("format = 1\nmatch = []\n")
        done = run("report", *["towers.py:wordless"] * 2, "--mapping", "none.toml")
        assert done.code == 2
        assert "Linear.forward takes input, and inputs are made for" in done.err
