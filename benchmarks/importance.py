"""What importance costs a step of the head, and what dropping predictions saves.

    python benchmarks/importance.py                          # T=2048, D=512/512, V=32000, fp32, CPU
    python benchmarks/importance.py --score student_entropy --labels
    python benchmarks/importance.py --device cuda --dtype bfloat16 --tokens 16384 --width 4096 \
        --teacher-width 4096 --vocabulary 128256

Forward and backward of the fused head, as ``wrap`` calls it, with and without an ``Importance``.
Times are interleaved: every round runs every version once, and a ratio is taken within a round.
"""

import argparse
from typing import Any

import torch
from head import operands
from measure import Step, comparison, interleaved
from rich.console import Console
from torch import Tensor

from fxdistill import Importance
from fxdistill.losses import vocab_loss
from fxdistill.losses.scores import Asked, vocab_scores
from fxdistill.objective.importance import factors


def versions(o: argparse.Namespace) -> dict[str, Step]:
    x = operands(o)
    labels = x.pop("labels")
    weights = torch.ones(o.tokens, device=o.device)
    own: dict[str, Any] = {"labels": labels, "label_weight": 1.0} if o.labels else {}

    def total(importance: Importance | None) -> Tensor:
        if importance is None:
            return vocab_loss(**x, **own, weights=weights).loss
        if importance.proportional and not o.labels and len(importance.names) == 1:
            return vocab_loss(**x, weights=weights, score=o.score).loss
        asked = Asked(importance.names, (("forward_kl", 1.0, 0.5),)).text
        scores = vocab_scores(**x, asked=asked, weights=weights)
        given = {"logit_weights": factors(scores, weights, importance.rule), "weights": weights}
        if not o.labels:
            given = {"weights": given["logit_weights"], "keep": importance.part}
        return vocab_loss(**x, **own, **given).loss

    def step(importance: Importance | None) -> Step:
        def run() -> None:
            total(importance).backward()
            x["student_hidden"].grad = x["student_weight"].grad = None

        return run

    return {
        "no importance": step(None),
        o.score: step(Importance(o.score)),
        f"{o.score}, keep 0.5": step(Importance(o.score, keep=0.5)),
        f"{o.score}, keep 0.2": step(Importance(o.score, keep=0.2)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--teacher-width", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--score", default="tip")
    parser.add_argument("--labels", action="store_true", help="cross entropy too, of all tokens")
    parser.add_argument("--rounds", type=int, default=7)
    o = parser.parse_args()
    rounds = interleaved(versions(o), o.rounds, o.device)
    Console(width=100).print(vars(o) | {"torch": torch.__version__}, comparison(rounds, {}))


if __name__ == "__main__":
    main()
