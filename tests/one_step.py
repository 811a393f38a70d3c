"""One step of a distiller beside the same step of the oracle, on small models."""

import itertools
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import fxdistill
from families import spread
from oracle import Reference, check_gradients, check_losses, reference

VOCAB, ROWS, LENGTH = 50, 3, 8
PAIRS = [
    ("model.layers.0.self_attn", "model.layers.1.self_attn"),
    ("model.layers.0.mlp", "model.layers.2.mlp"),
]
ALL_TERMS = tuple(itertools.product((False, True), repeat=3))
MODES = [False, pytest.param({"backend": "aot_eager"}, id="aot_eager")]
LONG_MODES = [False, pytest.param({"backend": "aot_eager"}, id="aot_eager", marks=pytest.mark.slow)]
SLOW_REGIONAL = pytest.param("regional", marks=pytest.mark.slow)


def llama(layers: int, vocab: int = VOCAB, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    config = hf.LlamaConfig(
        vocab_size=vocab,
        hidden_size=16,
        intermediate_size=24,
        num_attention_heads=2,
        num_hidden_layers=layers,
        max_position_embeddings=32,
        use_cache=False,
    )
    return spread(hf.LlamaForCausalLM(config))


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width)
        self.flat = nn.Linear(width, width)
        self.pool = nn.Linear(width, width)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        flat = self.flat(x.flatten(0, 1)).view_as(x)  # as mixtures of experts do
        pooled = self.pool(x.mean(1))
        return {
            "hidden": x + self.inner(x).tanh() + flat.sigmoid() + pooled[:, None],
            "pooled": pooled,
        }


class Handwritten(nn.Module):
    """No configuration, a tensor for output, dictionaries, flattened and pooled values inside."""

    def __init__(self, blocks: int, seed: int, width: int = 6, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(VOCAB, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(width, VOCAB)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embed(input_ids)
        for block in self.blocks:
            x = self.dropout(block(x)["hidden"])
        return self.head(x)


class Tagger(nn.Module):
    """Each token alone: rows may be cut, padded and stacked without a change of any prediction."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(VOCAB, 6)
        self.body = nn.Linear(6, 6)
        self.head = nn.Linear(6, VOCAB)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.head(self.body(self.embed(input_ids)).tanh())


def batch_of(
    padding: str | None = None, rows: int = ROWS, length: int = LENGTH
) -> dict[str, Tensor]:
    torch.manual_seed(2)
    ids = torch.randint(3, VOCAB, (rows, length))
    mask = torch.ones_like(ids)
    if padding == "left":
        mask[0, :3] = mask[1, :1] = 0
    elif padding == "right":
        mask[0, -3:] = mask[1, -1:] = 0
    return {"input_ids": ids} if padding is None else {"input_ids": ids, "attention_mask": mask}


def labels_of(batch: dict[str, Tensor], prompt: bool = True) -> Tensor:
    labels = batch["input_ids"].masked_fill(
        batch.get("attention_mask", torch.ones(1, 1)) == 0, -100
    )
    if prompt:
        labels[2, :4] = -100
    return labels


def as_match(pair: tuple[Any, ...]) -> fxdistill.Match:
    return fxdistill.Match(pair[0], pair[1], weight=pair[2] if len(pair) == 3 else 1.0)


def compare(
    towers: tuple[nn.Module, nn.Module],
    batch: dict[str, Tensor],
    pairs: Any = (),
    settings: dict[str, Any] | None = None,
    mode: Any = False,
    task: str = "causal_lm",
    encoder_paths: tuple[str, ...] = (),
    **call: Any,
) -> Reference:
    """One step of both: `settings` are for `wrap`, `call` for the distiller, the oracle has all."""
    settings = settings or {}
    student, teacher = towers
    expected = reference(
        student, teacher, pairs, batch, task=task, encoder_paths=encoder_paths, **settings, **call
    )
    student.zero_grad(set_to_none=True)
    matches = [as_match(pair) for pair in pairs]
    distiller = fxdistill.wrap(student, teacher, matches, task=task, compile=mode, **settings)
    out = distiller(**batch, **call)
    out.loss.backward()
    check_losses(out, expected)
    check_gradients(student, expected)
    return expected


def every_mask() -> dict[str, Tensor]:
    torch.manual_seed(3)
    return {
        "loss_mask": torch.rand(ROWS, LENGTH) > 0.3,
        "token_weights": torch.rand(ROWS, LENGTH) * 3,
    }
