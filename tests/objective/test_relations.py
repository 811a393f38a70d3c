"""Losses of samples, of maps and with state in a distiller: what they see, in every mode."""

import copy
import functools
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import fxdistill
from fxdistill import Match, errors, losses
from mesh_steps import AOT, aot
from toys import tokens, toy_pair

MODES = pytest.mark.parametrize("compile", [False, AOT, "regional"], ids=["eager", "one", "terms"])
RELATIONS = ("gram", "distance_wise", "angle_wise", "similarity_preserving")


class Net(nn.Module):
    """A convolutional network of any width; ``remat`` runs its first half again in the backward."""

    def __init__(self, width: int, remat: bool = False) -> None:
        super().__init__()
        self.stem, self.deep = nn.Conv2d(1, width, 3), nn.Conv2d(width, width, 3)
        self.head, self.remat = nn.Linear(width, 10), remat

    def forward(self, x):
        x = checkpoint(self.stem, x, use_reentrant=False) if self.remat else self.stem(x)
        x = self.deep(x.tanh()).tanh()
        return self.head(x.mean((2, 3)))


def nets(width=4, teacher=6, **options):
    torch.manual_seed(0)
    return Net(width, **options), Net(teacher)


IMAGES = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def values(model, path, *inputs):
    """What a module returns, once more, with gradients."""
    seen = []
    handle = model.get_submodule(path).register_forward_hook(lambda m, i, out: seen.append(out))
    model(*inputs)
    handle.remove()
    return seen[0]


def check(distiller, loss, want, student):
    torch.testing.assert_close(loss.detach(), want.detach())
    learnt = [p for p in student.parameters() if p.requires_grad]
    options = {"allow_unused": True, "retain_graph": True, "materialize_grads": True}
    found, wanted = (torch.autograd.grad(x, learnt, **options) for x in (loss, want))
    # The gradient of a bias that all samples share is 0 in exact arithmetic.
    largest = max(float(gradient.norm()) for gradient in wanted)
    for ours, theirs in zip(found, wanted, strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm() + 1e-6 * largest


@MODES
@pytest.mark.parametrize(
    "name", [*RELATIONS, "attention_transfer", "fpn", "fitnet", "info_nce", "l2", "cosine"]
)
def test_maps_of_other_widths_are_compared_without_a_projection(name, compile):
    any_width = name in (*RELATIONS, "attention_transfer")
    student, teacher = nets(teacher=6 if any_width else 4)
    options = {"logit_loss": None, "feature_loss": name, "compile": compile}
    distiller = aot(fxdistill.wrap(student, teacher, {"deep": "deep"}, **options))
    out = distiller(IMAGES)
    with torch.no_grad():
        t = values(teacher, "deep", IMAGES)
    want = getattr(losses, name)(values(student, "deep", IMAGES), t)
    check(distiller, out.loss, want, student)


@MODES
@pytest.mark.parametrize("name", [*RELATIONS, "attention_transfer"])
def test_a_text_is_reduced_by_what_counts_and_a_projection_is_possible(name, compile):
    student, teacher = toy_pair()
    mask = torch.ones(3, 7)
    mask[0, 4:], mask[2, :2] = 0, 0
    match = Match("blocks.1.mlp", "blocks.2.mlp", loss=name)
    options = {"logit_loss": None, "compile": compile, "task": "causal_lm"}
    distiller = aot(fxdistill.wrap(student, teacher, [match], **options))
    out = distiller(tokens(), loss_mask=mask)
    s = values(student, "blocks.1.mlp", tokens())
    with torch.no_grad():
        t = values(teacher, "blocks.2.mlp", tokens())
    if name != "attention_transfer":
        s, t = ((x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True) for x in (s, t))
        want = getattr(losses, name)(s, t)
    else:
        want = losses.attention_transfer(s, t, mask)
    check(distiller, out.loss, want, student)


def test_a_sample_of_which_nothing_counts_has_no_part():
    student, teacher = toy_pair()
    mask = torch.ones(3, 7)
    mask[1] = 0
    mapping = [Match("blocks.0.mlp", "blocks.0.mlp", loss="gram")]
    distiller = fxdistill.wrap(
        student, teacher, mapping, logit_loss=None, compile=False, task="causal_lm"
    )
    found = distiller(tokens(), loss_mask=mask).loss
    want = distiller(tokens()[[0, 2]]).loss
    torch.testing.assert_close(found, want)


@pytest.mark.parametrize("name", [*RELATIONS, "info_nce"])
def test_in_classification_samples_weigh_their_pairs(name):
    student, teacher = nets(teacher=4)
    options = {"logit_loss": None, "feature_loss": name, "compile": False}
    distiller = fxdistill.wrap(student, teacher, {"deep": "deep"}, **options)
    w = torch.tensor([1.0, 0.0, 2.0, 0.5, 1.0])
    out = distiller(IMAGES, token_weights=w, labels=torch.arange(5))
    s, t = (values(model, "deep", IMAGES) for model in (student, teacher))
    torch.testing.assert_close(out.losses["deep"], getattr(losses, name)(s, t, w).detach())


# ---- weights by name


WEIGHED = [
    *itertools.product(("mse", "l2", "attention_transfer", "fpn", "gram"), (False, AOT)),
    ("l2", "regional"),
]


@pytest.mark.parametrize("shape", [(5,), (5, 4, 4)], ids=str)
@pytest.mark.parametrize(("name", "compile"), WEIGHED)
def test_weights_by_name_weigh_samples_or_places(name, shape, compile):
    student, teacher = nets(teacher=4)
    match = Match("deep", "deep", loss=name, weights="foreground")
    distiller = aot(fxdistill.wrap(student, teacher, [match], logit_loss=None, compile=compile))
    w = (torch.arange(torch.Size(shape).numel()) % 3).float().reshape(shape)
    out = distiller(IMAGES, weights={"foreground": w})
    with torch.no_grad():
        t = values(teacher, "deep", IMAGES)
    want = getattr(losses, name)(values(student, "deep", IMAGES), t, w)
    check(distiller, out.loss, want, student)


def test_weights_by_name_multiply_what_else_weighs_a_text():
    student, teacher = toy_pair()
    mapping = [Match("blocks.0.mlp", "blocks.0.mlp", weights="hard")]
    distiller = fxdistill.wrap(
        student, teacher, mapping, logit_loss=None, compile=False, task="causal_lm"
    )
    mask, hard = torch.ones(3, 7), torch.rand(3, 7)
    mask[0, 3:] = 0
    s, t = (values(model, "blocks.0.mlp", tokens()) for model in (student, teacher))
    for named in (hard, hard[:, 0]):
        out = distiller(tokens(), loss_mask=mask, weights={"hard": named})
        w = mask * (named if named.ndim == 2 else named[:, None])
        want = ((s - t).square().mean(-1) * w).sum() / w.sum()
        torch.testing.assert_close(out.loss, want)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({}, "needs distiller.*'foreground'"),
        ({"weights": {"foregroud": torch.ones(5)}}, "needs distiller"),
        (
            {"weights": {"foreground": torch.ones(5), "back": torch.ones(5)}},
            "no match has that name",
        ),
        ({"weights": {"foreground": torch.ones(5, 3)}}, r"\[5, 3\], and weigh a value \[5, 4"),
        ({"weights": torch.ones(5)}, "a dict of tensors"),
    ],
)
def test_weights_that_do_not_fit_are_errors(given, says):
    student, teacher = nets(teacher=4)
    match = Match("deep", "deep", weights="foreground")
    for compile in (False, AOT):
        distiller = fxdistill.wrap(student, teacher, [match], logit_loss=None, compile=compile)
        with pytest.raises(errors.BatchError, match=says):
            distiller(IMAGES, **given)


