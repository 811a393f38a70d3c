"""Sound: the frames are the tokens, and what only is as many (channels) has none."""

import pytest
import torch
from torch import nn
from transformers import Wav2Vec2Config, Wav2Vec2ForCTC, WhisperConfig
from transformers import WhisperForConditionalGeneration as Whisper

import fxdistill
from fxdistill import Match, errors
from toys import AOT, same_step

OPTIONS = {"logit_loss": None, "label_loss": None, "task": "masked_lm"}
SAMPLES, FRAMES, CHANNELS = 90, 8, 8  # as many frames as channels
SOUND = torch.randn(2, SAMPLES, generator=torch.Generator().manual_seed(0))
HEARD = (torch.arange(SAMPLES) < torch.tensor([[SAMPLES], [50]])).long()


def wav2vec2(layers):
    torch.manual_seed(layers)
    small = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    convolutions = {"conv_dim": (8, 8), "conv_kernel": (10, 3), "conv_stride": (5, 2)}
    positions = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
    config = Wav2Vec2Config(
        vocab_size=12,
        num_hidden_layers=layers,
        feat_extract_norm="layer",
        **small,
        **convolutions,
        **positions,
    )
    return Wav2Vec2ForCTC(config).eval()


def values(model, path, *given):
    """The value that a module returns, with gradients."""
    seen = []
    handle = model.get_submodule(path).register_forward_hook(lambda m, a, out: seen.append(out))
    model(*given)
    handle.remove()
    return seen[0] if isinstance(seen[0], torch.Tensor) else seen[0][0]


FEATURES, LAYER = "wav2vec2.feature_extractor", "wav2vec2.encoder.layers.0"
TURNED = {"rearrange": "b c l -> b l c", "tokens": "input"}


@pytest.mark.parametrize(
    ("path", "options", "weighs"),
    [(FEATURES, {}, False), (LAYER, {}, True), (FEATURES, TURNED, True)],
    ids=["channels", "frames", "turned"],
)
def test_a_mask_of_samples_weighs_frames_and_no_channels(path, options, weighs):
    student, teacher = wav2vec2(1), wav2vec2(2)
    mapping = {path: Match(teacher=path, **options)}
    distiller = fxdistill.wrap(student, teacher, mapping, compile=False, **OPTIONS)
    found = distiller(input_values=SOUND, attention_mask=HEARD)
    s, t = (values(model, path, SOUND, HEARD) for model in (student, teacher))
    assert s.shape[:2] == (2, FRAMES)
    each = (s - t.detach()).square()
    if path == FEATURES:
        each = each.transpose(1, 2)
    mask = student._get_feature_vector_attention_mask(FRAMES, HEARD).float()
    assert mask.sum() < mask.numel()
    weights = mask if weighs else torch.ones_like(mask)
    same_step(student, found.loss, (each.mean(-1) * weights).sum() / weights.sum())


