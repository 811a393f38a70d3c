"""Three networks learn together, each from labels and from the other two, without a teacher.

Three CNNs of one architecture start from different weights and see the same 100 labelled digits, in
the same batches. They learn each for itself; or together, in one graph, each also from the mean of
the other two's logits, or from each of the other two (Zhang et al. 2018, arXiv 1706.00384, whose
target is the mean of the divergences from each peer).

What one learns here: ``fxdistill.mutual``, whose students are all trained; ``peers=``, what each of
them learns from.

    python examples/mutual_learning.py            # a minute on a CPU
    python examples/mutual_learning.py --quick    # seconds; nothing is learned
"""

from collections.abc import Sequence

import digits
import runs
import torch
from born_again import Vote
from torch import Tensor

import fxdistill

WIDTH = 8
STUDENTS = 3
WAYS: dict[str, dict] = {
    "each for itself": {"logit_loss": None},
    "from the mean of logits": {"peers": "logits"},
    "from each of the others": {"peers": "each"},
}


def main(argv: Sequence[str] | None = None) -> None:
    options = runs.options(__doc__, argv, steps=600)
    measures = {
        "accuracy": "held-out accuracy, mean of the three (%)",
        "vote": "of their vote (%)",
    }
    sizes = {"width": WIDTH, "students": STUDENTS}
    with runs.Study("mutual_learning", options, measures, sizes=sizes) as study:
        for seed in options.seeds:
            split = digits.load(seed)
            for way, recipe in WAYS.items():
                students = [digits.cnn(WIDTH, seed + 1000 * number) for number in range(STUDENTS)]
                # A step of models this small takes milliseconds: no compile pays for itself.
                # Without a logit loss, the three share nothing but the call.
                given = {"task": "classification", "compile": False, **recipe}
                distiller = fxdistill.mutual(students, **given)

                def loss(batch: tuple[Tensor, Tensor], run=distiller) -> Tensor:
                    return run(batch[0], labels=batch[1]).loss

                data = digits.batches(split.student, 64, options.steps, seed)
                study.train(way, loss, distiller.parameters(), data, options.steps, lr=1e-2)
                alone = [digits.accuracy(student, split.heldout) for student in students]
                mean = torch.tensor(alone).mean().item()
                study.note(way, accuracy=mean, vote=digits.accuracy(Vote(students), split.heldout))


if __name__ == "__main__":
    main()
