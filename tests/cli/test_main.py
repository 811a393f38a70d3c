"""The command line: what it prints and where, its exit codes, what it makes of arguments."""

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
import torch
from torch import Tensor

import fxdistill
from families import FAMILIES
from fxdistill import Matches
from fxdistill.cli.example_inputs import example_inputs
from fxdistill.cli.loading import from_config
from fxdistill.cli.main import main, parser
from fxdistill.losses.names import FEATURE_LOSSES, LABEL_LOSSES, LOGIT_LOSSES
from fxdistill.report.data import SCHEMA, Value
from fxdistill.report.report import Report

pytestmark = pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "dtype": "float16",
}
MODELS = """
import warnings
import torch
from torch import nn

print("printed by the file")

class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm, self.up = nn.LayerNorm(width), nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x):
        return x + self.down(self.up(self.norm(x)).relu())

class Tower(nn.Module):
    def __init__(self, blocks=2, width=8):
        super().__init__()
        self.embedding = nn.Embedding(10, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        self.head = nn.Linear(width, 10)

    def forward(self, input_ids):
        x = self.embedding(input_ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)

def student():
    import beside
    return Tower(beside.BLOCKS)

def teacher():
    print("printed by a factory")
    return Tower(4, 16)

ready = Tower()
def inputs(): return {"input_ids": torch.zeros(3, 5, dtype=torch.long)}
def positional(): return (torch.zeros(3, 5, dtype=torch.long),)
def number(): return 3
def needs(width): pass
def broken(): raise ValueError("no\\nway")
def stopped(): raise KeyboardInterrupt
def leaving(): raise SystemExit(0)
def wordless(): return nn.Linear(2, 2)
def frozen(): return Tower().requires_grad_(False)
def warning():
    warnings.warn("look out")
    return Tower()
text = "no function"
big = dict
def odd(): return {1: 2}
def nothing(): return ()
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with models and configurations, which is the current one."""
    (tmp_path / "towers.py").write_text(MODELS)
    (tmp_path / "beside.py").write_text("BLOCKS = 2")
    (tmp_path / "unreadable.py").write_text("def (")
    for name, layers, width in (("small", 2, 32), ("large", 4, 64)):
        sizes = {"hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": layers}
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({**LLAMA, **sizes}))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., SimpleNamespace]:
    """Run a command in this process: its code, and both streams."""

    def command(*argv: str) -> SimpleNamespace:
        code = main(argv)
        out, err = capsys.readouterr()
        return SimpleNamespace(code=code, out=out, err=err)

    return command


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
        self, run: Any, here: Path, change: Any, says: str
    ) -> None:
        (here / "config.json").write_text(json.dumps({**LLAMA, **change}))
        done = run("modules", "config.json", "--hf-config")
        assert (done.code, done.out) == (2, "")
        assert says in done.err
        assert done.err.count("\n") == 1

    def test_architectures_may_be_one_name(self, run: Any, here: Path) -> None:
        named = {**LLAMA, "architectures": "LlamaForSequenceClassification"}
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
    def test_quantisation_is_left_out_and_told(self, run: Any, here: Path) -> None:
        (here / "config.json").write_text(json.dumps({**LLAMA, "quantization_config": {}}))
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


# ---- report

