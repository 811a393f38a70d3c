"""`fxdistill report`: what reaches the distiller, what is shown, written, and refused."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fxdistill
from fxdistill.report.data import SCHEMA, Value
from fxdistill.report.report import Report

pytestmark = pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")


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
