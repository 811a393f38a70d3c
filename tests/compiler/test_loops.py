"""Models whose graphs hold more than operators: ``cond``, ``scan``, ``map``, ``vmap``, ``grad``."""

import copy

import pytest
import torch
from torch import fx, nn
from torch._higher_order_ops.map import map as over
from torch._higher_order_ops.scan import scan
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import fxdistill
from fxdistill import errors
from fxdistill.graph.effects import effects_of
from fxdistill.passes import ExposeOutputs
from fxdistill.taps.markers import is_tap

AOT = {"backend": "aot_eager"}
KINDS = ("cond", "scan", "map", "vmap", "grad")
STEPS, WIDTH = 12, 8


class Mixer(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.weight, self.kind = nn.Parameter(torch.randn(WIDTH, WIDTH) / 4), kind

    def forward(self, x):
        if self.kind == "cond":
            return torch.cond(x.sum() > 0, self._twice, self._once, (x,))
        if self.kind == "map":
            return over(self._once, x)
        if self.kind == "vmap":
            return torch.vmap(self._row)(x)
        if self.kind == "grad":
            return torch.func.grad(self._energy)(x)
        _, steps = scan(self._step, torch.zeros_like(x[:, 0]), x.movedim(1, 0))
        return steps.movedim(0, 1)

    def _once(self, x):
        return x @ self.weight

    def _twice(self, x):
        return x @ self.weight @ self.weight

    def _row(self, x):
        return torch.vmap(lambda token: self.weight @ token * token.sum())(x)

    def _energy(self, x):
        return (x @ self.weight).pow(3).sum()

    def _step(self, state, x):
        state = torch.tanh(state @ self.weight + x)
        return state, state * 2


class Model(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.mixer, self.head = Mixer(kind), nn.Linear(WIDTH, 3)

    def forward(self, x):
        return self.head(torch.relu(self.mixer(x)).mean(1))


def batch():
    return {"x": torch.randn(2, STEPS, WIDTH), "labels": torch.tensor([0, 2])}


def made(kind, mode, student=None):
    student, teacher = student or Model(kind), Model(kind).eval()
    return fxdistill.wrap(student, teacher, {"mixer": "mixer"}, task="classification", compile=mode)


@pytest.mark.parametrize("kind", KINDS)
def test_one_graph_is_what_eager_computes(kind):
    torch.manual_seed(1)
    eager = made(kind, False)
    compiled = fxdistill.wrap(
        copy.deepcopy(eager.student),
        eager.teacher,
        {"mixer": "mixer"},
        task="classification",
        compile=AOT,
    )
    inputs = batch()
    results = [distiller(**inputs) for distiller in (eager, compiled)]
    for result in results:
        result.loss.backward()
    torch.testing.assert_close(results[1].loss, results[0].loss)
    for a, b in zip(eager.student.parameters(), compiled.student.parameters(), strict=True):
        assert float(a.grad.abs().max()) > 0
        torch.testing.assert_close(b.grad, a.grad)


@pytest.mark.parametrize(("kind", "products"), [("cond", 2), ("scan", 1), ("map", 1)])
def test_flops_are_those_of_the_bodies_as_often_as_they_run(kind, products):
    report = made(kind, AOT).report(**batch())
    head = 2 * 2 * WIDTH * 3
    wanted = products * 2 * 2 * STEPS * WIDTH * WIDTH + head
    assert report.flops.forward == report.flops.teacher == wanted
    assert any("holds while it runs is not in the memory" in note for note in report.notes)


def test_flops_of_a_branch_are_torchs():
    model, inputs = Model("cond"), batch()
    with FlopCounterMode(display=False) as counter:
        model(inputs["x"])
    found = made("cond", AOT, model).report(**inputs)
    # Run for real, one branch is taken: the dearer one is the bound that torch gives for fakes.
    assert counter.get_total_flops() <= found.flops.forward


class Inside(Model):
    """The module of the pair runs in the loop."""

    def __init__(self):
        super().__init__("scan")
        self.mixer.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        def step(state, x):
            state = torch.tanh(self.mixer.linear(state) + x)
            return state, state * 2

        _, steps = scan(step, torch.zeros_like(x[:, 0]), x.movedim(1, 0))
        return self.head(steps.mean(0))


@pytest.mark.parametrize("mode", [AOT, False], ids=str)
def test_a_pair_within_a_loop_is_an_error(mode):
    pair = {"mixer.linear": "mixer.linear"}
    distiller = fxdistill.wrap(Inside(), Inside(), pair, task="classification", compile=mode)
    with pytest.raises(errors.TapError, match=r"mixer\.linear"):
        distiller(**batch())


class Transformed(Model):
    """The module of the pair runs in a function that is transformed."""

    def __init__(self, kind):
        super().__init__(kind)
        self.mixer.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        if self.mixer.kind == "vmap":
            return self.head(torch.vmap(self.mixer.linear)(x).mean(1))
        return self.head(torch.func.grad(lambda t: self.mixer.linear(t).pow(2).sum())(x).mean(1))


@pytest.mark.parametrize("mode", [AOT, False, "regional"], ids=str)
@pytest.mark.parametrize("kind", ["vmap", "grad"])
def test_a_pair_within_a_transform_is_an_error(kind, mode):
    models = Transformed(kind), Transformed(kind).eval()
    pair = {"mixer.linear": "mixer.linear"}
    distiller = fxdistill.wrap(*models, pair, task="classification", compile=mode)
    with pytest.raises(errors.TapError, match=r"mixer\.linear.*torch\.vmap or torch\.func"):
        distiller(**batch())


class Reused(nn.Module):
    """The module runs once by itself and once where its value is hidden."""

    def __init__(self, kind):
        super().__init__()
        self.linear, self.head, self.kind = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3), kind

    def forward(self, x):
        if self.kind == "grad":
            x = self.linear(x)
            x = x + torch.func.grad(lambda t: self.linear(t).pow(2).sum())(x)
        elif self.kind == "vmap":
            x = torch.vmap(self.linear)(x)
            x = self.linear(x)
        else:
            start = torch.zeros_like(x[:, 0])
            _, x = scan(lambda s, t: (s + self.linear(t), t * 1), start, x.movedim(1, 0))
            x = self.linear(x.movedim(0, 1))
        return self.head(x.mean(1))


@pytest.mark.parametrize("mode", [AOT, False, "regional"], ids=str)
@pytest.mark.parametrize(("kind", "visible", "hidden"), [("grad", 0, 1), ("vmap", 1, 0)])
def test_calls_outside_of_a_transform_are_matched(kind, visible, hidden, mode):
    torch.manual_seed(0)
    student, teacher, x = Reused(kind), Reused(kind).eval(), batch()["x"]
    values = []
    for model in (student, teacher):
        inner = model.linear(x)
        values.append(inner if kind == "grad" else model.linear(inner))
    wanted = (values[0] - values[1].detach()).pow(2).mean()
    pair = {f"linear@{visible}": f"linear@{visible}"}
    distiller = fxdistill.wrap(student, teacher, pair, logit_loss=None, compile=mode)
    loss = distiller(x).loss
    torch.testing.assert_close(loss, wanted)
    found = torch.autograd.grad(loss, student.linear.weight)
    torch.testing.assert_close(found, torch.autograd.grad(wanted, student.linear.weight))
    pair = {f"linear@{hidden}": f"linear@{hidden}"}
    distiller = fxdistill.wrap(student, teacher, pair, logit_loss=None, compile=mode)
    with pytest.raises(errors.TapError, match=r"torch\.vmap or torch\.func"):
        distiller(x)


@pytest.mark.parametrize("call", [0, 1])
def test_a_module_that_runs_in_a_loop_is_matched_nowhere(call):
    pair = {f"linear@{call}": f"linear@{call}"}
    models = Reused("scan"), Reused("scan").eval()
    distiller = fxdistill.wrap(*models, pair, logit_loss=None, compile=AOT)
    with pytest.raises(errors.TapError, match="runs inside a loop"):
        distiller(batch()["x"])


def test_what_is_hidden_does_not_hinder_a_trace():
    program = ExposeOutputs()(fxdistill.trace(Reused("vmap"), batch()["x"]))
    assert program.outputs[1:] == ("linear@1", "head")


def test_a_loop_that_only_reads_makes_no_copies():
    class Behind(Model):
        def forward(self, x):
            return self.head(torch.relu(self.mixer(self.first(x))).mean(1))

    models = [Behind("scan"), Behind("scan").eval()]
    for model in models:
        model.first = nn.Linear(WIDTH, WIDTH)
    distiller = fxdistill.wrap(
        *models, {"first": "first"}, logit_loss=None, freeze_teacher=False, compile=AOT
    )
    program = distiller.check(batch()["x"])
    targets = [str(node.target) for node in program.gm.graph.nodes]
    assert not [target for target in targets if "clone" in target]
    assert targets.count("scan") == 1  # the student's: no term reads what the teacher's makes


def test_markers_within_loops_are_erased():
    program = ExposeOutputs()(fxdistill.trace(Inside(), batch()["x"]))
    assert program.outputs[1:] == ("head",)
    inner = [m for m in program.gm.modules() if isinstance(m, fx.GraphModule)]
    assert len(inner) > 1
    assert not [n for m in inner for n in m.graph.nodes if is_tap(n)]


# ---------------------------------------------------------------------- what bodies write


def traced(build):
    """A graph on fake tensors, as a capture has it."""
    mode = FakeTensorMode()
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["example_value"] = mode.from_tensor(torch.zeros(4))
    holder = nn.Module()
    node = build(graph, x, holder)
    graph.output(x)
    return fx.GraphModule(holder, graph), x, node


def body(mode_of, write):
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["example_value"] = mode_of.meta["example_value"]
    made = graph.call_method("add_" if write else "add", (x, 1))
    graph.output((made,))
    return fx.GraphModule(nn.Module(), graph)


@pytest.mark.parametrize("write", [False, True])
def test_a_region_writes_what_its_body_writes(write):
    def build(graph, x, holder):
        holder.body = body(x, write)
        region = graph.get_attr("body")
        return graph.call_function(torch.ops.higher_order.invoke_subgraph, (region, "region", x))

    gm, x, node = traced(build)
    effects = effects_of(gm)
    assert effects.written_after(x, node) == write


def test_a_kernel_that_returns_nothing_may_write_all_that_it_is_given():
    from torch._higher_order_ops.triton_kernel_wrap import triton_kernel_wrapper_mutation

    def build(graph, x, holder):
        return graph.call_function(
            triton_kernel_wrapper_mutation,
            kwargs={
                "kernel_idx": 0,
                "constant_args_idx": 0,
                "grid": [(1, 1, 1)],
                "tma_descriptor_metadata": {},
                "kwargs": {"x": x},
            },
        )

    gm, x, node = traced(build)
    effects = effects_of(gm)
    assert effects.written_after(x, node)
    assert node in effects.live(gm.graph)
