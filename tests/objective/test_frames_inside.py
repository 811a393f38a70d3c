"""Speech models that tell which frames are padding: in a part of them, and at several lengths."""

import pytest
import torch
import transformers as tf
from torch import nn

import fxdistill
from fxdistill import Match
from toys import AOT, same_step

OPTIONS = {"logit_loss": None, "label_loss": None}
SOUND = torch.randn(2, 200, generator=torch.Generator().manual_seed(0))
HEARD = (torch.arange(200) < torch.tensor([[200], [80]])).long()
SPECTRUM = torch.randn(2, 12, 16, generator=torch.Generator().manual_seed(1))  # fewer than bands
FRAMES = (torch.arange(12) < torch.tensor([[12], [5]])).long()
LABELS = torch.tensor([[3, 4, 5], [6, 7, -100]])

WIDTH = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
SMALL = {
    "feat_extract_norm": "layer",
    "conv_dim": (8, 8),
    "conv_kernel": (10, 3),
    "conv_stride": (5, 2),
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
}
ENDS = {"pad_token_id": 0, "decoder_start_token_id": 1, "use_cache": False}
ADAPTER = {"add_adapter": True, "num_adapter_layers": 1, "output_hidden_size": 16}


def wav2vec2(layers, **options):
    config = tf.Wav2Vec2Config(num_hidden_layers=layers, vocab_size=12, **WIDTH, **SMALL, **options)
    return tf.Wav2Vec2Model(config)


def with_adapter(layers):
    return wav2vec2(layers, **ADAPTER)


def sew(layers):
    config = tf.SEWConfig(num_hidden_layers=layers, squeeze_factor=2, **WIDTH, **SMALL)
    return tf.SEWModel(config)


class Own(nn.Module):
    """A head of one's own, which knows nothing of masks."""

    def __init__(self, layers):
        super().__init__()
        self.heard, self.head = wav2vec2(layers), nn.Linear(16, 5)

    def forward(self, audio, attention_mask=None):
        return self.head(self.heard(audio, attention_mask=attention_mask)[0].mean(1))


