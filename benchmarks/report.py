"""What the report predicts, beside what is measured: peak memory and FLOPs of eight models.

    python benchmarks/report.py                       # eager lowering and Inductor, CPU
    python benchmarks/report.py --only llama bert --backends aot_eager
    python benchmarks/report.py --device cuda

Memory: what the allocator hands out at most in a step (forward and backward), and the weights,
which are there before it. FLOPs: torch's FlopCounterMode on the same step run eagerly, its logits
made; on a CPU with torch's own formula for the attention kernel that it leaves out.
"""

import argparse
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from measure import peak
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop, sdpa_flop
from transformers import (
    BambaConfig,
    BambaForCausalLM,
    BertConfig,
    BertForMaskedLM,
    ConvNextConfig,
    ConvNextForImageClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

import fxdistill
from fxdistill import Match

aten = torch.ops.aten


def as_it_is(formula: Any) -> Any:
    """Torch's formulas take tensors; those that are given to its counter are handed shapes."""

    def counted(*args: Any, **kwargs: Any) -> int:
        return formula(*args, **kwargs)

    counted._get_raw = True
    return counted


CPU_ATTENTION = {
    aten._scaled_dot_product_flash_attention_for_cpu: as_it_is(sdpa_flop),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: as_it_is(sdpa_backward_flop),
}


@dataclass(frozen=True)
class Case:
    """A pair of models, what is matched, and a batch."""

    build: Callable[[int], nn.Module]  # by layers
    batch: Callable[[], dict[str, Tensor]]
    layers: tuple[int, int] = (4, 8)
    mapping: str = ""  # a path with {} for the layer
    options: dict[str, Any] = field(default_factory=dict)
    checkpoint: bool = False

    def distiller(self, compile: Any, device: str) -> fxdistill.Distiller:
        torch.manual_seed(0)
        ours, theirs = self.layers
        student, teacher = (self.build(n).to(device) for n in self.layers)
        if self.checkpoint:
            student.activation_checkpointing_enable({"use_reentrant": False})
        matches = [
            Match(self.mapping.format(i), self.mapping.format(i * theirs // ours))
            for i in range(ours)
            if self.mapping
        ]
        return fxdistill.wrap(student, teacher, matches, compile=compile, **self.options)


def tokens(batch: int, length: int, vocabulary: int) -> Callable[[], dict[str, Tensor]]:
    def make() -> dict[str, Tensor]:
        ids = torch.randint(10, vocabulary, (batch, length))
        return {"input_ids": ids, "labels": ids}

    return make


def images(batch: int, size: int) -> Callable[[], dict[str, Tensor]]:
    def make() -> dict[str, Tensor]:
        pixels = torch.randn(batch, 3, size, size)
        return {"pixel_values": pixels, "labels": torch.randint(100, (batch,))}

    return make


def decoder(model: Any, config: Any, **more: Any) -> Callable[[int], nn.Module]:
    def build(layers: int) -> nn.Module:
        options: dict[str, Any] = {
            "vocab_size": 16000,
            "hidden_size": 512,
            "intermediate_size": 1536,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "use_cache": False,
        }
        return model(config(num_hidden_layers=layers, **{**options, **more}))

    return build


def gpt2(layers: int) -> nn.Module:
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=16000, n_embd=512, n_layer=layers, n_head=8, use_cache=False)
    )


def bert(layers: int) -> nn.Module:
    return BertForMaskedLM(
        BertConfig(
            vocab_size=16000,
            hidden_size=512,
            num_hidden_layers=layers,
            num_attention_heads=8,
            intermediate_size=2048,
        )
    )


def t5(layers: int) -> nn.Module:
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=16000,
            d_model=512,
            d_ff=1536,
            d_kv=64,
            num_heads=8,
            num_layers=layers,
            decoder_start_token_id=0,
            use_cache=False,
        )
    )


def vit(layers: int) -> nn.Module:
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=384,
            num_hidden_layers=layers,
            num_attention_heads=6,
            intermediate_size=1536,
            num_labels=100,
        )
    )


