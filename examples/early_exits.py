"""A network with early exits is its own teacher: its last classifier teaches the earlier ones.

A CNN of three sections reads handwritten digits, of which 100 are labelled. It learns with its own
classifier alone; with one more classifier behind each of the first two sections, all from labels;
and as in Zhang et al. 2019 (arXiv 1905.08094), where the early ones also learn from the last one's
predictions, and their sections from its features. There is no teacher model.

What one learns here: ``presets.be_your_own_teacher`` and ``wrap(student, None)``; the modules of
the exits live in ``distiller.heads`` and are no part of the student, which stays what it was.

    python examples/early_exits.py            # a minute on a CPU
    python examples/early_exits.py --quick    # seconds; nothing is learned
"""

from collections.abc import Sequence

import digits
import runs
import torch
from digits import Images
from torch import Tensor, nn

import fxdistill
from fxdistill import presets

WIDTH = 8
BLOCKS = ("blocks.0", "blocks.1", "blocks.2")


def block(before: int, width: int, stride: int) -> nn.Sequential:
    """Two convolutions; with a stride of 2, maps of half the size."""
    layers: list[nn.Module] = []
    for a, s in ((before, stride), (width, 1)):
        layers += [nn.Conv2d(a, width, 3, s, 1), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*layers)


class Sections(nn.Module):
    """``[B, 1, 8, 8]`` to maps ``[B, w, 8, 8]``, ``[B, 2w, 4, 4]``, ``[B, 4w, 2, 2]``, logits."""

    def __init__(self, width: int) -> None:
        super().__init__()
        sizes = ((1, width, 1), (width, 2 * width, 2), (2 * width, 4 * width, 2))
        self.blocks = nn.ModuleList(block(*size) for size in sizes)
        self.head = nn.Linear(4 * width, 10)

    def forward(self, pixels: Tensor) -> Tensor:
        for section in self.blocks:
            pixels = section(pixels)
        return self.head(pixels.mean((2, 3)))


class Early(nn.Module):
    """What runs when one leaves at an exit: the sections up to it, and its classifier."""

    def __init__(self, distiller: fxdistill.Distiller, exit_: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*distiller.student.blocks[: exit_ + 1])
        self.head = distiller.heads[f"exit{exit_}"]

    def forward(self, pixels: Tensor) -> Tensor:
        return self.head(self.blocks(pixels))


def ways(student: Sections) -> dict[str, dict]:
    """Arguments of ``wrap``. In the second, the exits' label losses count as in the third."""
    alone = {"alpha": 0.0, "feature": 0.0}
    return {
        "one classifier": {},
        "exits, labels": presets.be_your_own_teacher(student, BLOCKS, **alone),
        "exits, own teacher": presets.be_your_own_teacher(student, BLOCKS),
    }


def note(study: runs.Study, way: str, distiller: fxdistill.Distiller, heldout: Images) -> None:
    """Note how well the last classifier reads, and the exits, where there are any."""
    early = [digits.accuracy(Early(distiller, i), heldout) for i in range(len(distiller.heads))]
    names = dict(zip(("first", "second"), early, strict=False))
    study.note(way, last=digits.accuracy(distiller.student, heldout), **names)


def main(argv: Sequence[str] | None = None) -> None:
    options = runs.options(__doc__, argv, steps=1000)
    measures = {
        "last": "held-out accuracy of the last classifier (%)",
        "second": "of the second exit (%)",
        "first": "of the first exit (%)",
    }
    with runs.Study("early_exits", options, measures, sizes={"width": WIDTH}) as study:
        for seed in options.seeds:
            split = digits.load(seed)
            for way in ways(Sections(WIDTH)):
                torch.manual_seed(seed)
                student = Sections(WIDTH)
                # A step of models this small takes milliseconds: no compile pays for itself.
                given = {"task": "classification", "compile": False, **ways(student)[way]}
                distiller = fxdistill.wrap(student, None, **given)
                data = digits.batches(split.student, 64, options.steps, seed)
                parameters = distiller.parameters()

                def loss(batch: tuple[Tensor, Tensor], run=distiller) -> Tensor:
                    return run(batch[0], labels=batch[1]).loss

                study.train(way, loss, parameters, data, options.steps, lr=1e-2)
                note(study, way, distiller, split.heldout)


if __name__ == "__main__":
    main()
