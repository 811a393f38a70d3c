"""A day under Trainer: killed for good in the middle of a save, resumed, exported, used without us.

Each part is a process of its own, with the step compiled, as a user has it.
"""

import multiprocessing as mp
import os
import signal
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM, Trainer

from fxdistill.trainers import LossCallback, SaveStudent
from loops import ROWS, Rows, pair, trainer

SAVED, BROKEN, STEPS = 2, 4, 6


def day(folder, resumed, queue):
    """Train to the end, or until the process ends itself within the save of step ``BROKEN``."""
    torch.set_num_threads(1)
    run = trainer(
        pair(compile={"backend": "aot_eager"}),
        folder,
        callbacks=[LossCallback(), SaveStudent()],
        max_steps=STEPS,
        save_strategy="steps",
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        logging_steps=1,
        load_best_model_at_end=True,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=ROWS // 2,
        learning_rate=1e-2,
    )
    if queue is None:
        real = Trainer._save_optimizer_and_scheduler

        def killed(self, output_dir):
            if self.state.global_step == BROKEN:
                os.kill(os.getpid(), signal.SIGKILL)
            real(self, output_dir)

        Trainer._save_optimizer_and_scheduler = killed
    run.train(resume_from_checkpoint=resumed)
    run.model.save_pretrained(f"{folder}/final")
    records = [row for row in run.state.log_history if "loss" in row or "eval_loss" in row]
    queue.put((run.state.best_model_checkpoint, [_values(row) for row in records]))


def _values(row):
    return {
        name: value for name, value in row.items() if "runtime" not in name and "per_s" not in name
    }


@pytest.mark.slow
def test_killed_within_a_save_resumed_and_exported(tmp_path):
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["loops", "fxdistill.distiller.wrap"])

    def part(folder, resumed=None, ends=True):
        queue = context.SimpleQueue() if ends else None
        process = context.Process(target=day, args=(str(folder), resumed, queue))
        process.start()
        process.join(250)
        assert process.exitcode == (0 if ends else -signal.SIGKILL)
        return queue.get() if ends else None

    _, wanted = part(tmp_path / "whole")
    folder = tmp_path / "killed"
    part(folder, ends=False)
    # What transformers writes last is how one tells a checkpoint that is whole.
    last = folder / f"checkpoint-{BROKEN}"
    assert (last / "model.safetensors").exists()
    assert not (last / "trainer_state.json").exists()
    best, records = part(folder, str(folder / f"checkpoint-{SAVED}"))
    assert records == wanted  # every term of every step, bit for bit
    assert sum("loss" in row for row in records) == STEPS
    assert (last / "trainer_state.json").exists()

    student = LlamaForCausalLM.from_pretrained(Path(best) / "student")
    final = LlamaForCausalLM.from_pretrained(folder / "final").state_dict()
    for name, value in student.state_dict().items():
        assert torch.equal(value, final[name]), name
    prompt = Rows().batch()["input_ids"][:1, :4]
    written = student.generate(prompt, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert written.shape == (1, 8)
