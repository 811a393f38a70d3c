"""Trainer and Accelerate with FSDP2 on two ranks: one process's curve, saved, resumed, exported.

Accelerate (1.15) looks at its FSDP plugin on accelerators only: on CPUs its state is set by hand
here, as it sets it elsewhere, and all that comes after is its own and transformers'.
"""

import os
import warnings
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin, PartialState
from accelerate.utils import DistributedType
from torch.utils.data import DataLoader, default_collate
from transformers import LlamaForCausalLM

from fxdistill.trainers import LossCallback, SaveStudent
from loops import ROWS, Rows, losses_of, pair, trainer
from processes import run

STEPS = {"max_steps": 4, "logging_steps": 1, "learning_rate": 1e-2}


class Sharding(Accelerator):
    """An Accelerator that shards by FSDP2 on CPUs too."""

    kept = "FULL_STATE_DICT"

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        self.state.distributed_type = DistributedType.FSDP
        self.state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
            state_dict_type=self.kept,
        )


class KeepingShards(Sharding):
    kept = "SHARDED_STATE_DICT"


def on_two(rank, folder):
    where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1"}
    os.environ.update({name: str(value) for name, value in where.items()}, MASTER_PORT="1")
    warnings.filterwarnings("error", "FSDP2-wrapped module")  # of a loss that is a view
    return [*of_trainer(folder), *of_accelerate(f"{folder}/accelerate")]


def of_trainer(folder):
    """The curve of a run, the loss of its evaluation, and the curve of a run that goes on."""
    import transformers.trainer

    transformers.trainer.Accelerator = Sharding
    steps = {**STEPS, "per_device_train_batch_size": ROWS // 2}
    saving = {"save_strategy": "steps", "save_steps": 2, "load_best_model_at_end": True}
    saving |= {"eval_strategy": "steps", "eval_steps": 2}
    whole = trainer(pair(), folder, callbacks=[LossCallback(), SaveStudent()], **steps, **saving)
    assert whole.is_fsdp_enabled
    assert whole.accelerator.is_fsdp2
    whole.train()
    rest = trainer(pair(), folder, callbacks=[LossCallback()], **steps)
    rest.train(resume_from_checkpoint=f"{folder}/checkpoint-2")
    return curve(whole), whole.evaluate()["eval_loss"], curve(rest)


def curve(made):
    wanted = ("loss", "logits", "labels", "features")
    return [[row[name] for name in wanted] for row in made.state.log_history if "logits" in row]


def of_accelerate(folder):
    """The losses of six steps, and those of the last three after a state was loaded."""

    def made():
        accelerator = KeepingShards(cpu=True)
        distiller = pair()
        optimizer = torch.optim.AdamW(distiller.param_groups(), lr=1e-2)
        loader = DataLoader(Rows(), ROWS // 2, collate_fn=texts)
        return accelerator, *accelerator.prepare(distiller, optimizer, loader)

    def trained(accelerator, model, optimizer, loader, count):
        batches = [batch for _ in range(count) for batch in loader]
        return losses_of(model, optimizer, batches, accelerator.backward)

    one = made()
    losses = trained(*one, 3)
    one[0].save_state(folder)
    losses += trained(*one, 3)
    other = made()
    trained(*other, 1)
    other[0].load_state(folder)
    return losses, trained(*other, 3)


def texts(rows):
    return default_collate([{k: x for k, x in row.items() if k != "comment"} for row in rows])


@pytest.mark.slow
def test_two_ranks_have_the_curve_of_one_and_go_on_from_it(tmp_path):
    alone = trainer(pair(), tmp_path / "one", callbacks=[LossCallback()], **STEPS)
    alone.train()
    one, batch = pair(), Rows().batch()
    optimizer = torch.optim.AdamW(one.param_groups(), lr=1e-2)
    wanted = losses_of(one, optimizer, [batch] * 6)

    folder = tmp_path / "two"
    for found, evaluated, rest, losses, after in run(2, on_two, str(folder)):
        for mine, its in zip(found, curve(alone), strict=True):
            assert mine == pytest.approx(its, rel=1e-4)
        assert evaluated == pytest.approx(alone.evaluate()["eval_loss"], rel=1e-4)
        assert rest == found
        assert losses == pytest.approx(wanted, rel=1e-4)
        assert after == losses[3:]
    # One student, of whole tensors, although each rank has its parts alone.
    for step in (2, 4):
        names = {path.name for path in (folder / f"checkpoint-{step}" / "student").iterdir()}
        assert names == {"config.json", "generation_config.json", "model.safetensors"}
    student = LlamaForCausalLM.from_pretrained(Path(folder) / "checkpoint-4" / "student")
    loss, its = (model.eval()(**batch).loss.item() for model in (student, alone.model.student))
    assert loss == pytest.approx(its, rel=1e-4)
