"""Feature terms form their gradient in the forward, where their two values meet."""

import functools

import pytest
import torch
from torch import fx, nn
from torch.utils.checkpoint import checkpoint

import fxdistill
from fxdistill import Match, errors, losses
from fxdistill.graph.pipeline import run
from fxdistill.graph.program import Program, all_nodes
from fxdistill.graph.sections import OBJECTIVE, SECTION
from fxdistill.losses.formed import formed
from fxdistill.passes import MeetEarly
from fxdistill.passes.form_gradients import FORMED
from mesh_steps import AOT
from toys import assert_same_gradients, gradients, tokens, toy_pair

WITHOUT = {**AOT, "disable": ("FormGradients",)}


def own(student, teacher, weights):
    """A loss that dynamo traces through, with a square root and a view."""
    gap = (student - teacher).flatten(1).square().sum(-1) + 1e-3
    return gap.sqrt().mean()


def remat(student, teacher, weights):
    return checkpoint(lambda s: (s.tanh() - teacher).square().mean(), student, use_reentrant=False)


def pairs(students, teachers, weights):
    """One term of several values."""
    return torch.stack(
        [(s - t).square().mean() for s, t in zip(students, teachers, strict=True)]
    ).prod()


def projection():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(8, 5), nn.GELU(), nn.Linear(5, 8))


CASES = {
    "named": {"mapping": {"blocks.0.mixer": "blocks.1.mixer", "blocks.1.mlp": "blocks.2.mlp"}},
    "projected": {"mapping": [Match("blocks.1.mlp", "blocks.2.mlp", project=nn.Module)]},
    "own": {"mapping": {"blocks.0.mlp": "blocks.0.mlp"}, "feature_loss": own},
    "pairs": {
        "mapping": {"blocks.0.mlp": "blocks.0.mlp", "blocks.1": "blocks.2"},
        "pairs_loss": pairs,
    },
    "angles": {"mapping": {"blocks.0.mlp": "blocks.0.mlp"}, "feature_loss": "angle_wise"},
    "one tap twice": {
        "mapping": [
            Match("blocks.0.mlp", "blocks.0.mlp", loss="l2"),
            Match("blocks.0.mlp", "blocks.1.mlp", weight=0.5, reduce=("b l d -> b d", "mean")),
        ]
    },
}


def made(case, compile, **options):
    student, teacher = toy_pair()
    given = dict(CASES[case] if isinstance(case, str) else case)
    if case == "projected":
        given["mapping"] = [Match("blocks.1.mlp", "blocks.2.mlp", project=projection())]
    options = {"task": "causal_lm", "feature_weight": 0.7, "compile": compile, **options}
    return fxdistill.wrap(student, teacher, **given, **options)


def stepped(distiller, **given):
    mask = torch.ones(3, 7)
    mask[0, 5:] = 0
    out = distiller(tokens(), loss_mask=mask, **given)
    out.loss.backward()
    return {"loss": out.loss.detach(), **out.losses}, gradients(distiller)


def formed_in(distiller):
    return [node for node in all_nodes(distiller.program.gm) if node.target is formed]


@pytest.mark.parametrize("compile", [AOT, "regional"], ids=["one", "terms"])
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_those_of_eager(case, compile):
    distiller = made(case, compile)
    for items in ({}, {"num_items": 30.0}):
        found, wanted = stepped(distiller, **items), stepped(made(case, False), **items)
        for name, value in wanted[0].items():
            torch.testing.assert_close(found[0][name], value)
        assert_same_gradients(found[1], wanted[1])
    assert len(formed_in(distiller)) == len(distiller.objective.weighed)


@pytest.mark.slow  # Inductor
def test_values_and_gradients_are_those_of_eager_with_inductor():
    found, wanted = stepped(made("projected", True)), stepped(made("projected", False))
    torch.testing.assert_close(found[0], wanted[0])
    assert_same_gradients(found[1], wanted[1])


def held(distiller, tap=None):
    """The bytes that taps and losses hold when the backward begins."""
    timeline = distiller.report(tokens(), labels=tokens()).memory.timeline
    last = [moment for moment in timeline if moment.phase == "forward"][-1].held
    return last.get("taps", 0) + last.get("losses", 0)


