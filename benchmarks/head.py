"""The fused vocabulary head against logits that exist: time and peak memory, in one run.

    python benchmarks/head.py                       # T=2048, D=256/512, V=32000, fp32, CPU or GPU
    python benchmarks/head.py --vocabulary 128000
    python benchmarks/head.py --device cuda --dtype bfloat16 --tokens 16384 --width 4096 \
        --teacher-width 4096 --vocabulary 128256
    python benchmarks/head.py --loss jsd --liger 128 256 512 1024    # after pip install --no-deps \
                                                                     # liger-kernel

A divergence plus cross entropy, forward and backward. Times are interleaved: every round runs every
version once, and a ratio is taken within a round; the median of the ratios is shown with the
smallest and the largest. Peak memory is what the allocator hands out beyond inputs and gradients:
on a CPU by the profiler's events, on a GPU by its statistics.
"""

import argparse
import functools
import json
from collections.abc import Callable
from pathlib import Path

import torch
from measure import Step, comparison, interleaved, peak
from rich.console import Console
from torch import Tensor

from fxdistill.losses import cross_entropy, vocab_loss
from fxdistill.losses.names import LOGIT_LOSSES


def operands(o: argparse.Namespace) -> dict[str, Tensor]:
    g = torch.Generator(o.device).manual_seed(0)

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        x = torch.randn(*shape, generator=g, device=o.device) * scale
        return x.to(getattr(torch, o.dtype))

    made = {
        "student_hidden": random(o.tokens, o.width),
        "student_weight": random(o.vocabulary, o.width, scale=0.02),
        "teacher_hidden": random(o.tokens, o.teacher_width),
        "teacher_weight": random(o.vocabulary, o.teacher_width, scale=0.02),
        "labels": torch.randint(0, o.vocabulary, (o.tokens,), generator=g, device=o.device),
    }
    made["student_hidden"].requires_grad_()
    made["student_weight"].requires_grad_()
    return made


def unfused(divergence, student_hidden, student_weight, teacher_hidden, teacher_weight, labels):
    s, t = student_hidden @ student_weight.T, teacher_hidden @ teacher_weight.T
    return divergence(s, t) + cross_entropy(s, labels)


def fused(o: argparse.Namespace) -> Callable[..., Tensor]:
    def loss(**x: Tensor) -> Tensor:
        options = {"divergence": o.loss, "label_weight": 1.0, "chunk_tokens": o.chunk}
        return vocab_loss(**x, **options).loss

    return loss


def liger(o: argparse.Namespace, chunk: int) -> Callable[..., Tensor]:
    """Liger's chunked loss; its β = 0 is forward KL, as ours."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    beta = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.5}[o.loss]
    weights = {"weight_hard_loss": 1.0, "weight_soft_loss": 1.0}
    loss = LigerFusedLinearJSDLoss(**weights, beta=beta, chunk_size=chunk)
    order = ("student_hidden", "student_weight", "teacher_hidden", "teacher_weight", "labels")
    return lambda **x: loss(*(x[name] for name in order))


def products(student_hidden, student_weight, teacher_hidden, teacher_weight, labels):
    """The four bare matrix products that any version needs, and nothing else."""
    with torch.no_grad():
        s = student_hidden @ student_weight.T
        teacher_hidden @ teacher_weight.T
        s @ student_weight
        s.T @ student_hidden


def versions(o: argparse.Namespace) -> dict[str, Step]:
    x = operands(o)

    def step(loss: Callable[..., Tensor]) -> Step:
        def run() -> None:
            loss(**x).backward()
            x["student_hidden"].grad = x["student_weight"].grad = None

        return run

    plain = functools.partial(unfused, LOGIT_LOSSES[o.loss])
    compiled = torch.compile(plain, fullgraph=True)
    inside = torch.compile(fused(o), fullgraph=True)
    return {
        "unfused, compiled": step(compiled),
        "fused": step(fused(o)),
        "fused, compiled": step(inside),
        **{f"Liger, chunk_size={c}": step(liger(o, c)) for c in o.liger},
        "four products": lambda: products(**x),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--teacher-width", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--chunk", type=int, default=None)
    parser.add_argument("--loss", default="forward_kl", choices=["forward_kl", "reverse_kl", "jsd"])
    parser.add_argument("--liger", type=int, nargs="*", default=[], help="chunk sizes of Liger's")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--json", type=Path, default=None)
    o = parser.parse_args()
    if o.threads:
        torch.set_num_threads(o.threads)
    steps = versions(o)
    rounds = interleaved(steps, o.rounds, o.device)
    # Beyond the two gradients, which every version makes.
    gradients = (o.tokens + o.vocabulary) * o.width * getattr(torch, o.dtype).itemsize
    measured = [name for name in steps if name != "four products"]
    memory = {name: peak(steps[name], o.device) - gradients for name in measured}
    Console(width=100).print(vars(o) | {"torch": torch.__version__}, comparison(rounds, memory))
    if o.json:
        o.json.write_text(json.dumps({"seconds": rounds, "peak": memory}, indent=2) + "\n")


if __name__ == "__main__":
    main()
