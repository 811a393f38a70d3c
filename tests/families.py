"""Tiny students and teachers of many Hugging Face families, from configurations alone (no hub)."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

VOCAB, WIDTH, HEADS, CLASSES = 96, 32, 4, 5
BATCH, LENGTH, TARGETS = 3, 11, 7
SPECIAL: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LM: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": WIDTH, "use_cache": False, **SPECIAL}
ENCODER = {"num_attention_heads": HEADS, "intermediate_size": 48, "max_position_embeddings": 64}
ATTENTION: dict[str, Any] = {**ENCODER, "num_key_value_heads": 2}
MAMBA2 = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 8}
# The loop over experts depends on data, and grouped_mm wants bf16: only this compiles on a CPU.
EXPERTS = {"num_experts_per_tok": 2, "experts_implementation": "batched_mm"}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@dataclasses.dataclass(frozen=True)
class Family:
    student: nn.Module
    teacher: nn.Module
    mapping: dict[str, str]
    batch: dict[str, Tensor]
    labels: Tensor
    task: str
    wrap_task: str = "auto"  # what `wrap` is told
    encoder_paths: tuple[str, ...] = ()


def spread(model: nn.Module) -> nn.Module:
    """Weights at which logits differ by about one: initial ones leave a divergence in rounding."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2 and "A_log" not in name:
                fan_in = (
                    1 if name == "shared.weight" else parameter[0].numel()
                )  # T5 scales its head
                parameter.normal_(0, fan_in**-0.5)
            elif name.endswith("bias") and "dt" not in name:
                parameter.normal_(0, 0.1)
    return model


# A step compiles in a time that grows with the layers: these are the fewest with a layer behind one
# that is matched, and one of the teacher that is not.
LAYERS, CHOSEN = (2, 3), {0: 1, 1: 2}


def towers(build: Any, layers: tuple[int, int] = LAYERS) -> tuple[Any, Any]:
    torch.manual_seed(0)
    student, teacher = (spread(build(n)) for n in layers)
    return student.train(), teacher.eval()


def layer_map(
    prefix: str, parts: tuple[str, ...], chosen: dict[int, int] = CHOSEN
) -> dict[str, str]:
    return {f"{prefix}.{s}.{p}": f"{prefix}.{t}.{p}" for s, t in chosen.items() for p in parts}


def text(padding: str | None, length: int = LENGTH) -> tuple[dict[str, Tensor], Tensor]:
    """Ids, an attention mask and causal labels: a full row, a padded one, one partly ignored."""
    torch.manual_seed(1)
    ids = torch.randint(3, VOCAB, (BATCH, length))
    mask = torch.ones_like(ids)
    if padding == "left":
        mask[1, :4] = 0
    elif padding == "right":
        mask[1, -4:] = 0
    ids = ids.masked_fill(mask == 0, 0)
    labels = ids.masked_fill(mask == 0, -100)
    labels[2, :5] = -100  # a prompt
    batch = {"input_ids": ids} if padding is None else {"input_ids": ids, "attention_mask": mask}
    return batch, labels


def decoder(
    config: Any,
    prefix: str = "model.layers",
    parts: tuple[str, ...] = ("self_attn", "mlp"),
    padding: str | None = "left",
    mapping: dict[str, str] | None = None,
    layers: tuple[int, int] = LAYERS,
    per_layer: Callable[[int], dict[str, Any]] = lambda n: {},
    **options: Any,
) -> Family:
    def build(n: int) -> nn.Module:
        sizes = {**LM, "num_hidden_layers": n, **options, **per_layer(n)}
        return hf.AutoModelForCausalLM.from_config(config(**sizes))

    student, teacher = towers(build, layers)
    chosen = dict(list(CHOSEN.items())[: layers[0]])
    mapping = mapping or layer_map(prefix, parts, chosen)
    return Family(student, teacher, mapping, *text(padding), "causal_lm")


# ---- decoders


def llama() -> Family:
    return decoder(hf.LlamaConfig, **ATTENTION)


def shallow_llama() -> Family:
    """For steps whose captures are slow: on a mesh, a layer takes some 2 s."""
    return decoder(hf.LlamaConfig, layers=(1, 2), **ATTENTION)


def qwen3() -> Family:
    return decoder(hf.Qwen3Config, padding="right", head_dim=8, **ATTENTION)