class Hears(nn.Module):
    """A spectrum ``[B, mel, 2·T]`` to frames ``[B, T, D]``, by way of channels ``[B, C, T]``."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv1d(4, 6, 3, stride=2, padding=1), nn.Linear(6, 9)
        self.channels, self.frames = nn.Identity(), nn.Identity()

    def forward(self, spectrum):
        value = self.channels(self.conv(spectrum).relu())
        return self.head(self.frames(value.transpose(1, 2)))


@pytest.mark.parametrize("compile", [False, AOT], ids=["eager", "graph"])
@pytest.mark.parametrize("length", [12, 14, 13])  # 6, 7 and 7 frames of 6 channels
def test_a_spectrum(length, compile):
    torch.manual_seed(0)
    student, teacher = Hears(), Hears()
    spectrum = torch.randn(2, 4, length)
    frames = -(-length // 2)
    mask = (torch.arange(frames) < torch.tensor([[frames], [3]])).float()
    for path in ("channels", "frames"):
        mapping = {path: path}
        distiller = fxdistill.wrap(student, teacher, mapping, compile=compile, **OPTIONS)
        found = distiller(spectrum, loss_mask=mask)
        s, t = (model.conv(spectrum).relu().transpose(1, 2) for model in (student, teacher))
        each = (s - t.detach()).square().mean(-1)
        w = mask if path == "frames" else torch.ones_like(mask)
        same_step(student, found.loss, (each * w).sum() / w.sum())


def test_sound_of_one_length_alone_leaves_the_decoder_to_be_asked():
    """Whisper refuses other lengths: its encoder's tokens are told by sizes, and a note says so."""
    sizes = {"num_mel_bins": 8, "max_source_positions": 12, "max_target_positions": 16}
    sizes |= {"d_model": 16, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "vocab_size": 30}
    sizes |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_layers": 1}
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    ends |= {"begin_suppress_tokens": None, "suppress_tokens": None, "use_cache": False}
    student, teacher = (Whisper(WhisperConfig(decoder_layers=n, **sizes, **ends)) for n in (1, 2))
    mapping = {
        "model.encoder.conv1": Match(teacher="model.encoder.conv1", rearrange="b c l -> b l c"),
        "model.decoder.layers.0": "model.decoder.layers.1",
    }
    mel, mask = torch.randn(2, 8, 24), torch.ones(2, 24)
    mask[1, 10:] = 0
    labels = torch.tensor([[3, 4, 5, 6], [7, 8, -100, -100]])
    options = {"logit_loss": None, "label_loss": None, "compile": False}
    distiller = fxdistill.wrap(student, teacher, mapping, **options)
    out = distiller(input_features=mel, attention_mask=mask, labels=labels)
    s, t = (model.model.encoder.conv1(mel).transpose(1, 2) for model in (student, teacher))
    wanted = ((s - t).square().mean(-1) * mask).sum() / mask.sum()
    torch.testing.assert_close(out.losses["model.encoder.conv1"], wanted.detach())
    ids = torch.tensor([[1, 3, 4, 5], [1, 7, 8, 0]])
    s = values(student, "model.decoder.layers.0", mel, mask, ids)
    t = values(teacher, "model.decoder.layers.1", mel, mask, ids)
    kept = (labels != -100).float()
    wanted = ((s - t).square().mean(-1) * kept).sum() / kept.sum()
    torch.testing.assert_close(out.losses["model.decoder.layers.0"], wanted.detach())
    given = {"input_features": mel, "attention_mask": mask, "labels": labels}
    (note,) = (n for n in distiller.report(**given).notes if "whose tokens" in n)
    assert "model.encoder.conv1 is taken from their sizes" in note


# ------------------------------------------------------------------ said


def test_a_convolution_is_known_to_have_its_tokens_last():
    torch.manual_seed(0)
    match = {"conv": Match(teacher="conv", tokens="input")}
    with pytest.raises(errors.OptionError, match="rearrange='b c l -> b l c' brings them"):
        fxdistill.wrap(Hears(), Hears(), match, compile=False, **OPTIONS)


@pytest.mark.parametrize(
    ("layout", "weighed"),
    [
        ({"rearrange": "b c l -> b l c"}, True),
        ({"rearrange": "b c l -> (b l) c"}, True),
        ({"rearrange": "b c l -> b l c 1"}, True),
        ({"reduce": ("b c l -> b c", "mean")}, False),
    ],
    ids=lambda x: str(next(iter(x.values()))) if isinstance(x, dict) else "",
)
def test_what_is_said_holds_behind_a_layout(layout, weighed):
    """It is honoured, and the summary says so; or it is an error that says what to do."""
    torch.manual_seed(0)
    student, teacher = Hears(), Hears()
    spectrum, mask = torch.randn(2, 4, 14), torch.ones(2, 7)
    mask[1, 3:] = 0
    match = {"channels": Match(teacher="channels", tokens="input", **layout)}
    distiller = fxdistill.wrap(student, teacher, match, compile=False, **OPTIONS)
    if not weighed:
        with pytest.raises(errors.BatchError, match="a port of your own does"):
            distiller(spectrum, loss_mask=mask)
        return
    s, t = (model.conv(spectrum).relu().transpose(1, 2) for model in (student, teacher))
    each = (s - t.detach()).square().mean(-1)
    found = distiller(spectrum, loss_mask=mask).loss
    same_step(student, found, (each * mask).sum() / mask.sum())
    assert " tokens " in str(distiller.summary())
