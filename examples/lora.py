"""A LoRA student that stays close to its own base: the base's weights are in memory once.

The base runs with the adapters off as the teacher; only adapters learn, and only they are saved.
"""

from collections.abc import Sequence

import torch
from code_pair import llama, options, rows
from peft import LoraConfig, get_peft_model

import fxdistill


def main(argv: Sequence[str] | None = None) -> None:
    asked = options(__doc__, argv)
    config = LoraConfig(r=8, target_modules=["q_proj", "v_proj"], lora_dropout=0.05)
    student = get_peft_model(llama(4, 128), config)
    base = fxdistill.base_of(student)
    distiller = fxdistill.wrap(student, base, logit_weight=0.5, compile=False)
    learning = [p for p in distiller.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=2e-3)
    data = rows(asked.out, 4 * asked.steps)
    for step in range(asked.steps):
        ids = torch.stack([row["input_ids"] for row in data[4 * step : 4 * step + 4]])
        out = distiller(input_ids=ids, labels=ids)
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % max(1, asked.steps // 10) == 0:
            print(step, {name: round(value.item(), 4) for name, value in out.losses.items()})
    distiller.save_pretrained(asked.out / "adapters")
    saved = sum(p.numel() for p in learning)
    print(f"{saved:,} of {sum(p.numel() for p in student.parameters()):,} parameters are saved")


if __name__ == "__main__":
    main()
