"""Values whose sizes agree with a text's, with a decoder's or with a map's by chance."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    MarianConfig,
    MarianMTModel,
    T5Config,
    T5ForConditionalGeneration,
)

import fxdistill
from fxdistill import Match, errors

AOT = {"backend": "aot_eager"}
OPTIONS = {"logit_loss": None, "label_loss": None}


class Reader(nn.Module):
    """A text ``[B, L]`` to a value that is as long as the text by chance alone."""

    def __init__(self):
        super().__init__()
        self.text, self.head = nn.Embedding(20, 8), nn.Linear(8, 20)
        self.kept = nn.Identity()

    def forward(self, input_ids, attention_mask=None):
        return self.head(self.text(input_ids)) + self.kept(self.value(self.text(input_ids))).mean()


class Latents(Reader):
    """As many latent vectors as words: ``[B, 6, 8]``, as in a Perceiver."""

    def __init__(self):
        super().__init__()
        self.latents = nn.Parameter(torch.randn(6, 8))

    def value(self, x):
        return (self.latents @ x.transpose(1, 2)).softmax(-1) @ x


class Queries(Latents):
    """Learned queries, as in a DETR or a Q-Former."""

    def __init__(self):
        super().__init__()
        self.latents, self.queries = None, nn.Embedding(6, 8)

    def value(self, x):
        return (self.queries.weight @ x.transpose(1, 2)).softmax(-1) @ x


class Pooled(Reader):
    """A text that is pooled to six places by the model's own code."""

    def value(self, x):
        return F.adaptive_avg_pool1d(x.transpose(1, 2), 6).transpose(1, 2)


