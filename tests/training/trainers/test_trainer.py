"""``transformers.Trainer`` around a distiller: what is logged, saved, chosen, resumed, refused."""

import functools
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaForCausalLM,
    TrainerCallback,
    default_data_collator,
)

import fxdistill
from fxdistill.errors import BatchError, OptionError
from fxdistill.trainers import LossCallback, SaveStudent
from loops import LENGTH, ROWS, Rows, llama, pair, trainer

MLP = "model.layers.0.mlp"
TERMS = {"logits", "labels", "features", MLP}
PLAIN = {"optim": "sgd", "learning_rate": 0.5, "max_grad_norm": 0.0}
PLAIN |= {"lr_scheduler_type": "constant"}


class Reads(TrainerCallback):
    """What a callback behind ours is given."""

    def __init__(self):
        self.seen = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append(dict(logs))


@pytest.mark.parametrize("size", [ROWS, 2], ids=["whole", "accumulated"])
def test_every_term_is_logged_as_the_mean_of_the_steps(tmp_path, size):
    """The records are those of a plain loop over the same batches."""
    steps = {"max_steps": 4, "logging_steps": 2, "per_device_train_batch_size": size}
    steps |= {"gradient_accumulation_steps": ROWS // size, **PLAIN}
    behind = Reads()
    run = trainer(pair(), tmp_path, padded=False, callbacks=[LossCallback(), behind], **steps)
    run.train()
    one, batch, wanted = pair(), Rows(padded=False).batch(), []
    optimizer = torch.optim.SGD(one.parameters(), lr=0.5)
    for _ in range(4):
        out = one(**batch)
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        wanted.append({"loss": out.loss.detach(), **out.losses})
    records = [row for row in run.state.log_history if "loss" in row]
    assert [row["step"] for row in records] == [2, 4]
    for row, seen, pair_of in zip(records, behind.seen, (wanted[:2], wanted[2:]), strict=False):
        for name in ("loss", *TERMS):
            mean = sum(float(values[name]) for values in pair_of) / 2
            assert row[name] == pytest.approx(mean, rel=1e-5), name
            assert seen[name] == row[name]
    assert not TERMS & run.state.log_history[-1].keys()  # the summary of the run
    assert not run.model._forward_hooks


def test_no_step_waits_for_the_device(tmp_path, monkeypatch):
    """Values are read when there is a record, and not before."""
    read = []
    rows = fxdistill.LossLog.rows
    monkeypatch.setattr(fxdistill.LossLog, "rows", lambda log: read.append(1) or rows(log))
    callback = LossCallback()
    run = trainer(pair(), tmp_path, callbacks=[callback], max_steps=1)
    run.train()  # no record: logging_steps is 500, and the run's own summary has no loss
    assert not read
    out = run.model(**Rows().batch())
    # Tensors without values: to read one would fail.
    out["loss"], out["losses"] = out.loss.to("meta"), {"a": out.loss.to("meta")}
    callback._log = fxdistill.LossLog()
    callback._listen(run.model.train(), (), {}, out)


def test_label_smoothing_is_refused_with_what_to_use(tmp_path):
    for callbacks in ([], [LossCallback()]):
        run = trainer(pair(), tmp_path, callbacks=callbacks, label_smoothing_factor=0.1)
        before = run.model.student.lm_head.weight.detach().clone()
        with pytest.raises(BatchError, match=r"functools\.partial\(.*label_smoothing="):
            run.train()
        assert torch.equal(run.model.student.lm_head.weight, before)
        assert not run.model._forward_hooks


def test_smoothed_labels_of_the_distillers_own(tmp_path):
    smooth = functools.partial(fxdistill.losses.cross_entropy, label_smoothing=0.1)
    one = pair(label_loss=smooth, logit_loss=None)
    run = trainer(one, tmp_path, callbacks=[LossCallback()], max_steps=1, logging_steps=1)
    rows = Rows().batch()
    logits = one.student(**rows).logits[:, :-1].flatten(0, 1)
    wanted = nn.functional.cross_entropy(
        logits, rows["labels"][:, 1:].flatten(), label_smoothing=0.1
    )
    run.train()
    assert run.state.log_history[0]["labels"] == pytest.approx(wanted.item(), rel=1e-5)


def test_the_best_checkpoint_by_a_metric_is_loaded_and_loads_without_us(tmp_path):
    """A metric of the predictions, the student's logits, chooses; the student stands beside."""
    values = iter([0.5, 0.9, 0.1, 0.2])
    shapes = []

    def measured(found):
        shapes.append((found.predictions.shape, found.label_ids.shape))
        return {"share": next(values)}

    steps = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps"}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "share", "eval_steps": 1}
    given = {"compute_metrics": measured}
    run = trainer(
        pair(),
        tmp_path,
        callbacks=[SaveStudent(), LossCallback()],
        of_trainer=given,
        learning_rate=1e-2,
        **steps,
        **best,
    )
    run.train()
    assert shapes == [((ROWS, LENGTH, 64), (ROWS, LENGTH))] * 4
    checkpoint = tmp_path / "checkpoint-2"
    assert run.state.best_model_checkpoint == str(checkpoint)
    saved = load_file(checkpoint / "model.safetensors")
    assert saved.keys() == run.model.state_dict().keys()
    for name, value in run.model.state_dict().items():
        assert torch.equal(value, saved[name]), name
    student = LlamaForCausalLM.from_pretrained(checkpoint / "student")
    for name, value in student.state_dict().items():
        assert torch.equal(value, run.model.student.state_dict()[name]), name
    assert all((tmp_path / f"checkpoint-{i}" / "student").is_dir() for i in (1, 2, 3, 4))


class Unlabelled(Rows):
    """Rows that nobody has labelled."""

    def __getitem__(self, i):
        row = super().__getitem__(i)
        del row["labels"]
        return row


@pytest.mark.parametrize("kind", [Rows, Unlabelled])
def test_predictions_are_the_students_logits_alone(tmp_path, kind):
    run = trainer(pair(), tmp_path)
    found = run.predict(kind()).predictions
    batch = kind().batch()
    with torch.no_grad():
        wanted = run.model.student(batch["input_ids"], batch["attention_mask"]).logits
    torch.testing.assert_close(torch.from_numpy(found), wanted)


@pytest.mark.parametrize("label_loss", ["cross_entropy", None])
def test_predictions_need_no_term_that_reads_them(tmp_path, label_loss):
    run = trainer(pair(logit_loss=None, label_loss=label_loss), tmp_path)
    for kind in (Rows, Unlabelled):
        batch = Rows().batch()
        with torch.no_grad():
            wanted = run.model.student(batch["input_ids"], batch["attention_mask"]).logits
        found = run.predict(kind()).predictions
        torch.testing.assert_close(torch.from_numpy(found), wanted)


def test_rows_without_labels_choose_the_best_checkpoint(tmp_path):
    """By the loss of logits and features; the batches have unlike sizes."""
    steps = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps"}
    steps |= {"eval_steps": 1, "load_best_model_at_end": True, "per_device_eval_batch_size": 3}
    one, rows = pair(), Unlabelled()
    of_trainer = {"callbacks": [LossCallback()], **PLAIN}
    run = trainer(one, tmp_path, **of_trainer, **steps)
    run.train_dataset = run.eval_dataset = rows
    run.train()
    records = [row["eval_loss"] for row in run.state.log_history if "eval_runtime" in row]
    assert run.state.best_metric == min(records)
    one.load_state_dict(load_file(tmp_path / "checkpoint-2" / "model.safetensors"), strict=False)
    one.eval()
    batch = rows.batch()
    with torch.no_grad():
        parts = [
            (size, one(**{k: x[i : i + size] for k, x in batch.items()}).loss.item())
            for i, size in ((0, 3), (3, 3), (6, 2))
        ]
    wanted = sum(size * loss for size, loss in parts) / ROWS
    assert records[1] == pytest.approx(wanted, rel=1e-5)
    assert not one._forward_hooks


def test_trainer_can_be_told_that_there_are_no_labels(tmp_path):
    run = trainer(pair(), tmp_path, label_names=[], per_device_eval_batch_size=ROWS)
    found = run.evaluate(Unlabelled())["eval_loss"]
    run.model.eval()
    assert found == pytest.approx(run.model(**Unlabelled().batch()).loss.item(), rel=1e-5)


def test_so_they_are_where_the_config_says_nothing_of_predictions(tmp_path):
    """BERT's names no keys to leave out, as Llama's does."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    config = BertConfig(vocab_size=64, num_hidden_layers=1, **sizes)
    assert not hasattr(config, "keys_to_ignore_at_inference")
    student, teacher = (BertForMaskedLM(config) for _ in range(2))
    run = trainer(fxdistill.wrap(student, teacher, compile=False), tmp_path)
    for rows in (Rows(), Unlabelled()):
        found = run.predict(rows).predictions
        batch = rows.batch()
        with torch.no_grad():
            wanted = student(batch["input_ids"], batch["attention_mask"]).logits
        torch.testing.assert_close(torch.from_numpy(found), wanted)


@pytest.mark.parametrize("accepts", [True, False])
def test_token_weights_make_means_of_what_they_leave(tmp_path, accepts):
    """In training and in evaluation, whether Trainer tells the number of labels or not."""
    seen = []

    class Weighed(Rows):
        def __getitem__(self, i):
            row = super().__getitem__(i)
            return row | {"loss_mask": (row["input_ids"] % 2) * row["attention_mask"]}

    one = pair()
    one.register_forward_pre_hook(
        lambda model, args, given: seen.append("num_items_in_batch" in given), with_kwargs=True
    )
    rows = Weighed()
    given = {"train_dataset": rows, "eval_dataset": rows}
    run = trainer(one, tmp_path, max_steps=1, logging_steps=1, **{**PLAIN, "learning_rate": 0.0})
    run.train_dataset, run.eval_dataset = given.values()
    run.model_accepts_loss_kwargs = accepts
    run.train()
    loss = run.state.log_history[0]["loss"]
    assert run.evaluate()["eval_loss"] == pytest.approx(loss, rel=1e-5)
    assert seen == [accepts, accepts]
    batch = rows.batch()
    assert loss == pytest.approx(one(**batch).loss.item(), rel=1e-5)


@pytest.mark.parametrize("ignored", [True, False])
def test_padding_on_the_left_is_in_no_mean(tmp_path, ignored):
    """Trainer counts the first word behind the padding, and labels of the padding itself."""

    class Left(Rows):
        def __getitem__(self, i):
            row = super().__getitem__(i)
            row |= {k: row[k].flip(0) for k in ("input_ids", "attention_mask", "labels")}
            return row if ignored else row | {"labels": row["input_ids"]}

    one, rows = pair(), Left()
    run = trainer(one, tmp_path, max_steps=1, logging_steps=1, **{**PLAIN, "learning_rate": 0.0})
    run.train_dataset = run.eval_dataset = rows
    run.train()
    batch = rows.batch()
    assert (batch["attention_mask"][:, 0] == 0).any()
    wanted = one(**batch).loss.item()
    assert run.state.log_history[0]["loss"] == pytest.approx(wanted, rel=1e-5)
    assert run.evaluate()["eval_loss"] == pytest.approx(wanted, rel=1e-5)


def test_a_student_that_a_kill_has_left_out_is_written_by_the_run_that_goes_on(tmp_path):
    steps = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    trainer(pair(), tmp_path, learning_rate=1e-2, **steps).train()  # Trainer's save, and not ours
    rest = trainer(pair(), tmp_path, callbacks=[SaveStudent()], learning_rate=1e-2, **steps)
    rest.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    for step in (1, 2):
        saved = load_file(tmp_path / f"checkpoint-{step}" / "model.safetensors")
        student = LlamaForCausalLM.from_pretrained(tmp_path / f"checkpoint-{step}" / "student")
        for name, value in student.state_dict().items():
            if f"student.{name}" in saved:  # a tied head is in it once
                assert torch.equal(value, saved[f"student.{name}"]), (step, name)


class Processor:
    """A tokenizer, to Trainer."""

    def save_pretrained(self, folder):
        (Path(folder) / "tokenizer.json").write_text("{}")


@pytest.mark.parametrize("lost", ["student1", "tokenizer.json"])
def test_a_part_of_the_students_that_a_kill_has_left_out_is_written_too(tmp_path, lost):
    """As by versions that wrote one student after the other, and then the tokenizer."""

    def run(steps, **resume):
        students = fxdistill.mutual([llama(1), llama(1)], compile=False)
        given = {"processing_class": Processor(), "data_collator": default_data_collator}
        given = {"callbacks": [SaveStudent()], "of_trainer": given}
        steps = {"max_steps": steps, "save_strategy": "steps", "save_steps": 1}
        trainer(students, tmp_path, **given, **steps).train(**resume)

    run(1)
    folder = tmp_path / "checkpoint-1" / "student"
    names = ["student0", "student1", "tokenizer.json"]
    assert sorted(path.name for path in folder.iterdir()) == names
    gone = folder / lost
    shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
    run(2, resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert sorted(path.name for path in folder.iterdir()) == names
    LlamaForCausalLM.from_pretrained(folder / "student1")


def test_projections_are_in_the_checkpoint_and_a_resumed_run_goes_on_exactly(tmp_path):
    """AdamW, a warm-up, dropout: the rest of the run is the same, bit for bit."""

    def wide():
        student = llama(1, attention_dropout=0.1)
        torch.manual_seed(5)
        match = fxdistill.Match(teacher="model.layers.1.mlp", project="linear")
        return fxdistill.wrap(student, llama(2), {MLP: match}, compile=False)

    steps = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "logging_steps": 1}
    steps |= {"learning_rate": 1e-2, "warmup_steps": 3, "per_device_train_batch_size": 4}
    whole = trainer(wide(), tmp_path / "a", callbacks=[LossCallback()], **steps)
    whole.train()
    rest = trainer(wide(), tmp_path / "b", callbacks=[LossCallback()], **steps)
    rest.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    state = whole.model.state_dict()
    assert any(name.startswith("projections.") for name in state)
    for name, value in rest.model.state_dict().items():
        assert torch.equal(value, state[name]), name
    for one, other in zip(whole.state.log_history, rest.state.log_history, strict=True):
        shared = {"loss", "grad_norm", *TERMS} & one.keys()
        assert {name: one[name] for name in shared} == {name: other[name] for name in shared}


def test_of_a_student_with_adapters_they_alone_are_saved_and_the_run_goes_on_exactly(tmp_path):
    """The teacher is the student's own base, which is made as before and is in no checkpoint."""

    def adapted():
        torch.manual_seed(6)
        lora = LoraConfig(r=2, lora_dropout=0.1, target_modules=["q_proj"], task_type="CAUSAL_LM")
        student = get_peft_model(llama(1), lora)
        return fxdistill.wrap(student, fxdistill.base_of(student), compile=False)

    steps = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "logging_steps": 1}
    steps |= {"learning_rate": 1e-2, "callbacks": [LossCallback(), SaveStudent()]}
    whole = trainer(adapted(), tmp_path / "a", **steps)
    whole.train()
    checkpoint = tmp_path / "a" / "checkpoint-4"
    names = load_file(checkpoint / "model.safetensors").keys()
    assert names
    assert all("lora_" in name for name in names)
    assert not (checkpoint / "student" / "model.safetensors").exists()
    rest = trainer(adapted(), tmp_path / "b", **steps)
    rest.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    curves = [[row["loss"] for row in t.state.log_history if "loss" in row] for t in (whole, rest)]
    assert curves[0] == curves[1]
    alone = PeftModel.from_pretrained(llama(1), checkpoint / "student").state_dict()
    for run in (whole, rest):
        for name, value in run.model.student.state_dict().items():
            assert torch.equal(value, alone[name]), name


