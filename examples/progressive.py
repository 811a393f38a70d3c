"""A schedule against constants: targets that are soft at first, and sharper stage by stage.

A small CNN has 100 labelled digits and the logits of a wide CNN that has learned from 1000 others.
The temperature of the logit loss is 4 or 1 all the time; or it falls in stages, from 10 to 1
(annealing, as in Jafari et al. 2021, arXiv 2104.07163), while the weight of the logits stays, or
rises from 0.5 to 1.

What one learns here: ``fxdistill.Schedule`` and ``schedules.stages``; settings are inputs of a
distiller, so a compiled step would not be compiled again.

    python examples/progressive.py            # a minute on a CPU
    python examples/progressive.py --quick    # seconds; nothing is learned
"""

from collections.abc import Iterator, Sequence
from typing import Any

import digits
import runs
from torch import Tensor

import fxdistill
from fxdistill import Schedule, schedules

WIDTH = 4  # of the student's first stage; the teacher's is 32
FALLING, RISING = (10.0, 5.0, 2.0, 1.0), (0.5, 0.7, 0.85, 1.0)


def ways(steps: int) -> dict[str, dict[str, Any]]:
    """What is set when; a number stays."""
    every = max(1, steps // len(FALLING))
    falling, rising = schedules.stages(FALLING, every=every), schedules.stages(RISING, every=every)
    return {
        "labels alone": {"logit_weight": 0.0},
        "τ = 1": {"temperature": 1.0},
        "τ = 4": {"temperature": 4.0},
        "τ = 10, 5, 2, 1": {"temperature": falling},
        "τ = 10, 5, 2, 1, weight rises": {"temperature": falling, "logit_weight": rising},
        "τ = 1, 2, 5, 10": {"temperature": schedules.stages(FALLING[::-1], every=every)},
    }


def following(data: Iterator[Any], schedule: Schedule) -> Iterator[Any]:
    """The batches; before each but the first, the schedule makes a step."""
    for number, batch in enumerate(data):
        if number:
            schedule.step()
        yield batch


def main(argv: Sequence[str] | None = None) -> None:
    options = runs.options(__doc__, argv, steps=1000, teacher_steps=600)
    measures = {"accuracy": "held-out accuracy (%)"}
    sizes = {"width": WIDTH, "falling": FALLING, "rising": RISING}
    with runs.Study("progressive", options, measures, sizes=sizes) as study:
        for seed in options.seeds:
            split = digits.load(seed)
            teacher = digits.teacher(study, split, seed)
            for way, settings in ways(options.steps).items():
                student = digits.cnn(WIDTH, seed + 1)
                # A step of models this small takes milliseconds: no compile pays for itself.
                given = {"task": "classification", "compile": False}
                distiller = fxdistill.wrap(student, teacher, **given)
                schedule = Schedule(distiller, **settings)
                data = digits.batches(split.student, 64, options.steps, seed)

                def loss(batch: tuple[Tensor, Tensor], run=distiller) -> Tensor:
                    return run(batch[0], labels=batch[1]).loss

                rest = (distiller.parameters(), following(data, schedule), options.steps)
                study.train(way, loss, *rest, lr=1e-2)
                study.note(way, accuracy=digits.accuracy(student, split.heldout))


if __name__ == "__main__":
    main()
