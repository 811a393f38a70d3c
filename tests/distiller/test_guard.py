"""Nothing is trained, or the wrong thing: told at wrap or at the first step, never passed over."""

import copy
import gc
import re

import pytest
import torch
from torch import nn

import fxdistill
from fxdistill import errors
from toys import MAPPING, Toy, tokens, toy_pair

AOT = {"backend": "aot_eager"}
MODES = pytest.mark.parametrize("compile", [False, AOT], ids=["eager", "graph"])


def net():
    layers = nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Dropout(0.5), nn.Linear(16, 4)
    return nn.Sequential(*layers)


X, Y = torch.randn(32, 8, generator=torch.Generator().manual_seed(0)), torch.arange(32) % 4
OPTIONS = {"task": "classification", "compile": False}


def test_two_students_that_are_each_others_teacher_are_refused():
    a, b = net(), net()
    ab = fxdistill.wrap(a, b, **OPTIONS).train()
    ba = fxdistill.wrap(b, a, **OPTIONS).train()  # puts a in eval mode
    with pytest.raises(errors.ModeError, match="the student is in eval mode, because another"):
        ab(X, labels=Y)
    assert torch.isfinite(ba(X, labels=Y).loss)


def test_each_may_train_in_its_turn():
    a, b = net(), net()
    ab, ba = fxdistill.wrap(a, b, **OPTIONS), fxdistill.wrap(b, a, **OPTIONS)
    for distiller in (ab, ba, ab, ba):
        distiller.train()  # puts the other one in eval mode
        distiller(X, labels=Y).loss.backward()
    assert int(a[1].num_batches_tracked) == int(b[1].num_batches_tracked) == 2


def test_a_student_may_become_a_teacher():
    """Born again: the next generation learns from the last, and nobody trains the last again."""
    model = net()
    for _ in range(3):
        student = copy.deepcopy(model)
        distiller = fxdistill.wrap(student, model, **OPTIONS).train()
        distiller(X, labels=Y).loss.backward()
        model = student


def test_a_student_in_eval_mode_by_its_users_wish_is_fine():
    student, teacher = net(), net()
    distiller = fxdistill.wrap(student, teacher, **OPTIONS).train()
    student.eval()
    distiller(X, labels=Y).loss.backward()
    assert int(student[1].num_batches_tracked) == 0


def test_a_distiller_that_is_gone_freezes_nothing():
    a, b = net(), net()
    ab = fxdistill.wrap(a, b, **OPTIONS).train()
    ba = fxdistill.wrap(b, a, **OPTIONS).train()
    del ba
    gc.collect()
    ab(X, labels=Y)


@MODES
def test_one_model_as_both_sides_is_refused(compile):
    model = Toy(2)
    distiller = fxdistill.wrap(model, model, task="causal_lm", compile=compile)
    with pytest.raises(errors.OptionError, match="are one model and see the same inputs"):
        distiller(tokens())


@MODES
def test_one_model_may_see_two_things(compile):
    """Consistency: a clean input teaches a disturbed one."""
    model = Toy(2)
    ids, clean = tokens(), tokens().flip(0)
    distiller = fxdistill.wrap(model, model, task="causal_lm", compile=compile)
    out = distiller(ids, teacher_inputs={"ids": clean})
    z, t = model(ids)["logits"], model(clean)["logits"].detach()
    want = (t.softmax(-1) * (t.log_softmax(-1) - z.log_softmax(-1))).sum(-1).mean()
    torch.testing.assert_close(out.loss, want)


def test_one_model_may_learn_from_its_own_deeper_layer():
    model = Toy(2)
    distiller = fxdistill.wrap(
        model, model, {"blocks.0.mlp": "blocks.1.mlp"}, logit_loss=None, compile=False
    )
    distiller(tokens()).loss.backward()
    assert model.blocks[0].mlp.weight.grad.abs().sum() > 0


def test_targets_that_move_are_warned_of():
    student, teacher = toy_pair()
    teacher.embed = student.embed
    with pytest.warns(errors.MatchWarning, match=r"holds 1 parameters that the student learns"):
        fxdistill.wrap(student, teacher, compile=False)
    student.embed.requires_grad_(False)  # shared and frozen: a base under adapters
    fxdistill.wrap(student, teacher, compile=False)


@pytest.mark.parametrize("wrong", [3, "gpt2", ["gpt2"], Toy])
def test_a_teacher_that_is_no_model_is_named(wrong):
    with pytest.raises(errors.OptionError, match=r"teacher.* is a .*nn.Module"):
        fxdistill.wrap(Toy(1), wrong)
    with pytest.raises(errors.OptionError, match=r"student is a .*an nn.Module is needed"):
        fxdistill.wrap(wrong, Toy(1))


# ---- what distillers print


def test_summary_and_report_print_as_text():
    distiller = fxdistill.wrap(*toy_pair(), MAPPING, task="causal_lm", compile=AOT)
    for told in (distiller.summary(), distiller.report(tokens())):
        lines = str(told).splitlines()
        assert any("blocks.0.mixer" in line for line in lines)
        assert max(map(len, lines)) <= 80


def test_logits_that_were_not_asked_for_say_how():
    out = fxdistill.wrap(*toy_pair(), compile=False)(tokens())
    with pytest.raises(AttributeError, match=r'wrap\(..., outputs=\("logits",\)\) adds'):
        out.logits  # noqa: B018
    with pytest.raises(
        KeyError, match="no output 'logits'; there are loss, losses, metrics"
    ) as found:
        out["logits"]
    assert "adds the student's logits" in str(found.value)
    assert out.get("logits") is None
    assert "logits" not in out


@pytest.mark.parametrize("outputs", ["logits", ("logits",), ["logits"], {"logits"}], ids=str)
def test_one_output_is_a_name_as_several_are(outputs):
    out = fxdistill.wrap(*toy_pair(), compile=False, outputs=outputs)(tokens())
    assert out["logits"].shape == out.logits.shape == (3, 7, 50)


@pytest.mark.parametrize("outputs", ["logit", ("l", "o"), True, 1], ids=str)
def test_an_output_that_there_is_not_is_named(outputs):
    wanted = re.escape(f"outputs={outputs!r}: only 'logits' can be asked for")
    with pytest.raises(errors.OptionError, match=wanted):
        fxdistill.wrap(*toy_pair(), compile=False, outputs=outputs)


def test_an_error_of_a_pass_prints_no_graph():
    def breaks(program):
        gm = copy.deepcopy(program.gm)
        gm.graph.output_node().args = ((next(iter(gm.graph.nodes)).next,) * 2,)
        return type(program)(gm, program.outputs)

    distiller = fxdistill.wrap(*toy_pair(), MAPPING, passes=(breaks,), compile=AOT)
    with pytest.raises(errors.PassError) as raised:
        distiller(tokens())
    assert len(str(raised.value).splitlines()) <= 4
