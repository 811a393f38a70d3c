"""At which temperature should a student learn from logits? A sweep on handwritten digits.

A small CNN has 100 labelled images; its teacher, a wide one, has learned from 1000 others. The
student learns from labels alone, and then from labels and logits at τ = 1, 2, 4, 8 and 16 (Hinton,
Vinyals & Dean 2015, arXiv 1503.02531: "when the distilled net was radically smaller, temperatures
in the range 2.5 to 4 worked significantly better").

What one learns here: τ is a number that a distiller is told, ``distiller.set(temperature=4.0)``
would change it while training; losses carry τ², so that their gradients stay of one size.

    python examples/temperature.py            # a minute on a CPU
    python examples/temperature.py --quick    # seconds; nothing is learned
"""

from collections.abc import Sequence

import digits
import runs

import fxdistill

TEMPERATURES = (1, 2, 4, 8, 16)
WIDTH = 4  # of the student's first stage; the teacher's is 32


def main(argv: Sequence[str] | None = None) -> None:
    options = runs.options(__doc__, argv, steps=1000, teacher_steps=600)
    measures = {"accuracy": "held-out accuracy (%)"}
    with runs.Study("temperature", options, measures, sizes={"width": WIDTH}) as study:
        for seed in options.seeds:
            split = digits.load(seed)
            teacher = digits.teacher(study, split, seed)
            for tau in (None, *TEMPERATURES):
                way = "labels alone" if tau is None else f"logits at τ = {tau}"
                student = digits.cnn(WIDTH, seed + 1)
                # A step of models this small is a millisecond: no compile pays for itself.
                distiller = fxdistill.wrap(
                    student,
                    teacher,
                    logit_loss=None if tau is None else "forward_kl",
                    temperature=tau or 1.0,
                    compile=False,
                )
                digits.distil(study, way, distiller, split, seed)


if __name__ == "__main__":
    main()