class Channels(Reader):
    """Six channels of a convolution over the text: ``[B, 6, L]``."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(8, 6, 3, padding=1)

    def value(self, x):
        return self.conv(x.transpose(1, 2))


def text(length):
    ids = torch.arange(2 * length).reshape(2, length) % 20
    kept = torch.tensor([[length], [1 + length // 2]])
    return {"input_ids": ids, "attention_mask": (torch.arange(length) < kept).long()}


def gradients(model):
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def same_step(model, found, wanted):
    """Value and gradients of two losses of one model."""
    torch.testing.assert_close(found, wanted)
    found.backward()
    ours = gradients(model)
    wanted.backward()
    theirs = gradients(model)
    for name, gradient in theirs.items():
        if gradient.abs().sum() > 0 or name in ours:
            torch.testing.assert_close(ours[name], gradient, msg=name)


@pytest.mark.parametrize("length", [6, 3, 7])  # 2 · 3 is 6, too
@pytest.mark.parametrize("kind", [Latents, Queries, Pooled, Channels])
def test_a_text_does_not_weigh_what_only_is_as_long(kind, length):
    torch.manual_seed(0)
    student, teacher = kind(), kind()
    distiller = fxdistill.wrap(
        student, teacher, {"kept": "kept"}, **OPTIONS, task="masked_lm", compile=False
    )
    given = text(length)
    s, t = (model.value(model.text(given["input_ids"])) for model in (student, teacher))
    same_step(student, distiller(**given).loss, (s - t.detach()).square().mean())


def test_one_graph_agrees():
    torch.manual_seed(0)
    student, teacher = Latents(), Latents()
    distiller = fxdistill.wrap(
        student, teacher, {"kept": "kept"}, **OPTIONS, task="masked_lm", compile=AOT
    )
    for length in (7, 6):  # the length of the second call is the one that agrees
        given = text(length)
        s, t = (model.value(model.text(given["input_ids"])) for model in (student, teacher))
        same_step(student, distiller(**given).loss, (s - t.detach()).square().mean())


def test_hooks_of_the_user_see_no_fake_values():
    torch.manual_seed(0)
    student, teacher = Latents(), Latents()
    seen = []
    student.kept.register_forward_hook(lambda module, args, out: seen.append(type(out)))
    fxdistill.wrap(student, teacher, {"kept": "kept"}, task="masked_lm", compile=False)(**text(6))
    assert seen == [torch.Tensor]


# ------------------------------------------------------------------ encoder-decoders


def bart(layers, config=BartConfig, model=BartForConditionalGeneration):
    sizes = {"encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "encoder_attention_heads": 2}
    ends = {"pad_token_id": 0, "decoder_start_token_id": 0, "eos_token_id": 2}
    made = config(
        vocab_size=30,
        d_model=16,
        encoder_layers=1,
        decoder_layers=layers,
        decoder_attention_heads=2,
        dropout=0.0,
        use_cache=False,
        **sizes,
        **ends,
    )
    return model(made)


def marian(layers):
    return bart(layers, MarianConfig, MarianMTModel)


def t5(layers):
    config = T5Config(
        vocab_size=30,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=1,
        num_decoder_layers=layers,
        num_heads=2,
        dropout_rate=0.0,
        use_cache=False,
        decoder_start_token_id=0,
    )
    return T5ForConditionalGeneration(config)


SEQ2SEQ = {
    bart: ("model.decoder.layers.0.encoder_attn", "k_proj", "q_proj"),
    marian: ("model.decoder.layers.0.encoder_attn", "v_proj", "out_proj"),
    t5: ("decoder.block.0.layer.1.EncDecAttention", "k", "o"),
}


@pytest.mark.parametrize("given_decoder", [False, True], ids=["labels", "decoder inputs"])
@pytest.mark.parametrize("make", SEQ2SEQ)
def test_keys_of_cross_attention_go_by_the_encoders_mask(make, given_decoder):
    """Both texts are of one length, so that sizes tell nothing."""
    torch.manual_seed(0)
    student, teacher = make(1), make(2).eval()
    around, keys, queries = SEQ2SEQ[make]
    paths = [f"{around}.{name}" for name in (keys, queries)]
    ids = torch.randint(3, 30, (2, 6))
    mask = torch.tensor([[1] * 6, [1, 1, 0, 0, 0, 0]])
    after = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0]])
    given = {"input_ids": ids, "attention_mask": mask}
    if given_decoder:
        given |= {
            "decoder_input_ids": torch.randint(3, 30, (2, 6)),
            "decoder_attention_mask": after,
        }
    else:
        given["labels"] = torch.randint(3, 30, (2, 6)).masked_fill(after == 0, -100)
    distiller = fxdistill.wrap(student, teacher, {p: p for p in paths}, **OPTIONS, compile=False)
    out = distiller(**given)
    seen = {}
    for model in (student, teacher):
        for path in paths:
            model.get_submodule(path).register_forward_hook(
                lambda module, args, value, key=(model, path): seen.update({key: value})
            )
        model(**given)
    each = [(seen[student, p] - seen[teacher, p].detach()).square().mean(-1) for p in paths]
    wanted = [(x * w).sum() / w.sum() for x, w in zip(each, (mask, after), strict=True)]
    for path, value in zip(paths, wanted, strict=True):
        torch.testing.assert_close(out.losses[path], value.detach())
    same_step(student, out.loss, sum(wanted) / 2)


@pytest.mark.parametrize("keys", [6, 7])
@pytest.mark.parametrize("make", [bart, t5])
def test_maps_of_cross_attention_go_by_the_decoders_mask(make, keys):
    """A model that makes its map itself: behind its queries are the encoder's keys."""
    torch.manual_seed(0)
    student, teacher = make(1), make(2).eval()
    for model in (student, teacher):
        model.set_attn_implementation("eager")
    path = SEQ2SEQ[make][0]
    mask, after = torch.ones(2, keys).long(), torch.ones(2, 6).long()
    mask[1, 2:], after[0, 3:] = 0, 0
    given = {
        "input_ids": torch.randint(3, 30, (2, keys)),
        "attention_mask": mask,
        "decoder_input_ids": torch.randint(3, 30, (2, 6)),
        "decoder_attention_mask": after,
    }
    ports = {"student_port": "attention", "teacher_port": "attention"}
    match = Match(path, path, loss="attention_kl", **ports)
    distiller = fxdistill.wrap(student, teacher, [match], **OPTIONS, compile=False)
    out = distiller(**given)
    maps = [
        model(**given, output_attentions=True).cross_attentions[0] for model in (teacher, student)
    ]
    t, s = maps[0].detach().clamp_min(1e-30), maps[1].clamp_min(1e-30)
    each = (t * (t / s).log()).sum(-1).mean(1)
    wanted = (each * after).sum() / after.sum()
    torch.testing.assert_close(out.loss, wanted)
    same_step(student, out.loss, wanted)


# ------------------------------------------------------------------ maps whose channels are last


class Windows(nn.Module):
    """Like a Swin transformer: everything is ``[B, H, W, C]``."""

    def __init__(self, width=6):
        super().__init__()
        self.patches, self.mix = nn.Conv2d(3, width, 2, 2), nn.Linear(width, width)
        self.stage, self.head = nn.Identity(), nn.Linear(width, 4)

    def value(self, pixels):
        return self.mix(self.patches(pixels).permute(0, 2, 3, 1)).tanh()

    def forward(self, pixel_values):
        return self.head(self.stage(self.value(pixel_values)).mean((1, 2)))