MADE = Report(
    schema=SCHEMA,
    fxdistill=fxdistill.__version__,
    torch=torch.__version__,
    mode="one_graph",
    backend="inductor",
    mesh={},
    inputs={},
    towers=(),
    pairs=(),
    terms=(),
)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Reports are made by hand; what asked for them is kept. ``stopped`` in inputs stops them."""
    seen: list[Any] = []

    def report(self: Any, *args: Any, **kwargs: Any) -> Report:
        seen.append((self, args, kwargs))
        inputs = {key: Value(tuple(x.shape), str(x.dtype)) for key, x in kwargs.items()}
        stopped = None if self.options.mode != "regional" else "a line\nof the model"
        return Report(**{**vars(MADE), "inputs": inputs, "stopped": stopped})

    def to_html(self: Report, path: Any) -> Any:
        Path(path).write_text("<html>")

    monkeypatch.setattr(fxdistill.Distiller, "report", report)
    monkeypatch.setattr(Report, "to_html", to_html)
    return seen


class TestReport:
    def test_everything_reaches_the_distiller(self, run: Any, asked: list[Any]) -> None:
        run("match", "small", "large", "--hf-config", "--roles", "norm", "--output", "norm.toml")
        files = ("--mapping", "norm.toml", "--html", "report.html", "--json", "report.json")
        sizes = ("--batch", "2", "--length", "7", "--dtype", "float32", "--backend", "aot_eager")
        done = run("report", "small", "large", "--hf-config", *sizes, *files)
        assert (done.code, done.err) == (0, "")
        assert "one_graph" in done.out
        ((distiller, args, inputs),) = asked
        assert distiller.matches.keys() == ["model.norm"]
        assert distiller.options.lowering.backend == "aot_eager"
        assert {p.dtype for p in distiller.parameters()} == {torch.float32}
        assert all(x.is_meta and x.shape == (2, 7) for x in inputs.values())
        assert list(inputs) == ["input_ids", "attention_mask", "labels"]
        assert args == ()
        assert Path("report.html").read_text() == "<html>"
        assert json.loads(Path("report.json").read_text())["mode"] == "one_graph"

    def test_without_a_mapping_there_is_what_match_proposes(
        self, run: Any, asked: list[Any]
    ) -> None:
        assert run("report", "small", "large", "--hf-config").code == 0
        distiller, _, inputs = asked[0]
        assert distiller.matches == fxdistill.match(distiller.student, distiller.teacher)
        assert len(distiller.projections) == 4
        assert (distiller.student.training, distiller.teacher.training) == (True, False)
        assert distiller._notes == ()
        assert {p.dtype for p in distiller.projections.parameters()} == {torch.bfloat16}
        assert inputs["labels"].shape == (4, 64)

    @pytest.mark.parametrize("factory", ["inputs", "positional"])
    def test_inputs_of_the_user(self, run: Any, asked: list[Any], factory: str) -> None:
        models = ("towers.py:student", "towers.py:teacher")
        done = run("report", *models, "--inputs", f"towers.py:{factory}", "--eager")
        assert done.code == 0
        distiller, args, kwargs = asked[0]
        assert distiller.options.mode == "eager"
        values: list[Tensor] = [*args, *kwargs.values()]
        assert [tuple(x.shape) for x in values] == [(3, 5)]
        assert bool(args) == (factory == "positional")

    @pytest.mark.parametrize(
        ("factory", "says"),
        [
            ("towers.py:number", "--inputs made a int: a dict of the keywords"),
            ("towers.py:nothing", "--inputs made an empty tuple: the factory returns no inputs"),
            ("builtins:dict", "--inputs made an empty dict: the factory returns no inputs"),
            ("towers.py:odd", "--inputs made a dict with the key 1: keys are the keywords"),
        ],
    )
    def test_inputs_that_are_none_are_a_wrong_argument(
        self, run: Any, asked: list[Any], factory: str, says: str
    ) -> None:
        models = ("towers.py:student", "towers.py:teacher")
        done = run("report", *models, "--inputs", factory)
        assert (done.code, asked) == (2, [])
        assert says in done.err

    def test_a_partial_report_is_shown_and_has_a_code(self, run: Any, asked: list[Any]) -> None:
        done = run("report", "small", "large", "--hf-config", "--regional", "--json", "-")
        assert done.code == 1
        assert json.loads(done.out)["stopped"] == "a line\nof the model"
        assert done.err == "fxdistill report: partial: a line\n"

    def test_json_is_alone_on_standard_output(self, run: Any, asked: list[Any]) -> None:
        done = run("report", "towers.py:student", "towers.py:teacher", "--json", "-")
        assert json.loads(done.out)["schema"] == SCHEMA
        assert done.err.count("printed by") == 2

    @pytest.mark.parametrize(
        ("argv", "code", "says"),
        [
            (["--mapping", "nowhere.toml"], 2, "nowhere.toml cannot be read"),
            (["--html", "nowhere/report.html"], 2, "there is no folder nowhere"),
            (["--html", "-"], 2, "--html -: only --json can go to standard output"),
            (["--html", "same", "--json", "small/../same"], 2, "--html same name one file"),
            (["--mapping", "m.json", "--json", "m.json"], 2, "--mapping m.json and --json m.json"),
            (["--html", "h" * 256], 2, "cannot be written: File name too long"),
            (["--json", "j" * 256], 2, "cannot be written: File name too long"),
            (["--backend", "indcutor"], 2, "indcutor"),
            (["--backend", ""], 2, "compile's backend '' does not exist"),
        ],
    )
    def test_wrong_files_and_backends(
        self, run: Any, asked: list[Any], argv: Any, code: int, says: str
    ) -> None:
        done = run("report", "small", "large", "--hf-config", *argv)
        assert (done.code, asked) == (code, [])
        assert says in done.err

    @pytest.mark.parametrize(
        ("name", "content", "code"),
        [
            ("none.toml", "format = 1\n", 0),
            ("none.json", '{"format": 1}', 0),
            ("none.toml", "", 2),
            ("none.json", "{}", 2),
        ],
    )
    def test_a_mapping_without_matches_is_for_logits_and_labels(
        self, run: Any, asked: list[Any], name: str, content: str, code: int
    ) -> None:
        Path(name).write_text(content)
        models = ("towers.py:wordless", "towers.py:wordless", "--inputs", "towers.py:positional")
        done = run("report", *models, "--mapping", name)
        assert (done.code, len(asked)) == (code, 1 - code // 2)
        says = "has no list of [[match]] tables" if code else ""
        assert says in done.err

    def test_models_without_blocks_are_told_of_a_mapping(self, run: Any, asked: list[Any]) -> None:
        done = run("report", "towers.py:wordless", "towers.py:teacher")
        assert (done.code, done.out, asked) == (3, "", [])
        assert "no repeated blocks found in the student (Linear)" in done.err
        assert "--mapping FILE; a file without matches" in done.err
        assert "compares logits and labels only" in done.err

    def test_a_name_that_just_fits_and_a_link_are_written(self, run: Any, asked: list[Any]) -> None:
        os.symlink("behind.json", "link")
        done = run("report", "small", "large", "--hf-config", "--html", "h" * 250, "--json", "link")
        assert done.code == 0, done.err
        assert Path("h" * 250).read_text() == "<html>"
        assert Path("link").is_symlink()
        assert json.loads(Path("behind.json").read_text())["schema"] == SCHEMA
        assert run("modules", "small", "--hf-config", "--json", "j" * 250).code == 0

    def test_a_page_that_cannot_be_written_in_the_end(
        self, run: Any, asked: list[Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(self: Report, path: Any) -> Any:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(Report, "to_html", full)
        done = run("report", "small", "large", "--hf-config", "--html", "report.html")
        assert (done.code, done.out) == (2, "")
        assert "--html report.html: cannot be written: No space left on device" in done.err

    def test_a_mapping_that_does_not_fit(self, run: Any, asked: list[Any]) -> None:
        content = '[[match]]\nstudent = "model.layer.0.mlp"\nteacher = "model.layers.0.mlp"\n'
        Path("mapping.toml").write_text(content)
        done = run("report", "small", "large", "--hf-config", "--mapping", "mapping.toml")
        assert (done.code, asked) == (3, [])
        assert "Nearest" in done.err or "nearest" in done.err


class TestRealReport:
    """The same with nothing replaced."""

    @pytest.mark.parametrize(
        "mode",
        ["--backend=aot_eager", pytest.param("--regional", marks=pytest.mark.slow), "--eager"],
    )
    def test_configurations(self, run: Any, mode: str) -> None:
        argv = ("--hf-config", "--batch", "2", "--length", "16", mode, "--json", "-")
        done = run("report", "small", "large", *argv)
        data = json.loads(done.out)
        assert (done.code, data["stopped"]) == (0, None), done.err
        assert len(data["pairs"]) == 4
        assert data["inputs"]["input_ids"]["shape"] == [2, 16]

    def test_all_faces(self, run: Any) -> None:
        models = ("towers.py:student", "towers.py:teacher")
        files = ("--html", "report.html", "--json", "report.json")
        done = run("report", *models, "--inputs", "towers.py:inputs", *files)
        assert done.code == 0, done.err
        assert "Tower ← Tower" in done.out
        assert json.loads(Path("report.json").read_text())["schema"] == SCHEMA
        assert "<html" in Path("report.html").read_text()


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


# ---- losses


def test_losses_are_listed_with_formula_and_options(run: Callable[..., SimpleNamespace]) -> None:
    told = run("losses")
    assert told.code == 0
    rows = {line.split()[0]: line for line in told.out.splitlines() if line.startswith("  ")}
    assert rows.keys() == {*FEATURE_LOSSES, *LOGIT_LOSSES, *LABEL_LOSSES}
    assert "(1/D) Σ (s - t)²" in rows["mse"]
    assert rows["jsd"].rstrip().endswith("beta=0.5")
    assert "normalize='mean'" in rows["distance_wise"]
