"""A whole language model: distilled with the fused head, beside plain training of the same student.

    python benchmarks/language_model.py                     # V=128000, T=1024, CPU

One training step (forward and backward) of a small Llama with tied embeddings. Plain training makes
its logits and their cross entropy, compiled; distillation adds a teacher, forward KL, and labels.
Peak memory is what the allocator hands out beyond what is there before the step: weights are not in
it, gradients are.
"""

import argparse
import warnings

import torch
from llama import llama
from measure import Step, comparison, interleaved, peak
from rich.console import Console
from torch import Tensor
from transformers import LlamaForCausalLM

import fxdistill


def model(o: argparse.Namespace, width: int, layers: int) -> LlamaForCausalLM:
    return llama(o, width, layers).to(o.device, getattr(torch, o.dtype))


def versions(o: argparse.Namespace) -> dict[str, Step]:
    torch.manual_seed(0)
    student, teacher = model(o, o.width, 2), model(o, o.teacher_width, 4)
    ids = torch.randint(o.vocabulary, (o.batch, o.length), device=o.device)
    plain = torch.compile(lambda: student(input_ids=ids, labels=ids).loss)
    distillers = {
        "distilled, logits made": {"fuse_head": False},
        "distilled": True,
        'distilled, compile="regional"': "regional",
    }
    losses = {
        "plain training": plain,
        **{
            name: distilled(fxdistill.wrap(student, teacher, compile=compile), ids)
            for name, compile in distillers.items()
        },
    }

    def step(loss) -> Step:
        def run() -> None:
            loss().backward()
            student.zero_grad(set_to_none=True)

        return run

    return {name: step(loss) for name, loss in losses.items()}


def distilled(distiller: fxdistill.Distiller, ids: Tensor):
    return lambda: distiller(input_ids=ids, labels=ids).loss


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--vocabulary", type=int, default=128000)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--teacher-width", type=int, default=512)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=3)
    o = parser.parse_args()
    warnings.filterwarnings("ignore", message="Dynamo detected a call to a `functools.lru_cache`")
    steps = versions(o)
    rounds = interleaved(steps, o.rounds, o.device)
    memory = {name: peak(step, o.device) for name, step in steps.items()}
    Console(width=100).print(vars(o) | {"torch": torch.__version__}, comparison(rounds, memory))


if __name__ == "__main__":
    main()
