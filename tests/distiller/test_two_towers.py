"""Models of two towers, whose logits have other names: what errors advise does it."""

import pytest
import torch
from torch import nn
from transformers import CLIPConfig, CLIPModel

import fxdistill
from fxdistill import Head, errors
from toys import AOT, assert_same_gradients, gradients

PIXELS = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0)).double()
GIVEN = {
    "input_ids": torch.tensor([[5, 6, 29], [7, 29, 29], [9, 4, 29]]),
    "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0], [1, 1, 1]]),
    "pixel_values": PIXELS,
}


def clip(layers):
    torch.manual_seed(layers)
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    tower["num_hidden_layers"] = layers
    vision, text = {"image_size": 8, "patch_size": 4}, {"vocab_size": 30, "eos_token_id": 29}
    config = CLIPConfig(text_config=tower | text, vision_config=tower | vision)
    return CLIPModel(config).double()


class Scores(nn.Module):
    """As the error advises, with the other direction beside it."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, **inputs):
        out = self.model(**inputs)
        return {"logits": out.logits_per_image, "per_text": out.logits_per_text}


PER_IMAGE = Head(":logits_per_image", teacher=":logits_per_image", logit_weight=1, label_weight=0)
PER_TEXT = Head(":per_text", teacher=":per_text", logit_weight=1.0, label_weight=0.0)


@pytest.mark.parametrize("compile", [False, AOT], ids=["eager", "graph"])
@pytest.mark.parametrize("heads", [{}, {"image": PER_IMAGE}], ids=["bare", "head"])
def test_the_error_says_how_to_distil_what_there_is(heads, compile):
    distiller = fxdistill.wrap(clip(1), clip(2), heads=heads, compile=compile)
    with pytest.raises(errors.LogitsError) as found:
        distiller(**GIVEN)
    said = str(found.value)
    assert "Its output has logits_per_image, logits_per_text. To distil one of these" in said
    assert "its forward(self, **inputs) returns self.model(**inputs).logits_per_image" in said


def test_without_a_logit_loss_a_head_leads_to_the_same():
    with pytest.raises(errors.OptionError, match="wrap a module around it that returns these"):
        fxdistill.wrap(clip(1), clip(2), heads={"image": PER_IMAGE}, logit_loss=None)


@pytest.mark.parametrize("compile", [False, AOT], ids=["eager", "graph"])
def test_so_do_value_and_gradient(compile):
    student, teacher = clip(1), clip(2)
    towers = Scores(student), Scores(teacher)
    distiller = fxdistill.wrap(*towers, heads={"text": PER_TEXT}, temperature=2.0, compile=compile)
    out = distiller(**GIVEN)
    out.loss.backward()
    found = gradients(student)
    s, t = student(**GIVEN), teacher.eval()(**GIVEN)

    def divergence(ours, theirs):
        theirs = (theirs.detach() / 2.0).log_softmax(-1)
        return 4.0 * (theirs.exp() * (theirs - (ours / 2.0).log_softmax(-1))).sum(-1).mean()

    image = divergence(s.logits_per_image, t.logits_per_image)
    text = divergence(s.logits_per_text, t.logits_per_text)
    (image + text).backward()
    torch.testing.assert_close(out.losses["logits"], image.detach())
    torch.testing.assert_close(out.losses["text:logits"], text.detach())
    torch.testing.assert_close(out.loss, image + text)
    assert_same_gradients(found, gradients(student))
