"""Where models of many kinds keep their mixers, MLPs and other roles: an oracle for `match`.

The paths come from reading each block's forward, by one rule: a mixer or an MLP is the outermost
module whose output is what that branch computes, before the residual addition and before any norm
the block applies to it. Everything is built from configurations alone (no hub).
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformers as hf
from einops import rearrange
from einops.layers.torch import Rearrange, Reduce
from torch import Tensor, nn
from torch.nn import functional

VOCAB, WIDTH, HEADS, CLASSES, POSITIONS = 96, 32, 4, 5, 64
IMAGE, PATCH = 32, 8
Build = Callable[..., nn.Module]  # (layers, width=WIDTH); of stages, each has so many layers


@dataclasses.dataclass(frozen=True)
class StackExpectation:  # consecutive blocks of one width; paths are full, mixers in order
    blocks: list[str]
    mixers: list[list[str]]
    mlps: list[list[str]]
    norm: str | None = None  # applied to what leaves the last block


@dataclasses.dataclass(frozen=True)
class Architecture:
    name: str
    build: Build
    inputs: list[str]
    embedding: str | None
    logits: str | None
    rows: list[list[str]]  # of the table below

    def expected(self, layers: int) -> list[StackExpectation]:
        found = []
        for prefixes, mixers, mlp, norm in self.rows:
            for prefix in prefixes.split():
                blocks = [f"{prefix}.{i}" for i in range(layers)]
                kinds = [[p for p in kind.split() if p != "-"] for kind in mixers.split("/")]
                inside = [[f"{b}.{p}" for p in kinds[i % len(kinds)]] for i, b in enumerate(blocks)]
                mlps = [[] if mlp == "-" else [f"{b}.{mlp}"] for b in blocks]
                follows = norm != "-" and prefix == prefixes.split()[-1]
                found.append(StackExpectation(blocks, inside, mlps, norm if follows else None))
        return found

    def batch(self, length: int) -> dict[str, Tensor]:  # images and sounds keep their own size
        ids = 3 + 7 * torch.arange(2 * length + 4).view(2, -1) % (VOCAB - 3)
        made = {"input_ids": ids[:, 2:], "decoder_input_ids": ids}  # two lengths, to be told apart
        made["input_features"] = torch.arange(2 * 8 * 24.0).sin().view(2, 8, 24)
        made["pixel_values"] = torch.arange(6.0 * IMAGE**2).sin().view(2, 3, IMAGE, IMAGE)
        return {name: made[name] for name in self.inputs}


# ---- plain torch


def attend(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Tensor:
    """Written out: nothing here is named after attention."""
    query, key, value = (rearrange(x, "b t (h d) -> b h t d", h=HEADS) for x in (query, key, value))
    scores = query @ key.mT * query.shape[-1] ** -0.5
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores[0, 0]).triu(1) > 0, -torch.inf)
    return rearrange(scores.softmax(-1) @ value, "b h t d -> b t (h d)")


class Zig(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.w1, self.w2, self.w3, self.w4 = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x):
        return self.w4(attend(self.w1(x), self.w2(x), self.w3(x), causal=True))


class Zag(nn.Sequential):
    def __init__(self, width: int):
        super().__init__(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))


class Zug(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.a, self.b = nn.LayerNorm(width), Zig(width)
        self.c, self.d = nn.LayerNorm(width), Zag(width)

    def forward(self, x):
        x = x + self.b(self.a(x))
        return x + self.d(self.c(x))


class LooseBlock(nn.Module):  # two heads of queries share one of keys and values
    def __init__(self, width: int):
        super().__init__()
        self.norm_1, self.norm_2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.wq, self.wo = nn.Linear(width, width), nn.Linear(width, width)
        self.wk, self.wv = nn.Linear(width, width // 2), nn.Linear(width, width // 2)
        self.w_in, self.w_out = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        y = self.norm_1(x)
        grouped = (w(y).unflatten(-1, (HEADS // 2, -1)) for w in (self.wk, self.wv))
        key, value = (z.repeat_interleave(2, dim=2).flatten(2) for z in grouped)
        x = x + self.wo(attend(self.wq(y), key, value, causal=True))
        return x + self.w_out(functional.silu(self.w_in(self.norm_2(x))))


class SelectiveScan(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.in_proj, self.out_proj = nn.Linear(width, 4 * width), nn.Linear(2 * width, width)
        self.conv1d = nn.Conv1d(2 * width, 2 * width, 3, padding=2, groups=2 * width)
        self.dt_proj, self.A_log = nn.Linear(2 * width, 2 * width), nn.Parameter(torch.zeros(1))

    def forward(self, x):
        u, gate = self.in_proj(x).chunk(2, dim=-1)
        u = functional.silu(self.conv1d(u.mT)[..., : x.shape[1]].mT)
        step = functional.softplus(self.dt_proj(u))
        decay, states = torch.exp(-step * self.A_log.exp()), [step[:, 0] * u[:, 0]]
        for t in range(1, x.shape[1]):
            states.append(decay[:, t] * states[-1] + step[:, t] * u[:, t])
        return self.out_proj(torch.stack(states, 1) * functional.silu(gate))


class PreNorm(nn.Module):
    def __init__(self, width: int, fn: nn.Module):
        super().__init__()
        self.norm, self.fn = nn.LayerNorm(width), fn

    def forward(self, x):
        return self.fn(self.norm(x))


class Residual(PreNorm):
    def forward(self, x):
        return x + super().forward(x)


class Attention(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.to_qkv = nn.Linear(width, 3 * width, bias=False)
        self.to_out = nn.Sequential(nn.Linear(width, width), nn.Dropout(0.1))

    def forward(self, x):
        return self.to_out(attend(*self.to_qkv(x).chunk(3, dim=-1), causal=False))


class FeedForward(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.net = Zag(width)

    def forward(self, x):
        return self.net(x)


class Pairs(nn.Module):  # a block is a ModuleList, which is never called
    def __init__(self, layers: int, width: int):
        super().__init__()
        kinds = (Attention, FeedForward)
        pairs = ([PreNorm(width, kind(width)) for kind in kinds] for _ in range(layers))
        self.layers = nn.ModuleList(nn.ModuleList(pair) for pair in pairs)

    def forward(self, x):
        for attention, feed_forward in self.layers:
            x = attention(x) + x
            x = feed_forward(x) + x
        return x


class MixerBlock(nn.Module):  # two MLPs, of which the first mixes tokens
    def __init__(self, width: int):
        super().__init__()
        self.norm_1, self.along_tokens = nn.LayerNorm(width), Zag((IMAGE // PATCH) ** 2)
        self.norm_2, self.along_channels = nn.LayerNorm(width), Zag(width)

    def forward(self, x):
        x = x + self.along_tokens(self.norm_1(x).mT).mT
        return x + self.along_channels(self.norm_2(x))


class Frame(nn.Module):
    def __init__(self, body: Build, images: bool, layers: int, width: int = WIDTH):
        super().__init__()
        self.m: nn.Module = nn.Embedding(VOCAB, width)
        self.n, self.o = body(layers, width), nn.LayerNorm(width)
        self.p: nn.Module = nn.Linear(width, VOCAB)
        if images:
            cut = Rearrange("b c (h p) (w q) -> b (h w) (c p q)", p=PATCH, q=PATCH)
            self.m = nn.Sequential(cut, nn.Linear(3 * PATCH**2, width))
            self.p = nn.Sequential(Reduce("b t c -> b c", "mean"), nn.Linear(width, CLASSES))

    def forward(self, input_ids=None, pixel_values=None):
        return self.p(self.o(self.n(self.m(pixel_values if input_ids is None else input_ids))))


class BasicBlock(nn.Module):
    def __init__(self, before: int, width: int):
        super().__init__()
        stride = 1 if before == width else 2
        self.conv1 = nn.Conv2d(before, width, 3, stride, padding=1, bias=False)
        self.bn1, self.relu = nn.BatchNorm2d(width), nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        shortcut = nn.Sequential(nn.Conv2d(before, width, 1, 2), nn.BatchNorm2d(width))
        self.bn2, self.downsample = nn.BatchNorm2d(width), None if stride == 1 else shortcut

    def forward(self, x):
        identity = x if self.downsample is None else self.downsample(x)
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += identity
        return self.relu(out)


class TorchvisionResNet(nn.Module):
    def __init__(self, layers: int, width: int = WIDTH):
        super().__init__()
        widths = [width // 4, width // 4, width // 2, width, 2 * width]
        self.conv1 = nn.Conv2d(3, widths[0], 7, 2, padding=3, bias=False)
        self.bn1, self.relu = nn.BatchNorm2d(widths[0]), nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, padding=1)
        for i in range(1, 5):
            befores = [widths[i - 1]] + [widths[i]] * (layers - 1)
            setattr(self, f"layer{i}", nn.Sequential(*(BasicBlock(b, widths[i]) for b in befores)))
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(widths[-1], CLASSES)

    def forward(self, pixel_values):
        x = self.maxpool(self.relu(self.bn1(self.conv1(pixel_values))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(self.avgpool(x).flatten(1))


def repeat(block: Callable[[int], nn.Module]) -> Build:
    return lambda layers, width: nn.Sequential(*(block(width) for _ in range(layers)))


torch_layer = partial(nn.TransformerEncoderLayer, nhead=HEADS, dim_feedforward=48, batch_first=True)
PLAIN: dict[str, Build] = {
    "odd_names": partial(Frame, repeat(Zug), False),
    "loose_linears": partial(Frame, repeat(LooseBlock), False),
    "scan": partial(Frame, repeat(lambda width: Residual(width, SelectiveScan(width))), False),
    "torch_encoder": partial(Frame, repeat(torch_layer), False),
    "pairs": partial(Frame, Pairs, True),
    "mlp_mixer": partial(Frame, repeat(MixerBlock), True),
    "torchvision_resnet": TorchvisionResNet,
}

# ---- Hugging Face: a configuration keeps the options of other families, so one set serves all


def general(layers: int, width: int) -> dict[str, Any]:
    groups = (
        (0, "pad_token_id expert_layer_offset"),
        (1, "bos_token_id n_groups n_group topk_group first_k_dense_replace attn_layer_offset"),
        (2, "eos_token_id decoder_start_token_id attn_layer_period full_attention_interval"),
        (2, "num_key_value_heads num_experts_per_tok linear_num_key_heads num_stages"),
        (4, "mamba_n_heads linear_num_value_heads num_experts num_local_experts patch_size"),
        (8, "q_lora_rank kv_lora_rank qk_rope_head_dim qk_nope_head_dim v_head_dim state_size"),
        (8, "linear_key_head_dim linear_value_head_dim mamba_d_state chunk_size num_mel_bins"),
        (16, "moe_intermediate_size shared_expert_intermediate_size"),
        (48, "intermediate_size hidden_dim d_ff encoder_ffn_dim decoder_ffn_dim"),
        (HEADS, "num_attention_heads decoder_attention_heads"),
        (POSITIONS, "max_position_embeddings max_target_positions"),
        (layers, "num_hidden_layers num_decoder_layers decoder_layers"),
        (width // 2, "mamba_d_head embed_dim"),
        (width, "hidden_size embedding_size"),
    )
    options: dict[str, Any] = {name: size for size, names in groups for name in names.split()}
    options |= {"vocab_size": VOCAB, "num_labels": CLASSES, "image_size": IMAGE, "use_cache": False}
    options |= {"feed_forward_proj": "gated-gelu", "max_source_positions": 12, "window_size": 4}
    options |= {"layer_scale_init_value": 0.5, "mlp_only_layers": [0], "depths": [layers] * 2}
    options |= {"hidden_sizes": [width // 2, width], "head_dim": width // HEADS}
    return {**options, "mamba_d_ssm": 2 * width, "attn_layer_indices": list(range(1, layers, 2))}


# Where two families mean different things by a name; None leaves it out.
OWN: dict[str, dict[str, Any]] = {
    "DeepseekV3ForCausalLM": {"num_key_value_heads": HEADS, "head_dim": None},
    "Mamba2ForCausalLM": {"num_heads": 8},
    "SwinForImageClassification": {"num_heads": [2, 4], "num_hidden_layers": None}
    | {"num_attention_heads": None, "head_dim": None},
    "ConvNextForImageClassification": {"num_hidden_layers": None},
}


def hub(name: str) -> Build:
    def build(layers: int, width: int = WIDTH) -> nn.Module:
        options = {**general(layers, width), **OWN.get(name, {})}
        chosen = {key: value for key, value in options.items() if value is not None}
        return getattr(hf, name)(getattr(hf, name).config_class(**chosen))

    return build


# ---- what is expected where: first, names | inputs | embedding | logits; then, indented,
# prefixes | mixers | MLP | norm. "-" is none, "/" parts what even and odd blocks have.
# Stages differ in width, so each prefix is a stack of its own; the norm follows the last of them.

TABLE = """
LlamaForCausalLM Qwen3ForCausalLM Gemma2ForCausalLM Gemma3ForCausalLM Phi3ForCausalLM \
Olmo2ForCausalLM MixtralForCausalLM Qwen3MoeForCausalLM DeepseekV3ForCausalLM \
| input_ids | model.embed_tokens | lm_head
  model.layers | self_attn | mlp | model.norm