def test_a_name_of_weights_is_text():
    with pytest.raises(errors.OptionError, match="a name, whose values a call brings"):
        fxdistill.wrap(*nets(teacher=4), [Match("deep", "deep", weights=torch.ones(5))])


# ---- detectors


class Detector(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.body, self.head = nn.Linear(6, width), nn.Linear(width, 5)
        self.boxes = nn.Linear(width, 4)

    def forward(self, anchors):
        h = self.body(anchors).tanh()
        return self.head(h), self.boxes(h)


@MODES
def test_classes_and_boxes_of_anchors_that_count(compile):
    torch.manual_seed(0)
    student, teacher = Detector(4), Detector(7)
    mapping = [
        Match("head", "head", loss="detection_classification", weights="foreground"),
        Match("boxes", "boxes", loss="detection_box", weights="foreground"),
    ]
    options = {"logit_loss": None, "compile": compile}
    distiller = aot(fxdistill.wrap(student, teacher, mapping, **options))
    anchors, foreground = torch.randn(3, 8, 6), torch.rand(3, 8) < 0.4
    out = distiller(anchors, weights={"foreground": foreground})
    with torch.no_grad():
        targets, corners = (x[foreground] for x in teacher(anchors))
    classes, boxes = (x[foreground] for x in student(anchors))
    options = {"weight": None, "reduction": "mean"}
    soft = F.binary_cross_entropy_with_logits(classes / 2, (targets / 2).sigmoid(), **options) * 4
    want = (soft + F.smooth_l1_loss(boxes, corners)) / 2
    check(distiller, out.loss, want, student)


# ---- losses that are modules


@MODES
def test_crd_trains_its_layers_and_writes_once_a_step(compile):
    student, teacher = nets(remat=compile is not False)
    loss = functools.partial(losses.CRD, width=3, size=12)
    mapping = [Match("deep", "deep", loss=loss), Match("stem", "stem", loss=loss)]
    distiller = aot(fxdistill.wrap(student, teacher, mapping, logit_loss=None, compile=compile))
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
    distiller = aot(
        fxdistill.wrap(
            student, teacher, [Match("deep", "deep", loss=loss)], logit_loss=None, compile=compile
        )
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
    distiller = aot(
        fxdistill.wrap(student, teacher, label_loss=loss, logit_loss=None, compile=compile)
    )
    labels = torch.arange(5)
    distiller(IMAGES, labels=labels).loss.backward()
    want = F.cross_entropy(student(IMAGES) / loss.heat, labels)
    torch.testing.assert_close(loss.heat.grad, torch.autograd.grad(want, loss.heat)[0])


# ---- what does not fit


@pytest.mark.parametrize("compile", [False, AOT], ids=["eager", "one"])
@pytest.mark.parametrize(
    ("path", "options", "error", "says"),
    [
        ("deep", {"loss": "info_nce"}, errors.ShapeError, "project='auto'"),
        ("deep", {"loss": "fpn"}, errors.ShapeError, "Conv2d"),
        ("deep", {"loss": "detection_box"}, errors.ShapeError, "boxes are|Conv2d"),
        ("head", {"loss": "attention_transfer"}, errors.ShapeError, "has no places"),
        ("stem", {"loss": "attention_transfer"}, errors.ShapeError, "reduce="),
    ],
)
def test_values_that_a_loss_cannot_compare_are_errors(path, options, error, says, compile):
    student, teacher = nets()
    if path == "stem":
        teacher.stem = nn.Conv2d(1, 6, 5, padding=2)
    with pytest.raises(error, match=says):
        fxdistill.wrap(
            student, teacher, [Match(path, path, **options)], logit_loss=None, compile=compile
        )(IMAGES)


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


# ---- what the report says


def test_the_report_lists_loss_modules_and_what_weighs_a_match():
    student, teacher = nets()
    mapping = [
        Match("deep", "deep", loss=functools.partial(losses.CRD, width=3, size=12)),
        Match("stem", "stem", loss="gram", weights="foreground"),
    ]
    options = {"compile": AOT, "task": "classification"}
    distiller = fxdistill.wrap(student, teacher, mapping, **options)
    report = distiller.report(IMAGES, weights={"foreground": torch.ones(5)})
    found = {tower.name: tower for tower in report.towers}["loss_modules"]
    assert found.trainable == sum(p.numel() for p in distiller.loss_modules.parameters())
    assert found.bytes == 4 * (found.parameters + 12 * 3) + 2 * 8
    assert [pair.weighed_by for pair in report.pairs] == ["samples", "samples × 'foreground'"]
    # Layers [5, 4] -> 3 and [5, 6] -> 3, products with the queue and of gram: none are projections.
    assert report.flops.projections == 0
    assert report.flops.losses >= 2 * 5 * (4 + 6) * 3


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


def test_samples_weigh_flattened_tokens_by_name():
    torch.manual_seed(0)
    student, teacher = (nn.Sequential(nn.Flatten(0, 1), nn.Linear(4, 3)) for _ in range(2))
    mapping = [Match("1", "1", weights="hard")]
    distiller = fxdistill.wrap(student, teacher, mapping, logit_loss=None, compile=False)
    x, w = torch.randn(2, 5, 4), torch.tensor([1.0, 3.0])
    found = distiller(x, weights={"hard": w}).loss
    each = (student(x) - teacher(x)).square().mean(-1).reshape(2, 5).mean(1)
    torch.testing.assert_close(found, (each * w).sum() / w.sum())


def test_tokens_that_a_model_flattens_are_weighed_by_name():
    torch.manual_seed(0)
    student, teacher = (nn.Sequential(nn.Flatten(0, 1), nn.Linear(4, 3)) for _ in range(2))
    mapping = [Match("1", "1", weights="hard")]
    distiller = fxdistill.wrap(student, teacher, mapping, logit_loss=None, compile=False)
    x, w = torch.randn(2, 5, 4), torch.rand(2, 5)
    found = distiller(x, weights={"hard": w}).loss
    each = (student(x) - teacher(x)).square().mean(-1).reshape(2, 5)
    torch.testing.assert_close(found, (each * w).sum() / w.sum())
    with pytest.raises(errors.BatchError, match=r"the tokens \[B, L\] that are flattened"):
        distiller(x, weights={"hard": w[:, :4]})


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
    distiller = aot(fxdistill.wrap(student, teacher, [match], example_inputs=example, **options))
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


@pytest.mark.parametrize("compile", [False, AOT], ids=["eager", "one"])
@pytest.mark.parametrize(("name", "least"), [("distance_wise", 2), ("angle_wise", 3)])
def test_too_few_samples_to_compare_are_warned_of(name, least, compile):
    student, teacher = nets(teacher=4)
    options = {"logit_loss": None, "feature_loss": name, "compile": compile}
    distiller = fxdistill.wrap(student, teacher, {"deep": "deep"}, **options)
    with pytest.warns(errors.MatchWarning, match=f"at least {least} samples"):
        out = distiller(IMAGES[: least - 1])
    out.loss.backward()
    assert out.loss == 0
    assert all(not p.grad.any() for p in student.parameters() if p.grad is not None)
    fxdistill.wrap(student, teacher, {"deep": "deep"}, **options)(IMAGES[:least])
