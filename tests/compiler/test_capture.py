"""One graph: how many compilations, what is in it, what reaches the lowering."""

import gc
import warnings
import weakref

import pytest
import torch
from torch import nn

import fxdistill
from architectures import ARCHITECTURES
from fxdistill.errors import CaptureError, LoweringError, StepError
from fxdistill.graph.program import all_nodes
from fxdistill.passes import ExposeOutputs
from fxdistill.taps.markers import begin, tap, tapped
from toys import MAPPING, VOCABULARY, assert_same_gradients, gradients, tokens, toy_pair

AOT = {"backend": "aot_eager"}


class Counter:
    """A backend that counts, and shows what it was given; it runs the graph as it is."""

    def __init__(self):
        self.graphs = []

    def __call__(self, gm, example_inputs):
        self.graphs.append(gm)
        return gm


@pytest.fixture
def counted():
    counter = Counter()
    student, teacher = toy_pair()
    distiller = fxdistill.wrap(
        student, teacher, MAPPING, task="causal_lm", compile={"backend": counter}
    )
    return distiller.train(), counter.graphs


def step(distiller, batch=3, length=7, **kwargs):
    ids = torch.randint(0, VOCABULARY, (batch, length))
    distiller(ids, labels=ids, **kwargs).loss.backward()


@pytest.mark.slow
def test_six_shapes_that_vary_together_make_two_graphs(counted):
    distiller, graphs = counted
    for shape in [(3, 10), (4, 12), (5, 9), (2, 20), (7, 16), (6, 8)]:
        step(distiller, *shape)
    assert len(graphs) <= 2


@pytest.mark.slow
def test_shapes_that_vary_one_after_the_other_make_three_and_size_one_a_fourth(counted):
    distiller, graphs = counted
    for shape in [(3, 10), (4, 10), (4, 12), (5, 9), (5, 8), (2, 8)]:
        step(distiller, *shape)
    assert len(graphs) <= 3
    step(distiller, 1, 8)
    assert len(graphs) <= 4


def test_switching_modes_makes_one_more_and_leaves_the_teacher_in_eval(counted):
    distiller, graphs = counted
    for mode in (True, False, True, False):
        step(distiller.train(mode))
        assert not any(module.training for module in distiller.teacher.modules())
    assert len(graphs) <= 2


def test_set_and_num_items_recompile_nothing(counted):
    distiller, graphs = counted
    step(distiller, num_items=3)
    before = len(graphs)
    for i in range(3):
        distiller.set(
            feature_weight=0.1 * i, temperature=1.0 + i, weights={"blocks.1.mlp": 0.5 * i}
        )
        step(distiller, num_items=5 + i)
    assert len(graphs) == before == 1


@pytest.mark.slow
def test_distillers_do_not_use_up_each_others_compilations():
    for _ in range(10):
        student, teacher = toy_pair()
        fxdistill.wrap(student, teacher, compile={"backend": "eager"})(tokens())


@pytest.mark.parametrize("mode", [AOT, "regional", False], ids=str)
def test_a_distiller_that_is_dropped_leaves_nothing_behind(mode):
    student, teacher = toy_pair()
    distiller = fxdistill.wrap(student, teacher, MAPPING, task="causal_lm", compile=mode)
    ids = tokens()
    distiller(ids, labels=ids).loss.backward()
    distiller.check(ids, labels=ids)
    distiller.report()
    assert (distiller.program is None) == (mode is False)
    kept = [weakref.ref(x) for x in (distiller, student, teacher, *distiller.parameters())]
    kept += [weakref.ref(p) for p in teacher.parameters()]
    kept += [] if distiller.program is None else [weakref.ref(distiller.program)]
    del distiller, student, teacher
    gc.collect()
    assert not any(ref() is not None for ref in kept)


