"""Real images that scikit-learn brings: 1797 handwritten digits of 8 × 8, and a small CNN for them.

Labels are scarce for a student: the teacher has learned from 1000 images, the student is given
100 others, and 697 belong to neither. Which image is where, and all first weights, follow from the
seed.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from runs import Study
from sklearn.datasets import load_digits
from torch import Tensor, nn

import fxdistill


class Images(NamedTuple):
    """Images ``[N, 1, 8, 8]`` between 0 and 1, and their digits ``[N]``."""

    pixels: Tensor
    digits: Tensor


class Split(NamedTuple):
    """Who sees what: no image is in two of these."""

    teacher: Images
    student: Images
    heldout: Images


def load(seed: int, for_student: int = 100) -> Split:
    """The digits, shuffled and split by the seed."""
    pixels, digits = load_digits(return_X_y=True)
    order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(seed))
    shuffled = Images(
        torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8)[order] / 16,
        torch.tensor(digits)[order],
    )
    ends = (1000, 1000 + for_student, len(digits))
    parts = [
        Images(*(part[a:b] for part in shuffled)) for a, b in zip((0, *ends), ends, strict=False)
    ]
    return Split(*parts)


def batches(images: Images, batch: int, steps: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Images at random, each moved by up to a pixel, with some noise; a seed has its own."""
    generator = torch.Generator().manual_seed(seed)
    padded = F.pad(images.pixels, (1, 1, 1, 1))
    for _ in range(steps):
        chosen = torch.randint(len(images.digits), (batch,), generator=generator)
        moved = torch.randint(3, (2, batch, 1), generator=generator) + torch.arange(8)
        rows, columns = moved[0][:, :, None], moved[1][:, None, :]
        pixels = padded[chosen[:, None, None], 0, rows, columns][:, None]
        noise = 0.1 * torch.randn(pixels.shape, generator=generator)
        yield pixels + noise, images.digits[chosen]


@torch.no_grad()
def accuracy(model: nn.Module, images: Images) -> float:
    """The share of the images that a classifier gets right, in per cent."""
    model.eval()
    right = (model(images.pixels).argmax(-1) == images.digits).sum()
    model.train()
    return 100 * right.item() / len(images.digits)


class CNN(nn.Module):
    """Two stages of convolutions, ``[B, width, 8, 8]`` and ``[B, 2·width, 4, 4]``, and a head.

    ``stage1``, ``stage2`` and ``embedding`` (``[B, 8·width]``) are what matches name.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stage1 = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()
        )
        self.stage2 = nn.Sequential(
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(),
        )
        self.embedding = nn.Sequential(nn.AvgPool2d(2), nn.Flatten())
        self.head = nn.Linear(8 * width, 10)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.head(self.embedding(self.stage2(self.stage1(pixels))))


def cnn(width: int, seed: int) -> CNN:
    """A CNN with random weights, the same ones for the same seed."""
    torch.manual_seed(seed)
    return CNN(width)


def of_labels(model: nn.Module) -> Callable[[tuple[Tensor, Tensor]], Tensor]:
    """The loss of a batch of labelled images."""
    return lambda batch: F.cross_entropy(model(batch[0]), batch[1])


def taught(
    study: Study, way: str, model: nn.Module, split: Split, seed: int, *, lr: float = 1e-2
) -> None:
    """Teach a teacher by its images, or find it, and note how well it reads others."""
    steps = study.options.teacher_steps
    data = batches(split.teacher, 64, steps, seed)
    made_of = (seed, split.teacher.digits.tolist())
    study.taught(way, model, of_labels(model), data, steps, lr=lr, made_of=made_of)
    study.note(way, reference=True, accuracy=accuracy(model, split.heldout))


def distil(study: Study, way: str, distiller: fxdistill.Distiller, split: Split, seed: int) -> None:
    """Train a distiller's student on the student's images, and note how well it reads others."""
    data, steps = batches(split.student, 64, study.options.steps, seed), study.options.steps

    def loss(batch: tuple[Tensor, Tensor]) -> Tensor:
        return distiller(batch[0], labels=batch[1]).loss

    study.train(way, loss, distiller.parameters(), data, steps, lr=1e-2)
    study.note(way, accuracy=accuracy(distiller.student, split.heldout))


def teacher(study: Study, split: Split, seed: int, width: int = 32) -> CNN:
    """A CNN that has learned from the teacher's images."""
    model = cnn(width, seed)
    taught(study, "teacher", model, split, seed)
    return model
