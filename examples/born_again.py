"""Born again: a network teaches its own kind, three generations long, on handwritten digits.

Generation 0 learns from 100 labelled images. Each further one starts from new weights, of the same
architecture, and learns from the same labels and the logits of the generation before (Furlanello
et al. 2018, arXiv 1805.04770). At last, all generations vote.

What one learns here: a student that has been trained is a teacher like any other; nothing has to be
unwrapped, because nothing was changed in it.

    python examples/born_again.py            # four minutes on a CPU
    python examples/born_again.py --quick    # seconds; nothing is learned
"""

from collections.abc import Sequence

import digits
import runs
import torch
from torch import Tensor, nn

import fxdistill

WIDTH = 8
GENERATIONS = 3


class Vote(nn.Module):
    """The mean of the probabilities of several classifiers."""

    def __init__(self, models: Sequence[nn.Module]) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)

    def forward(self, pixels: Tensor) -> Tensor:
        return torch.stack([model(pixels).softmax(-1) for model in self.models]).mean(0)


def main(argv: Sequence[str] | None = None) -> None:
    options = runs.options(__doc__, argv, steps=1000)
    measures = {"accuracy": "held-out accuracy (%)"}
    with runs.Study("born_again", options, measures, sizes={"width": WIDTH}) as study:
        for seed in options.seeds:
            split = digits.load(seed)
            models = [digits.cnn(WIDTH, seed)]
            data = digits.batches(split.student, 64, options.steps, seed)
            given = (digits.of_labels(models[0]), models[0].parameters(), data, options.steps)
            study.train("generation 0", *given, lr=1e-2)
            study.note("generation 0", accuracy=digits.accuracy(models[0], split.heldout))
            for generation in range(1, GENERATIONS + 1):
                student = digits.cnn(WIDTH, seed + 1000 * generation)
                # A step of models this small takes a millisecond: no compile pays for itself.
                distiller = fxdistill.wrap(student, models[-1], compile=False)
                digits.distil(study, f"generation {generation}", distiller, split, seed)
                models.append(student)
            study.note("all of them", accuracy=digits.accuracy(Vote(models), split.heldout))


if __name__ == "__main__":
    main()
