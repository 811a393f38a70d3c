"""Features and logits, each alone and together: what does a student of handwritten digits gain?

A small CNN has 100 labelled images; its teacher, eight times as wide, has learned from 1000 others.
The student learns from labels; from labels and the teacher's logits; from labels and the teacher's
embedding (squares of the difference, as in FitNets, Romero et al. 2015, arXiv 1412.6550; a linear
layer lifts the student's 32 numbers to the teacher's 256); and from all of these.

What one learns here: a loss is a sum of terms, of which any may be missing; projections are made by
``wrap``, train with the student, and are no part of it.

    python examples/features_and_logits.py            # three minutes on a CPU
    python examples/features_and_logits.py --quick    # seconds; nothing is learned
"""

from collections.abc import Sequence

import digits
import runs

import fxdistill
from fxdistill import Match

WIDTH = 4  # of the student's first stage; the teacher's is 32
LOGITS = {"temperature": 4.0}
FEATURES = {
    "mapping": [Match("embedding", "embedding", loss="mse", project="auto")],
    "feature_weight": 1.0,
}
WAYS = {
    "labels alone": {"logit_loss": None},
    "logits": LOGITS,
    "features": {"logit_loss": None, **FEATURES},
    "features, logits": {**LOGITS, **FEATURES},
}


def main(argv: Sequence[str] | None = None) -> None:
    options = runs.options(__doc__, argv, steps=1000, teacher_steps=600)
    sizes = {"width": WIDTH, "feature_weight": FEATURES["feature_weight"], **LOGITS}
    measures = {"accuracy": "held-out accuracy (%)"}
    with runs.Study("features_and_logits", options, measures, sizes=sizes) as study:
        for seed in options.seeds:
            split = digits.load(seed)
            teacher = digits.teacher(study, split, seed)
            examples = (split.student.pixels[:4],)  # wrap reads the widths of projections from them
            for way, recipe in WAYS.items():
                student = digits.cnn(WIDTH, seed + 1)
                # A step of models this small takes a millisecond: no compile pays for itself.
                given = {"compile": False, "example_inputs": examples, **recipe}
                distiller = fxdistill.wrap(student, teacher, **given)
                digits.distil(study, way, distiller, split, seed)


if __name__ == "__main__":
    main()
