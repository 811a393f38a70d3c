"""Which values have tokens: never because sizes happen to agree in a batch."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxdistill
from fxdistill import Match, Matches, errors

MODES = pytest.mark.parametrize(
    "compile", [False, {"backend": "aot_eager"}], ids=["eager", "graph"]
)
LENGTHS = (7, 8, 9, 16)  # 8 channels, heads and patches; 2 · 8 packed ones
PIXELS = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


class Maps(nn.Module):
    """Values ``[2, 8, ...]`` of an image beside a text of any length."""

    def __init__(self):
        super().__init__()
        self.image = nn.Conv2d(3, 8, 3)  # [2, 8, 4, 4]
        self.patches = nn.Conv2d(3, 8, 3)
        self.text = nn.Embedding(20, 8)
        self.head = nn.Linear(8, 5)
        self.kept = nn.Identity()

    def value(self, image):
        return image

    def forward(self, input_ids, pixel_values, attention_mask=None):
        image = self.kept(self.value(self.image(pixel_values)))
        pooled = image.reshape(2, -1).mean(1, keepdim=True)
        return self.head(self.text(input_ids).mean(1) + pooled)


class Attention(Maps):
    """As many heads as the text may have tokens: ``[2, 8, 4, 4]``."""

    def value(self, image):
        return image.softmax(-1)


class Patches(Maps):
    """Image tokens ``[2, 8, 16]``, as many as the text may have."""

    def value(self, image):
        return image.flatten(2)


class Packed(Maps):
    """Patches of all images in one row ``[2 · 8, 16]``: as many as B · L of a text of 8."""

    def value(self, image):
        return image.flatten(2).flatten(0, 1)


def towers(kind):
    torch.manual_seed(0)
    return kind(), kind()


def call(length, padded=True):
    ids = torch.zeros(2, length, dtype=torch.long)
    mask = torch.ones_like(ids)
    if padded:
        mask[0, length // 2 :] = 0
    return {"input_ids": ids, "pixel_values": PIXELS, "attention_mask": mask}


CASES = [(Maps, "auto"), (Attention, "auto"), (Maps, None), (Patches, None), (Packed, None)]


@MODES
@pytest.mark.parametrize("loss", ["mse", "l2", "cosine"])
@pytest.mark.parametrize(("kind", "tokens"), CASES)
def test_a_text_does_not_weigh_an_image(kind, tokens, loss, compile):
    student, teacher = towers(kind)
    match = {"kept": Match(teacher="kept", loss=loss, tokens=tokens)}
    distiller = fxdistill.wrap(student, teacher, match, logit_loss=None, compile=compile)
    lengths = LENGTHS if compile is False else LENGTHS[:2]
    found = [float(distiller(**call(length)).losses["kept"]) for length in lengths]
    s, t = (model.value(model.image(PIXELS)) for model in (student, teacher))
    if s.ndim == 4:  # l2 and cosine compare whole maps
        s, t = s.flatten(1), t.flatten(1)
    want = {
        "mse": (s - t).square().mean(),
        "l2": (s - t).norm(dim=-1).mean(),
        "cosine": (1 - F.cosine_similarity(s, t, dim=-1)).mean(),
    }
    assert found == pytest.approx([float(want[loss].detach())] * len(found), rel=1e-5)


def test_samples_weigh_their_maps():
    student, teacher = towers(Maps)
    match = {"kept": Match(teacher="kept", loss="l2")}
    options = {"task": "classification", "logit_loss": None, "compile": False}
    distiller = fxdistill.wrap(student, teacher, match, **options)
    weights = torch.tensor([1.0, 3.0])
    out = distiller(input_ids=call(8)["input_ids"], pixel_values=PIXELS, token_weights=weights)
    s, t = (model.image(PIXELS) for model in (student, teacher))
    each = (s - t).flatten(1).norm(dim=-1)
    torch.testing.assert_close(out.loss, (each * weights).sum() / 4)


# ---- said


class Heads(nn.Module):
    """A value of tokens with heads, ``[B, L, 2, 4]``."""

    def __init__(self):
        super().__init__()
        self.text, self.split = nn.Embedding(20, 8), nn.Unflatten(-1, (2, 4))
        self.head = nn.Linear(8, 20)

    def forward(self, input_ids, attention_mask=None):
        return self.head(self.split(self.text(input_ids)).flatten(-2))


@MODES
def test_tokens_that_are_said_are_taken(compile):
    student, teacher = towers(Heads)
    ids = torch.arange(10).reshape(2, 5)
    mask = torch.ones_like(ids)
    mask[1, 3:] = 0
    match = {"split": Match(teacher="split", tokens="input")}
    options = {"task": "masked_lm", "logit_loss": None, "compile": compile}
    out = fxdistill.wrap(student, teacher, match, **options)(input_ids=ids, attention_mask=mask)
    out.loss.backward()
    found, student.text.weight.grad = student.text.weight.grad, None
    s, t = (model.text(ids) for model in (student, teacher))
    want = (s - t).square().mean(-1)[mask.bool()].mean()
    want.backward()
    torch.testing.assert_close(out.loss, want)
    torch.testing.assert_close(found, student.text.weight.grad)


@MODES
@pytest.mark.parametrize("task", ["auto", "classification"])
def test_a_value_without_the_axes_that_were_said_is_an_error(task, compile):
    student, teacher = towers(Maps)
    match = {"kept": Match(teacher="kept", tokens="input")}
    options = {"task": task, "logit_loss": None, "compile": compile}
    distiller = fxdistill.wrap(student, teacher, match, **options)
    with pytest.raises(errors.BatchError, match=r"is \[2, 8, 4, 4\]: neither \[2, 7, ...\] nor"):
        distiller(**call(7))


@MODES
def test_tokens_that_a_call_does_not_have_are_an_error(compile):
    student, teacher = towers(Maps)
    match = {"kept": Match(teacher="kept", tokens="decoder")}
    distiller = fxdistill.wrap(student, teacher, match, logit_loss=None, compile=compile)
    with pytest.raises(errors.BatchError, match="the call has none"):
        distiller(**call(7))


def test_an_unknown_option_is_named():
    match = {"kept": Match(teacher="kept", tokens="decoders")}
    with pytest.raises(errors.OptionError, match="tokens='decoders' for 'kept'"):
        fxdistill.wrap(*towers(Maps), match)


@pytest.mark.parametrize("kind", ["toml", "json"])
@pytest.mark.parametrize("tokens", [None, "decoder", "auto"])
def test_files_keep_it(tmp_path, kind, tokens):
    matches = Matches([Match("a", "b", tokens=tokens)])
    matches.save(tmp_path / f"m.{kind}")
    assert Matches.load(tmp_path / f"m.{kind}") == matches
