"""Values of another length than their mask: nothing weighs them, and that is said."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxdistill
from fxdistill import Match, errors
from toys import AOT, same_step

OPTIONS = {"logit_loss": None, "label_loss": None, "task": "masked_lm"}


class Reader(nn.Module):
    """A text ``[B, L]`` to the value that a kind makes of its words."""

    def __init__(self):
        super().__init__()
        self.words, self.head = nn.Embedding(20, 8), nn.Linear(8, 20)
        self.latents = nn.Parameter(torch.randn(5, 8))
        self.kept = nn.Tanh()

    def value(self, x):
        return x

    def forward(self, input_ids, attention_mask=None):
        words = self.words(input_ids)
        return self.head(words + self.kept(self.value(words)).mean())


class Pads(Reader):
    """To a multiple of eight, like a Longformer."""

    def value(self, x):
        return F.pad(x, (0, 0, 0, -x.shape[1] % 8))


class Halves(Reader):
    """Every second word alone, like a Funnel."""

    def value(self, x):
        return x[:, ::2]


class Prefixed(Reader):
    """Learned vectors before the words, like a prompt or an image's."""

    def value(self, x):
        return torch.cat([self.latents.expand(len(x), -1, -1), x], dim=1)


class SequenceFirst(Reader):
    def value(self, x):
        return x.transpose(0, 1)


class Latents(Reader):
    """As many as they are, whatever the text: they have no padding."""

    def value(self, x):
        return (self.latents @ x.transpose(1, 2)).softmax(-1) @ x


class Pooled(Reader):
    def value(self, x):
        return x.mean(1, keepdim=True)


def call(length=6, batch=3):
    ids = torch.randint(0, 20, (batch, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[-1, length // 2 :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def two(kind, match, compile=False):
    torch.manual_seed(0)
    student, teacher = kind(), kind()
    return student, teacher, fxdistill.wrap(student, teacher, [match], **OPTIONS, compile=compile)


def value(model, given):
    return model.value(model.words(given["input_ids"])).tanh()


@pytest.mark.parametrize(
    ("kind", "compile"),
    [(Pads, False), (Pads, AOT), (Halves, False), (Prefixed, False), (SequenceFirst, False)],
)
def test_it_is_warned_of_once_and_listed(kind, compile):
    student, teacher, distiller = two(kind, Match("kept", "kept"), compile)
    given = call()
    with pytest.warns(errors.MatchWarning, match=r"nothing weighs kept.*mask is \[3, 6\]") as seen:
        found = distiller(**given).loss
    assert len(seen) == 1
    assert ("l b d -> b l d" in str(seen[0].message)) == (kind is SequenceFirst)
    s, t = value(student, given), value(teacher, given).detach()
    same_step(student, found, (s - t).square().mean())
    distiller(**given)
    distiller(**call(7))
    assert distiller.report(**given).pairs[0].weighed_by == "nothing"
    assert " nothing " in str(distiller.summary())


@pytest.mark.parametrize(
    ("kind", "options", "weights"),
    [
        (Latents, {}, None),
        (Pooled, {}, None),
        (Pads, {"tokens": None}, None),
        (Pads, {"weights": "words"}, torch.ones(3, 8)),
    ],
)
def test_what_is_settled_or_has_no_padding_warns_of_nothing(kind, options, weights):
    _, _, distiller = two(kind, Match("kept", "kept", **options))
    given = {} if weights is None else {"weights": {"words": weights}}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        distiller(**call(), **given)


def test_padding_in_a_pooled_value_is_warned_of():
    match = Match("kept", "kept", reduce=("b l d -> b d", "mean"))
    _, _, distiller = two(Pads, match)
    with pytest.warns(errors.MatchWarning, match="nothing weighs kept"):
        distiller(**call())


def test_tokens_that_a_layout_has_brought_there_want_a_word():
    match = Match("kept", "kept", rearrange="l b d -> b l d")
    _, _, distiller = two(SequenceFirst, match)
    with pytest.warns(errors.MatchWarning, match=r"Match\(tokens='input'\) lets it weigh them"):
        distiller(**call())


def test_a_longer_batch_may_show_it_later():
    """A text of sixteen words is not padded; the mask weighs it."""
    student, teacher, distiller = two(Pads, Match("kept", "kept"))
    given = call(16)
    s, t = value(student, given), value(teacher, given).detach()
    each, mask = (s - t).square().mean(-1), given["attention_mask"]
    same_step(student, distiller(**given).loss, (each * mask).sum() / mask.sum())
    with pytest.warns(errors.MatchWarning, match="nothing weighs kept"):
        distiller(**call(6))


@pytest.mark.parametrize("tokens", ["auto", "input"])
def test_a_text_that_is_as_long_as_what_it_is_padded_to(tokens):
    """Near lengths do not show that these are its tokens; multiples do."""
    student, teacher, distiller = two(Pads, Match("kept", "kept", tokens=tokens))
    given = call(8)
    s, t = value(student, given), value(teacher, given).detach()
    each, mask = (s - t).square().mean(-1), given["attention_mask"]
    same_step(student, distiller(**given).loss, (each * mask).sum() / mask.sum())