def gemma2() -> Family:
    options = {**ATTENTION, "head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8}
    return decoder(hf.Gemma2Config, **options)


def cohere() -> Family:
    return decoder(hf.CohereConfig, logit_scale=0.25, **ATTENTION)


def gpt2() -> Family:
    sizes = {"num_attention_heads": HEADS, "n_positions": 64}
    no_dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    return decoder(hf.GPT2Config, "transformer.h", ("attn", "mlp"), "right", **sizes, **no_dropout)


def gpt_neox() -> Family:
    return decoder(hf.GPTNeoXConfig, "gpt_neox.layers", ("attention", "mlp"), None, **ENCODER)


def mixtral() -> Family:
    return decoder(hf.MixtralConfig, num_local_experts=4, **EXPERTS, **ATTENTION)


# ---- state spaces and hybrids


def mamba() -> Family:
    options = {"state_size": 4, "use_associative_scan": False}
    return decoder(hf.MambaConfig, "backbone.layers", ("mixer",), **options)


def mamba2() -> Family:
    options = {"num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 1, "chunk_size": 8}
    return decoder(hf.Mamba2Config, "backbone.layers", ("mixer",), "right", **options)


def hybrid(config: Any, recurrent: str, mlp: str, **options: Any) -> Family:
    """The last layer is attention, the others are recurrent."""
    mapping = layer_map("model.layers", (mlp,))
    mapping |= layer_map("model.layers", (recurrent,), {0: 1})
    mapping |= layer_map("model.layers", ("self_attn",), {1: 2})
    return decoder(config, mapping=mapping, **options, **ATTENTION)


def bamba() -> Family:
    return hybrid(
        hf.BambaConfig,
        "mamba",
        "feed_forward",
        per_layer=lambda n: {"attn_layer_indices": [n - 1]},
        **MAMBA2,
    )


def falcon_h1() -> Family:
    parts = ("mamba", "self_attn", "feed_forward")
    return decoder(hf.FalconH1Config, parts=parts, mamba_d_ssm=64, **MAMBA2, **ATTENTION)


def qwen3_next() -> Family:
    heads = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "head_dim": 8}
    widths = dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 8)
    experts = dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 16)
    return hybrid(
        hf.Qwen3NextConfig,
        "linear_attn",
        "mlp",
        per_layer=lambda n: {"layer_types": ["linear_attention"] * (n - 1) + ["full_attention"]},
        num_experts=4,
        **{**heads, **widths, **experts, **EXPERTS},
    )


# ---- encoders


def bert_mlm() -> Family:
    def build(n: int) -> nn.Module:
        return hf.BertForMaskedLM(hf.BertConfig(num_hidden_layers=n, **LM, **ENCODER, **NO_DROPOUT))

    batch, labels = text("right")
    chosen = torch.arange(LENGTH) % 3 == 1  # only masked positions carry a label
    labels = labels.masked_fill(~chosen, -100)
    batch["input_ids"] = batch["input_ids"].masked_fill(labels != -100, 3)
    mapping = layer_map("bert.encoder.layer", ("attention", "output"))
    return Family(*towers(build), mapping, batch, labels, "masked_lm")


def distilbert_classifier() -> Family:
    options = {"vocab_size": VOCAB, "dim": WIDTH, "n_heads": HEADS, "hidden_dim": 48}
    options |= dict.fromkeys(("dropout", "attention_dropout", "seq_classif_dropout"), 0.0)
    options |= {"max_position_embeddings": 64, "num_labels": CLASSES}

    def build(n: int) -> nn.Module:
        return hf.DistilBertForSequenceClassification(hf.DistilBertConfig(n_layers=n, **options))

    mapping = layer_map("distilbert.transformer.layer", ("attention", "ffn"))
    batch, labels = text("right")[0], torch.tensor([3, -100, 0])
    return Family(*towers(build), mapping, batch, labels, "classification")


# ---- encoder-decoders


def targets() -> Tensor:
    labels = text(None, TARGETS)[1]
    labels[1, 5:] = -100
    return labels


def sequence_to_sequence(
    build: Callable[[int], nn.Module], mapping: dict[str, str], batch: dict[str, Tensor]
) -> Family:
    taps = tuple(path for path in mapping if "encoder." in path)
    return Family(*towers(build), mapping, batch, targets(), "seq2seq", encoder_paths=taps)