def test_a_term_keeps_the_gradients_by_its_value_and_its_projection():
    tap, parameters = 3 * 7 * 8 * 4, sum(p.numel() for p in projection().parameters()) * 4
    mapping = [Match("blocks.1.mlp", "blocks.2.mlp", project=projection(), loss="smooth_l1")]
    options = {"mapping": mapping, "logit_loss": None, "label_weight": 0.0}
    kept, before = held(made(options, AOT)), held(made(options, WITHOUT))
    # A tap may be counted as one where the student keeps it anyway; and some numbers.
    assert tap + parameters <= kept <= 2 * tap + parameters + 100
    assert before > kept


def test_the_teacher_runs_beside_the_student_and_not_before_it():
    mapping = {"blocks.0.mlp": "blocks.0.mlp", "blocks.1.mlp": "blocks.2.mlp"}
    for compile, together in ((AOT, True), ({**AOT, "disable": ("MeetEarly",)}, False)):
        distiller = made({"mapping": mapping}, compile)
        timeline = distiller.report(tokens()).memory.timeline
        places = [moment.at for moment in timeline if moment.phase == "forward"]
        assert (places.index("losses") < places.index("teacher blocks.1")) == together
        assert (places.index("student blocks.0") < places.index("teacher blocks.1")) == together


def test_a_teacher_that_draws_random_numbers_keeps_its_place():
    torch.manual_seed(0)
    student, _ = toy_pair()
    _, teacher = toy_pair()
    for module in teacher.modules():
        if isinstance(module, nn.Dropout):
            module.forward = lambda x: nn.functional.dropout(x, 0.5, training=True)
    mapping = {"blocks.0.mlp": "blocks.0.mlp", "blocks.1.mlp": "blocks.2.mlp"}
    distiller = fxdistill.wrap(student, teacher, mapping, logit_loss=None, compile=AOT)
    places = [m.at for m in distiller.report(tokens()).memory.timeline if m.phase == "forward"]
    assert places.index("teacher blocks.2") < places.index("student blocks.0")
    eager = fxdistill.wrap(student, teacher, mapping, logit_loss=None, compile=False)
    values = []
    for each in (distiller, eager):
        torch.manual_seed(5)
        values.append(each(tokens()).loss.detach())
    torch.testing.assert_close(*values)


def test_buffers_are_written_when_all_models_have_read_them():
    graph = fx.Graph()
    x, buffer = (graph.placeholder(name) for name in ("primals_1", "primals_2"))
    add, mul, sub, copy = (getattr(torch.ops.aten, n) for n in ("add", "mul", "sub", "copy_"))

    def call(section, op, *args, **custom):
        node = graph.call_function(op, args)
        node.meta["custom"] = {SECTION: section, **custom}
        return node

    read = call("teacher", add.Tensor, buffer, x)
    own = call("student", mul.Tensor, x, x)
    term = call(OBJECTIVE, sub.Tensor, own, read, **{FORMED: "a term"})
    later = call("teacher", mul.Tensor, buffer, read)
    written = call("student", copy.default, buffer, own)
    graph.output((term, later))
    program = Program(fx.GraphModule({}, graph), ("term", "later"), level="joint")
    found = [n.name for n in run(program, [MeetEarly()]).gm.graph.nodes][2:-1]
    assert found == [n.name for n in (own, read, term, later, written)]


@pytest.mark.parametrize(
    "loss", [remat, functools.partial(losses.CRD, width=3, size=8)], ids=["region", "state"]
)
def test_what_cannot_stand_for_itself_stays_and_the_record_says_so(loss):
    case = {"mapping": {"blocks.0.mlp": "blocks.0.mlp", "blocks.1.mlp": "blocks.2.mlp"}}
    matches = [Match(s, t) for s, t in case["mapping"].items()]
    matches[0] = Match("blocks.0.mlp", "blocks.0.mlp", loss=loss)
    distiller = made({"mapping": matches}, AOT)
    stepped(distiller)
    assert len(formed_in(distiller)) == 1
    record = next(r for r in distiller.program.history if r.name == "FormGradients")
    assert "1 terms keep their gradients alone; as they were: blocks.0.mlp" in str(record)