GPT2LMHeadModel | input_ids | transformer.wte | lm_head
  transformer.h | attn | mlp | transformer.ln_f
GPTNeoXForCausalLM | input_ids | gpt_neox.embed_in | lm_head
  gpt_neox.layers | attention | mlp | gpt_neox.final_layer_norm
Mamba2ForCausalLM | input_ids | backbone.embeddings | lm_head
  backbone.layers | mixer | - | backbone.norm_f
FalconH1ForCausalLM | input_ids | model.embed_tokens | lm_head
  model.layers | mamba self_attn | feed_forward | model.final_layernorm
BambaForCausalLM JambaForCausalLM | input_ids | model.embed_tokens | lm_head
  model.layers | mamba / self_attn | feed_forward | model.final_layernorm
Qwen3NextForCausalLM | input_ids | model.embed_tokens | lm_head
  model.layers | linear_attn / self_attn | mlp | model.norm
BertForMaskedLM | input_ids | bert.embeddings.word_embeddings | cls.predictions.decoder
  bert.encoder.layer | attention.output.dense | output.dense | -
DistilBertForSequenceClassification | input_ids | distilbert.embeddings.word_embeddings | classifier
  distilbert.transformer.layer | attention | ffn | -
T5ForConditionalGeneration | input_ids decoder_input_ids | encoder.embed_tokens | lm_head
  encoder.block | layer.0.SelfAttention | layer.1.DenseReluDense | encoder.final_layer_norm
  decoder.block | layer.0.SelfAttention layer.1.EncDecAttention | layer.2.DenseReluDense \
