"""``fxdistill.trainers.trl.DistillationTrainer`` under the real TRL, with models made here."""

import subprocess
import sys
from functools import partial

import pytest
import torch
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import fxdistill
from fxdistill import losses
from fxdistill.errors import BatchError, OptionError
from fxdistill.trainers.trl import DistillationTrainer

WORDS = ["<pad>", "<end>", *(f"w{i}" for i in range(30))]
TEMPLATE = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
PAIR = {"model.layers.0.mlp": "model.layers.1.mlp"}


@pytest.fixture(scope="module")
def tokenizer():
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "<pad>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="<end>", padding_side="left"
    )


def llama(layers):
    torch.manual_seed(layers)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    special = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    config = LlamaConfig(
        vocab_size=len(WORDS), num_hidden_layers=layers, initializer_range=0.5, **sizes, **special
    )
    return LlamaForCausalLM(config)


def rows(completions=True):
    texts = [" ".join(f"w{(7 * i + j) % 30}" for j in range(2 + i % 3)) for i in range(16)]
    found = {"prompt": texts}
    return Dataset.from_dict(found | ({"completion": texts[::-1]} if completions else {}))


def config(folder, **given):
    options = {"max_steps": 3, "logging_steps": 1, "per_device_train_batch_size": 2}
    options |= {"gradient_accumulation_steps": 2, "max_completion_length": 5, "report_to": []}
    options |= {"bf16": False, "activation_checkpointing": False, "use_cpu": True}
    options |= {"learning_rate": 1e-2, "disable_tqdm": True, "save_strategy": "no"}
    return trl.DistillationConfig(str(folder), **options | given)


def distiller(**options):
    given = {"logit_loss": partial(losses.jsd, beta=1.0), "compile": False}
    return fxdistill.wrap(llama(1), llama(2), PAIR, **given | options)


class Kept(DistillationTrainer):
    """Keeps the batches, the losses, and what the plain distiller makes of them."""

    def compute_loss(self, model, inputs, **rest):
        loss = super().compute_loss(model, inputs, **rest)
        batch = {
            name: torch.cat([inputs[f"prompt_{name}"], inputs[f"completion_{name}"]], 1)
            for name in ("ids", "mask")
        }
        counted = torch.cat([torch.zeros_like(inputs["prompt_mask"]), inputs["completion_mask"]], 1)
        plain = self.model(
            input_ids=batch["ids"],
            attention_mask=batch["mask"],
            loss_mask=counted,
            num_items=inputs["num_items_in_batch"] if self.model.training else None,
        )
        self.kept = [*getattr(self, "kept", []), (loss.detach(), plain.loss.detach(), inputs)]
        return loss


def test_steps_have_the_loss_of_the_plain_distiller_and_log_every_term(tmp_path, tokenizer):
    one = distiller()
    given = {"train_dataset": rows(), "eval_dataset": rows(), "processing_class": tokenizer}
    run = Kept(one, args=config(tmp_path), **given)
    before = one.student.lm_head.weight.detach().clone()
    run.train()
    assert not torch.equal(one.student.lm_head.weight, before)
    assert len(run.kept) == 6
    for found, plain, _ in run.kept:
        torch.testing.assert_close(found, plain)
    records = [row for row in run.state.log_history if "loss" in row]
    assert len(records) == 3
    for i, row in enumerate(records):
        step = sum(float(loss) for loss, *_ in run.kept[2 * i : 2 * i + 2])
        assert row["loss"] == pytest.approx(step, rel=1e-5)
        assert row["loss"] == pytest.approx(row["logits"] + row["features"], rel=1e-5)
        assert row["features"] == pytest.approx(row["model.layers.0.mlp"], rel=1e-5)
        assert row["completions/mean_length"] > 0  # TRL's own
    assert {"eval_loss", "eval_logits", "eval_features"} <= run.evaluate().keys() | {
        *run.state.log_history[-1]
    }


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_the_loss_of_logits_is_the_one_of_trl(tmp_path, tokenizer, beta):
    """Student and teacher as TRL takes them, the same seed: the same texts and the same losses."""
    found = []
    for cls in (trl.DistillationTrainer, DistillationTrainer):
        options = {} if cls is trl.DistillationTrainer else {"compile": False}
        given = {"train_dataset": rows(), "processing_class": tokenizer, **options}
        run = cls(llama(1), llama(2), args=config(tmp_path, beta=beta), **given)
        run.train()
        weights = run.model.state_dict()
        name = "student.lm_head.weight"
        found.append(
            (
                [row["loss"] for row in run.state.log_history if "loss" in row],
                weights[name if name in weights else "lm_head.weight"],
            )
        )
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-4)
    torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("recomputes", [False, True], ids=["kept", "checkpointed"])
