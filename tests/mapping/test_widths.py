"""Widths of projections that structure does not tell: from examples, or from inputs made for it."""

from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import fxdistill
from architectures import ARCHITECTURES
from fxdistill import Match, errors

# transformers asks for versions in forward(), through a cache that dynamo warns about.
pytestmark = pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")


@pytest.fixture
def llamas() -> tuple[nn.Module, nn.Module]:
    build = ARCHITECTURES["LlamaForCausalLM"].build
    return build(2, 16), build(4, 32)


def batch() -> dict[str, Tensor]:
    ids = torch.arange(18).reshape(2, 9)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def test_unknown_widths_ask_for_examples_and_take_them(llamas: Any) -> None:
    """Where neither the structure nor the model itself tells what it is called with."""

    class Says(nn.Module):  # takes anything, so that nothing tells what
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner, self.lm_head = inner.model, inner.lm_head

        def forward(self, **inputs: Any) -> Tensor:
            return self.lm_head(self.inner(**inputs).last_hidden_state)

    student, teacher = map(Says, llamas)
    mapping = {
        "inner.rotary_emb": Match(teacher="inner.rotary_emb", project="auto"),
        "inner.layers.0.input_layernorm": Match(
            teacher="inner.layers.1.input_layernorm", student_port="input", project="auto"
        ),
    }
    asked = r"2 things are wrong(.|\n)*rotary_emb(.|\n)*input_layernorm(.|\n)*example_inputs"
    with pytest.raises(errors.ProjectionError, match=asked):
        fxdistill.wrap(student, teacher, mapping, task="causal_lm")
    with pytest.warns(errors.MatchWarning, match=r"'inner\.rotary_emb' depends on no trainable"):
        distiller = fxdistill.wrap(
            student, teacher, mapping, task="causal_lm", example_inputs=batch()
        )
    widths = [tuple(p.weight.shape) for p in distiller.projections]
    assert widths == [(8, 4), (32, 16)]


def test_unknown_widths_are_read_from_a_run_on_inputs_of_the_models_own(llamas: Any) -> None:
    student, teacher = llamas
    mapping = {
        "model.layers.0.input_layernorm": Match(
            teacher="model.layers.1.input_layernorm", student_port="input", project="auto"
        ),
    }
    distiller = fxdistill.wrap(student, teacher, mapping)
    assert [tuple(p.weight.shape) for p in distiller.projections] == [(32, 16)]


class OwnDummies(nn.Module):
    """Plain modules without blocks, which say by ``dummy_inputs`` what they take."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dummy_inputs = {"left": torch.ones(2, 3), "right": torch.ones(2, 3)}
        self.both, self.kept = nn.Linear(3, width), Doubles()
        self.head = nn.Linear(2 * width, 4)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.head(self.kept(self.both(left) + self.both(right)))


class Doubles(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, -x], dim=-1)


def test_a_models_own_dummy_inputs_tell_widths() -> None:
    match = {"kept": Match(teacher="kept", project="linear")}
    student, teacher = OwnDummies(4), OwnDummies(6)
    distiller = fxdistill.wrap(student, teacher, match, task="classification", logit_loss=None)
    assert [tuple(p.weight.shape) for p in distiller.projections] == [(12, 8)]


@pytest.mark.parametrize(
    ("name", "path", "widths"),
    [
        ("BertModel", "encoder.layer.{}", (16, 32)),
        ("ViTModel", "layernorm", (16, 32)),
        ("T5ForConditionalGeneration", "decoder.block.{}", (16, 32)),
        ("WhisperForConditionalGeneration", "model.encoder.layers.{}.self_attn", (16, 32)),
        ("ResNetModel", "encoder.stages.0", (16, 32)),
        ("Wav2Vec2Model", "feature_projection", (16, 32)),
    ],
)
def test_widths_of_whole_blocks(name: str, path: str, widths: tuple[int, int]) -> None:
    """Plain blocks, of models that read text, images and sound."""
    models = [width_model(name, width) for width in widths]
    match = {path.format(0): Match(teacher=path.format(1), project="linear")}
    distiller = fxdistill.wrap(*models, match, logit_loss=None)
    (projection,) = distiller.projections
    assert tuple(projection.weight.shape[:2]) == widths[::-1]


def width_model(name: str, width: int) -> nn.Module:
    config = getattr(hf, name).config_class
    options = {"num_attention_heads": 2, "num_hidden_layers": 2, "vocab_size": 30}
    special = {
        "T5ForConditionalGeneration": {"d_model": width, "d_kv": 8, "d_ff": 32, "num_heads": 2},
        "WhisperForConditionalGeneration": {
            "d_model": width,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "pad_token_id": 0,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "max_source_positions": 10,
            "num_mel_bins": 8,
            "encoder_ffn_dim": 32,
            "decoder_ffn_dim": 32,
            "vocab_size": 30,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 3,
        },
        "ResNetModel": {"hidden_sizes": [width], "depths": [1], "embedding_size": 8},
        "ViTModel": {"image_size": 8, "patch_size": 4, **options},
        "Wav2Vec2Model": {
            "conv_dim": (8, 8),
            "conv_kernel": (10, 3),
            "conv_stride": (5, 2),
            **options,
        },
    }
    sizes = {"hidden_size": width, "intermediate_size": 32}
    given = special.get(name, options)
    return getattr(hf, name)(config(**(given if "d_model" in given else sizes | given)))
