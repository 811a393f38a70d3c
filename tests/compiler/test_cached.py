"""AOTAutograd's cache holds our graphs, and its key follows what decides about their code."""

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import fx
from torch._library import custom_ops

import fxdistill
import fxdistill.passes
from fxdistill.compiler import cached
from fxdistill.compiler.cached import caching_of
from fxdistill.graph.sections import SECTION
from fxdistill.losses.formed import formed
from fxdistill.passes import KeepTeacher, PruneTeacher

TESTS = Path(__file__).parent.parent


def graph(target=torch.relu, section="student"):
    made = fx.Graph()
    x = made.placeholder("x")
    y = made.call_function(target, (x,))
    y.meta["custom"] = {SECTION: section, "else": object()}
    made.output((y,))
    return fx.GraphModule({}, made)


def holding(inner):
    """A graph whose part, in a submodule, is ``inner``."""
    made = fx.Graph()
    x = made.placeholder("x")
    part = made.get_attr("part")
    made.output((made.call_function(formed, (part, 1, x)),))
    return fx.GraphModule({"part": inner}, made)


def test_equal_graphs_have_one_key_and_options_and_labels_another():
    first = caching_of(graph(), (KeepTeacher(),))
    assert not first.why_not
    assert caching_of(graph(), (KeepTeacher(),)).key == first.key
    assert caching_of(graph(), (KeepTeacher(("other",)),)).key != first.key
    assert caching_of(graph(), (PruneTeacher(),)).key != first.key
    assert caching_of(graph(section="teacher"), (KeepTeacher(),)).key != first.key
    with torch.autocast("cpu", torch.bfloat16):
        assert caching_of(graph(), (KeepTeacher(),)).key != first.key


def test_the_key_follows_every_file_of_ours(monkeypatch, tmp_path):
    shutil.copytree(Path(fxdistill.__file__).parent, tmp_path / "fxdistill")
    shutil.copytree(Path(fxdistill.passes.__file__).parent, tmp_path / "passes")
    for package in (fxdistill, fxdistill.passes):
        name = package.__name__.rpartition(".")[2]
        monkeypatch.setattr(package, "__file__", str(tmp_path / name / "__init__.py"))
    assert cached._package_digest() == cached._PACKAGE
    for file in ("passes/keep_teacher.py", "fxdistill/losses/fused/operator.py"):
        before = cached._package_digest()
        with (tmp_path / file).open("a") as opened:
            opened.write("# changed\n")
        assert cached._package_digest() != before


def test_our_functions_are_declared_beside_those_of_the_user():
    caching = caching_of(holding(graph()), ())
    assert caching.functions == ("fxdistill.losses.formed.formed",)
    name = "unsafe_marked_cacheable_functions"
    options = caching.options({name: {"mine.f": "1"}, "epilogue_fusion": False})
    assert options["epilogue_fusion"] is False
    assert options[name] == {"mine.f": "1", "fxdistill.losses.formed.formed": caching.key}


def opaque(x):
    return x * 2


@pytest.mark.parametrize("inside", [False, True])
def test_a_function_through_which_nothing_looks_is_not_cached(caplog, inside):
    caplog.set_level("INFO", "fxdistill")
    made = graph(opaque)
    caching = caching_of(holding(made) if inside else made, ())
    assert "opaque" in caching.why_not
    assert caching.options({}) == {}
    assert [record.name for record in caplog.records] == ["fxdistill.compiler"]
    with caching.used():
        assert not torch._functorch.config.enable_autograd_cache
    assert torch._functorch.config.enable_autograd_cache


def by_hand(source, path):
    """A pass from a file of the user's, or from no file."""
    if path is not None:
        path.write_text(source)
    namespace = {"__name__": "of_the_user"}
    exec(compile(source, str(path or "<none>"), "exec"), namespace)
    return namespace["mine"]


def test_a_pass_of_the_user_is_known_by_its_source(tmp_path):
    source = "def mine(program):\n    return program\n"
    keys = [
        caching_of(graph(), (by_hand(text, tmp_path / f"{i}.py"),)).key
        for i, text in enumerate((source, source, source + "# changed\n"))
    ]
    assert keys[0] == keys[1] != keys[2]
    assert "cannot be read" in caching_of(graph(), (by_hand(source, None),)).why_not


def test_an_operator_of_the_user_is_known_by_its_source(tmp_path):
    file = tmp_path / "operator.py"
    source = "def mine(x: 'Tensor') -> 'Tensor':\n    return x.clone()\n"
    function = by_hand(source.replace("'Tensor'", "__import__('torch').Tensor"), file)
    made = torch.library.custom_op("fxdistill_test::mine", function, mutates_args=())
    made.register_fake(opaque)
    target = torch.ops.fxdistill_test.mine.default
    first = caching_of(graph(target), ())
    assert not first.why_not
    file.write_text(file.read_text() + "# changed\n")
    assert caching_of(graph(target), ()).key != first.key
    del custom_ops.OPDEFS["fxdistill_test::mine"]  # as if it came from a library in C++
    assert "fxdistill_test::mine" in caching_of(graph(target), ()).why_not


