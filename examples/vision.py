"""A CNN learns from a ViT: maps learn from tokens, on handwritten digits.

The teacher is a ViT that has learned from 1000 digits, enlarged to 16 × 16 and cut into 4 × 4
patches. The student is a small CNN with 100 labelled digits, whose second stage has maps of 4 × 4,
too: place by place they are the ViT's tokens, behind its class token. It learns from labels alone;
by FitNets (Romero et al. 2015, arXiv 1412.6550), by attention transfer (Zagoruyko & Komodakis 2017,
arXiv 1612.03928), which needs no projection; and from logits, with and without these.

What one learns here: ``rearrange`` makes maps of tokens, and each model gets inputs of its own.

    python examples/vision.py            # three minutes on a CPU
    python examples/vision.py --quick    # seconds; nothing is learned
"""

from collections.abc import Sequence

import digits
import runs
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification

import fxdistill
from fxdistill import Match

WIDTH = 4  # of the CNN's first stage
SIZES = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3}
MAPS = {"rearrange": ("b c h w -> b c h w", "b (1 + h w) c -> b c h w")}
LOGITS = {"logit_loss": "forward_kl", "temperature": 4.0}
FITNETS = {
    "mapping": [Match("stage2", "vit.vit.layers.2", loss="fitnet", project="auto", **MAPS)],
    "feature_weight": 3.0,
}
TRANSFER = {
    "mapping": [Match("stage2", "vit.vit.layers.2", loss="attention_transfer", **MAPS)],
    "feature_weight": 10.0,
}
WAYS = {
    "labels alone": {},
    "FitNets": FITNETS,
    "attention transfer": TRANSFER,
    "logits": LOGITS,
    "logits, FitNets": {**LOGITS, **FITNETS},
    "logits, attention transfer": {**LOGITS, **TRANSFER},
}


class Enlarged(nn.Module):
    """A ViT that sees digits twice as large."""

    def __init__(self) -> None:
        super().__init__()
        config = ViTConfig(
            image_size=16,
            patch_size=4,
            num_channels=1,
            num_attention_heads=4,
            num_labels=10,
            **SIZES,
        )
        self.vit = ViTForImageClassification(config)

    def forward(self, pixels: Tensor) -> Tensor:
        large = F.interpolate(pixels, scale_factor=2, mode="bilinear")
        return self.vit(pixel_values=large).logits


def main(argv: Sequence[str] | None = None) -> None:
    options = runs.options(__doc__, argv, steps=800, teacher_steps=1000)
    measures = {"accuracy": "held-out accuracy (%)"}
    with runs.Study("vision", options, measures, sizes={"width": WIDTH, **SIZES}) as study:
        for seed in options.seeds:
            split = digits.load(seed)
            torch.manual_seed(seed)
            vit = Enlarged()
            digits.taught(study, "ViT", vit, split, seed, lr=2e-3)
            examples = (split.student.pixels[:4],)  # wrap reads the widths of projections from them
            for way, recipe in WAYS.items():
                # A step of models this small takes milliseconds: no compile pays for itself.
                given = {"logit_loss": None, "compile": False, "example_inputs": examples, **recipe}
                distiller = fxdistill.wrap(digits.cnn(WIDTH, seed + 1), vit, **given)
                digits.distil(study, way, distiller, split, seed)


if __name__ == "__main__":
    main()
