"""What trainers ask of a model: a distiller answers for its student, under the real Trainer too."""

import inspect

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import fxdistill
from families import bert_mlm, t5
from loops import LENGTH, ROWS, Rows, llama, pair, trainer
from toys import Wrapper, toy_pair

AOT = {"backend": "aot_eager"}
# Regional mode compiles with Inductor, and these graphs are captured twice.
COMPILES = [False, *(pytest.param(how, marks=pytest.mark.slow) for how in ("regional", AOT))]
# ------------------------------------------------------------------ the signature


def names(distiller):
    return list(inspect.signature(distiller.forward).parameters)


def test_the_signature_names_what_the_models_and_the_distiller_take():
    found = names(pair())
    student = list(inspect.signature(LlamaForCausalLM.forward).parameters)[1:-1]
    assert found[: len(student)] == student
    assert {"labels", "loss_mask", "token_weights", "num_items", "teacher_inputs"} <= {*found}
    # Trainer finds the names of labels on the class.
    assert "labels" in inspect.signature(fxdistill.Distiller.forward).parameters


def test_a_wrapper_names_the_inputs_of_the_model_inside():
    found = names(fxdistill.wrap(Wrapper(llama(1)), llama(2), compile=False, task="causal_lm"))
    assert "input_ids" in found


def test_inputs_of_the_teacher_alone_are_named_too():
    class Student(nn.Linear):
        def forward(self, x):
            return super().forward(x)

    class Teacher(nn.Linear):
        def forward(self, x, *, domain):
            return super().forward(x) + domain

    distiller = fxdistill.wrap(Student(4, 3), Teacher(4, 3), compile=False)
    assert names(distiller)[0] == "x"
    assert "domain" in names(distiller)
    x, labels = torch.randn(2, 4), torch.tensor([0, 1])
    assert inspect.signature(distiller.forward).bind(x=x, domain=1.0, labels=labels)
    assert distiller(x=x, domain=1.0, labels=labels).loss > 0


# ------------------------------------------------------------------ attributes


def test_plain_modules_have_nothing_that_trainers_ask_for():
    student, teacher = toy_pair()
    distiller = fxdistill.wrap(student, teacher, compile=False, task="masked_lm")
    for name in ("config", "get_input_embeddings", "gradient_checkpointing_enable", "generate"):
        assert not hasattr(distiller, name)


def test_the_config_is_the_students_and_knows_what_is_no_prediction():
    distiller = pair()
    config, theirs = distiller.config, distiller.student.config
    assert isinstance(config, LlamaConfig)
    ignored = [*theirs.keys_to_ignore_at_inference, "loss", "losses", "metrics"]
    assert config.keys_to_ignore_at_inference == ignored
    assert config.to_dict() == theirs.to_dict()
    config.use_cache = False
    assert theirs.use_cache is False


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")  # the older names
@pytest.mark.parametrize("kind", ["gradient", "activation"])
def test_checkpointing_is_switched_on_in_the_student(kind):
    distiller = pair()
    getattr(distiller, f"{kind}_checkpointing_enable")()
    assert distiller.student.is_activation_checkpointing
    assert not distiller.teacher.is_activation_checkpointing
    getattr(distiller, f"{kind}_checkpointing_disable")()
    assert not distiller.is_activation_checkpointing


def test_generate_and_embeddings_are_the_students():
    distiller = pair().eval()
    assert distiller.get_input_embeddings() is distiller.student.get_input_embeddings()
    ids = torch.tensor([[1, 2, 3]])
    found = distiller.generate(ids, max_new_tokens=2, do_sample=False, pad_token_id=0)
    assert found.shape == (1, 5)


# ------------------------------------------------------------------ predictions


@pytest.mark.parametrize("compile", COMPILES, ids=["eager", "regional", "graph"])
def test_an_evaluation_gives_logits_unasked_and_training_does_not_make_them(compile):
    distiller = pair(compile=compile).eval()
    rows = Rows().batch()
    with torch.no_grad():
        out = distiller(**rows)
        student = distiller.student(**rows)
    torch.testing.assert_close(out.logits, student.logits)
    assert "logits" not in distiller.train()(**rows)
    assert "logits" not in distiller.eval()(**rows)  # with gradients: no evaluation


@pytest.mark.parametrize("compile", COMPILES, ids=["eager", "regional", "graph"])
@pytest.mark.parametrize("label_loss", ["cross_entropy", None])
def test_so_it_does_where_no_term_reads_them(compile, label_loss):
    """Features alone; and labels that the rows do not have."""
    distiller = pair(compile=compile, logit_loss=None, label_loss=label_loss).eval()
    rows = {name: value for name, value in Rows().batch().items() if name != "labels"}
    with torch.no_grad():
        out, wanted = distiller(**rows), distiller.student(**rows).logits
    torch.testing.assert_close(out.logits, wanted)
    assert out.losses.keys() == {"features", "model.layers.0.mlp"}
    assert "logits" not in distiller.train()(**rows)


