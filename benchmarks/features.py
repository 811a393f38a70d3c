"""Features of every layer: what they cost in memory and time, beside hooks and torch.compile.

    python benchmarks/features.py                     # 12 layers from 24, V=32000, CPU

One training step (forward and backward) of a small Llama that learns from labels, logits and the
mixer and MLP of each of its layers, with projections. "hooks" is what one writes without this
library: forward hooks collect the values of both models, `nn.functional` compares them, and all of
it is one graph of `torch.compile`. Peak memory is what the allocator hands out beyond what is there
before the step: weights are not in it, gradients are.
"""

import argparse
import copy
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from llama import llama
from measure import Step, comparison, interleaved, peak
from rich.console import Console
from torch import Tensor, nn
from transformers import LlamaForCausalLM

import fxdistill


def model(o: argparse.Namespace, width: int, layers: int) -> LlamaForCausalLM:
    return llama(o, width, layers).to(o.device, getattr(torch, o.dtype))


class Hooked(nn.Module):
    """Both models and all losses, as one writes them by hand."""

    def __init__(self, student: nn.Module, teacher: nn.Module, pairs: list[tuple[str, str]]):
        super().__init__()
        self.student, self.teacher, self.pairs = student, teacher.eval(), pairs
        widths = student.config.hidden_size, teacher.config.hidden_size
        self.projections = nn.ModuleList(nn.Linear(*widths) for _ in pairs)
        self.seen: dict[tuple[str, str], Tensor] = {}
        for side, net, index in (("student", student, 0), ("teacher", teacher, 1)):
            for pair in pairs:
                module = net.get_submodule(pair[index])
                module.register_forward_hook(self.keep(side, pair[index]))

    def keep(self, side: str, path: str):
        def hook(module: nn.Module, args: object, output: Tensor | tuple[Tensor, ...]) -> None:
            self.seen[side, path] = output if isinstance(output, Tensor) else output[0]

        return hook

    def forward(self, ids: Tensor) -> Tensor:
        with torch.no_grad():
            target = self.teacher(input_ids=ids).logits
        logits = self.student(input_ids=ids).logits
        features = [
            F.mse_loss(projection(self.seen["student", s]), self.seen["teacher", t])
            for projection, (s, t) in zip(self.projections, self.pairs, strict=True)
        ]
        p, q = (x[:, :-1].flatten(0, 1).float().log_softmax(-1) for x in (target, logits))
        divergence = F.kl_div(q, p, reduction="batchmean", log_target=True)
        labels = F.nll_loss(q, ids[:, 1:].flatten())
        return divergence + labels + torch.stack(features).mean()


def versions(o: argparse.Namespace) -> dict[str, Step]:
    torch.manual_seed(0)
    student, teacher = model(o, o.width, o.layers), model(o, o.teacher_width, 2 * o.layers)
    ids = torch.randint(o.vocabulary, (o.batch, o.length), device=o.device)
    mapping = fxdistill.match(student, teacher)
    pairs = [(match.student, match.teacher) for match in mapping]
    # Hooks stay on the models that they are put on, and would be traced by others.
    hooked = Hooked(copy.deepcopy(student), copy.deepcopy(teacher), pairs)
    together = {"disable": ("FormGradients", "MeetEarly")}
    late, early = (fxdistill.wrap(student, teacher, mapping, compile=c) for c in (together, True))
    plain = torch.compile(lambda: student(input_ids=ids, labels=ids).loss)
    by_hand = torch.compile(hooked, fullgraph=True)

    def step(loss: Callable[[], Tensor], learning: nn.Module) -> Step:
        def run() -> None:
            loss().backward()
            learning.zero_grad(set_to_none=True)

        return run

    return {
        "hooks + torch.compile": step(lambda: by_hand(ids), hooked),
        "plain training": step(plain, student),
        "fxdistill, as traced": step(lambda: late(input_ids=ids, labels=ids).loss, late),
        "fxdistill": step(lambda: early(input_ids=ids, labels=ids).loss, early),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--teacher-width", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    o = parser.parse_args()
    warnings.filterwarnings("ignore", message="Dynamo detected a call to a `functools.lru_cache`")
    steps = versions(o)
    rounds = interleaved(steps, o.rounds, o.device)
    memory = {name: peak(step, o.device) for name, step in steps.items()}
    Console(width=100).print(vars(o) | {"torch": torch.__version__}, comparison(rounds, memory))


if __name__ == "__main__":
    main()
