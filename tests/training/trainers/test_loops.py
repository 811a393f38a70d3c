"""The same curve in every loop; Accelerate and Lightning save and resume a distiller."""

import os

import lightning
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, Dataset, default_collate
from transformers import LlamaForCausalLM, Trainer, TrainingArguments

import fxdistill
from fxdistill.trainers import LossCallback, SaveStudent
from loops import LENGTH, llama, losses_of
from processes import run

MLP = "model.layers.0.mlp"
STEPS, BATCH, LR = 24, 4, 1e-2


class Texts(Dataset):
    """Rows of text, a batch after the other; some of each batch are padded."""

    def __init__(self, count=STEPS * BATCH):
        starts = torch.randint(0, 64, (count, 1), generator=torch.Generator().manual_seed(3))
        self.ids = (starts + 7 * torch.arange(LENGTH)) % 64

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        mask = (torch.arange(LENGTH) < LENGTH - i % 4).long()
        labels = self.ids[i].masked_fill(mask == 0, -100)
        return {"input_ids": self.ids[i], "attention_mask": mask, "labels": labels}


def distilled():
    student, teacher = llama(1), llama(2)
    torch.manual_seed(7)
    match = fxdistill.Match(teacher="model.layers.1.mlp", project="linear")
    return fxdistill.wrap(student, teacher, {MLP: match}, temperature=2.0, compile=False)


def optimizer_of(distiller):
    return torch.optim.AdamW(distiller.param_groups(lr=2 * LR), lr=LR, weight_decay=0.01)


def of_plain_loop(folder):
    distiller = distilled()
    return losses_of(distiller, optimizer_of(distiller), DataLoader(Texts(), BATCH))


class InOrder(Trainer):
    """Batches in order, so that all loops see the same."""

    def _get_train_sampler(self, *args, **kwargs):
        return None


def of_trainer(folder, batch=BATCH):
    distiller = distilled()
    args = TrainingArguments(
        str(folder),
        max_steps=STEPS,
        logging_steps=1,
        per_device_train_batch_size=batch,
        max_grad_norm=0.0,
        lr_scheduler_type="constant",
        save_strategy="steps",
        save_steps=STEPS,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    given = {"train_dataset": Texts(), "optimizers": (optimizer_of(distiller), None)}
    callbacks = [LossCallback(), SaveStudent()]
    trainer = InOrder(model=distiller, args=args, callbacks=callbacks, **given)
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    for row in rows:
        assert row["loss"] == pytest.approx(row["logits"] + row["labels"] + row["features"])
    return [row["loss"] for row in rows]


@pytest.fixture
def forgets():
    """Accelerate's state is of the process: each test has its own."""
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def of_accelerate(folder):
    accelerator = Accelerator(cpu=True)
    distiller = distilled()
    prepared = accelerator.prepare(distiller, optimizer_of(distiller), DataLoader(Texts(), BATCH))
    distiller, optimizer, loader = prepared
    found = []
    for batch in loader:
        with accelerator.accumulate(distiller):
            out = distiller(**batch)
            accelerator.backward(out.loss)
            optimizer.step()
            optimizer.zero_grad()
        found.append(out.loss.item())
    return found


class Distillation(lightning.LightningModule):
    """The module of the guide."""

    def __init__(self, distiller):
        super().__init__()
        self.distiller, self.seen = distiller, []

    def training_step(self, batch, index):
        out = self.distiller(**batch)
        self.log_dict({"loss": out.loss, **out.losses})
        self.seen.append(out.loss.item())
        return out.loss

    def configure_optimizers(self):
        return optimizer_of(self.distiller)


def lightning_trainer(folder, **options):
    return lightning.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"enable_checkpointing": False, "max_epochs": 1} | options,
    )


def of_lightning(folder):
    module = Distillation(distilled())
    trainer = lightning_trainer(folder)
    trainer.fit(module, DataLoader(Texts(), BATCH))
    logged = trainer.callback_metrics
    assert {"loss", "logits", "labels", "features", MLP} <= logged.keys()
    return module.seen


def test_every_loop_has_the_same_curve(tmp_path, forgets):
    wanted = of_plain_loop(tmp_path)
    assert len(wanted) == STEPS
    assert wanted[-1] < 0.9 * wanted[0]
    for loop in (of_trainer, of_accelerate, of_lightning):
        assert loop(tmp_path) == pytest.approx(wanted, rel=1e-4), loop.__name__