| decoder.final_layer_norm
WhisperForConditionalGeneration | input_features decoder_input_ids | model.decoder.embed_tokens \
| proj_out
  model.encoder.layers | self_attn | fc2 | model.encoder.layer_norm
  model.decoder.layers | self_attn encoder_attn | fc2 | model.decoder.layer_norm
ViTForImageClassification | pixel_values | vit.embeddings | classifier
  vit.layers | attention | mlp | vit.layernorm
SwinForImageClassification | pixel_values | swin.embeddings | classifier
  swin.encoder.layers.0.blocks swin.encoder.layers.1.blocks | attention | mlp | swin.layernorm
ConvNextForImageClassification | pixel_values | convnext.embeddings | classifier
  convnext.encoder.stages.0.layers convnext.encoder.stages.1.layers | dwconv | pwconv2 \
| convnext.layernorm
ResNetForImageClassification | pixel_values | resnet.embedder | classifier.1
  resnet.encoder.stages.0.layers resnet.encoder.stages.1.layers | layer | - | -
odd_names | input_ids | m | p
  n | b | d | o
loose_linears | input_ids | m | p
  n | wo | w_out | o
scan | input_ids | m | p
  n | fn | - | o
torch_encoder | input_ids | m | p
  n | self_attn | linear2 | o