class Normed(Windows):
    """The matched value is that of a norm over the last axis."""

    def __init__(self, width=6):
        super().__init__(width)
        self.stage = nn.LayerNorm(width)


class Inside(Windows):
    """Like a ConvNeXt: channels are last inside of a block, and first behind it."""

    def forward(self, pixel_values):
        return self.head(self.stage(self.value(pixel_values).permute(0, 3, 1, 2)).mean((2, 3)))


def as_channels_last(model, pixels):
    value = model.value(pixels)
    return model.stage(value) if isinstance(model, Normed) else value


@pytest.mark.parametrize("loss", ["l2", "cosine", "attention_transfer", "gram"])
@pytest.mark.parametrize(
    ("ours", "theirs"), [(Windows, Windows), (Normed, Normed), (Inside, Inside), (Windows, Inside)]
)
def test_channels_are_the_axis_that_does_not_follow_the_image(ours, theirs, loss):
    torch.manual_seed(0)
    student, teacher = ours(), theirs()
    pixels = torch.randn(3, 3, 12, 12)  # maps 6 × 6 of 6 channels: sizes tell nothing
    match = {"stage": Match(teacher="stage", loss=loss)}
    distiller = fxdistill.wrap(
        student, teacher, match, **OPTIONS, task="classification", compile=False
    )
    s, t = as_channels_last(student, pixels), as_channels_last(teacher, pixels).detach()
    if loss == "l2":
        wanted = (s - t).norm(dim=-1).mean()
    elif loss == "cosine":
        wanted = (1 - F.cosine_similarity(s, t, dim=-1)).mean()
    elif loss == "attention_transfer":
        a, b = (F.normalize(x.square().sum(-1).flatten(1)) for x in (s, t))
        wanted = (a - b).square().mean()
    else:
        wanted = fxdistill.losses.gram(s.mean((1, 2)), t.mean((1, 2)))
    same_step(student, distiller(pixel_values=pixels).loss, wanted)


class OfOneSize(Windows):
    """Takes images of one size alone, so that nothing can be asked of it."""

    def forward(self, pixel_values):
        if pixel_values.shape[-1] != 12:
            raise ValueError("images of 12 × 12")
        return super().forward(pixel_values)


def test_where_the_models_cannot_tell_a_warning_and_a_note_say_so(caplog):
    """Maps are then taken to have their channels on axis 1."""
    torch.manual_seed(0)
    student, teacher = OfOneSize(), OfOneSize()
    pixels = torch.randn(3, 3, 12, 12)
    match = {"stage": Match(teacher="stage", loss="l2")}
    options = {**OPTIONS, "task": "classification", "compile": False}
    distiller = fxdistill.wrap(student, teacher, match, **options)
    s, t = student.value(pixels), teacher.value(pixels).detach()
    with pytest.warns(errors.MatchWarning, match="of stage are taken to be on axis 1") as given:
        found = distiller(pixel_values=pixels).loss
    same_step(student, found, (s - t).norm(dim=1).mean())
    assert len(given) == 1
    distiller(pixel_values=pixels)  # it is given once
    assert not [x for x in caplog.records if x.name == "torch._subclasses.fake_tensor"]
    said = " ".join(str(distiller.summary()).split())
    assert "the channels of stage are taken to be on axis 1" in said
    assert "ValueError: images of 12 × 12" in said


class Given(nn.Module):
    """Images have their channels last, and so has what a module without weights makes of them."""

    def __init__(self, width=6):
        super().__init__()
        self.linear, self.stage, self.head = nn.Linear(3, width), nn.Tanh(), nn.Linear(width, 4)

    def forward(self, pixel_values):
        return self.head(self.stage(self.linear(pixel_values)).mean((1, 2)))


@pytest.mark.parametrize("examples", [False, True], ids=["first call", "examples"])
def test_images_with_their_channels_last_are_made_larger_too(examples, caplog):
    """What fails on the way (a linear layer over an image's width) reaches no log."""
    torch.manual_seed(0)
    student, teacher = Given(), Given()
    pixels = torch.randn(2, 5, 4, 3)
    match = {"stage": Match(teacher="stage", loss="attention_transfer")}
    given = {"example_inputs": {"pixel_values": pixels}} if examples else {}
    options = {**OPTIONS, "task": "classification", "compile": False}
    distiller = fxdistill.wrap(student, teacher, match, **options, **given)
    s, t = (model.linear(pixels).tanh().square().sum(-1).flatten(1) for model in (student, teacher))
    wanted = (F.normalize(s) - F.normalize(t.detach())).square().mean()
    same_step(student, distiller(pixel_values=pixels).loss, wanted)
    assert not [x for x in caplog.records if x.name == "torch._subclasses.fake_tensor"]