# ------------------------------------------------------------------ Accelerate


def test_accumulated_by_accelerate_is_the_whole_batch(forgets):
    """Shares of ``num_items`` add up; Accelerate divides by the steps, which is undone."""
    found = []
    for parts in (1, 2):
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=parts)
        distiller = distilled()
        optimizer = torch.optim.SGD(distiller.parameters(), lr=0.5)
        distiller, optimizer, loader = accelerator.prepare(
            distiller, optimizer, DataLoader(Texts(8), 8 // parts)
        )
        batches = list(loader)
        items = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
        for batch in loader:
            with accelerator.accumulate(distiller):
                loss = distiller(**batch, num_items=items).loss
                accelerator.backward(loss * accelerator.gradient_accumulation_steps)
                optimizer.step()
                optimizer.zero_grad()
        found.append(distiller.student.state_dict())
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], rtol=1e-4, atol=1e-6, msg=name)


def test_accelerate_saves_and_loads_a_state_and_goes_on_exactly(tmp_path, forgets):
    batches = list(DataLoader(Texts(16), BATCH))

    def made():
        accelerator = Accelerator(cpu=True)
        distiller = distilled()
        schedule = fxdistill.Schedule(
            distiller, temperature=fxdistill.schedules.linear(4, 1, steps=4)
        )
        accelerator.register_for_checkpointing(schedule)
        return accelerator, *accelerator.prepare(distiller, optimizer_of(distiller)), schedule

    def trained(accelerator, distiller, optimizer, schedule, batches):
        found = []
        for batch in batches:
            loss = distiller(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            found.append(loss.item())
        return found

    whole = made()
    trained(*whole, batches[:2])
    whole[0].save_state(str(tmp_path / "state"))
    wanted = trained(*whole, batches[2:])
    other = made()
    trained(*other, batches[3:])
    other[0].load_state(str(tmp_path / "state"))
    assert trained(*other, batches[2:]) == wanted
    assert other[1].settings == whole[1].settings


def on_two(rank, folder):
    """The curve of two ranks: Accelerate's loop under DDP, then transformers' Trainer."""
    where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1"}
    os.environ.update({name: str(value) for name, value in where.items()}, MASTER_PORT="1")
    return [of_ddp(), of_trainer(folder, BATCH // 2)]


def trimmed(rows):
    """A batch that is as long as its longest row: 12 tokens on one rank, 10 on the other."""
    batch = default_collate(rows)
    length = int(batch["attention_mask"].sum(1).max())
    return {name: x[:, :length] for name, x in batch.items()}


def of_ddp():
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    distiller = distilled()
    loader = DataLoader(Texts(), BATCH // 2, collate_fn=trimmed)  # a rank has every second batch
    prepared = accelerator.prepare(distiller, optimizer_of(distiller), loader)
    return losses_of(*prepared, accelerator.backward)


@pytest.mark.slow
def test_two_ranks_have_the_curve_of_one_and_save_one_student(tmp_path, forgets):
    wanted = of_trainer(tmp_path / "one")
    for curves in run(2, on_two, str(tmp_path / "two")):
        for curve in curves:
            assert curve == pytest.approx(wanted, rel=1e-4)
    one, two = (tmp_path / name / f"checkpoint-{STEPS}" / "student" for name in ("one", "two"))
    assert {p.name for p in two.iterdir()} == {p.name for p in one.iterdir()}
    found, its = (LlamaForCausalLM.from_pretrained(p).state_dict() for p in (two, one))
    for name, value in its.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4, msg=name)


# ------------------------------------------------------------------ Lightning


@pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning")
def test_lightning_saves_and_resumes_exactly(tmp_path):
    loader = DataLoader(Texts(12), BATCH)  # two epochs of three steps

    def saving(name):
        folder = tmp_path / name
        saves = ModelCheckpoint(folder, filename="{step}", save_top_k=-1)
        options = {"enable_checkpointing": True, "max_epochs": 2}
        return lightning_trainer(folder, callbacks=[saves], **options)

    whole, rest = Distillation(distilled()), Distillation(distilled())
    saving("whole").fit(whole, loader)
    saving("rest").fit(rest, loader, ckpt_path=tmp_path / "whole" / "step=3.ckpt")
    assert rest.seen == whole.seen[3:]
    for name, value in rest.state_dict().items():
        assert torch.equal(value, whole.state_dict()[name]), name