def test_a_tensor_of_a_class_of_its_own_is_known_by_its_source(tmp_path, monkeypatch):
    """Tracing looks into such a class, as into that of quantized weights."""
    file = tmp_path / "quantized_for_test.py"
    file.write_text(
        "from torch.testing._internal.two_tensor import TwoTensor\n\n"
        "class Quantized(TwoTensor):\n    pass\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    kind = importlib.import_module("quantized_for_test").Quantized

    def key():
        made = graph()
        (x,) = made.graph.find_nodes(op="placeholder")
        x.meta["example_value"] = kind(torch.ones(2), torch.ones(2))
        return caching_of(made, ()).key

    first = key()
    assert first == key() != caching_of(graph(), ()).key
    file.write_text(file.read_text() + "# changed\n")
    assert key() != first


def test_whoever_writes_programs_to_a_folder_gets_all_of_them(monkeypatch, tmp_path):
    caching = caching_of(graph(), (), wanted=False)
    assert caching.why_not
    assert caching.key == caching_of(graph(), ()).key


# What a process of its own runs: a step in each mode that compiles, and what came of it.
STEP = """
import json, torch
from torch._dynamo.utils import counters
import fxdistill
from toys import MAPPING, tokens, toy_pair

told = {}
for mode in (True, "regional"):
    counters.clear()
    student, teacher = toy_pair()
    matches = [fxdistill.Match(s, t) for s, t in MAPPING.items()]
    made = fxdistill.wrap(student, teacher, matches, logit_loss=None, compile=mode)
    out = made(tokens())
    out.loss.backward()
    gradient = sum(p.grad.norm() for p in student.parameters() if p.grad is not None)
    told[str(mode)] = {
        "loss": float(out.loss),
        "gradient": float(gradient),
        "passes": [record.name for record in made.program.history],
        **{k: v for k, v in counters["aot_autograd"].items() if k.startswith("autograd_cache")},
    }
print(json.dumps(told))
"""


def process(root, cache):
    """What ``STEP`` tells, run on the package at ``root``."""
    path = os.pathsep.join([str(root), str(TESTS)])
    env = {**os.environ, "PYTHONPATH": path, "TORCHINDUCTOR_CACHE_DIR": str(cache)}
    done = subprocess.run(
        [sys.executable, "-c", STEP], cwd=root, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    *said, told = done.stdout.splitlines()
    return said, json.loads(told)


@pytest.mark.slow
def test_a_second_process_finds_the_step_and_edited_sources_do_not(tmp_path):
    """Only processes show it: one of these keys that differs by process would never be found."""
    for package in (fxdistill, fxdistill.passes):
        source = Path(package.__file__).parent
        shutil.copytree(source, tmp_path / package.__name__.rpartition(".")[2])
    (tmp_path / "pyproject.toml").touch()  # a checkout
    cache = tmp_path / "cache"
    _, first = process(tmp_path, cache)
    _, second = process(tmp_path, cache)
    for mode in ("True", "regional"):
        assert first[mode]["autograd_cache_miss"] == first[mode]["autograd_cache_saved"] == 1
        assert second[mode]["autograd_cache_hit"] == 1
        assert "autograd_cache_miss" not in second[mode]
        assert not any("bypass" in name for told in (first, second) for name in told[mode])
        assert second[mode]["loss"] == first[mode]["loss"]
        assert second[mode]["gradient"] == first[mode]["gradient"]
        assert second[mode]["passes"][-1] == "AOTAutogradCache"
        assert "PackReductions" in first[mode]["passes"]

    run = "def __call__(self, program: P) -> P:\n"
    edit(tmp_path / "passes/pack_reductions.py", run, f"{run}        print('edited')\n")
    formula = tmp_path / "fxdistill/losses/formed.py"
    edit(formula, "scaled(next(saved), by_value)", "scaled(next(saved), 2 * by_value)")
    said, third = process(tmp_path, cache)
    assert said == ["edited"] * 2  # in each mode
    for mode in ("True", "regional"):
        assert third[mode]["autograd_cache_miss"] == 1
        assert third[mode]["loss"] == first[mode]["loss"]
        assert third[mode]["gradient"] == pytest.approx(2 * first[mode]["gradient"], rel=1e-5)


def edit(file, old, new):
    text = file.read_text()
    assert text.count(old) == 1
    file.write_text(text.replace(old, new))