def penalty(compile):
    """The gradient of ‖∂loss/∂W‖² by a weight W: a second derivative."""
    options = {"mapping": {"blocks.0.mlp": "blocks.0.mlp"}, "logit_loss": None}
    distiller = made(options, compile)
    weight = distiller.models["student"].get_parameter("embed.weight")
    (first,) = torch.autograd.grad(distiller(tokens()).loss, weight, create_graph=True)
    return torch.autograd.grad(first.square().sum(), weight)[0]


def test_a_formed_gradient_has_no_derivative_and_says_what_has():
    """Where nothing else refuses: AOTAutograd's graphs have no second derivative of any loss."""
    without = {"disable": ("FormGradients",)}
    with pytest.raises(errors.StepError, match=r"a feature loss forms.*'FormGradients'"):
        penalty({"backend": "eager"})
    wanted = penalty(False)
    assert wanted.norm() > 0
    torch.testing.assert_close(penalty({"backend": "eager", **without}), wanted)
    for compile in (AOT, {**AOT, **without}):
        with pytest.raises(
            RuntimeError, match=r"double backward|to not have been used in the graph"
        ):
            penalty(compile)


def test_a_teacher_that_learns_gets_its_gradient_too():
    results = []
    for compile in (AOT, False):
        student, teacher = toy_pair()
        options = {"freeze_teacher": False, "logit_loss": None, "compile": compile}
        distiller = fxdistill.wrap(student, teacher, {"blocks.0.mlp": "blocks.1.mlp"}, **options)
        distiller(tokens()).loss.backward()
        results.append(gradients(teacher) | {f"s.{n}": g for n, g in gradients(student).items()})
    assert_same_gradients(*results)


def test_half_precision_that_a_scaler_scales_is_left_alone():
    student, teacher = (model.half() for model in toy_pair())
    mapping = {"blocks.0.mlp": "blocks.0.mlp"}
    distiller = fxdistill.wrap(student, teacher, mapping, logit_loss=None, compile=AOT)
    distiller(tokens())
    assert not formed_in(distiller)


@pytest.mark.parametrize(
    ("names", "says"),
    [(("FormGradient",), "Nearest: 'FormGradients'"), (("ExposeOutputs",), "cannot be disabled")],
)
def test_passes_are_left_out_by_name(names, says):
    with pytest.raises(errors.OptionError, match=says):
        made("named", {**AOT, "disable": names})


def in_a_transform(student, teacher, weights):
    def own(a, b):
        return (a @ a.T - b @ b.T).square().mean()

    return torch.vmap(own)(student, teacher).mean() + (student - teacher).square().mean()


def over_a_write(student, teacher, weights):
    offset = torch.zeros_like(teacher)
    moved = student + offset
    offset.add_(3)
    return (moved - teacher).square().mean()


def without_autocast(student, teacher, weights):
    with torch.autocast("cpu", enabled=False):
        return (student.float() @ teacher.float().mT).square().mean()


def partly_without_autocast(student, teacher, weights):
    with torch.autocast("cpu", enabled=False):
        products = student.float() @ teacher.float().mT
    return (products @ products).square().mean()


class Centred(nn.Module):
    """A loss with a buffer that it reads before it writes it."""

    def __init__(self):
        super().__init__()
        self.register_buffer("centre", torch.ones(8))

    def forward(self, student, teacher, weights):
        gap = student - self.centre
        with torch.no_grad():
            self.centre.mul_(0.5).add_(student.mean((0, 1)))
        return (gap - teacher).square().mean()


@pytest.mark.parametrize(
    "loss", [in_a_transform, over_a_write, without_autocast, partly_without_autocast, Centred]
)
def test_losses_with_effects_of_their_own_are_those_of_eager(loss):
    results = []
    for compile in (AOT, False):
        student, teacher = toy_pair()
        own_loss = loss() if loss is Centred else loss
        match = Match("blocks.0.mlp", "blocks.0.mlp", loss=own_loss, project=projection())
        options = {"logit_loss": None, "compile": compile}
        distiller = fxdistill.wrap(student, teacher, [match], **options)
        with torch.autocast("cpu", torch.bfloat16, enabled="autocast" in str(loss)):
            out = distiller(tokens())
        out.loss.backward()
        results.append((out.loss.detach(), gradients(student)))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-4, atol=1e-6)
    assert_same_gradients(results[0][1], results[1][1], rtol=1e-2 if "auto" in str(loss) else 1e-5)
