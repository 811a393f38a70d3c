"""What a second teacher, and what teaching each other, add to a step.

    python benchmarks/several.py                       # 4 × 256 tokens, V=8192, fp32, CPU
    python benchmarks/several.py --what mutual
    python benchmarks/several.py --device cuda --dtype bfloat16 --width 2048 --vocabulary 128256

Two teachers: a step with both beside a step with the first and a forward of the second. Mutual: a
step of three students beside three steps of their own on labels and the losses between them, of
logits that are there. Times are interleaved: every round runs every version once, and a ratio is
taken within a round, to the sum of the parts.
"""

import argparse
import statistics

import torch
from llama import llama
from measure import Step, interleaved, peak
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import fxdistill
from fxdistill import losses


def ids_of(o: argparse.Namespace) -> Tensor:
    return torch.randint(o.vocabulary, (o.batch, o.length), device=o.device)


def made(o: argparse.Namespace, width: int, layers: int) -> nn.Module:
    return llama(o, width, layers).to(o.device, getattr(torch, o.dtype))


def trained(distiller: nn.Module, ids: Tensor) -> Step:
    optimizer = torch.optim.SGD(distiller.parameters(), lr=1e-3)

    def run() -> None:
        distiller(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def two_teachers(o: argparse.Namespace) -> dict[str, Step]:
    ids, student = ids_of(o), made(o, o.width // 2, o.layers // 2)
    one, two = (made(o, o.width, o.layers).eval() for _ in range(2))
    forward = torch.compile(two)

    def of_second() -> None:
        with torch.no_grad():
            forward(input_ids=ids)

    return {
        "whole": trained(fxdistill.wrap(student, [one, two]), ids),
        "one teacher": trained(fxdistill.wrap(student, one), ids),
        "forward of the other": of_second,
    }


def mutual(o: argparse.Namespace) -> dict[str, Step]:
    ids, students = ids_of(o), [made(o, o.width // 2, o.layers // 2) for _ in range(3)]
    shape = (3, o.batch, o.length, o.vocabulary)
    logits = [z.requires_grad_() for z in torch.randn(shape, device=o.device)]

    @torch.compile
    def between(*z: Tensor) -> Tensor:
        total = z[0].new_zeros(())
        for i in range(3):
            others = [x.detach() for j, x in enumerate(z) if j != i]
            total = total + losses.forward_kl(z[i], sum(others) / 2)
        return total

    alone = [trained(fxdistill.wrap(model, None), ids) for model in students]
    return {
        "whole": trained(fxdistill.mutual(students), ids),
        **{f"student {i} alone": step for i, step in enumerate(alone)},
        "losses between them": lambda: between(*logits).backward(),
    }


VERSIONS = {"teachers": two_teachers, "mutual": mutual}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--what", choices=VERSIONS, default="teachers")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=9)
    o = parser.parse_args()
    steps = VERSIONS[o.what](o)
    rounds = interleaved(steps, o.rounds, o.device)
    table = Table("version", "s", "peak MB")
    for name, step in steps.items():
        cell = f"{peak(step, o.device) / 1e6:.0f}"
        table.add_row(name, f"{statistics.median(r[name] for r in rounds):.3f}", cell)
    ratios = sorted(r["whole"] / (sum(r.values()) - r["whole"]) for r in rounds)
    said = f"whole / parts: {statistics.median(ratios):.3f} ({ratios[0]:.3f}-{ratios[-1]:.3f})"
    Console(width=100).print(vars(o) | {"torch": torch.__version__}, table, said)


if __name__ == "__main__":
    main()