def test_training_compiles_once_around_evaluations_and_checkpoints(tmp_path):
    """An evaluation has a graph of its own, which the later ones find."""
    graphs = []

    class Counts(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])

    steps = {"max_steps": 6, "eval_strategy": "steps", "eval_steps": 2, "logging_steps": 1}
    steps |= {"save_strategy": "steps", "save_steps": 2}
    steps |= {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    callbacks = [LossCallback(), SaveStudent(), Counts()]
    given = {"compile": {"backend": "aot_eager"}}
    trainer(pair(**given), tmp_path, callbacks=callbacks, **steps).train()
    assert graphs[0] == graphs[1]
    assert graphs[2:] == [graphs[2]] * 4


def test_callbacks_want_a_distiller(tmp_path):
    for callback in (LossCallback(), SaveStudent()):
        run = trainer(llama(1), tmp_path, callbacks=[callback])
        with pytest.raises(OptionError, match=r"Trainer\(model=distiller"):
            run.train()


def test_the_public_face_imports_nothing_before_it_is_asked():
    program = """
import sys
from pathlib import Path
import fxdistill.trainers
assert not {"torch", "transformers", "trl"} & sys.modules.keys()
assert dir(fxdistill.trainers) and fxdistill.trainers is sys.modules["fxdistill.trainers"]
from fxdistill.trainers import LossCallback
assert "transformers" in sys.modules and "trl" not in sys.modules
try:
    fxdistill.trainers.LossCallbak
except AttributeError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "no attribute 'LossCallbak'" in done.stdout
