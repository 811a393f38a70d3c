"""What losses cost: in a step of the demo, between samples, and of attention at 2048 tokens.

    python benchmarks/losses.py                       # all three, CPU; the first compiles for long
    python benchmarks/losses.py step --losses mse,gram
    python benchmarks/losses.py samples attention --rounds 9

``step``: the models of examples/distill_language_model.py learn from labels, logits and six matches
of one loss, beside the same step without matches. ``samples``: losses between samples alone,
forward and backward, beside the mean of squares; the angles of all triples also as one writes them
down. ``attention``: losses of maps from queries and keys, beside the same loss of explicit maps.

The cost of importance is benchmarks/importance.py, that of vocabulary heads benchmarks/head.py.
"""

import argparse
import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from measure import Step, comparison, interleaved, peak
from rich.console import Console
from torch import Tensor

import fxdistill
from fxdistill import Match, losses
from fxdistill.losses import Attention
from fxdistill.losses.names import OF_ATTENTION

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from distill_language_model import Settings, llama

IN_A_STEP = (
    *("mse", "l2", "smooth_l1", "l1", "cosine", "fitnet", "attention_transfer", "fpn"),
    *("gram", "distance_wise", "angle_wise", "similarity_preserving", "info_nce", "CRD"),
    *("attention_kl", "attention_mse", "relation_kl", "transfer_matrix"),
)


def training(loss: Callable[[], Tensor], *learning: Tensor) -> Step:
    """Forward and backward; the gradients of ``learning`` are then dropped."""

    def run() -> None:
        loss().backward()
        for x in learning:
            x.grad = None

    return run


# ---- in a step of the demo


def matches(loss: str) -> list[Match]:
    """Six matches: both parts of three layers; attention of three layers, each with two."""
    if getattr(losses, loss) in OF_ATTENTION:
        port: dict[str, Any] = {"student_port": "attention", "teacher_port": "attention"}
        pairs = [(i, 2 * i + j, "self_attn") for i in range(3) for j in range(2)]
    else:
        port = {}
        pairs = [(i, 2 * i + 1, part) for i in range(3) for part in ("self_attn", "mlp")]
    return [
        Match(f"model.layers.{s}.{part}", f"model.layers.{t}.{part}", loss=chosen(loss), **port)
        for s, t, part in pairs
    ]


def chosen(loss: str) -> Any:
    return functools.partial(losses.CRD, size=1024) if loss == "CRD" else loss


def steps(o: argparse.Namespace) -> Iterator[tuple[str, dict[str, Step]]]:
    """A loss at a time, so that few compiled steps live together."""
    settings = Settings()
    ids = torch.randint(settings.vocabulary, (settings.batch, settings.length))
    compile = {"backend": o.backend}

    def made(mapping: Any) -> Step:
        student = llama(settings, settings.student_layers, seed=1)
        teacher = llama(settings, settings.teacher_layers, seed=0)
        options = {"feature_weight": 0.1, "compile": compile}
        distiller = fxdistill.wrap(student, teacher, mapping, **options)
        learning = [*distiller.parameters()]
        return training(lambda: distiller(input_ids=ids, labels=ids).loss, *learning)

    plain = made(None)
    for loss in o.losses.split(",") if o.losses else IN_A_STEP:
        yield loss, {"labels, logits": plain, f"+ 6 of {loss}": made(matches(loss))}


# ---- between samples


def angles(student: Tensor, teacher: Tensor) -> Tensor:
    """The loss of angles as one writes it: the cosines of all triples at once."""
    found = []
    for x in (student, teacher):
        unit = torch.nn.functional.normalize(x[None] - x[:, None], dim=-1)
        found.append(unit @ unit.transpose(1, 2))
    return torch.nn.functional.smooth_l1_loss(*found)


def of_samples(o: argparse.Namespace) -> dict[str, Step]:
    s = torch.randn(o.batch, o.width, requires_grad=True)
    t = torch.randn(o.batch, o.width)
    bank = losses.CRD(size=4096)
    bank(s, t)
    named = ("mse", "gram", "distance_wise", "similarity_preserving", "info_nce", "angle_wise")
    versions = {name: getattr(losses, name) for name in named}
    versions |= {"CRD, 4096 in the queue": bank, "angle_wise, as written": angles}
    return {
        name: training(functools.partial(loss, s, t), s, *bank.parameters())
        for name, loss in versions.items()
    }


# ---- attention


def explicit(loss: str, student: Attention, teacher: Attention) -> Tensor:
    """The loss of maps ``[B, H, L, L]`` that are formed whole."""
    maps = []
    for x in (student, teacher):
        scores = x.query @ x.key.transpose(-1, -2) * x.query.shape[-1] ** -0.5
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        maps.append(scores.masked_fill(hidden, -torch.inf).softmax(-1))
    value: Tensor = getattr(losses, loss)(*maps)
    return value


def of_attention(o: argparse.Namespace) -> Iterator[tuple[str, dict[str, Step]]]:
    def side(width: int, learns: bool) -> Attention:
        parts = (torch.randn(1, o.heads, o.length, width, requires_grad=learns) for _ in range(3))
        return Attention(*parts, causal=True)

    s, t = side(64, True), side(128, False)
    for loss in ("attention_kl", "attention_mse", "transfer_matrix"):
        yield (
            loss,
            {
                f"{loss}, maps": training(lambda n=loss: explicit(n, s, t), *s[:2]),
                f"{loss}, blocks": training(lambda n=loss: getattr(losses, n)(s, t), *s[:2]),
            },
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parts = ("step", "samples", "attention")
    parser.add_argument("parts", nargs="*", help=f"some of {', '.join(parts)}; all by default")
    parser.add_argument("--losses", default="", help="of the demo's step, with commas between")
    parser.add_argument("--backend", default="inductor")
    parser.add_argument("--batch", type=int, default=128, help="samples that are compared")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    o = parser.parse_args()
    if unknown := set(o.parts) - set(parts):
        parser.error(f"{', '.join(sorted(unknown))}: some of {', '.join(parts)}")
    torch.manual_seed(0)
    console = Console(width=100)
    console.print(vars(o) | {"torch": torch.__version__})

    def show(versions: dict[str, Step], title: str) -> None:
        rounds = interleaved(versions, o.rounds)
        memory = {name: peak(step) for name, step in versions.items()}
        console.print(title, comparison(rounds, memory))

    wanted = o.parts or parts
    if "attention" in wanted:
        for loss, versions in of_attention(o):
            show(versions, loss)
    if "samples" in wanted:
        show(of_samples(o), "between samples")
    if "step" in wanted:
        for loss, versions in steps(o):
            show(versions, loss)


if __name__ == "__main__":
    main()