def test_an_evaluation_may_be_asked_for_no_logits():
    with torch.no_grad():
        assert "logits" not in pair(outputs=None).eval()(**Rows().batch())


@pytest.mark.parametrize("compile", COMPILES, ids=["eager", "regional", "graph"])
def test_models_without_logits_are_evaluated_without(compile):
    body = fxdistill.wrap(
        llama(1).model,
        llama(2).model,
        {"layers.0.mlp": "layers.1.mlp"},
        logit_loss=None,
        compile=compile,
    )
    with torch.no_grad():
        out = body.eval()(input_ids=Rows().batch()["input_ids"])
    assert list(out) == ["loss", "losses", "metrics"]


# ------------------------------------------------------------------ state dicts


def test_a_tied_tensor_is_saved_once_and_both_forms_load():
    distiller, other = pair(), pair()
    state = distiller.state_dict()
    assert "student.model.embed_tokens.weight" in state
    assert "student.lm_head.weight" not in state
    assert "lm_head.weight" in distiller.student.state_dict()
    with torch.no_grad():
        distiller.student.lm_head.weight.mul_(2.0)
    whole = {f"student.{k}": v for k, v in distiller.student.state_dict().items()}
    for form in (distiller.state_dict(), whole):
        for p in other.parameters():
            nn.init.zeros_(p)
        other.load_state_dict(form, strict=True)
        for name, value in distiller.student.state_dict().items():
            torch.testing.assert_close(other.student.state_dict()[name], value)
    nested = nn.ModuleDict({"inner": distiller})
    nested.load_state_dict(nested.state_dict())


def test_a_buffer_that_is_also_a_scratch_one_is_saved():
    class Shares(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 3)
            kept = torch.ones(3)
            self.register_buffer("scratch", kept, persistent=False)
            self.register_buffer("kept", kept)

        def forward(self, x):
            return self.linear(x) * self.kept

    distiller = fxdistill.wrap(Shares(), Shares(), compile=False)
    assert "student.kept" in distiller.state_dict()
    distiller.load_state_dict(distiller.state_dict())


def test_a_missing_tensor_is_still_missing():
    distiller = pair()
    state = distiller.state_dict()
    del state["student.model.embed_tokens.weight"]
    with pytest.raises(RuntimeError, match=r"Missing key.*embed_tokens"):
        distiller.load_state_dict(state)


# ------------------------------------------------------------------ under Trainer


def test_trainer_trains_evaluates_predicts_saves_and_resumes(tmp_path):
    every = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}
    run = trainer(pair(), tmp_path, max_steps=3, learning_rate=1e-2, **every, **best)
    run.train()
    found = run.predict(Rows())
    assert found.predictions.shape == (ROWS, LENGTH, 64)
    assert found.label_ids.shape == (ROWS, LENGTH)
    run.save_model(str(tmp_path / "best"))
    saved = load_file(tmp_path / "best" / "model.safetensors")
    assert saved.keys() == run.model.state_dict().keys()
    again = trainer(pair(), tmp_path, max_steps=3, learning_rate=1e-2, **every)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for (name, ours), theirs in zip(
        run.model.named_parameters(), again.model.parameters(), strict=True
    ):
        torch.testing.assert_close(ours, theirs, msg=name)


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_evaluation_under_trainer_is_the_loss_of_the_batch(tmp_path, bf16):
    """All tokens but the first of a row are predicted, and Trainer counts just these."""
    distiller = pair()
    run = trainer(distiller, tmp_path, per_device_eval_batch_size=ROWS, bf16=bf16)
    found = run.evaluate()["eval_loss"]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        wanted = distiller.eval()(**Rows().batch()).loss
    assert found == pytest.approx(float(wanted), rel=1e-5)


def test_a_second_trainer_still_sees_the_columns(tmp_path):
    """Mixed precision replaces ``forward``; its signature stays the student's."""
    distiller = pair()
    for _ in range(2):
        run = trainer(distiller, tmp_path, bf16=True, max_steps=1)
        run.train()
    assert run.evaluate()["eval_loss"] > 0


