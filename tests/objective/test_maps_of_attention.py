"""Maps of attention by whatever port, and paths that seem to see: the models tell what they are."""

import pytest
import torch
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

import fxdistill
from fxdistill import Match
from toys import AOT, same_step

OPTIONS = {"logit_loss": None, "label_loss": None}


class Attends(nn.Module):
    """Returns its map third, and lets it through a module without weights."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.drop = nn.Linear(8, 8), nn.Linear(8, 8), nn.Dropout(0.0)

    def forward(self, x):
        q, k = (m(x).unflatten(-1, (2, 4)).transpose(1, 2) for m in (self.q, self.k))
        weights = self.drop((3 * q @ k.transpose(-1, -2)).softmax(-1))
        return x + (weights @ k).transpose(1, 2).flatten(2), None, weights


class Reader(nn.Module):
    """A text beside an image of as many patches as the text may have words."""

    def __init__(self):
        super().__init__()
        self.words, self.head = nn.Embedding(20, 8), nn.Linear(8, 20)
        self.mix, self.patch, self.look = Attends(), nn.Linear(12, 8), Attends()

    def forward(self, input_ids, attention_mask=None, pixel_values=None):
        mixed, _, weights = self.mix(self.words(input_ids))
        seen = 0
        if pixel_values is not None:
            seen = self.look(self.patch(pixel_values))[0].mean(1, keepdim=True)
        return {"logits": self.head(mixed + seen), "attentions": (weights,)}


def two(kind):
    torch.manual_seed(0)
    return kind(), kind()


def text(length=6):
    ids = torch.randint(0, 20, (2, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 3:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def third(module, args, kwargs, output):
    return output[2]


PORTS = {
    "output[2]": ("mix", "output[2]"),
    "of one's own": ("mix", third),
    "a dropout": ("mix.drop", "output"),
    "its input": ("mix.drop", "input"),
}


def weighed(s, t, mask):
    each = (s - t.detach()).square().mean((1, 3))
    return (each * mask).sum() / mask.sum()


@pytest.mark.parametrize(
    ("name", "compile"), [*((name, False) for name in PORTS), ("output[2]", AOT)]
)
def test_padded_queries_of_a_map_do_not_count(name, compile):
    student, teacher = two(Reader)
    path, port = PORTS[name]
    match = Match(path, path, student_port=port, teacher_port=port)
    options = {**OPTIONS, "task": "masked_lm", "compile": compile}
    distiller = fxdistill.wrap(student, teacher, [match], **options)
    found = distiller(**text()).loss
    s, t = (model.mix(model.words(text()["input_ids"]))[2] for model in (student, teacher))
    same_step(student, found, weighed(s, t, text()["attention_mask"]))
    assert distiller.report(**text()).pairs[0].weighed_by == "tokens"


class Around(nn.Module):
    """What a model returns, as a port of a path."""

    def __init__(self):
        super().__init__()
        self.body = Reader()

    def forward(self, input_ids, attention_mask=None):
        if input_ids.device.type != "meta":
            assert int(input_ids.max()) >= 0  # data decides: it cannot be asked
        return self.body(input_ids, attention_mask)["logits"]


def test_a_port_of_that_name_needs_no_asking():
    student, teacher = two(Around)
    port = "output.attentions[0]"
    match = Match("body", "body", student_port=port, teacher_port=port)
    distiller = fxdistill.wrap(
        student, teacher, [match], **OPTIONS, task="masked_lm", compile=False
    )
    found = distiller(**text()).loss
    s, t = (m.body(text()["input_ids"])["attentions"][0] for m in (student, teacher))
    same_step(student, found, weighed(s, t, text()["attention_mask"]))


def test_a_map_of_patches_is_not_weighed():
    student, teacher = two(Reader)
    match = Match("look", "look", student_port="output[2]", teacher_port="output[2]")
    distiller = fxdistill.wrap(
        student, teacher, [match], **OPTIONS, task="masked_lm", compile=False
    )
    pixels = torch.randn(2, 6, 12)
    s, t = (model.look(model.patch(pixels))[2] for model in (student, teacher))
    same_step(
        student,
        distiller(**text(), pixel_values=pixels).loss,
        (s - t.detach()).square().mean(),
    )


def t5(layers):
    torch.manual_seed(layers)
    sizes = {"d_model": 16, "d_kv": 8, "num_heads": 2, "d_ff": 32, "vocab_size": 20}
    ends = {"decoder_start_token_id": 0, "pad_token_id": 0, "use_cache": False}
    config = T5Config(
        num_layers=layers, num_decoder_layers=layers, attn_implementation="eager", **sizes, **ends
    )
    return T5ForConditionalGeneration(config).eval()


@pytest.mark.parametrize(
    "path",
    [
        "encoder.block.0.layer.0.SelfAttention",
        "decoder.block.0.layer.0.SelfAttention",
        "decoder.block.0.layer.1.EncDecAttention",
    ],
)
def test_t5_returns_its_map_third(path):
    student, teacher = t5(1), t5(2)
    labels = torch.tensor([[3, 4, 5, 6, 7], [6, 7, -100, -100, -100]])
    match = Match(path, path, student_port="output[2]", teacher_port="output[2]")
    for model in (student, teacher):
        model.config.output_attentions = True
    distiller = fxdistill.wrap(student, teacher, [match], **OPTIONS, compile=False)
    found = distiller(**text(), labels=labels).loss
    kind = "encoder_attentions" if path.startswith("encoder") else "decoder_attentions"
    kind = "cross_attentions" if "EncDec" in path else kind
    s, t = (m(**text(), labels=labels, output_attentions=True)[kind][0] for m in (student, teacher))
    mask = text()["attention_mask"] if path.startswith("encoder") else (labels != -100).long()
    same_step(student, found, weighed(s, t, mask))


# ------------------------------------------------------------------ paths that seem to see


class VisualReader(nn.Module):
    """Like a VisualBERT: by its name it sees, and it reads a text, beside an image or alone."""

    def __init__(self):
        super().__init__()
        self.visual_reader, self.head = Reader(), nn.Linear(20, 3)
        self.vision = nn.Linear(12, 8)

    def forward(self, input_ids, attention_mask=None, pixel_values=None):
        seen = 0 if pixel_values is None else self.vision(pixel_values).mean()
        return self.head(self.visual_reader(input_ids, attention_mask)["logits"]) + seen


class Decides(VisualReader):
    """Its data decide, so that it cannot be asked."""

    def forward(self, input_ids, attention_mask=None, pixel_values=None):
        assert int(input_ids.max()) >= 0
        return super().forward(input_ids, attention_mask, pixel_values)


@pytest.mark.parametrize(
    ("kind", "sees", "reduce"),
    [
        (VisualReader, False, None),
        (VisualReader, True, None),
        (VisualReader, False, ("b l d -> b d", "mean")),
        (Decides, False, None),
    ],
)
def test_a_word_in_a_path_does_not_overrule_a_text(kind, sees, reduce):
    """Where the models cannot be asked, it is what is left."""
    student, teacher = two(kind)
    path, pixels = "visual_reader.mix.q", torch.randn(2, 6, 12)
    distiller = fxdistill.wrap(
        student,
        teacher,
        [Match(path, path, reduce=reduce)],
        **OPTIONS,
        task="masked_lm",
        compile=False,
    )
    found = distiller(**text(), **({"pixel_values": pixels} if sees else {})).loss
    readers = [model.visual_reader for model in (student, teacher)]
    s, t = (reader.mix.q(reader.words(text()["input_ids"])) for reader in readers)
    mask = text()["attention_mask"] if kind is VisualReader else torch.ones(2, 6)
    if reduce is not None:
        s, t = ((x * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True) for x in (s, t))
        mask = torch.ones(2)
    each = (s - t.detach()).square().mean(-1)
    same_step(student, found, (each * mask).sum() / mask.sum())


def test_what_sees_is_still_weighed_by_nothing():
    student, teacher = two(VisualReader)
    distiller = fxdistill.wrap(
        student, teacher, {"vision": "vision"}, **OPTIONS, task="masked_lm", compile=False
    )
    pixels = torch.randn(2, 6, 12)
    found = distiller(**text(), pixel_values=pixels).loss
    s, t = (model.vision(pixels) for model in (student, teacher))
    same_step(student, found, (s - t.detach()).square().mean())
