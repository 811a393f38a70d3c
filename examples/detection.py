"""A small detector learns from a large one: classes, boxes, and the pyramid between.

Both find handwritten digits in scenes of up to three, without anchor boxes: every place of two
grids says which digit lies there and where its edges are (as in FCOS, Tian et al. 2019, arXiv
1904.01355). The teacher's scenes are made of 1000 digits, the student's of 100 others. Besides its
labels the student gets the teacher's classes, softened, and its boxes, both where there is a digit;
its pyramid's maps, weighed by where the teacher is active; or all of these.

What one learns here: a label loss of one's own, weights that a call brings by name
(``weights="foreground"``), and a match for each level of a pyramid.

    python examples/detection.py            # three minutes on a CPU
    python examples/detection.py --quick    # seconds; nothing is learned
"""

from collections.abc import Sequence

import digit_scenes
import digits
import runs
import torch
from digit_detector import Detector, label_loss, labels_of, precision
from digit_scenes import NOTHING, Scenes
from torch import Tensor

import fxdistill
from fxdistill import Match

WIDTHS = {"teacher": 24, "student": 8}
THERE = {"weights": "foreground"}  # of each call: where a digit is
CLASSES = Match("classes", "classes", loss="detection_classification", weight=1.0, **THERE)
BOXES = Match("boxes", "boxes", loss="detection_box", weight=0.2, **THERE)
LEVELS = [Match(f"pyramid.{i}", f"pyramid.{i}", loss="fpn", project="auto") for i in (0, 1)]
WAYS = {
    "labels alone": [],
    "classes": [CLASSES],
    "boxes": [BOXES],
    "pyramid": LEVELS,
    "classes, boxes, pyramid": [CLASSES, BOXES, *LEVELS],
}


def main(argv: Sequence[str] | None = None) -> None:
    options = runs.options(__doc__, argv, steps=500, teacher_steps=1200)
    count = 16 if options.quick else 1000
    measures = {"precision": "average precision (%)"}
    with runs.Study("detection", options, measures, sizes=WIDTHS) as study:
        for seed in options.seeds:
            split = digits.load(seed)
            scenes = {
                name: digit_scenes.compose(part, count, seed)
                for name, part in split._asdict().items()
            }
            torch.manual_seed(seed)
            teacher, steps = Detector(WIDTHS["teacher"]), options.teacher_steps
            data = digit_scenes.batches(scenes["teacher"], 32, steps, seed)

            def taught(batch: Scenes, model: Detector = teacher) -> Tensor:
                return label_loss(model(batch.pixels), labels_of(batch))

            study.train("teacher", taught, teacher.parameters(), data, steps, lr=5e-3)
            measured = precision(teacher, scenes["heldout"])
            study.note("teacher", reference=True, precision=measured)
            for way, matches in WAYS.items():
                torch.manual_seed(seed + 1)
                student = Detector(WIDTHS["student"])
                named = any(match.weights for match in matches)

                def call(batch: Scenes, named: bool = named) -> dict:
                    given = {"pixels": batch.pixels, "labels": labels_of(batch)}
                    foreground = {"weights": {"foreground": batch.digits != NOTHING}}
                    return {**given, **foreground} if named else given

                distiller = fxdistill.wrap(
                    student,
                    teacher,
                    matches,
                    feature_weight=float(max(len(matches), 1)),  # the sum, and no mean
                    logit_loss=None,
                    label_loss=label_loss,
                    task="classification",
                    example_inputs=call(scenes["student"]),  # wrap reads widths from them
                    compile=False,  # steps of milliseconds: no compile pays for itself
                )

                def loss(batch: Scenes, run=distiller, call=call) -> Tensor:
                    return run(**call(batch)).loss

                data = digit_scenes.batches(scenes["student"], 32, options.steps, seed)
                parameters = distiller.parameters()
                study.train(way, loss, parameters, data, options.steps, lr=1e-2)
                study.note(way, precision=precision(student, scenes["heldout"]))


if __name__ == "__main__":
    main()
