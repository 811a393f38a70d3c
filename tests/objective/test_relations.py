"""Losses of samples and maps in a distiller: what they see, in every mode."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxdistill
from fxdistill import Match, errors, losses
from image_nets import IMAGES, MODES, check, nets, values
from mesh_steps import AOT
from toys import tokens, toy_pair

RELATIONS = ("gram", "distance_wise", "angle_wise", "similarity_preserving")


@MODES
@pytest.mark.parametrize(
    "name", [*RELATIONS, "attention_transfer", "fpn", "fitnet", "info_nce", "l2", "cosine"]
)
def test_maps_of_other_widths_are_compared_without_a_projection(name, compile):
    any_width = name in (*RELATIONS, "attention_transfer")
    student, teacher = nets(teacher=6 if any_width else 4)
    options = {"logit_loss": None, "feature_loss": name, "compile": compile}
    distiller = fxdistill.wrap(student, teacher, {"deep": "deep"}, **options)
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
    distiller = fxdistill.wrap(student, teacher, [match], **options)
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
    distiller = fxdistill.wrap(student, teacher, mapping, **options)
    anchors, foreground = torch.randn(3, 8, 6), torch.rand(3, 8) < 0.4
    out = distiller(anchors, weights={"foreground": foreground})
    with torch.no_grad():
        targets, corners = (x[foreground] for x in teacher(anchors))
    classes, boxes = (x[foreground] for x in student(anchors))
    options = {"weight": None, "reduction": "mean"}
    soft = F.binary_cross_entropy_with_logits(classes / 2, (targets / 2).sigmoid(), **options) * 4
    want = (soft + F.smooth_l1_loss(boxes, corners)) / 2
    check(distiller, out.loss, want, student)


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
