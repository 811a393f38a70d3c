"""A detector without anchor boxes, for scenes of digits, and the loss that teaches it by labels."""

from collections.abc import Sequence

import digit_scenes
import torch
import torch.nn.functional as F
from digit_scenes import NOTHING, Scenes
from torch import Tensor, nn


class Places(nn.Module):
    """A convolution over each level of a pyramid, whose places are one axis: ``[B, 80, out]``."""

    def __init__(self, width: int, out: int, boxes: bool = False) -> None:
        super().__init__()
        self.conv, self.boxes = nn.Conv2d(width, out, 3, padding=1), boxes
        self.register_buffer("places", digit_scenes.places(), persistent=False)

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        z = torch.cat([self.conv(level).flatten(2) for level in levels], -1).mT
        if not self.boxes:
            return z
        x, y, stride = self.places.unbind(-1)
        left, top, right, bottom = (F.softplus(z) * stride[:, None]).unbind(-1)
        return torch.stack([x - left, y - top, x + right, y + bottom], -1)


class Detector(nn.Module):
    """Three stages, a pyramid of two levels, and what its places say: ``[B, 80, 10 + 4]``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        stages = [
            nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), nn.BatchNorm2d(b), nn.ReLU())
            for a, b in ((1, width), (width, 2 * width), (2 * width, 2 * width))
        ]
        self.stages = nn.ModuleList(stages)
        self.pyramid = nn.ModuleList(
            [nn.Sequential(nn.Conv2d(2 * width, width, 3, padding=1), nn.ReLU()) for _ in range(2)]
        )
        self.classes, self.boxes = Places(width, NOTHING), Places(width, 4, boxes=True)
        nn.init.constant_(self.classes.conv.bias, -3.0)  # at first, nothing is there

    def forward(self, pixels: Tensor) -> Tensor:
        fine = self.stages[1](self.stages[0](pixels))
        coarse = self.stages[2](fine)
        fine = fine + F.interpolate(coarse, scale_factor=2)
        levels = [self.pyramid[0](fine), self.pyramid[1](coarse)]
        return torch.cat([self.classes(levels), self.boxes(levels)], -1)


def label_loss(said: Tensor, labels: Tensor, *, weights: Tensor | None = None) -> Tensor:
    """Focal loss of the classes (Lin et al. 2017), L1 of the foreground's boxes, a foreground."""
    digits_, boxes = labels[..., 0].long(), labels[..., 1:]
    foreground = (digits_ != NOTHING).float()
    target = F.one_hot(digits_, NOTHING + 1)[..., :NOTHING].float()
    z = said[..., :NOTHING]
    cross = F.binary_cross_entropy_with_logits(z, target, reduction="none")
    focal = cross * (target - z.sigmoid()).square()
    apart = (said[..., NOTHING:] - boxes).abs().mean(-1) * foreground
    return (focal.sum() + 0.5 * apart.sum()) / foreground.sum().clamp(min=1)


def labels_of(batch: Scenes) -> Tensor:
    return torch.cat([batch.digits[..., None].float(), batch.boxes], -1)


@torch.no_grad()
def precision(model: Detector, scenes: Scenes) -> float:
    model.eval()
    said = model(scenes.pixels)
    model.train()
    return digit_scenes.average_precision(scenes, said[..., :NOTHING], said[..., NOTHING:])