def test_the_student_writes_its_share_and_the_step_compiles_once(tmp_path, tokenizer, recomputes):
    """Also with activation checkpointing, TRL's default, which is off while the student writes."""
    from_data, lengths, graphs = [], set(), []

    class Watched(DistillationTrainer):
        def compute_loss(self, model, inputs, **rest):
            loss = super().compute_loss(model, inputs, **rest)
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
            lengths.add(inputs["prompt_ids"].shape[1] + inputs["completion_ids"].shape[1])
            return loss

        def _generate_single_turn(self, *args, **kwargs):
            from_data.append(self._taken is not None)
            assert one.is_activation_checkpointing is recomputes
            texts = super()._generate_single_turn(*args, **kwargs)
            assert one.is_activation_checkpointing is recomputes
            return texts

    one = distiller(
        compile={"backend": "aot_eager"},
        importance=fxdistill.Importance("student_entropy", keep=0.5),
    )
    schedule = fxdistill.Schedule(one, temperature=fxdistill.schedules.linear(4, 1, steps=6))
    several = {"max_steps": 8, "gradient_accumulation_steps": 1}
    args = config(tmp_path, activation_checkpointing=recomputes, **several)
    given = {"train_dataset": rows(), "processing_class": tokenizer, "schedule": schedule}
    Watched(one, args=args, on_policy=0.5, pad_to=12, **given).train()
    assert len(set(from_data)) == 2  # some steps of either kind
    assert len(lengths) > 1
    assert graphs == [graphs[0]] * 8
    assert one.settings["temperature"] == 1.0


def test_completions_of_the_data_are_what_is_compared(tmp_path, tokenizer):
    run = Kept(
        distiller(),
        args=config(tmp_path, max_steps=1),
        on_policy=0.0,
        train_dataset=rows(),
        processing_class=tokenizer,
    )
    run.train()
    texts = {tuple(tokenizer(row["completion"])["input_ids"])[:5] for row in rows()}
    for _, _, inputs in run.kept:
        for ids, mask in zip(inputs["completion_ids"], inputs["completion_mask"], strict=True):
            *text, last = ids[mask.bool()].tolist()
            assert last == 1 or len(text) == 4
            assert (tuple(text) if last == 1 else (*text, last)) in texts


def test_messages_are_written_by_the_chat_template(tmp_path, tokenizer):
    tokenizer.chat_template = TEMPLATE
    messages = Dataset.from_dict(
        {
            "prompt": [[{"role": "w1", "content": f"w{i}"}] for i in range(8)],
            "completion": [[{"role": "w2", "content": "w3"}]] * 8,
        }
    )
    run = Kept(
        distiller(),
        args=config(tmp_path, max_steps=1),
        on_policy=0.0,
        train_dataset=messages,
        processing_class=tokenizer,
    )
    run.train()
    for _, _, inputs in run.kept:
        assert inputs["completion_ids"].tolist() == [[4, 5]] * 2
    tokenizer.chat_template = "w{{ messages | length }} " + TEMPLATE
    with pytest.raises(BatchError, match="chat template"):
        run._after([{"role": "w1", "content": "w5"}], [{"role": "w2", "content": "w3"}])
    tokenizer.chat_template = None


def test_what_cannot_be_done_is_said_before_the_first_step(tmp_path, tokenizer):
    given = {"train_dataset": rows(completions=False), "processing_class": tokenizer}
    args = config(tmp_path)
    make = partial(DistillationTrainer, args=args, **given)
    with pytest.raises(OptionError, match="add a column completion"):
        make(distiller(), on_policy=0.5)
    with pytest.raises(OptionError, match="from 0 to 1"):
        make(distiller(), on_policy=2)
    with pytest.raises(OptionError, match="no place for a prompt"):
        make(distiller(), pad_to=5)
    with pytest.raises(OptionError, match="teacher_model would change nothing"):
        make(distiller(), llama(2))
    with pytest.raises(OptionError, match="give teacher_model"):
        make(llama(1))
    with pytest.raises(OptionError, match="load the model"):
        make("a/name", llama(2))
    other = fxdistill.Schedule(distiller(), temperature=2.0)
    with pytest.raises(OptionError, match="another distiller"):
        make(distiller(), schedule=other)
    with pytest.raises(BatchError, match="pad_to=7"):
        make(distiller(), pad_to=7).train()


def test_without_trl_the_error_says_what_to_install():
    program = """
import sys
sys.modules["trl"] = None
import fxdistill
fxdistill.trainers.LossCallback
try:
    fxdistill.trainers.trl
except fxdistill.FxDistillError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "pip install trl" in done.stdout, done.stderr
