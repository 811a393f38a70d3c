"""A pair of small Llamas and rows of the standard library's source, for the loops of trainers."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from stdlib_text import load
from transformers import LlamaConfig, LlamaForCausalLM

import fxdistill

VOCABULARY, LENGTH = 2048, 64


def options(doc: str, argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--out", type=Path, default=Path("runs"), metavar="DIR")
    parser.add_argument("--quick", action="store_true", help="four steps, for tests")
    found = parser.parse_args(argv)
    found.steps = 4 if found.quick else found.steps
    return found


def llama(layers: int, width: int, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {"hidden_size": width, "intermediate_size": 3 * width, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=VOCABULARY, num_hidden_layers=layers, **sizes)
    return LlamaForCausalLM(config)


def pair(**given: Any) -> fxdistill.Distiller:
    """A student of two layers beside a teacher of four; what it learns from is of no matter here.

    A real teacher is trained, of course: AutoModelForCausalLM.from_pretrained(...). Graphs this
    small run as they are: a compile would take longer than the run.
    """
    student, teacher = llama(2, 64), llama(4, 128, seed=1)
    mapping = fxdistill.match(student, teacher)
    return fxdistill.wrap(student, teacher, mapping, **{"compile": False, **given})


def rows(folder: Path, count: int) -> list[dict[str, torch.Tensor]]:
    """Windows of the text, one after the other: token ids, which are their own labels."""
    text = load(folder, VOCABULARY).train[: count * LENGTH].long().reshape(count, LENGTH)
    return [{"input_ids": ids, "labels": ids} for ids in text]