@pytest.mark.parametrize("family", [bert_mlm, t5], ids=["bert", "t5"])
def test_evaluation_of_models_that_predict_every_label(tmp_path, family):
    family = family()
    inputs = {**family.batch, "labels": family.labels}
    distiller = fxdistill.wrap(family.student, family.teacher, compile=False)
    rows = [{k: v[i] for k, v in inputs.items()} for i in range(len(family.labels))]
    args = {"report_to": [], "use_cpu": True, "disable_tqdm": True}
    found = Trainer(
        model=distiller, args=TrainingArguments(str(tmp_path), **args), eval_dataset=rows
    ).evaluate()["eval_loss"]
    with torch.no_grad():
        wanted = distiller.eval()(**inputs).loss
    assert found == pytest.approx(float(wanted), rel=1e-5)


def trained(folder, size, compile=False, **options):
    """The student after two steps of SGD over the whole set, in micro-batches of ``size``."""
    distiller = pair(compile=compile, **options)
    steps = {"gradient_accumulation_steps": ROWS // size, "per_device_train_batch_size": size}
    sgd = {
        "optim": "sgd",
        "learning_rate": 0.5,
        "max_grad_norm": 0.0,
        "lr_scheduler_type": "constant",
    }
    trainer(distiller, folder, padded=False, **steps, **sgd).train()
    return distiller.student


@pytest.mark.parametrize(
    "options",
    [{}, {"logit_loss": None}, {"logit_loss": None, "label_loss": None}],
    ids=["all", "labels", "features"],
)
def test_accumulated_micro_batches_train_like_one_batch(tmp_path, options):
    """Features too, though Trainer passes the number of predictions only."""
    whole = trained(tmp_path, ROWS, **options)
    parts = trained(tmp_path, 2, **options)
    for (name, one), other in zip(whole.named_parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("compile", COMPILES, ids=["eager", "regional", "graph"])
def test_a_feature_weighs_by_the_share_of_its_batch(compile):
    """Value and gradient of the plain mean over two unequal batches, each by its predictions."""
    rows = Rows().batch()
    parts = [{k: v[rows_of] for k, v in rows.items()} for rows_of in (slice(0, 3), slice(3, 8))]
    counts = [int((part["labels"][:, 1:] != -100).sum()) for part in parts]
    options = {"logit_loss": None, "label_weight": 0.0, "compile": compile}
    found = pair(**options)
    alone = [pair(**{**options, "compile": False}) for _ in parts]
    values = []
    for part, count, single in zip(parts, counts, alone, strict=True):
        out = found(**part, num_items_in_batch=torch.tensor(sum(counts)))
        out.loss.backward()
        values.append(out.losses["features"])
        (single(**part).loss * (count / sum(counts))).backward()
    wanted = sum(
        single(**part).losses["features"] * (count / sum(counts))
        for part, count, single in zip(parts, counts, alone, strict=True)
    )
    torch.testing.assert_close(sum(values), wanted)
    learnt = [p for p in found.student.parameters() if p.grad is not None]
    both = zip(
        *([p for p in s.student.parameters() if p.grad is not None] for s in alone), strict=True
    )
    for p, (a, b) in zip(learnt, both, strict=True):
        torch.testing.assert_close(p.grad, a.grad + b.grad, rtol=1e-5, atol=1e-8)


def test_features_alone_divide_by_the_items():
    rows = Rows(padded=False).batch()
    del rows["labels"]
    distiller = pair(logit_loss=None)
    count = rows["input_ids"].numel()
    halves = distiller(**rows, num_items=2 * count).losses["features"]
    torch.testing.assert_close(2 * halves, distiller(**rows).losses["features"])


# ------------------------------------------------------------------ settings


def test_settings_are_saved_and_loaded(tmp_path):
    distiller, other = pair(), pair()
    distiller.set(temperature=2.5, feature_weight=0.3, weights={"model.layers.0.mlp": 0.7})
    torch.save(distiller.state_dict(), tmp_path / "state.pt")
    other.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert other.settings == distiller.settings
    assert other.settings["feature_weight"] == 0.3
    rows = Rows().batch()
    torch.testing.assert_close(other(**rows).loss, distiller(**rows).loss)


def test_a_state_dict_without_settings_leaves_them_alone():
    distiller = pair()
    state = dict(distiller.state_dict())
    distiller.set(temperature=2.0)
    distiller.load_state_dict(state, strict=True)
    assert distiller.settings["temperature"] == 2.0


def test_weights_of_other_matches_are_left_out():
    distiller, other = pair(), fxdistill.wrap(llama(1), llama(2), compile=False)
    distiller.set(temperature=3.0)
    other.load_state_dict(distiller.state_dict())
    assert other.settings["temperature"] == 3.0
    assert "model.layers.0.mlp" not in other.settings