def test_no_marker_reaches_the_lowering(counted):
    distiller, graphs = counted
    step(distiller)
    targets = {node.target for node in graphs[0].graph.nodes}
    assert not targets & {begin, tap, tapped}
    assert "loss" in distiller.program.outputs
    assert "blocks.1.mlp" in distiller.program.outputs


def test_the_objective_stays_readable_at_the_captured_level(counted):
    distiller, graphs = counted
    step(distiller)
    targets = [node.target for node in all_nodes(graphs[0])]
    assert targets.count(fxdistill.losses.mse) == 2
    assert targets.count(fxdistill.losses.vocab_loss) == 1


def test_autocast_in_every_path():
    losses = []
    for mode in (False, AOT):
        student, teacher = toy_pair()
        distiller = fxdistill.wrap(student, teacher, MAPPING, task="causal_lm", compile=mode)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = distiller(tokens(), labels=tokens())
        out.loss.backward()
        assert out.loss.dtype == torch.float32
        losses.append((out.loss.detach(), gradients(student)))
    torch.testing.assert_close(losses[1][0], losses[0][0], rtol=1e-2, atol=1e-3)
    assert_same_gradients(losses[1][1], losses[0][1], rtol=2e-2)


class Breaks(nn.Module):
    """A model with a line that no graph can hold."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, ids):
        out = self.inner(ids)
        print("this line breaks the graph")
        return out


def test_a_graph_break_names_the_line_and_the_way_out(capsys):
    student, teacher = toy_pair()
    mapping = {f"inner.{s}": t for s, t in MAPPING.items()}
    with pytest.raises(CaptureError) as caught:
        fxdistill.wrap(Breaks(student), teacher, mapping, compile=AOT)(tokens())
    message = str(caught.value)
    assert "test_capture.py" in message
    assert "this line breaks the graph" in message
    assert 'compile="regional"' in message


def test_fallback_is_said_aloud_and_has_the_same_numbers():
    student, teacher = toy_pair()
    mapping = {f"inner.{s}": t for s, t in MAPPING.items()}
    options = {**AOT, "fallback": "regional"}
    distiller = fxdistill.wrap(Breaks(student), teacher, mapping, compile=options)
    with pytest.warns(UserWarning, match="falling back"):
        out = distiller(tokens())
    reference = fxdistill.wrap(*toy_pair(), MAPPING, compile=False)(tokens())
    torch.testing.assert_close(out.loss, reference.loss, rtol=1e-6, atol=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        distiller(tokens())


def test_regional_terms_are_compiled_with_the_same_options(monkeypatch):
    seen = []

    def remember(gm, example_inputs, options=None):
        seen.append(options)
        return gm

    student, teacher = toy_pair()
    options = {"backend": remember, "options": {"level": 3}, "fallback": "regional"}
    mapping = {f"inner.{s}": t for s, t in MAPPING.items()}
    distiller = fxdistill.wrap(Breaks(student), teacher, mapping, compile=options)
    with pytest.warns(UserWarning, match="falling back"):
        distiller(tokens())
    assert seen == [{"level": 3}]


def test_a_loss_that_breaks_the_graph_is_named():
    def talks(student, teacher, weights):
        print("a word")
        return (student - teacher).square().mean()

    for mode in (AOT, "regional"):
        distiller = fxdistill.wrap(*toy_pair(), MAPPING, feature_loss=talks, compile=mode)
        with pytest.raises(CaptureError, match=r'print\("a word"\)'):
            distiller(tokens())


def test_trace_and_expose():
    student, _ = toy_pair(remat=True)
    program = fxdistill.trace(student, tokens())
    exposed = fxdistill.run(program, (ExposeOutputs(("blocks.*.mlp",)),))
    assert exposed.outputs == ("output_0", "blocks.0.mlp", "blocks.1.mlp")
    assert not any(node.target is tap for node in exposed.gm.graph.nodes)
    assert program.outputs == ("output_0",)
    assert fxdistill.run(exposed, (ExposeOutputs(),)).history[-1].changed is False


def test_dump_writes_numbered_programs(tmp_path, monkeypatch):
    monkeypatch.setenv("FXDISTILL_DUMP", str(tmp_path))
    student, teacher = toy_pair()
    fxdistill.wrap(student, teacher, MAPPING, compile=AOT)(tokens()).loss.backward()
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names[0] == "00_capture.py"
    assert any("ExposeOutputs" in name for name in names)
    assert any("PruneTeacher" in name for name in names)
    assert any("KeepTeacher" in name for name in names)
    assert "mse" in (tmp_path / next(n for n in names if "PruneTeacher" in n)).read_text()


@pytest.mark.slow
def test_the_registered_backend():
    student, teacher = toy_pair()
    compiled = torch.compile(
        fxdistill.wrap(student, teacher, MAPPING, compile=AOT), backend="fxdistill"
    )
    reference = fxdistill.wrap(*toy_pair(), MAPPING, compile=False)(tokens())
    torch.testing.assert_close(compiled(tokens()).loss, reference.loss)


def test_passes_of_the_user_run_after_compose():
    seen = []

    def look(program):
        seen.append(program.outputs)
        return program

    student, teacher = toy_pair()
    fxdistill.wrap(student, teacher, MAPPING, compile=AOT, passes=(look,))(tokens())
    assert seen
    assert seen[0][0] == "loss"


@pytest.mark.slow
def test_an_evaluation_in_inference_mode_comes_first():
    for mode in (False, AOT, "regional"):
        distiller = fxdistill.wrap(*toy_pair(), MAPPING, compile=mode)
        with torch.inference_mode():
            distiller(tokens())
        distiller(tokens()).loss.backward()


@pytest.mark.slow
def test_all_sizes_dynamic():
    project = nn.Linear(8, 8)
    mapping = [
        fxdistill.Match("blocks.0.mlp", "blocks.0.mlp@1", project=project),
        fxdistill.Match("blocks.0.mlp@1", "blocks.0.mlp", reduce=("b l d -> b d", "mean")),
    ]
    results = []
    for mode in (False, {**AOT, "dynamic": True}):
        student, teacher = toy_pair("twice")
        distiller = fxdistill.wrap(student, teacher, mapping, compile=mode)
        out = distiller(tokens())
        out.loss.backward()
        results.append((out.losses, gradients(student)))
    assert "blocks.0.mlp@1" in results[1][0]
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-5, atol=1e-7)
    assert_same_gradients(results[1][1], results[0][1])


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
def test_a_checkpointed_model_with_its_default_cache():
    """Transformers turns the cache off with a message logged once, which dynamo would refuse."""
    build = ARCHITECTURES["LlamaForCausalLM"].build
    student, teacher = build(2), build(2)
    student.config.use_cache = teacher.config.use_cache = True
    student.train().gradient_checkpointing_enable()
    mapping = {"model.layers.*.mlp": "model.layers.*.mlp"}
    results = []
    for mode in (False, AOT):
        out = fxdistill.wrap(student, teacher, mapping, compile=mode)(input_ids=tokens())
        out.loss.backward()
        results.append((out.loss.detach(), gradients(student)))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-5, atol=1e-8)
    assert_same_gradients(results[1][1], results[0][1])


def test_a_wrong_call_is_the_calls_fault_and_falls_back_nowhere():
    class Refuses(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, ids):
            if ids.shape[1] > 7:
                raise ValueError("too long")
            return self.inner(ids)

    student, teacher = toy_pair()
    options = {**AOT, "fallback": "regional"}
    distiller = fxdistill.wrap(Refuses(student), teacher, compile=options)
    distiller(tokens())
    with pytest.raises(StepError, match=r'(?s)test_capture\.py.*raise ValueError\("too long"\)'):
        distiller(tokens(3, 8))
    assert distiller.options.mode == "one_graph"
    distiller(tokens())


def test_a_fallback_that_fails_too_changes_nothing():
    def fails_untraced(student, teacher, weights):
        print("a word")
        raise ZeroDivisionError

    options = {**AOT, "fallback": "regional"}
    distiller = fxdistill.wrap(*toy_pair(), MAPPING, feature_loss=fails_untraced, compile=options)
    with pytest.raises(CaptureError):
        distiller(tokens())
    assert distiller.options.mode == "one_graph"


def test_a_backend_that_fails_is_named_as_such():
    def broken(gm, example_inputs):
        raise RuntimeError("no compiler here")

    distiller = fxdistill.wrap(*toy_pair(), compile={"backend": broken})
    with pytest.raises(LoweringError, match=r"the backend.*no compiler here") as caught:
        distiller(tokens())
    assert len(str(caught.value)) < 400


@pytest.mark.slow
def test_an_ordinary_loop_has_more_forms_than_dynamo_allows_by_default():
    student, teacher = toy_pair()
    eager = {"backend": "eager"}  # forms are dynamo's
    distiller = fxdistill.wrap(student, teacher, MAPPING, task="causal_lm", compile=eager)
    ids, ones = tokens(), torch.ones(3, 7)
    forms = [{}, {"labels": ids}, {"loss_mask": ones}, {"token_weights": ones}, {"num_items": 5}]
    for form in [{**a, **b} for a in forms for b in forms[1:3]]:
        distiller(ids, **form)


def test_the_backend_takes_no_options_of_torch_compile():
    compiled = torch.compile(
        fxdistill.wrap(*toy_pair(), compile=AOT).student, backend="fxdistill", options={"a": 1}
    )
    with pytest.raises(Exception, match="takes no options"):
        compiled(tokens())


@pytest.mark.parametrize("mode", [False, "regional"])
def test_the_registered_backend_leaves_the_other_modes_alone(mode):
    pair = toy_pair()
    compiled = torch.compile(fxdistill.wrap(*pair, MAPPING, compile=mode), backend="fxdistill")
    reference = fxdistill.wrap(*pair, MAPPING, compile=False)(tokens())
    torch.testing.assert_close(compiled(tokens()).loss, reference.loss)


def test_every_graph_is_dumped(tmp_path, monkeypatch):
    monkeypatch.setenv("FXDISTILL_DUMP", str(tmp_path))
    distiller = fxdistill.wrap(*toy_pair(), MAPPING, task="causal_lm", compile=AOT)
    distiller(tokens())
    distiller(tokens(), labels=tokens())
    assert (tmp_path / "00_capture.py").is_file()
    assert "cross_entropy" not in (tmp_path / "00_capture.py").read_text()
    assert "cross_entropy" in (tmp_path / "graph_2" / "00_capture.py").read_text()
    fxdistill.wrap(*toy_pair(), MAPPING, compile="regional")(tokens())
    assert "mse" in (tmp_path / "graph_3" / "00_terms.py").read_text()


class Catching(nn.Module):
    """Tries what its inputs do not allow, and goes on without: no graph holds that."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x):
        try:
            return self.linear(x.view(-1, 5)[:, :4])
        except RuntimeError:
            return self.linear(x)


def test_what_a_model_catches_itself_falls_back_and_stops_no_check():
    x = torch.randn(4, 4)
    given = {"task": "classification", "label_loss": None}
    with pytest.raises(StepError, match=r"If the step runs then \(a model may catch it\)"):
        fxdistill.wrap(Catching(), Catching(), compile=AOT, **given)(x)
    models = Catching(), Catching()
    wanted = fxdistill.wrap(*models, compile=False, **given)(x).loss
    falling = {**AOT, "fallback": "regional"}
    with pytest.warns(UserWarning, match="falling back"):
        found = fxdistill.wrap(*models, compile=falling, **given)(x).loss
    torch.testing.assert_close(found, wanted)
    for mode in (falling, "regional", False):
        with pytest.warns(UserWarning, match="could not be checked"):
            fxdistill.wrap(*models, compile=mode, example_inputs=(x,), **given)
