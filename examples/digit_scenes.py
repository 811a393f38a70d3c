"""Scenes for detectors: up to three handwritten digits of several sizes on a dark canvas.

A detector sees a scene at 80 *places*: the centres of an 8 × 8 grid, for small digits, and of a
4 × 4 grid, for large ones. A place in the middle of a digit of its size is *foreground*: it is to
say which digit that is, and how far away its four edges are.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from digits import Images
from torch import Tensor

SIDE, NOTHING = 32, 10
STRIDES = (4, 8)  # of the two grids
LARGE = 12  # digits of so many pixels and more are seen by the coarse grid


class Scenes(NamedTuple):
    """``pixels`` ``[N, 1, 32, 32]``; of each place its digit, or NOTHING, and its box.

    A box is (left, top, right, bottom), in pixels of the scene.
    """

    pixels: Tensor
    digits: Tensor  # [N, 80]
    boxes: Tensor  # [N, 80, 4]
    truth: list[list[tuple[int, Tensor]]]  # of each scene its digits and their boxes


def places() -> Tensor:
    """The centre and the stride of every place, ``[80, 3]``: the fine grid, then the coarse one."""
    found = []
    for stride in STRIDES:
        at = (torch.arange(SIDE // stride) + 0.5) * stride
        y, x = torch.meshgrid(at, at, indexing="ij")
        found.append(torch.stack([x, y, torch.full_like(x, stride)], -1).flatten(0, 1))
    return torch.cat(found)


def compose(images: Images, count: int, seed: int) -> Scenes:
    """``count`` scenes of these digits, the same ones for the same seed."""
    generator = torch.Generator().manual_seed(seed)

    def draw(below: int) -> int:
        return int(torch.randint(below, (), generator=generator))

    pixels = torch.zeros(count, 1, SIDE, SIDE)
    truth: list[list[tuple[int, Tensor]]] = [[] for _ in range(count)]
    for scene, found in zip(pixels, truth, strict=True):
        for _ in range(8):
            size = (8, 12, 16)[draw(3)]
            x, y = draw(SIDE - size + 1), draw(SIDE - size + 1)
            spot = scene[:, y : y + size, x : x + size]
            if spot.any() or len(found) == 3:  # where another digit lies, or enough of them
                continue
            index = draw(len(images.digits))
            large = F.interpolate(images.pixels[index][None], size, mode="bilinear")[0]
            spot.copy_(large.clamp(min=0.01))  # a box is nowhere empty
            found.append((int(images.digits[index]), torch.tensor([x, y, x + size, y + size])))
    pixels += 0.1 * torch.randn(pixels.shape, generator=generator)
    return Scenes(pixels, *_assigned(truth), truth)


def _assigned(truth: list[list[tuple[int, Tensor]]]) -> tuple[Tensor, Tensor]:
    """What each place is to say."""
    x, y, stride = places().unbind(-1)
    digits = torch.full((len(truth), len(x)), NOTHING)
    boxes = torch.zeros(len(truth), len(x), 4)
    for i, scene in enumerate(truth):
        for digit, box in scene:
            size = int(box[2] - box[0])
            middle, step = (box[:2] + box[2:]) / 2, STRIDES[size >= LARGE]
            inside = ((x - middle[0]).abs() <= step / 2) & ((y - middle[1]).abs() <= step / 2)
            inside &= stride == step
            digits[i, inside], boxes[i, inside] = digit, box.float()
    return digits, boxes


def batches(scenes: Scenes, batch: int, steps: int, seed: int) -> Iterator[Scenes]:
    """Scenes at random; the same ones for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        chosen = torch.randint(len(scenes.pixels), (batch,), generator=generator)
        yield Scenes(*(part[chosen] for part in scenes[:3]), [])


def average_precision(scenes: Scenes, logits: Tensor, boxes: Tensor) -> float:
    """AP at an overlap of one half, in per cent, over all digits together.

    Detections, best first, are right where their digit and half of their box are; each digit of a
    scene is found once. AP is the mean, over all digits there are, of the best precision at which
    one more of them is found.
    """
    found = []  # score, right
    for scene, z, places_ in zip(scenes.truth, logits, boxes, strict=True):
        left = list(scene)
        scores, digits = z.sigmoid().max(-1)
        kept: list[tuple[int, Tensor]] = []
        for i in scores.argsort(descending=True).tolist():
            digit, box = int(digits[i]), places_[i]
            if scores[i] < 0.05 or any(d == digit and overlap(b, box) > 0.5 for d, b in kept):
                continue
            kept.append((digit, box))
            right = [j for j, (d, b) in enumerate(left) if d == digit and overlap(b, box) > 0.5]
            if right:
                del left[right[0]]
            found.append((float(scores[i]), bool(right)))
    right = torch.tensor([hit for _, hit in sorted(found, reverse=True)] or [False]).float()
    precision = right.cumsum(0) / torch.arange(1, len(right) + 1)
    best = precision.flip(0).cummax(0).values.flip(0)  # at this recall or a higher one
    return 100 * float((best * right).sum()) / sum(map(len, scenes.truth))


def overlap(a: Tensor, b: Tensor) -> float:
    """Intersection over union of two boxes."""
    sides = (torch.minimum(a[2:], b[2:]) - torch.maximum(a[:2], b[:2])).clamp(min=0)
    areas = sum(float((box[2:] - box[:2]).clamp(min=0).prod()) for box in (a, b))
    shared = float(sides.prod())
    return shared / (areas - shared) if shared else 0.0
