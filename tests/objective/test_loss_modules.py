"""Losses with parameters or state: trained, written once a step, saved."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxdistill
from fxdistill import Match, errors, losses
from image_nets import IMAGES, MODES, check, nets, values
from mesh_steps import AOT
from toys import tokens


@MODES
def test_crd_trains_its_layers_and_writes_once_a_step(compile):
    student, teacher = nets(remat=compile is not False)
    loss = functools.partial(losses.CRD, width=3, size=12)
    mapping = [Match("deep", "deep", loss=loss), Match("stem", "stem", loss=loss)]
    distiller = fxdistill.wrap(student, teacher, mapping, logit_loss=None, compile=compile)
    assert len(distiller.loss_modules) == 2
    own = copy.deepcopy(distiller.loss_modules)
    for step in range(4):
        images = IMAGES + step
        out = distiller(images)
        with torch.no_grad():
            t = [values(teacher, path, images) for path in ("deep", "stem")]
        s = [values(student, path, images) for path in ("deep", "stem")]
        each = [bank(a, b) for bank, a, b in zip(own, s, t, strict=True)]
        check(distiller, out.loss, sum(each) / 2, student)
        theirs = torch.autograd.grad(out.loss, list(distiller.loss_modules.parameters()))
        ours = torch.autograd.grad(sum(each) / 2, list(own.parameters()))
        for a, b in zip(theirs, ours, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
        for a, b in zip(distiller.loss_modules.buffers(), own.buffers(), strict=True):
            torch.testing.assert_close(a, b)
    assert int(own[0].filled) == 12
    before = copy.deepcopy(distiller.loss_modules.state_dict())
    distiller.eval()
    distiller(IMAGES)
    distiller.report(IMAGES)
    distiller.check(IMAGES)
    torch.testing.assert_close(distiller.loss_modules.state_dict(), before)


def test_crd_is_saved_with_the_distiller_and_not_with_the_student():
    student, _ = nets()
    names = set(student.state_dict())
    made = [
        fxdistill.wrap(*nets(), {"deep": "deep"}, feature_loss="CRD", compile=False)
        for _ in range(2)
    ]
    made[0](IMAGES).loss.backward()
    state = made[0].state_dict()
    assert {"loss_modules.0.queue", "loss_modules.0.embedding.of_student.weight"} <= set(state)
    made[1].load_state_dict(state)
    torch.testing.assert_close(made[0](IMAGES).loss, made[1](IMAGES).loss)
    groups = made[0].param_groups(weight_decay=0.0)
    assert [len(group["params"]) for group in groups] == [len(list(student.parameters())), 4]
    assert groups[1]["weight_decay"] == 0.0
    assert set(made[0].student.state_dict()) == names


class Scaled(nn.Module):
    """A loss with a learnt scale, and a count of its calls."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, student, teacher, weights=None):
        if self.training:
            self.calls += 1
        return (self.scale * student - teacher).square().mean()


@MODES
def test_a_loss_of_the_users_own_may_be_a_module(compile):
    student, teacher = nets(teacher=4)
    loss = Scaled()
    distiller = fxdistill.wrap(
        student, teacher, [Match("deep", "deep", loss=loss)], logit_loss=None, compile=compile
    )
    assert list(distiller.loss_modules) == [loss]
    for _ in range(2):
        out = distiller(IMAGES)
    out.loss.backward()
    s, t = (values(model, "deep", IMAGES) for model in (student, teacher))
    with torch.no_grad():
        want = (2 * (2 * s - t) * s).mean()
    torch.testing.assert_close(loss.scale.grad, want)
    assert loss.calls == 2
    assert any(p is loss.scale for p in distiller.parameters())
    distiller.eval()
    distiller(IMAGES)
    assert loss.calls == 2


class Smoothed(nn.Module):
    """A label loss with a parameter."""

    def __init__(self):
        super().__init__()
        self.heat = nn.Parameter(torch.tensor(1.5))

    def forward(self, logits, labels, *, weights):
        return F.cross_entropy(logits / self.heat, labels)


@MODES
def test_a_label_loss_may_be_a_module(compile):
    student, teacher = nets()
    loss = Smoothed()
    distiller = fxdistill.wrap(student, teacher, label_loss=loss, logit_loss=None, compile=compile)
    labels = torch.arange(5)
    distiller(IMAGES, labels=labels).loss.backward()
    want = F.cross_entropy(student(IMAGES) / loss.heat, labels)
    torch.testing.assert_close(loss.heat.grad, torch.autograd.grad(want, loss.heat)[0])


