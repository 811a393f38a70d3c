"""Attention is replaced by linear attention, in the order of MOHAWK, on real text.

A small language model has learned the source of Python's standard library. The student is that
model with another mixer in each layer: a linear attention, which keeps a state of one size in
place of all earlier tokens. In the order of Bick et al. 2024 (arXiv 2408.10189) it learns, one
after the other, the teacher's mixing matrices, its hidden states, and its logits. Other students go
without the first stages, for the same number of steps. (The paper gives each student layer the
teacher's hidden states as its input in stage 2; here, layers see what the student makes.)

What one learns here: three calls of ``wrap``, between which the student stays itself; the port
``"attention"`` of a model that never makes its map; and a port that is a function.

    python examples/mixer.py            # four minutes on a CPU
    python examples/mixer.py --quick    # seconds; nothing is learned
"""

import copy
from collections.abc import Sequence

import runs
import stdlib_text
import torch
from tiny_decoder import Decoder, LinearAttention, heldout_loss, matrix, next_token_loss

import fxdistill
from fxdistill import Match

SIZES = {"vocabulary": 1024, "width": 64, "layers": 3, "heads": 4, "length": 48}
QUICK = {**SIZES, "vocabulary": 512, "width": 16}
BATCH = 16
ALONE = {"logit_loss": None, "label_loss": None}
MATRICES = {
    "mapping": {
        "layers.{i}.mixer": Match(
            teacher="layers.{i}.mixer",
            loss="transfer_matrix",
            student_port=matrix,
            teacher_port="attention",
        )
    },
    **ALONE,
}
HIDDEN = {"mapping": {"layers.{i}": "layers.{i}"}, "feature_loss": "l2", **ALONE}
LOGITS: dict = {}
WAYS = {  # stages, each with its share of the steps
    "labels alone": [({"logit_loss": None}, 1.0)],
    "logits": [(LOGITS, 1.0)],
    "hidden states, then logits": [(HIDDEN, 0.4), (LOGITS, 0.6)],
    "matrices, hidden states, logits": [(MATRICES, 0.2), (HIDDEN, 0.2), (LOGITS, 0.6)],
}


def taught(study: runs.Study, text: stdlib_text.Text, sizes: dict) -> Decoder:
    """The one teacher of all seeds."""
    torch.manual_seed(0)
    model, steps = Decoder(**sizes), study.options.teacher_steps

    data = stdlib_text.batches(text.train, BATCH, sizes["length"], steps, seed=0)
    given = (model, lambda ids: next_token_loss(model, ids), data, steps)
    study.taught("teacher", *given, lr=4e-3, made_of=(sizes, text.digest))
    study.note("teacher", reference=True, loss=heldout_loss(model, text, sizes["length"]))
    return model


def main(argv: Sequence[str] | None = None) -> None:
    options = runs.options(__doc__, argv, steps=150, teacher_steps=1200)
    sizes = QUICK if options.quick else SIZES
    measures = {"loss": "held-out loss (nats per token)"}
    with runs.Study("mixer", options, measures, less=["loss"], sizes=sizes) as study:
        text = stdlib_text.load(options.out, sizes["vocabulary"])
        teacher = taught(study, text, sizes)
        for seed in options.seeds:
            for way, stages in WAYS.items():
                torch.manual_seed(seed + 1)
                student = copy.deepcopy(teacher).requires_grad_(True)
                for layer in student.layers:
                    layer.mixer = LinearAttention(sizes["width"], sizes["heads"])
                for number, (recipe, share) in enumerate(stages):
                    # On two cores each of these graphs would compile for half a minute.
                    given = {"task": "causal_lm", "compile": False, **recipe}
                    distiller = fxdistill.wrap(student, teacher, **given)
                    steps = max(1, round(share * options.steps))
                    place = (BATCH, sizes["length"], steps, 10 * seed + number)
                    data = stdlib_text.batches(text.train, *place)
                    rest = (distiller.parameters(), data, steps)
                    study.train(
                        way, lambda ids, d=distiller: d(ids, labels=ids).loss, *rest, lr=4e-3
                    )
                study.note(way, loss=heldout_loss(student, text, sizes["length"]))


if __name__ == "__main__":
    main()
