"""Logits and values on a grid of their own, and teachers whose inputs have other tokens."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxdistill
from families import sound, speech
from fxdistill import Match, errors

AOT = {"backend": "aot_eager"}
REGIONAL = pytest.param("regional", marks=pytest.mark.slow)
MODES = pytest.mark.parametrize(
    "compile", [False, REGIONAL, AOT], ids=["eager", "regional", "graph"]
)
LAYERS = "wav2vec2.encoder.layers"


# ------------------------------------------------------------------ speech: frames and samples


SOUND, HEARD, TARGETS = sound().values()


def by_torch(logits, labels, *, weights):
    """torch's own loss, for each label; -100 is padding."""
    log_p, kept = logits.log_softmax(-1).transpose(0, 1), labels != -100
    frames = weights.sum(-1).long()
    nll = F.ctc_loss(log_p, labels[kept], frames, kept.sum(-1), reduction="sum")
    return nll / kept.sum()


def frames_of(model):
    count = int(model._get_feat_extract_output_lengths(torch.tensor(400)))
    return model._get_feature_vector_attention_mask(count, HEARD).float()


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
@pytest.mark.parametrize(
    ("compile", "label_loss"),
    [
        (False, "ctc"),
        pytest.param("regional", "ctc", marks=pytest.mark.slow),
        (AOT, "ctc"),
        (False, by_torch),
    ],
    ids=["eager", "regional", "graph", "own"],
)
def test_frames_of_padding_do_not_count(compile, label_loss):
    student, teacher = speech(1), speech(2)
    distiller = fxdistill.wrap(
        student, teacher, {f"{LAYERS}.0": f"{LAYERS}.1"}, label_loss=label_loss, compile=compile
    )
    out = distiller(input_values=SOUND, attention_mask=HEARD, labels=TARGETS)
    out.loss.backward()
    learning = {name: p for name, p in student.named_parameters() if p.requires_grad}
    found, weights = [p.grad for p in learning.values()], frames_of(student)
    student.zero_grad(set_to_none=True)

    seen = {}
    for model in (student, teacher.eval()):
        model.get_submodule(LAYERS)[-1].register_forward_hook(
            lambda module, args, value, model=model: seen.update({model: value})
        )
    logits = student(SOUND, HEARD).logits
    with torch.no_grad():
        target = teacher(SOUND, HEARD).logits.log_softmax(-1)
    each = (target.exp() * (target - logits.log_softmax(-1))).sum(-1)
    s, t = (x[0] if isinstance(x, tuple) else x for x in (seen[student], seen[teacher]))
    wanted = {
        "logits": (each * weights).sum() / weights.sum(),
        "labels": by_torch(logits, TARGETS, weights=weights),
        f"{LAYERS}.0": ((s - t).square().mean(-1) * weights).sum() / weights.sum(),
    }
    for name, value in wanted.items():
        torch.testing.assert_close(out.losses[name], value.detach(), rtol=1e-4, atol=1e-6)
    sum(wanted.values()).backward()
    for (name, p), gradient in zip(learning.items(), found, strict=True):
        torch.testing.assert_close(gradient, p.grad, rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.parametrize("label_loss", ["ctc", by_torch])
def test_items_count_the_labels(label_loss):
    """Trainers count labels: all terms of a batch weigh by its share of them."""
    mapping = {f"{LAYERS}.0": f"{LAYERS}.1"}
    distiller = fxdistill.wrap(speech(1), speech(2), mapping, label_loss=label_loss, compile=False)
    call = {"input_values": SOUND, "attention_mask": HEARD, "labels": TARGETS}
    whole, half = distiller(**call), distiller(**call, num_items_in_batch=torch.tensor(12))
    for name, value in whole.losses.items():
        torch.testing.assert_close(half.losses[name] * 2, value, msg=name)


def test_labels_of_as_many_as_frames_are_not_taken_for_frames():
    """The targets' −100 are padding of their own, whatever their number."""
    frames = int(frames_of(speech(1)).shape[1])
    targets = torch.full((2, frames), -100)
    targets[:, :4] = TARGETS.clamp(min=1)
    distiller = fxdistill.wrap(speech(1), speech(2), label_loss="ctc", compile=False)
    call = {"input_values": SOUND, "attention_mask": HEARD}
    out = distiller(**call, labels=targets)
    torch.testing.assert_close(out.losses["logits"], distiller(**call).losses["logits"])
    again = distiller(**call, labels=targets[:, :4])
    torch.testing.assert_close(out.losses["labels"], again.losses["labels"])


class Heard(nn.Module):
    """Frames ``[B, L, 6]`` to letters."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(6, 8), nn.Linear(8, 12)

    def forward(self, x=None, input_values=None):
        return self.head(self.body(input_values if x is None else x).relu())


class HeardForCTC(Heard):
    """A class that says what it predicts."""


class HeardForAudioFrameClassification(Heard):
    """Its labels are those of frames."""


FRAMES = torch.randn(2, 9, 6, generator=torch.Generator().manual_seed(0))


def written(length):
    labels = torch.full((2, length), -100)
    labels[:, :3] = torch.tensor([[3, 4, 5], [6, 7, -100]])
    return labels


def traceable(logits, labels, *, weights):
    """A loss of the user's own, to us; torch's has sizes that data decides."""
    return fxdistill.losses.ctc(logits, labels, weights=weights)


def listening(kind, compile=False):
    torch.manual_seed(0)
    student, teacher = kind(), kind()
    options = {"label_loss": traceable, "task": "masked_lm", "compile": compile}
    return fxdistill.wrap(student, teacher, {"body": "body"}, **options)


@pytest.mark.parametrize("compile", [False, AOT], ids=["eager", "graph"])
@pytest.mark.parametrize(("kind", "name"), [(HeardForCTC, "x"), (Heard, "input_values")])
def test_an_own_loss_of_sound_takes_any_number_of_labels(kind, name, compile):
    """That of the frames too, and their padding takes no frame out of the other terms."""
    distiller = listening(kind, compile)
    student, teacher = distiller.student, distiller.teacher
    s, t = student(FRAMES).log_softmax(-1), teacher(FRAMES).log_softmax(-1).detach()
    divergence = (t.exp() * (t - s)).sum(-1).mean()
    labels = by_torch(student(FRAMES), written(3), weights=torch.ones(2, 9))
    features = (student.body(FRAMES) - teacher.body(FRAMES).detach()).square().mean()
    (divergence + labels + features).backward()
    wanted = [p.grad for p in student.parameters()]
    for length in (8, 9):
        student.zero_grad()
        out = distiller(**{name: FRAMES}, labels=written(length))
        torch.testing.assert_close(out.losses["logits"], divergence.detach())
        torch.testing.assert_close(out.losses["labels"], labels.detach())
        out.loss.backward()
        for p, gradient in zip(student.parameters(), wanted, strict=True):
            torch.testing.assert_close(p.grad, gradient, rtol=1e-4, atol=1e-6)


def test_labels_of_frames_take_frames_out():
    distiller = listening(HeardForAudioFrameClassification)
    labels = written(9)
    out = distiller(input_values=FRAMES, labels=labels)
    s, t = (m(FRAMES).log_softmax(-1) for m in (distiller.student, distiller.teacher))
    each = (t.exp() * (t - s)).sum(-1)[labels != -100]
    torch.testing.assert_close(out.losses["logits"], each.mean().detach())


@MODES
@pytest.mark.parametrize("lengths", [(9, 7), (7, 9)])
def test_labels_that_change_their_grid_are_refused(lengths, compile):
    """Of a model that does not say what it reads, sizes tell it, and they may agree by chance."""
    distiller = listening(Heard, compile)
    first, then = lengths
    distiller(x=FRAMES, labels=written(first))
    distiller(x=FRAMES)
    with pytest.raises(errors.BatchError, match=r"in the first call.*loss\.aligns_labels = True"):
        distiller(x=FRAMES, labels=written(then))
    distiller(x=FRAMES, labels=written(first))


def test_the_own_loss_of_the_library_refuses_labels_of_another_grid():
    distiller = fxdistill.wrap(speech(1), speech(2), compile=False)
    with pytest.raises(errors.BatchError, match="A label_loss of your own takes labels of any"):
        distiller(input_values=SOUND, attention_mask=HEARD, labels=TARGETS)


def test_features_of_speech_alone_weigh_by_the_labels():
    mapping = {f"{LAYERS}.0": f"{LAYERS}.1"}
    options = {"label_loss": None, "logit_loss": None, "compile": False}
    distiller = fxdistill.wrap(speech(1), speech(2), mapping, **options)
    call = {"input_values": SOUND, "attention_mask": HEARD, "labels": TARGETS}
    whole, half = distiller(**call), distiller(**call, num_items=12)
    torch.testing.assert_close(half.loss * 2, whole.loss)


class Frames(nn.Module):
    """Samples ``[B, S]`` to frames ``[B, S / 4]``, without a word about how they go together."""

    def __init__(self):
        super().__init__()
        self.frames, self.head = nn.Linear(4, 6), nn.Linear(6, 5)

    def forward(self, x, attention_mask=None):
        return self.head(self.frames(x.unflatten(1, (-1, 4))))


@MODES
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "with the samples' mask"])
def test_a_loss_mask_weighs_logits_on_its_grid(compile, masked):
    torch.manual_seed(0)
    student, teacher = Frames(), Frames()
    x, kept = torch.randn(2, 20), torch.tensor([[1.0, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    mask = {"attention_mask": kept.repeat_interleave(4, 1).long()} if masked else {}
    distiller = fxdistill.wrap(
        student, teacher, {"frames": "frames"}, task="masked_lm", compile=compile
    )
    out = distiller(x=x, loss_mask=kept, **mask)
    s, t = (m.frames(x.unflatten(1, (-1, 4))) for m in (student, teacher))
    q, p = student.head(s).log_softmax(-1), teacher.head(t).log_softmax(-1)
    each = (p.exp() * (p - q)).sum(-1)
    torch.testing.assert_close(out.losses["logits"], ((each * kept).sum() / 8).detach())
    values = (s - t).square().mean(-1)
    torch.testing.assert_close(out.losses["frames"], ((values * kept).sum() / 8).detach())
    with pytest.raises(errors.BatchError, match="a loss_mask of its shape says which"):
        distiller(x=x, attention_mask=kept.repeat_interleave(4, 1).long())


# ------------------------------------------------------------------ a teacher with its own tokens


class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        self.text, self.mix, self.head = nn.Embedding(30, 8), nn.Linear(8, 8), nn.Linear(8, 30)

    def forward(self, input_ids, attention_mask=None):
        return self.head(self.mix(self.text(input_ids)))


def readers():
    torch.manual_seed(0)
    return Reader(), Reader()


def inputs(length, kept):
    ids = torch.arange(2 * length).reshape(2, length) % 30
    return {
        "input_ids": ids,
        "attention_mask": (torch.arange(length) < torch.tensor(kept)[:, None]).long(),
    }


OURS, THEIRS = inputs(6, [6, 3]), inputs(9, [5, 9])


def pooled(model, seen):
    value = model.mix(model.text(seen["input_ids"]))
    mask = seen["attention_mask"].unsqueeze(-1)
    return (value * mask).sum(1) / mask.sum(1)


@MODES
@pytest.mark.parametrize("tokens", ["auto", "teacher"])
def test_a_teacher_is_pooled_by_its_own_mask(compile, tokens):
    student, teacher = readers()
    match = {"mix": Match(teacher="mix", reduce=("b l d -> b d", "mean"), tokens=tokens)}
    options = {"logit_loss": None, "task": "masked_lm", "compile": compile}
    out = fxdistill.wrap(student, teacher, match, **options)(**OURS, teacher_inputs=THEIRS)
    wanted = (pooled(student, OURS) - pooled(teacher, THEIRS)).square().mean()
    torch.testing.assert_close(out.loss, wanted)
    out.loss.backward()
    found, student.mix.weight.grad = student.mix.weight.grad, None
    wanted.backward()
    torch.testing.assert_close(found, student.mix.weight.grad)


@MODES
@pytest.mark.parametrize("tokens", ["auto", "teacher"])
def test_per_token_the_teachers_mask_weighs_where_it_is_said(compile, tokens):
    student, teacher = readers()
    theirs = inputs(6, [2, 6])
    match = {"mix": Match(teacher="mix", tokens=tokens)}
    options = {"logit_loss": None, "task": "masked_lm", "compile": compile}
    out = fxdistill.wrap(student, teacher, match, **options)(**OURS, teacher_inputs=theirs)
    s, t = (
        student.mix(student.text(OURS["input_ids"])),
        teacher.mix(teacher.text(theirs["input_ids"])),
    )
    mask = (theirs if tokens == "teacher" else OURS)["attention_mask"]
    wanted = ((s - t).square().mean(-1) * mask).sum() / mask.sum()
    torch.testing.assert_close(out.loss, wanted)