def speecht5(layers):
    sizes = {"hidden_size": 16, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    sizes |= {"encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "decoder_layers": 1, "vocab_size": 20}
    config = tf.SpeechT5Config(encoder_layers=layers, **sizes, **SMALL, **ENDS)
    return tf.SpeechT5ForSpeechToText(config)


def speech_to_text(layers):
    sizes = {"d_model": 16, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    sizes |= {"encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "decoder_layers": 1, "vocab_size": 30}
    sizes |= {"input_feat_per_channel": 16, "conv_channels": 16, "num_conv_layers": 2}
    sizes |= {"max_source_positions": 200, "max_target_positions": 32}
    config = tf.Speech2TextConfig(encoder_layers=layers, **sizes, **ENDS)
    return tf.Speech2TextForConditionalGeneration(config)


def encoder_decoder(layers):
    kind = {"is_decoder": True, "add_cross_attention": True, "use_cache": False}
    decoder = tf.BertConfig(vocab_size=30, num_hidden_layers=1, **WIDTH, **kind)
    made = tf.SpeechEncoderDecoderModel(
        encoder=wav2vec2(layers), decoder=tf.BertLMHeadModel(decoder)
    )
    made.config.decoder_start_token_id, made.config.pad_token_id = 1, 0
    return made


def two(make):
    """A student of one layer and a teacher of two, without anything random."""
    made = []
    for layers in (1, 2):
        torch.manual_seed(layers)
        made.append(make(layers).eval())
    return made


def value(model, path, *args, **given):
    """What a module returns, with gradients."""
    seen = []
    handle = model.get_submodule(path).register_forward_hook(lambda m, a, out: seen.append(out))
    model(*args, **given)
    handle.remove()
    return seen[0] if isinstance(seen[0], torch.Tensor) else seen[0][0]


def inside(model, mask, frames):
    return model._get_feature_vector_attention_mask(frames, mask, add_adapter=False)


def pooled(model, mask, frames):
    """SEW attends to a frame that is squeezed of two if it would to one of them."""
    whole = model._get_feature_vector_attention_mask(2 * frames + 1, mask)[:, : 2 * frames]
    return whole.reshape(len(mask), frames, 2).any(-1)


def of(path):
    """The mask that the part of a model at ``path`` tells."""

    def told(model, mask, frames):
        return model.get_submodule(path)._get_feature_vector_attention_mask(frames, mask)

    return told


CASES = {
    "adapter": (with_adapter, "adapter", of("")),
    "before the adapter": (with_adapter, "encoder.layers.0", inside),
    "squeezed": (sew, "encoder.layers.0", pooled),
    "own head": (Own, "heard.encoder.layers.0", of("heard")),
    "SpeechT5": (
        speecht5,
        "speecht5.encoder.wrapped_encoder.layers.0",
        of("speecht5.encoder.prenet"),
    ),
    "Speech2Text": (speech_to_text, "model.encoder.layers.0", of("")),
    "encoder-decoder": (encoder_decoder, "encoder.encoder.layers.0", of("encoder")),
}


@pytest.mark.parametrize("name", CASES)
def test_frames_of_padding_do_not_count(name):
    make, path, told = CASES[name]
    student, teacher = two(make)
    spectral = make is speech_to_text
    sound, mask = (SPECTRUM, FRAMES) if spectral else (SOUND, HEARD)
    call = {"input_features" if spectral else "input_values": sound, "attention_mask": mask}
    if make is Own:
        call = {"audio": sound, "attention_mask": mask}
    oracle, options = call, {**OPTIONS, "task": "masked_lm"}
    if make in (speecht5, speech_to_text, encoder_decoder):
        call = {**call, "labels": LABELS}
        oracle = {**oracle, "decoder_input_ids": torch.tensor([[1, 3, 4], [1, 6, 7]])}
        options = OPTIONS
    distiller = fxdistill.wrap(student, teacher, {path: path}, **options, compile=False)
    found = distiller(**call)
    s, t = (value(model, path, **oracle) for model in (student, teacher))
    weights = told(student, mask, s.shape[1]).float()
    assert 0 < weights.sum() < weights.numel()
    each = (s - t.detach()).square().mean(-1)
    same_step(student, found.loss, (each * weights).sum() / weights.sum())
    assert "tokens" in distiller.report(**call).pairs[0].weighed_by


class Halved(nn.Module):
    """Frames of 20 samples, and half as many behind an adapter; it tells both."""

    def __init__(self):
        super().__init__()
        self.frames, self.adapter = nn.Linear(20, 8), nn.Linear(16, 8)

    def _get_feat_extract_output_lengths(self, samples, add_adapter=True):
        return samples // 40 if add_adapter else samples // 20

    def _get_feature_vector_attention_mask(self, frames, mask, add_adapter=True):
        kept = self._get_feat_extract_output_lengths(mask.sum(-1), add_adapter)
        return torch.arange(frames) < kept.unsqueeze(1)

    def forward(self, input_values, attention_mask=None):
        frames = self.frames(input_values.unflatten(1, (-1, 20))).tanh()
        return self.adapter(frames.unflatten(1, (-1, 2)).flatten(2))


@pytest.mark.parametrize("compile", [False, AOT], ids=["eager", "graph"])
def test_both_lengths(compile):
    """Frames before and behind an adapter, each by its own mask; a loss_mask is of the latter."""
    torch.manual_seed(0)
    student, teacher = Halved(), Halved()
    paths = ("frames", "adapter")
    options = {**OPTIONS, "task": "masked_lm", "compile": compile}
    distiller = fxdistill.wrap(student, teacher, {p: p for p in paths}, **options)
    chosen = torch.tensor([[1.0, 0, 1, 1, 1]] * 2)
    call = {"input_values": SOUND, "attention_mask": HEARD}
    out = distiller(**call, loss_mask=chosen)
    total = 0
    for path, add in zip(paths, (False, True), strict=True):
        s, t = (value(model, path, **call) for model in (student, teacher))
        w = student._get_feature_vector_attention_mask(s.shape[1], HEARD, add).float()
        w = w * chosen if add else w
        each = (s - t.detach()).square().mean(-1)
        total = total + (each * w).sum() / w.sum() / 2
    same_step(student, out.loss, total)


def test_channels_as_many_as_inner_frames_are_not_weighed():
    student, teacher = two(with_adapter)
    sound, mask = SOUND[:, :90], HEARD[:, :90]  # 8 frames of 8 channels
    distiller = fxdistill.wrap(
        student,
        teacher,
        {"feature_extractor": "feature_extractor"},
        **OPTIONS,
        task="masked_lm",
        compile=False,
    )
    call = {"input_values": sound, "attention_mask": mask}
    s, t = (value(model, "feature_extractor", **call) for model in (student, teacher))
    assert s.shape == (2, 8, 8)
    same_step(student, distiller(**call).loss, (s - t.detach()).square().mean())


def test_a_teacher_that_makes_other_frames_is_pooled_by_its_own():
    torch.manual_seed(0)
    student, teacher = wav2vec2(1).eval(), wav2vec2(1, **ADAPTER).eval()
    match = Match("encoder.layers.0", "adapter", reduce=("b l d -> b d", "mean"))
    distiller = fxdistill.wrap(
        student, teacher, [match], **OPTIONS, task="masked_lm", compile=False
    )
    call = {"input_values": SOUND, "attention_mask": HEARD}

    def mean(model, path):
        x = value(model, path, **call)
        w = model._get_feature_vector_attention_mask(x.shape[1], HEARD).float().unsqueeze(-1)
        return (x * w).sum(1) / w.sum(1)

    s, t = mean(student, "encoder.layers.0"), mean(teacher, "adapter").detach()
    same_step(student, distiller(**call).loss, (s - t).square().mean())


def test_ctc_behind_an_adapter():
    def make(layers):
        sizes = {"feature_projection_input_dim": 16, "conv_depthwise_kernel_size": 3}
        config = tf.Wav2Vec2BertConfig(
            vocab_size=12, num_hidden_layers=layers, **sizes, **WIDTH, **ADAPTER
        )
        return tf.Wav2Vec2BertForCTC(config)

    student, teacher = two(make)
    call = {"input_features": SPECTRUM, "attention_mask": FRAMES}
    distiller = fxdistill.wrap(student, teacher, label_loss=None, compile=False)
    found = distiller(**call).loss
    s, t = (model(**call).logits.log_softmax(-1) for model in (student, teacher))
    each = (t.exp() * (t - s)).sum(-1)
    w = student._get_feature_vector_attention_mask(each.shape[1], FRAMES).float()
    assert each.shape[1] == 6
    torch.testing.assert_close(found, (each * w).sum() / w.sum())
