"""A distiller in a LightningModule of ten lines."""

from collections.abc import Sequence
from typing import Any

import lightning
import torch
from code_pair import options, pair, rows
from torch.utils.data import DataLoader

import fxdistill


class Distilled(lightning.LightningModule):
    def __init__(self, distiller: fxdistill.Distiller) -> None:
        super().__init__()
        self.distiller = distiller

    def training_step(self, batch: dict[str, Any], index: int) -> torch.Tensor:
        out = self.distiller(**batch)
        self.log_dict({"loss": out.loss, **out.losses})
        return out.loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.distiller.param_groups(), lr=2e-3)


def main(argv: Sequence[str] | None = None) -> None:
    asked = options(__doc__, argv)
    trainer = lightning.Trainer(
        max_steps=asked.steps,
        default_root_dir=asked.out,
        accelerator="cpu",
        accumulate_grad_batches=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    distiller = pair()
    data = DataLoader(rows(asked.out, 8 * asked.steps), batch_size=4)
    trainer.fit(Distilled(distiller), data)
    print({name: round(float(value), 3) for name, value in trainer.callback_metrics.items()})
    distiller.save_pretrained(asked.out / "student")


if __name__ == "__main__":
    main()
