"""How images lie to each other: losses between the samples of a batch, on handwritten digits.

A small CNN has 100 labelled images and no logits of its teacher. What it gets is the teacher's
embedding, four times as wide as its own, which these losses compare without any projection: how
far images are from each other and at which angles (RKD, Park et al. 2019, arXiv 1904.05068), how
alike they are (Tung & Mori 2019, arXiv 1907.09682), their correlations, and which image it is among
many earlier ones (CRD, Tian et al. 2020, arXiv 1910.10699).

What one learns here: a loss may have parameters and a memory (CRD). They live on the distiller.

    python examples/relations.py            # two minutes on a CPU
    python examples/relations.py --quick    # seconds; nothing is learned
"""

from collections.abc import Sequence
from functools import partial

import digits
import runs

import fxdistill
from fxdistill import Match, losses

WIDTH = 8  # of the student's first stage; the teacher's is 32
CRD = partial(losses.CRD, width=64, size=512)


def of_embeddings(**weights: float) -> dict:
    """What ``wrap`` takes to compare embeddings by named losses with these weights."""
    given = {"crd": CRD}
    matches = [
        Match("embedding", "embedding", loss=given.get(name, name), weight=weight)
        for name, weight in weights.items()
    ]
    return {"mapping": matches, "feature_weight": float(len(matches))}  # the sum, and no mean


WAYS = {
    "labels alone": {},
    "RKD: distances, angles": of_embeddings(distance_wise=5.0, angle_wise=10.0),
    "similarity-preserving": of_embeddings(similarity_preserving=400.0),
    "gram": of_embeddings(gram=20.0),
    "CRD": of_embeddings(crd=0.2),
}


def main(argv: Sequence[str] | None = None) -> None:
    options = runs.options(__doc__, argv, steps=1000, teacher_steps=600)
    measures = {"accuracy": "held-out accuracy (%)"}
    with runs.Study("relations", options, measures, sizes={"width": WIDTH}) as study:
        for seed in options.seeds:
            split = digits.load(seed)
            teacher = digits.teacher(study, split, seed)
            examples = (split.student.pixels[:4],)  # wrap reads the widths of projections from them
            for way, recipe in WAYS.items():
                student = digits.cnn(WIDTH, seed + 1)
                # A step of models this small takes a millisecond: no compile pays for itself.
                given = {"logit_loss": None, "compile": False, "example_inputs": examples, **recipe}
                distiller = fxdistill.wrap(student, teacher, **given)
                digits.distil(study, way, distiller, split, seed)


if __name__ == "__main__":
    main()
