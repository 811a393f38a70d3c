"""Models that attend, by family: what to give them, and which map is compared."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn

import fxdistill
from families import spread
from fxdistill import Match
from mesh_steps import AOT

VOCAB, BATCH, LENGTH = 60, 2, 9
IDS = torch.randint(3, VOCAB, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
LEFT = torch.ones(BATCH, LENGTH, dtype=torch.long)
LEFT[0, :3] = 0
RIGHT = LEFT.flip(1)
TARGETS = IDS[:, :5].clone()
TARGETS[1, 3:] = -100
NONE = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def decoder(config: Any, model: Any, layers: int, heads: int, attention: str, **more: Any) -> Any:
    sizes = {"hidden_size": 8 * heads, "num_attention_heads": heads, "num_key_value_heads": 2}
    sizes |= {"intermediate_size": 16, "num_hidden_layers": layers, "use_cache": False}
    return model(config(vocab_size=VOCAB, **sizes, **more, attn_implementation=attention))


def bert(layers: int, heads: int, attention: str) -> Any:
    sizes = {"hidden_size": 8 * heads, "num_attention_heads": heads, "intermediate_size": 16}
    sizes |= {"num_hidden_layers": layers, "vocab_size": VOCAB, **NONE}
    return hf.BertForMaskedLM(hf.BertConfig(**sizes, attn_implementation=attention))


def distilbert(layers: int, heads: int, attention: str) -> Any:
    sizes = {"dim": 8 * heads, "n_heads": heads, "hidden_dim": 16, "n_layers": layers}
    config = hf.DistilBertConfig(
        vocab_size=VOCAB,
        dropout=0.0,
        attention_dropout=0.0,
        **sizes,
        attn_implementation=attention,
    )
    return hf.DistilBertForMaskedLM(config)


def t5(layers: int, heads: int, attention: str) -> Any:
    sizes = {"d_model": 16, "d_kv": 8, "num_heads": heads, "d_ff": 16, "num_layers": layers}
    sizes |= {"vocab_size": VOCAB, "dropout_rate": 0.0, "use_cache": False}
    config = hf.T5Config(**sizes, decoder_start_token_id=0, attn_implementation=attention)
    return hf.T5ForConditionalGeneration(config)


def vit(layers: int, heads: int, attention: str) -> Any:
    sizes = {"hidden_size": 8 * heads, "num_attention_heads": heads, "intermediate_size": 16}
    sizes |= {"num_hidden_layers": layers, "image_size": 12, "patch_size": 4, **NONE}
    return hf.ViTForImageClassification(
        hf.ViTConfig(**sizes, num_labels=4, attn_implementation=attention)
    )


def whisper(layers: int, heads: int, attention: str) -> Any:
    sides: dict[str, int] = {"d_model": 8 * heads}
    for side in ("encoder", "decoder"):
        sides |= {f"{side}_layers": layers, f"{side}_attention_heads": heads}
        sides[f"{side}_ffn_dim"] = 16
    special = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 0)
    config = hf.WhisperConfig(
        vocab_size=VOCAB,
        num_mel_bins=4,
        max_source_positions=7,
        max_target_positions=16,
        decoder_start_token_id=1,
        use_cache=False,
        attn_implementation=attention,
        **sides,
        **special,
    )
    return hf.WhisperForConditionalGeneration(config)


@dataclasses.dataclass(frozen=True)
class Case:
    """``build(layers, heads, attention)``, the module, and where its map is among the outputs."""

    build: Callable[[int, int, str], Any]
    path: str
    batch: dict[str, Tensor]
    weights: Tensor | None
    field: str = "attentions"
    heads: tuple[int, int] = (4, 8)
    explicit: bool = False


TEXT = {"input_ids": IDS, "attention_mask": LEFT}
ENCODED = {"input_ids": IDS, "attention_mask": RIGHT, "labels": TARGETS}
SOUND = {"input_features": torch.randn(BATCH, 4, 14), "labels": TARGETS}
OF_LABELS = (TARGETS != -100).float()
# Sequences behind each other in a row: their places begin anew, or a mask of blocks parts them.
PIECES = [(0, slice(0, 4)), (0, slice(4, 9)), (1, slice(0, 6)), (1, slice(6, 9))]
PLACES = torch.zeros(BATCH, LENGTH, dtype=torch.long)
BLOCKS = torch.full((BATCH, 1, LENGTH, LENGTH), torch.finfo(torch.float32).min)
for _row, _at in PIECES:
    PLACES[_row, _at] = torch.arange(_at.stop - _at.start)
    BLOCKS[_row, 0, _at, _at] = BLOCKS[_row, 0, _at, _at].triu(1)
PACKED = {"input_ids": IDS, "position_ids": PLACES}
CASES = {
    "llama": Case(
        partial(decoder, hf.LlamaConfig, hf.LlamaForCausalLM),
        "model.layers.{}.self_attn",
        TEXT,
        LEFT.float(),
    ),
    "llama without a mask": Case(
        partial(decoder, hf.LlamaConfig, hf.LlamaForCausalLM),
        "model.layers.{}.self_attn",
        {"input_ids": IDS},
        None,
        heads=(4, 4),
    ),
    "llama of packed sequences": Case(
        partial(decoder, hf.LlamaConfig, hf.LlamaForCausalLM),
        "model.layers.{}.self_attn",
        PACKED,
        None,
    ),
    "llama of packed sequences by a mask": Case(
        partial(decoder, hf.LlamaConfig, hf.LlamaForCausalLM),
        "model.layers.{}.self_attn",
        {**PACKED, "attention_mask": BLOCKS},
        None,
        heads=(4, 4),
    ),
    "mistral": Case(
        partial(decoder, hf.MistralConfig, hf.MistralForCausalLM, sliding_window=4),
        "model.layers.{}.self_attn",
        TEXT,
        LEFT.float(),
    ),
    "gemma2": Case(
        partial(decoder, hf.Gemma2Config, hf.Gemma2ForCausalLM, head_dim=8),
        "model.layers.{}.self_attn",
        TEXT,
        LEFT.float(),
        explicit=True,
    ),
    "t5 that makes its map": Case(
        t5,
        "decoder.block.{}.layer.0.SelfAttention",
        ENCODED,
        OF_LABELS,
        "decoder_attentions",
        explicit=True,
    ),
    "bert": Case(
        bert,
        "bert.encoder.layer.{}.attention.self",
        {"input_ids": IDS, "attention_mask": RIGHT},
        RIGHT.float(),
        heads=(2, 2),
    ),
    "distilbert": Case(
        distilbert,
        "distilbert.transformer.layer.{}.attention",
        {"input_ids": IDS, "attention_mask": RIGHT},
        RIGHT.float(),
        heads=(2, 4),
    ),
    "t5 encoder": Case(
        t5,
        "encoder.block.{}.layer.0.SelfAttention",
        ENCODED,
        RIGHT.float(),
        "encoder_attentions",
    ),
    "t5 decoder": Case(
        t5,
        "decoder.block.{}.layer.0.SelfAttention",
        ENCODED,
        OF_LABELS,
        "decoder_attentions",
        heads=(2, 2),
    ),
    "t5 cross": Case(
        t5,
        "decoder.block.{}.layer.1.EncDecAttention",
        ENCODED,
        OF_LABELS,
        "cross_attentions",
    ),
    "vit": Case(
        vit,
        "vit.layers.{}.attention",
        {"pixel_values": torch.randn(BATCH, 3, 12, 12)},
        None,
        heads=(2, 4),
    ),
    "whisper cross": Case(
        whisper,
        "model.decoder.layers.{}.encoder_attn",
        SOUND,
        OF_LABELS,
        "cross_attentions",
        heads=(2, 2),
    ),
}
LAYERS = {"student": (1, 0), "teacher": (2, 1)}  # how many, and which is compared


def made(case: Case, side: str, attention: str) -> Any:
    """One model; of the same weights, however it attends."""
    torch.manual_seed(len(side))
    heads = case.heads[side == "teacher"]
    return spread(case.build(LAYERS[side][0], heads, attention)).eval()


def map_of(case: Case, side: str, model: Any) -> Tensor:
    """The map that a model returns which forms it."""
    output = model(**case.batch, output_attentions=True, return_dict=True)
    return getattr(output, case.field)[LAYERS[side][1]]


def divergence(s: Tensor, t: Tensor, w: Tensor | None) -> Tensor:
    """KL(a_T ‖ a_S), by a formula of this file."""
    if s.shape[1] != t.shape[1]:
        s, t = s.mean(1, keepdim=True), t.mean(1, keepdim=True)
    each = F.kl_div((s + 1e-30).log(), t, reduction="none").sum(-1).mean(1)
    w = torch.ones_like(each) if w is None else w
    return (each * w).sum() / w.sum()


def attention_match(case: Case, loss: Any = "attention_kl", port: str = "attention") -> Match:
    paths = (case.path.format(LAYERS[side][1]) for side in ("student", "teacher"))
    return Match(*paths, loss=loss, student_port=port, teacher_port=port)


def distilled(case: Case, student: Any, teacher: Any, loss: Any, compile: Any, **more: Any) -> Any:
    return fxdistill.wrap(
        student,
        teacher,
        [attention_match(case, loss)],
        logit_loss=None,
        label_loss=None,
        compile=compile,
        **more,
    )


def gradients(student: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad for n, p in student.named_parameters() if p.grad is not None}


def close(found: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    """Equal but for rounding, measured against the largest of all gradients."""
    largest = max(float(g.norm()) for g in want.values())
    assert largest > 0
    for name, gradient in want.items():
        gap = (found[name] - gradient).norm() if name in found else gradient.norm()
        assert gap <= 2e-5 * gradient.norm() + 1e-5 * largest, (name, gap, gradient.norm())


LLAMA = CASES["llama"]


def llamas(**options: Any) -> tuple[Any, Any]:
    return made(LLAMA, "student", "sdpa"), made(LLAMA, "teacher", "sdpa")


MODES = pytest.mark.parametrize("compile", [False, AOT, "regional"], ids=["eager", "one", "terms"])
