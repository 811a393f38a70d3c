"""A distiller in a loop of Accelerate: accumulation, a state that is saved and loaded.

python examples/with_accelerate.py
torchrun --nproc-per-node 2 examples/with_accelerate.py    # half of every batch each
"""

from collections.abc import Sequence

import torch
from accelerate import Accelerator
from code_pair import options, pair, rows
from torch.utils.data import DataLoader


def main(argv: Sequence[str] | None = None) -> None:
    asked = options(__doc__, argv)
    accelerator = Accelerator(gradient_accumulation_steps=2, cpu=True)
    distiller = pair()
    optimizer = torch.optim.AdamW(distiller.param_groups(), lr=2e-3)
    data = DataLoader(rows(asked.out, 8 * asked.steps), batch_size=4)
    model, optimizer, data = accelerator.prepare(distiller, optimizer, data)
    model.train()
    for step, batch in enumerate(data):
        with accelerator.accumulate(model):
            out = model(**batch)
            accelerator.backward(out.loss)
            optimizer.step()
            optimizer.zero_grad()
        if step % max(1, len(data) // 10) == 0:
            terms = {name: round(value.item(), 3) for name, value in out.losses.items()}
            accelerator.print(step, round(out.loss.item(), 3), terms["logits"], terms["labels"])
    accelerator.save_state(str(asked.out / "accelerate"))
    accelerator.wait_for_everyone()  # the first rank writes for all of them
    accelerator.load_state(str(asked.out / "accelerate"))
    accelerator.unwrap_model(model).save_pretrained(asked.out / "student")
    accelerator.end_training()


if __name__ == "__main__":
    main()