def convnext(layers: int) -> nn.Module:
    return ConvNextForImageClassification(
        ConvNextConfig(
            num_stages=2, hidden_sizes=[96, 192], depths=[layers, layers], num_labels=100
        )
    )


def bamba(layers: int) -> nn.Module:
    return decoder(
        BambaForCausalLM,
        BambaConfig,
        attn_layer_indices=list(range(1, layers, 2)),
        mamba_n_heads=16,
        mamba_d_state=32,
        mamba_chunk_size=64,
    )(layers)


CASES = {
    "llama, logits fused": Case(
        decoder(LlamaForCausalLM, LlamaConfig),
        tokens(4, 512, 16000),
        mapping="model.layers.{}.mlp",
    ),
    "llama, checkpoints": Case(
        decoder(LlamaForCausalLM, LlamaConfig),
        tokens(8, 512, 16000),
        mapping="model.layers.{}.self_attn",
        checkpoint=True,
    ),
    "qwen3, logits made": Case(
        decoder(Qwen3ForCausalLM, Qwen3Config, head_dim=64),
        tokens(4, 512, 16000),
        mapping="model.layers.{}.self_attn",
        options={"outputs": ("logits",)},
    ),
    "gpt2": Case(gpt2, tokens(4, 512, 16000), mapping="transformer.h.{}.mlp"),
    "bamba": Case(bamba, tokens(6, 256, 16000), layers=(2, 4), mapping="model.layers.{}"),
    "bert": Case(
        bert,
        tokens(4, 512, 16000),
        mapping="bert.encoder.layer.{}",
        options={"task": "masked_lm"},
    ),
    "t5": Case(t5, tokens(4, 256, 16000), mapping="encoder.block.{}.layer.1"),
    "vit": Case(vit, images(24, 224), mapping="vit.layers.{}"),
    "convnext": Case(convnext, images(24, 224), layers=(1, 2)),
}


def compared(case: Case, backend: str, device: str) -> list[str]:
    """One row: predicted and measured."""
    torch._dynamo.reset()
    distiller = case.distiller({"backend": backend}, device)
    batch = {name: value.to(device) for name, value in case.batch().items()}
    start = time.perf_counter()
    report = distiller.report(**batch)
    took = time.perf_counter() - start
    if report.stopped:
        return [report.stopped[:60]]
    assert report.memory
    assert report.flops

    def step() -> None:
        distiller(**batch).loss.backward()
        distiller.zero_grad(set_to_none=True)

    step()
    weights = sum(report.memory.weights.values())
    measured = weights + peak(step, device)
    predicted = report.memory.peak
    counted = counted_flops(case, batch, device)
    # What checkpoints run again is told apart: eagerly it is more, as regions run to their end.
    flops = report.flops.total - report.flops.again
    return [
        f"{predicted / 1e6:.0f}",
        f"{measured / 1e6:.0f}",
        f"{predicted / measured:.3f}",
        f"{(predicted - weights) / (measured - weights):.3f}",
        f"{flops / 1e9:.1f}",
        f"{flops / counted:.4f}",
        report.memory.peak_at,
        f"{took:.1f}",
    ]


def counted_flops(case: Case, batch: dict[str, Tensor], device: str) -> int:
    """The step as torch counts it, nothing compiled."""
    distiller = replace(case, checkpoint=False).distiller(False, device)
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        distiller(**batch).loss.backward()
    return int(counter.get_total_flops())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", nargs="*", default=[""], help="cases whose names begin so")
    parser.add_argument("--backends", nargs="*", default=["aot_eager", "inductor"])
    parser.add_argument("--device", default="cpu")
    o = parser.parse_args()
    warnings.filterwarnings("ignore")
    table = Table(
        "model", "backend", "MB", "measured", "ratio", "step", "GFLOP", "ratio", "at", "s"
    )
    console = Console(width=130)
    for name, case in CASES.items():
        if any(name.startswith(some) for some in o.only):
            for backend in o.backends:
                row = [name, backend, *compared(case, backend, o.device)]
                console.print(*row)
                table.add_row(*row)
    console.print({"torch": torch.__version__, "device": o.device}, table)


if __name__ == "__main__":
    main()