def t5() -> Family:
    options = {"d_model": WIDTH, "d_kv": 8, "d_ff": 48, "num_heads": HEADS, "dropout_rate": 0.0}
    options |= {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    options |= {"vocab_size": VOCAB, "use_cache": False}

    def build(n: int) -> nn.Module:
        return hf.T5ForConditionalGeneration(hf.T5Config(num_layers=n, **options))

    mapping = layer_map("encoder.block", ("layer.0", "layer.1"))
    mapping |= layer_map("decoder.block", ("layer.0", "layer.1", "layer.2"))
    return sequence_to_sequence(build, mapping, text("right")[0])


def bart_options(n: int) -> dict[str, Any]:
    options: dict[str, Any] = {"d_model": WIDTH, "vocab_size": VOCAB, "decoder_start_token_id": 2}
    options |= dict.fromkeys(("dropout", "attention_dropout", "activation_dropout"), 0.0)
    for side in ("encoder", "decoder"):
        sizes = {"layers": n, "ffn_dim": 48, "attention_heads": HEADS}
        options |= {f"{side}_{name}": size for name, size in sizes.items()}
    return {**options, **SPECIAL, "use_cache": False}


def bart() -> Family:
    def build(n: int) -> nn.Module:
        config = hf.BartConfig(max_position_embeddings=64, **bart_options(n))
        return hf.BartForConditionalGeneration(config)

    mapping = layer_map("model.encoder.layers", ("self_attn", "fc2"))
    mapping |= layer_map("model.decoder.layers", ("self_attn", "encoder_attn", "fc2"))
    return sequence_to_sequence(build, mapping, text("right")[0])


def whisper() -> Family:
    sizes = {"num_mel_bins": 8, "max_source_positions": 12, "max_target_positions": 16}

    def build(n: int) -> nn.Module:
        return hf.WhisperForConditionalGeneration(hf.WhisperConfig(**sizes, **bart_options(n)))

    torch.manual_seed(1)
    batch = {"input_features": torch.randn(BATCH, 8, 24)}
    mapping = layer_map("model.encoder.layers", ("self_attn", "fc2"))
    mapping |= layer_map("model.decoder.layers", ("encoder_attn", "fc2"))
    return sequence_to_sequence(build, mapping, batch)


# ---- vision


def speech(layers: int) -> nn.Module:
    """A speech model with a head for CTC; what it hears and says is `sound()`."""
    torch.manual_seed(layers)
    small = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    convolutions = {"conv_dim": (8, 8), "conv_kernel": (10, 3), "conv_stride": (5, 2)}
    parts = ("hidden", "activation", "attention", "feat_proj", "final")
    quiet = {f"{part}_dropout": 0.0 for part in parts} | {"layerdrop": 0.0, "mask_time_prob": 0.0}
    positions = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
    sizes: dict[str, Any] = {**small, **convolutions, **quiet, **positions}
    model = hf.Wav2Vec2ForCTC(
        hf.Wav2Vec2Config(
            vocab_size=12, num_hidden_layers=layers, feat_extract_norm="layer", **sizes
        )
    )
    model.freeze_feature_encoder()  # as in fine-tuning; unfrozen, it cannot be one graph
    return model


def sound() -> dict[str, Tensor]:
    """Two samples, the second of them padded, and their labels `[2, 4]`."""
    return {
        "input_values": torch.randn(2, 400, generator=torch.Generator().manual_seed(0)),
        "attention_mask": (torch.arange(400) < torch.tensor([[400], [260]])).long(),
        "labels": torch.tensor([[1, 2, 3, 4], [5, 6, -100, -100]]),
    }


def image_classifier(student: Any, teacher: Any, mapping: dict[str, str]) -> Family:
    torch.manual_seed(1)
    batch = {"pixel_values": torch.randn(BATCH, 3, 16, 16)}
    labels = torch.tensor([3, -100, 0])
    return Family(student, teacher, mapping, batch, labels, "classification")


def vit() -> Family:
    options = {"hidden_size": WIDTH, "num_attention_heads": HEADS, "intermediate_size": 48}
    options |= {"image_size": 16, "patch_size": 4, "num_labels": CLASSES, **NO_DROPOUT}

    def build(n: int) -> nn.Module:
        return hf.ViTForImageClassification(hf.ViTConfig(num_hidden_layers=n, **options))

    mapping = layer_map("vit.layers", ("attention", "mlp"))
    return image_classifier(*towers(build), mapping)


def resnet() -> Family:
    # In training mode: BatchNorm normalises by the batch and writes its statistics.
    options = {"embedding_size": 8, "hidden_sizes": [8, 16], "layer_type": "basic"}

    def build(n: int) -> nn.Module:
        config = hf.ResNetConfig(depths=[n, n], num_labels=CLASSES, **options)
        return hf.ResNetForImageClassification(config)

    mapping = {f"resnet.encoder.stages.{i}": f"resnet.encoder.stages.{i}" for i in range(2)}
    return image_classifier(*towers(build, (1, 2)), mapping)


def convnext() -> Family:
    options = {"num_stages": 2, "patch_size": 2, "hidden_sizes": [8, 16]}
    options |= {"layer_scale_init_value": 0.5, "num_labels": CLASSES}

    def build(n: int) -> nn.Module:
        return hf.ConvNextForImageClassification(hf.ConvNextConfig(depths=[n, n], **options))

    mapping = {f"convnext.encoder.stages.{i}": f"convnext.encoder.stages.{i}" for i in range(2)}
    return image_classifier(*towers(build, (1, 2)), mapping)


DECODERS = (llama, qwen3, gemma2, cohere, gpt2, gpt_neox, mixtral)
RECURRENT = (mamba, mamba2, bamba, falcon_h1, qwen3_next)
ENCODERS = (bert_mlm, distilbert_classifier)
ENCODER_DECODERS = (t5, bart, whisper)
VISION = (vit, resnet, convnext)
FAMILIES: dict[str, Callable[[], Family]] = {
    f.__name__: f for f in (*DECODERS, *RECURRENT, *ENCODERS, *ENCODER_DECODERS, *VISION)
}
