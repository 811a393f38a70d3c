"""Batches of changing lengths under ``transformers.Trainer``: padded to their longest row."""

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import Trainer, TrainerCallback, TrainingArguments

from fxdistill.trainers import LossCallback
from loops import losses_of, pair

AOT = {"backend": "aot_eager"}
SIZE, STEPS = 3, 20
LENGTHS = [7, 5, 6, 12, 9, 4, 5, 5, 3, 16, 11, 8]  # the longest of each batch: 7, 12, 5, 16
SGD = {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0, "lr_scheduler_type": "constant"}


def row(length, start):
    ids = (start + 7 * torch.arange(length)) % 64
    return {"input_ids": ids, "labels": ids.clone()}


ROWS = [row(length, start) for start, length in enumerate(LENGTHS * (STEPS * SIZE // len(LENGTHS)))]


class Padded:
    """A data collator that pads to the longest row; it keeps the batches that it has made."""

    def __init__(self):
        self.made = []

    def __call__(self, rows):
        masks = [torch.ones_like(row["input_ids"]) for row in rows]
        batch = {
            "input_ids": pad_sequence([row["input_ids"] for row in rows], batch_first=True),
            "attention_mask": pad_sequence(masks, batch_first=True),
            "labels": pad_sequence([row["labels"] for row in rows], True, padding_value=-100),
        }
        self.made.append(batch)
        return batch


class Graphs(TrainerCallback):
    """Counts the graphs that there are after each step."""

    def __init__(self):
        self.after = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.after.append(len(model.journal.events))


def trainer(folder, distiller, collator, *callbacks, **given):
    steps = {"max_steps": STEPS, "logging_steps": 1, "per_device_train_batch_size": SIZE}
    quiet = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
    order = {"train_sampling_strategy": "sequential"}
    return Trainer(
        model=distiller,
        args=TrainingArguments(str(folder), **{**SGD, **steps, **quiet, **order, **given}),
        train_dataset=ROWS,
        eval_dataset=ROWS[: 2 * SIZE + 1],
        data_collator=collator,
        callbacks=[LossCallback(), *callbacks],
    )


@pytest.mark.parametrize(("order", "compile"), [("sequential", AOT), ("group_by_length", False)])
def test_losses_are_those_of_the_plain_loop_and_a_third_length_compiles_nothing(
    tmp_path, order, compile
):
    """Also where Trainer puts rows of about one length into each batch."""
    collator, graphs = Padded(), Graphs()
    given = {"train_sampling_strategy": order}
    run = trainer(tmp_path, pair(compile=compile), collator, graphs, **given)
    run.train()
    batches = collator.made[:STEPS]
    lengths = [batch["input_ids"].shape[1] for batch in batches]
    assert len(set(lengths)) >= 4
    second = next(i for i, length in enumerate(lengths) if length != lengths[0])
    if compile:
        assert graphs.after == [1] * second + [2] * (STEPS - second)

    plain = pair()
    wanted = losses_of(plain, torch.optim.SGD(plain.parameters(), lr=0.1), batches)
    found = [row["loss"] for row in run.state.log_history if "loss" in row]
    assert found == pytest.approx(wanted, rel=1e-5)
    for (name, ours), theirs in zip(run.model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6, msg=name)


def test_an_evaluation_counts_a_last_batch_of_fewer_rows_and_compiles_no_length_twice(tmp_path):
    collator = Padded()
    given = {"per_device_eval_batch_size": SIZE}
    run = trainer(tmp_path, pair(compile=AOT), collator, **given)
    found = run.predict(run.eval_dataset)
    batches, plain = list(collator.made), pair().eval()
    sizes = [tuple(batch["input_ids"].shape) for batch in batches]
    assert sizes == [(3, 7), (3, 12), (1, 5)]
    with torch.no_grad():
        outs = [plain(**batch) for batch in batches]
    # Trainer's mean over batches weighs each by its rows.
    wanted = sum(float(out.loss) * size for out, (size, _) in zip(outs, sizes, strict=True)) / 7
    assert found.metrics["test_loss"] == pytest.approx(wanted, rel=1e-5)
    assert found.predictions.shape == (7, 12, 64)
    rows = [logits for out in outs for logits in out.logits]
    for ours, theirs in zip(found.predictions, rows, strict=True):
        torch.testing.assert_close(torch.from_numpy(ours)[: len(theirs)], theirs)
    events = list(run.model.journal.events)
    run.predict(run.eval_dataset)
    assert run.model.journal.events == events


def test_micro_batches_of_several_lengths_are_one_large_batch(tmp_path):
    """Trainer gives the number of predictions of all: labels and logits divide by it."""
    parts, steps = 4, 2
    given = {"gradient_accumulation_steps": parts, "max_steps": steps}
    distiller = pair(feature_weight=0.0)
    run = trainer(tmp_path, distiller, Padded(), **given)
    run.train()
    records = [row for row in run.state.log_history if "labels" in row]

    plain, collator = pair(feature_weight=0.0), Padded()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    count = parts * SIZE
    for step, record in enumerate(records):
        out = plain(**collator(ROWS[step * count : (step + 1) * count]))
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        for name in ("labels", "logits"):
            assert record[name] == pytest.approx(float(out.losses[name]), rel=1e-5), name
        assert record["loss"] == pytest.approx(float(out.loss.detach()), rel=1e-5)
    assert len(records) == steps
    for (name, ours), theirs in zip(distiller.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6, msg=name)
