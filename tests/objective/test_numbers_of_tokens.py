"""Values of one number for each token, ``[B, L]``: weighed where that is known, never by chance."""

import pytest
import torch
from torch import nn

import fxdistill
from fxdistill import Match, errors

AOT = {"backend": "aot_eager"}
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])
IDS = torch.arange(12).reshape(2, 6) % 20


class Reader(nn.Module):
    """A text ``[B, L]``, to its tokens ``[B, L, 6]`` and to logits."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.text, self.body, self.head = nn.Embedding(20, 6), nn.Linear(6, 6), nn.Linear(6, 20)

    def forward(self, input_ids, attention_mask=None):
        return self.head(self.body(self.text(input_ids)))


def pair(match, compile=False, **options):
    options = {"task": "masked_lm", "logit_loss": None, "label_loss": None} | options
    models = Reader(1), Reader(2)
    return fxdistill.wrap(*models, {"body": match}, compile=compile, **options)


def bodies(distiller, ids=IDS):
    models = distiller.student, distiller.teacher
    return [model.body(model.text(ids)) for model in models]


def by_mask(each, mask=MASK):
    return (each * mask).sum() / mask.sum()


def to_numbers(module, args, kwargs, output):
    return output.mean(-1)


def table(distiller):
    return str(distiller.summary()).splitlines()[3]


def weighed(distiller, mask=MASK):
    return distiller.report(input_ids=IDS, attention_mask=mask).pairs[0].weighed_by


MEAN = ("b l d -> b l", "mean")


@pytest.mark.parametrize("compile", [False, AOT], ids=["eager", "graph"])
@pytest.mark.parametrize(
    "options",
    [
        {"reduce": MEAN},
        {"reduce": MEAN, "tokens": "input"},
        {"reduce": ("b l d -> (b l)", "mean")},
        {"teacher_port": to_numbers, "student_port": to_numbers, "tokens": "input"},
    ],
    ids=["reduced", "said", "flat", "port"],
)
def test_a_number_of_each_token_is_weighed(options, compile):
    distiller = pair(Match(teacher="body", **options), compile)
    out = distiller(input_ids=IDS, attention_mask=MASK)
    out.loss.backward()
    found = distiller.student.body.weight.grad.clone()
    distiller.student.zero_grad()
    s, t = (x.mean(-1) for x in bodies(distiller))
    wanted = by_mask((s - t.detach()).square())
    torch.testing.assert_close(out.loss, wanted)
    wanted.backward()
    torch.testing.assert_close(found, distiller.student.body.weight.grad)
    assert "tokens" in table(distiller)
    assert weighed(distiller) == "tokens"


def test_in_classification_samples_weigh_them_too():
    distiller = pair(Match(teacher="body", reduce=MEAN), task="classification")
    chosen = torch.tensor([2.0, 1.0])
    out = distiller(input_ids=IDS, attention_mask=MASK, token_weights=chosen)
    s, t = (x.mean(-1) for x in bodies(distiller))
    torch.testing.assert_close(out.loss, by_mask((s - t).square(), MASK * chosen[:, None]))
    assert weighed(distiller) == "samples and tokens"


def test_a_port_is_not_weighed_because_its_sizes_agree():
    distiller = pair(Match(teacher="body", student_port=to_numbers, teacher_port=to_numbers))
    for length in (5, 6):  # 6 is also a width, for which the models are asked
        call = {"input_ids": IDS[:, :length], "attention_mask": MASK[:, :length]}
        out = distiller(**call)
        s, t = (x.mean(-1) for x in bodies(distiller, IDS[:, :length]))
        torch.testing.assert_close(out.loss, (s - t).square().mean())
        assert distiller.report(**call).pairs[0].weighed_by == "nothing"
    assert "tokens, if it is [B·L, D]" in table(distiller)


class Sees(Reader):
    """It takes an image besides, so that the models are asked what follows the text."""

    def forward(self, input_ids, image, attention_mask=None):
        return super().forward(input_ids) + image.mean()


def to_width(module, args, kwargs, output):
    return output.mean(1)


@pytest.mark.parametrize("port", [to_numbers, to_width])
def test_models_that_are_asked_tell(port):
    """Numbers of the six tokens, or the mean of their six entries."""
    match = Match(teacher="body", student_port=port, teacher_port=port)
    options = {"logit_loss": None, "label_loss": None, "task": "masked_lm", "compile": False}
    distiller = fxdistill.wrap(Sees(1), Sees(2), {"body": match}, **options)
    call = {"input_ids": IDS, "attention_mask": MASK, "image": torch.ones(2, 3, 4, 4)}
    out = distiller(**call)
    s, t = (port(None, None, None, x) for x in bodies(distiller))
    each = (s - t).square()
    torch.testing.assert_close(out.loss, by_mask(each) if port is to_numbers else each.mean())
    wanted = "tokens" if port is to_numbers else "nothing"
    assert distiller.report(**call).pairs[0].weighed_by == wanted
    assert wanted in table(distiller)


def test_pooled_entries_as_many_as_tokens_are_none():
    """The layout says what is left: ``[B, D]``; and of a map the channels are no tokens."""
    for pattern in ("b l d -> b d", "b c 1 w -> b c"):
        match = Match(teacher="body", reduce=(pattern, "mean"))
        if "1" in pattern:
            match = Match(
                teacher="body", reduce=(pattern, "mean"), student_port=as_map, teacher_port=as_map
            )
        distiller = pair(match)
        out = distiller(input_ids=IDS, attention_mask=torch.ones_like(MASK))
        assert weighed(distiller, torch.ones_like(MASK)) != "tokens"
        s, t = (x.mean(1) for x in bodies(distiller))
        torch.testing.assert_close(out.loss, (s - t).square().mean())


def as_map(module, args, kwargs, output):
    return output.transpose(1, 2)[:, :, None]


def by_heads(module, args, kwargs, output):
    return output[:, :, None]


@pytest.mark.parametrize("loss", ["cosine", "fitnet", "similarity_preserving"])
def test_losses_of_vectors_say_that_there_are_none(loss):
    call = {"input_ids": IDS, "attention_mask": MASK}
    distiller = pair(Match(teacher="body", reduce=MEAN, loss=loss))
    with pytest.raises(errors.ShapeError, match=r"one number for each token.*tokens=None"):
        distiller(**call)
    distiller = pair(Match(teacher="body", reduce=MEAN, loss=loss, tokens=None))
    s, t = (x.mean(-1) for x in bodies(distiller))
    wanted = getattr(fxdistill.losses, loss)(s, t, None)
    torch.testing.assert_close(distiller(**call).loss, wanted)
    assert weighed(distiller) == "nothing"


def test_the_report_sees_the_value_as_its_layout_leaves_it():
    """``[B, L, H, D]`` has no tokens, and ``[B, L, H·D]`` has."""
    match = Match(
        teacher="body",
        student_port=by_heads,
        teacher_port=by_heads,
        rearrange="b l h d -> b l (h d)",
    )
    distiller = pair(match)
    out = distiller(input_ids=IDS, attention_mask=MASK)
    s, t = bodies(distiller)
    torch.testing.assert_close(out.loss, by_mask((s - t).square().mean(-1)))
    assert weighed(distiller) == "tokens"
    assert "tokens" in table(distiller)
