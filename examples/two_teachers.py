"""Two teachers are better than one? A student learns from each alone, and from both.

Each teacher has read 500 digits that the other has not seen; the student has 100 labelled ones of
its own. It learns from labels alone; from labels and the logits of the first, or of the second; and
of both, whose probabilities are averaged: evenly, or three to one.

What one learns here: ``wrap(student, [first, second])``, and ``teacher_weights``, which
``distiller.set`` changes while training.

    python examples/two_teachers.py            # a minute on a CPU
    python examples/two_teachers.py --quick    # seconds; nothing is learned
"""

from collections.abc import Sequence

import digits
import runs
from digits import Images

import fxdistill

WIDTHS = {"teachers": 32, "student": 4}
WAYS: dict[str, tuple[float, ...] | None] = {
    "labels alone": None,
    "the first teacher": (1.0, 0.0),
    "the second teacher": (0.0, 1.0),
    "both": (1.0, 1.0),
    "both, 3 : 1": (3.0, 1.0),
}


def halves(images: Images) -> list[Images]:
    """The first half of the images, and the second one."""
    pairs = zip(*(part.chunk(2) for part in images), strict=True)
    return [Images(*pair) for pair in pairs]


def main(argv: Sequence[str] | None = None) -> None:
    options = runs.options(__doc__, argv, steps=1000, teacher_steps=600)
    measures = {"accuracy": "held-out accuracy (%)"}
    with runs.Study("two_teachers", options, measures, sizes=WIDTHS) as study:
        for seed in options.seeds:
            split = digits.load(seed)
            teachers = []
            for name, half in zip(("first", "second"), halves(split.teacher), strict=True):
                own = split._replace(teacher=half)
                teachers.append(digits.cnn(WIDTHS["teachers"], seed + 10 * len(teachers)))
                digits.taught(study, f"{name} teacher", teachers[-1], own, seed)
            for way, weights in WAYS.items():
                student = digits.cnn(WIDTHS["student"], seed + 1)
                # A step of models this small takes milliseconds: no compile pays for itself.
                distiller = fxdistill.wrap(
                    student,
                    teachers,
                    teacher_weights=weights,
                    logit_loss=None if weights is None else "forward_kl",
                    temperature=4.0,
                    task="classification",
                    compile=False,
                )
                digits.distil(study, way, distiller, split, seed)


if __name__ == "__main__":
    main()