def test_matches_do_not_share_a_queue():
    bank = losses.CRD()
    mapping = [Match("deep", "deep", loss=bank), Match("stem", "stem", loss=bank)]
    with pytest.raises(errors.OptionError, match="share one CRD"):
        fxdistill.wrap(*nets(), mapping)


def test_a_loss_module_on_another_device_is_an_error():
    distiller = fxdistill.wrap(*nets(), {"deep": "deep"}, feature_loss="CRD", compile=False)
    distiller.loss_modules.to("meta")
    with pytest.raises(errors.DeviceError, match=r"loss module 0 \(CRD\)"):
        distiller(IMAGES)


def test_parameters_that_a_loss_shares_with_the_student_are_in_one_group():
    student, teacher = nets(teacher=4)

    class Through(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = student.deep

        def forward(self, s, t, weights=None):
            return (self.layer(s) - self.layer(t)).square().mean()

    mapping = [Match("deep", "deep", loss=Through())]
    distiller = fxdistill.wrap(student, teacher, mapping, logit_loss=None, compile=False)
    torch.optim.SGD(distiller.param_groups(), lr=0.1)
    distiller(IMAGES).loss.backward()


class Within(nn.Module):
    """A loss behind a layer that it is given."""

    def __init__(self, layer, registered):
        super().__init__()
        self.held = [layer]
        if registered:
            self.layer = layer

    def forward(self, student, teacher, weights=None):
        return (self.held[0](student) - self.held[0](teacher)).square().mean()


def test_what_is_trained_holds_no_part_of_a_frozen_teacher():
    student, teacher = nets(teacher=4)
    options = {"logit_loss": None, "compile": False}
    mapping = [Match("stem", "stem", loss=Within(teacher.deep, registered=True))]
    with pytest.raises(errors.OptionError, match=r"which is 'deep.weight' of the teacher"):
        fxdistill.wrap(student, teacher, mapping, **options)
    projected = [Match("deep", "deep", project=teacher.deep)]
    with pytest.raises(errors.OptionError, match="projection 0 has 'weight'"):
        fxdistill.wrap(student, teacher, projected, **options)
    loss = Within(teacher.deep, registered=False)
    distiller = fxdistill.wrap(student, teacher, [Match("stem", "stem", loss=loss)], **options)
    distiller(IMAGES).loss.backward()
    assert not any("loss_modules" in name for name in distiller.state_dict())
    assert student.stem.weight.grad.any()
    learnt = {id(p) for p in distiller.parameters()}
    assert not any(id(p) in learnt for p in teacher.parameters())
    fxdistill.wrap(student, teacher, mapping, freeze_teacher=False, **options)  # then it may learn


class Heads(nn.Module):
    """Values ``[B, L, heads, D]``, whose shape alone says that they are maps."""

    def __init__(self, heads):
        super().__init__()
        self.embed, self.split = nn.Embedding(50, 12), nn.Unflatten(-1, (heads, 12 // heads))
        self.lm_head = nn.Linear(12, 50)

    def forward(self, input_ids):
        x = self.embed(input_ids)
        return {"logits": self.lm_head(self.split(x).flatten(2))}


@pytest.mark.parametrize("compile", [False, AOT], ids=["eager", "one"])
@pytest.mark.parametrize("said", ["auto", "input"])
@pytest.mark.parametrize("heads", [(3, 4), (4, 4)], ids=str)
def test_crd_of_values_with_heads_has_the_width_of_their_samples(heads, said, compile):
    torch.manual_seed(0)
    student, teacher = (Heads(n) for n in heads)
    bank = losses.CRD(width=3, size=5, in_batch=True)
    match = Match("split", "split", loss=bank, tokens=said)
    options = {"task": "causal_lm", "logit_loss": None, "compile": compile}
    example = {"input_ids": tokens()}
    distiller = fxdistill.wrap(student, teacher, [match], example_inputs=example, **options)
    mask = torch.ones(3, 7)
    mask[0, 4:] = 0
    own = copy.deepcopy(bank)
    found = distiller(tokens(), loss_mask=mask).loss
    s, t = (values(model, "split", tokens()) for model in (student, teacher))
    if said == "input":
        s, t = ((x.flatten(2) * mask[..., None]).sum(1) for x in (s, t))
        s, t = (x / mask.sum(1, keepdim=True) for x in (s, t))
    else:
        s, t = (x.mean((2, 3)) for x in (s, t))
    torch.testing.assert_close(found, own(s, t))


def test_crd_of_other_samples_than_its_layers_have_says_so():
    bank = losses.CRD(width=3, size=5)
    bank.embedding.build(6, 4, torch.device("cpu"))
    with pytest.raises(errors.ShapeError, match="the student's samples of width 6, and they have"):
        bank(torch.randn(2, 7), torch.randn(2, 4))