pairs | pixel_values | m | p.1
  n.layers | 0.fn | 1.fn | o
mlp_mixer | pixel_values | m | p.1
  n | along_tokens | along_channels | o
torchvision_resnet | pixel_values | maxpool | fc
  layer1 layer2 layer3 layer4 | bn2 | - | -
"""


def read_table() -> dict[str, Architecture]:
    found, rows = {}, []
    for line in TABLE.strip().splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        if line.startswith(" "):
            rows.append(cells)
        else:
            rows, (names, inputs, *ends) = [], cells  # the lines below fill these rows
            for name in names.split():
                build = PLAIN.get(name) or hub(name)
                found[name] = Architecture(name, build, inputs.split(), *ends, rows)
    return found


ARCHITECTURES = read_table()


def check_paths_exist_and_run(architecture: Architecture, layers: int = 3) -> None:
    model, stacks = architecture.build(layers).eval(), architecture.expected(layers)
    rows = [row for s in stacks for row in zip(s.blocks, s.mixers, s.mlps, strict=True)]
    ends = {architecture.embedding, architecture.logits, *(s.norm for s in stacks)} - {None}
    shapes: dict[str, torch.Size] = {}  # in the order of execution

    def record(path: str, module: nn.Module, inputs: Any, output: Any) -> None:
        shapes[path] = (output if isinstance(output, Tensor) else output[0]).shape

    for path in ends.union(*([block, *mixers, *mlps] for block, mixers, mlps in rows)):
        model.get_submodule(path).register_forward_hook(partial(record, path))
    with torch.no_grad():
        model(**architecture.batch(7))
    assert ends <= shapes.keys()
    axes = (1, -1) if "pixel_values" in architecture.inputs else (-1,)  # may hold the channels
    for block, mixers, mlps in rows:
        assert [path for path in shapes if path in mixers + mlps] == mixers + mlps, block
        assert block in shapes or isinstance(model.get_submodule(block), nn.ModuleList), block
        shape = shapes.get(block, (WIDTH,))
        width = shape[1 if len(shape) == 4 else -1]
        assert all(width in [shapes[p][axis] for axis in axes] for p in mixers + mlps), block
