"""What a report says, beside what a step does."""

import copy
import dataclasses
import functools
import json

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop, sdpa_flop
from transformers import LlamaConfig, LlamaForCausalLM

import families
import fxdistill
from benchmarks.measure import peak
from fxdistill import Match, errors
from toys import MAPPING, Toy, tokens, toy_pair

AOT = {"backend": "aot_eager"}
aten = torch.ops.aten


def raw(formula):
    def counted(*args, **kwargs):
        return formula(*args, **kwargs)

    counted._get_raw = True
    return counted


CPU_ATTENTION = {  # which torch's counter leaves out
    aten._scaled_dot_product_flash_attention_for_cpu: raw(sdpa_flop),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: raw(sdpa_backward_flop),
}


def llama(width, layers, vocabulary=1000, **options):
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=layers,
            num_attention_heads=2,
            num_key_value_heads=2,
            use_cache=False,
            **options,
        )
    )


def pair(compile=AOT, **options):
    """Of the teacher, a layer and the head come after what is matched."""
    matches = [Match(f"model.layers.{i}.mlp", f"model.layers.{i}.mlp") for i in range(2)]
    return fxdistill.wrap(llama(64, 2), llama(64, 3), matches, compile=compile, **options)


def batch(size=4, length=128, vocabulary=1000):
    ids = torch.randint(1, vocabulary, (size, length))
    return {"input_ids": ids, "labels": ids}


@functools.cache
def reported():
    """A distiller, and what it reports of ``batch()``: tests that only read share it."""
    distiller = pair()
    return distiller, distiller.report(**batch())


def run(distiller, inputs):
    distiller(**inputs).loss.backward()
    distiller.zero_grad(set_to_none=True)


# ---------------------------------------------------------------------- against what happens


def only_slow(*values):
    """Cases that are run in ``make test`` only."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


@pytest.mark.parametrize("kind", ["fused", *only_slow("logits made", "checkpoints", "bf16")])
def test_the_peak_is_what_the_allocator_hands_out(kind):
    options = {"outputs": ("logits",)} if kind == "logits made" else {}
    distiller = pair(**options)
    if kind == "checkpoints":
        distiller.student.activation_checkpointing_enable({"use_reentrant": False})
    if kind == "bf16":
        distiller.to(torch.bfloat16)
    inputs = batch()
    memory = distiller.report(**inputs).memory
    run(distiller, inputs)
    measured = peak(lambda: run(distiller, inputs))
    predicted = memory.peak - sum(memory.weights.values())
    assert predicted == pytest.approx(measured, rel=0.05)


@pytest.mark.slow
def test_the_peak_of_fused_kernels():
    distiller = pair({"backend": "inductor"})
    inputs = batch(8, 128)
    memory = distiller.report(**inputs).memory
    run(distiller, inputs)
    measured = peak(lambda: run(distiller, inputs))
    predicted = memory.peak - sum(memory.weights.values())
    assert predicted == pytest.approx(measured, rel=0.15)


FAMILIES = ("llama", "bert_mlm", "vit", "resnet", *only_slow("bamba", "t5"))


@pytest.mark.parametrize("name", FAMILIES)
def test_flops_are_those_that_torch_counts(name):
    family = getattr(families, name)()
    inputs = {**family.batch, "labels": family.labels}

    def made(compile):
        models = copy.deepcopy((family.student, family.teacher))
        return fxdistill.wrap(*models, family.mapping, task=family.wrap_task, compile=compile)

    report = made(AOT).report(**inputs)
    assert report.stopped is None
    eager = made(False)
    eager(**inputs)  # the first call asks, on fake tensors that are counted too, whose tokens count
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        eager(**inputs).loss.backward()
    assert report.flops.total == pytest.approx(counter.get_total_flops(), rel=0.02)
    parts = report.flops
    assert parts.total == sum(
        (parts.teacher, parts.forward, parts.backward, parts.losses, parts.projections, parts.again)
    )


def test_flops_of_blocks_and_of_what_is_done_again():
    plain = reported()[1]
    teacher, student = plain.towers
    assert [b.path for b in student.blocks] == [
        "model.embed_tokens",
        "model.layers.0",
        "model.layers.1",
        "model.norm",
        "lm_head",
    ]
    layers = student.blocks[1:3]
    assert layers[0].forward == layers[1].forward > 0
    assert layers[0].backward == layers[1].backward > 2 * layers[0].forward  # attention has more
    assert sum(b.forward for b in student.blocks) == plain.flops.forward
    assert sum(b.backward for b in student.blocks) == plain.flops.backward
    assert sum(b.forward for b in teacher.blocks) == plain.flops.teacher
    distiller = pair()
    distiller.student.activation_checkpointing_enable({"use_reentrant": False})
    again = distiller.report(**batch())
    # All of the forward but the last products of regions, whose values no gradient needs.
    assert 0.9 * plain.flops.forward < again.flops.again < plain.flops.forward
    assert dataclasses.replace(again.flops, again=0, total=plain.flops.total) == plain.flops
    assert again.flops.total == plain.flops.total + again.flops.again
    for tower, found in zip(plain.towers, again.towers, strict=True):
        assert [b.forward for b in tower.blocks] == [b.forward for b in found.blocks]
    assert again.memory.saved < plain.memory.saved


def test_parameters_gradients_and_states():
    distiller = pair()
    distiller.student.lm_head.requires_grad_(False)
    report = distiller.report(**batch())
    student = distiller.student
    count = sum(p.numel() for p in student.parameters())
    head = student.lm_head.weight.numel()
    teacher, tower = report.towers
    assert (tower.parameters, tower.trainable) == (count, count - head)
    assert teacher.trainable == 0
    assert not teacher.training
    assert report.memory.gradients == 4 * (count - head)
    assert report.memory.optimizers["Adam, AdamW"] == 8 * (count - head)
    buffers = sum(b.numel() * b.element_size() for b in student.buffers())
    assert report.memory.weights["student"] == 4 * count + buffers


def test_weights_that_towers_share_are_counted_once():
    model = llama(64, 2)
    distiller = fxdistill.wrap(model, model, {"model.layers.0": "model.layers.1"}, compile=AOT)
    weights = distiller.report(**batch()).memory.weights
    assert weights["teacher"] == 0


def test_beside_plain_training():
    distiller, report = reported()
    alone = fxdistill.wrap(
        distiller.student, distiller.teacher, logit_loss=None, compile={**AOT, "fuse_head": False}
    )
    plain = alone.report(**batch())
    assert report.plain.flops == plain.flops.total
    weights = plain.memory.weights
    assert report.plain.peak == plain.memory.peak - sum(weights.values()) + weights["student"]
    ids = batch()["input_ids"]
    assert distiller.report(input_ids=ids).plain is None


# ---------------------------------------------------------------------- what it shows


def test_pairs_and_terms():
    distiller = fxdistill.wrap(
        llama(64, 2),
        llama(96, 2),
        [
            Match("model.layers.1.mlp", "model.layers.1.mlp", project="linear", weight=0.5),
            Match("model.layers.0.self_attn", "model.layers.0", project="linear"),
            Match("model.norm", "model.norm", project="linear"),
        ],
        feature_loss="cosine",
        feature_weight=2.0,
        compile=AOT,
    )
    report = distiller.report(**batch(2, 16))
    assert [(p.student_role, p.teacher_role) for p in report.pairs] == [
        ("mlp", "mlp"),
        ("mixer", "block"),
        ("norm", "norm"),
    ]
    found = report.pairs[0]
    assert (found.name, found.teacher) == ("model.layers.1.mlp", "model.layers.1.mlp")
    assert (found.loss, found.weight, found.between) == ("cosine", 0.5, "Linear 64 → 96")
    assert found.projection == "Linear 64 → 96"
    assert str(found.student_value) == "[2, 16, 64] float32"
    assert str(found.teacher_value) == "[2, 16, 96] float32"
    assert [(t.name, t.loss, t.weight) for t in report.terms] == [
        ("logits", "forward_kl", 1.0),
        ("labels", "cross_entropy", 1.0),
        ("features", "cosine", 2.0),
    ]
    projections = next(tower for tower in report.towers if tower.name == "projections")
    assert [block.path for block in projections.blocks] == ["0", "1", "2"]
    assert [block.parameters for block in projections.blocks] == [64 * 96 + 96] * 3
    products = [block.forward + block.backward for block in projections.blocks]
    assert sum(products) == report.flops.projections
    assert len(set(products)) == 1
    assert set(report.inputs) == {"input_ids", "labels"}


def test_passes_have_costs_before_and_after():
    distiller = pair({**AOT, "fuse_head": False}, logit_loss=None)
    lines = {line.name: line for line in distiller.report(**batch()).passes}
    pruned = lines["PruneTeacher"]
    assert pruned.flops.after < pruned.flops.before  # a block and the head of the teacher
    assert pruned.bytes.after < pruned.bytes.before
    assert pruned.nodes.after < pruned.nodes.before
    assert lines["ExposeOutputs"].flops.before == lines["ExposeOutputs"].flops.after > 0
    assert {line.graph for line in lines.values()} >= {"student", "joint", "backward"}


def test_casts():
    distiller = pair()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        report = distiller.report(**batch())
    assert any((c.before, c.after) == ("float32", "bfloat16") for c in report.casts)
    assert {c.owner for c in report.casts} >= {"student", "teacher"}
    plain = reported()[1]
    assert plain.casts == ()
    # A timeline holds the peak, and both halves.
    memory = plain.memory
    assert max(m.total for m in memory.timeline) == memory.peak
    assert {m.phase for m in memory.timeline} == {"forward", "backward"}
    assert len(memory.timeline) <= 2 * 200
    last = memory.timeline[-1]
    assert last.held["gradients"] == memory.gradients
    assert memory.peak_at in {m.at for m in memory.timeline}


def test_the_last_call_is_reported_and_recompiles_are_told():
    distiller = fxdistill.wrap(*toy_pair(), MAPPING, task="causal_lm", compile=AOT)
    with pytest.raises(errors.StepError, match="as the distiller itself would be called"):
        distiller.report()
    distiller(ids=tokens(2, 16))
    distiller(ids=tokens(2, 24))
    report = distiller.report()
    assert report.inputs["ids"].shape == (2, 24)
    first, second = report.events
    assert first.kind == "capture"
    assert second.kind == "recompile"
    assert "expected 16, actual 24" in second.reason


# ---------------------------------------------------------------------- what it leaves alone


def test_nothing_is_run_and_nothing_changes():
    student, teacher = toy_pair("batchnorm", dropout=0.5)
    distiller = fxdistill.wrap(student, teacher, MAPPING, task="causal_lm", compile=AOT)
    ids = tokens()
    distiller(ids=ids, labels=ids).loss.backward()
    state = copy.deepcopy(distiller.state_dict())
    grads = [p.grad.clone() for p in student.parameters()]
    program, events, rng = distiller.program, list(distiller.journal.events), torch.get_rng_state()
    distiller.report(ids=ids, labels=ids)
    assert distiller.program is program
    assert distiller.journal.events == events
    assert torch.equal(torch.get_rng_state(), rng)
    for name, value in distiller.state_dict().items():
        assert torch.equal(value, state[name]), name
    for p, grad in zip(student.parameters(), grads, strict=True):
        assert torch.equal(p.grad, grad)
    distiller(ids=ids, labels=ids)
    assert distiller.journal.events == events  # no graph is made anew


def test_models_without_weights():
    matches = [Match("model.layers.0.mlp", "model.layers.1.mlp")]
    real = fxdistill.wrap(llama(64, 1), llama(64, 2), matches, compile=AOT)
    with torch.device("meta"):
        models = llama(64, 1, tie_word_embeddings=True), llama(64, 2)
    fake = fxdistill.wrap(*models, matches, compile=AOT)
    meta = {name: value.to("meta") for name, value in batch().items()}
    found = fake.report(**meta)
    assert found.stopped is None
    assert all(p.is_meta for model in models for p in model.parameters())
    assert models[0].lm_head.weight is models[0].model.embed_tokens.weight
    wanted = real.report(**batch())
    assert found.flops == wanted.flops
    assert found.pairs == wanted.pairs
    head = 4 * 1000 * 64  # tied here: one weight and one gradient less
    assert wanted.memory.weights["student"] - found.memory.weights["student"] == head
    assert found.memory.saved == wanted.memory.saved


# ---------------------------------------------------------------------- what goes wrong


class Branching(Toy):
    def forward(self, ids):
        if ids.float().mean() > 1:  # which no graph can hold
            ids = ids + 0
        return super().forward(ids)


def test_what_cannot_be_captured_is_partly_reported():
    distiller = fxdistill.wrap(Branching(2), Toy(3), MAPPING, compile=AOT)
    ids = tokens()
    report = distiller.report(ids=ids, labels=ids)
    assert "if ids.float().mean() > 1" in report.stopped
    assert "test_build.py" in report.stopped
    assert report.memory is None
    assert [p.student for p in report.pairs] == list(MAPPING)
    assert json.loads(report.to_json())["stopped"] == report.stopped


def test_inputs_that_fit_no_call_are_errors():
    with pytest.raises(errors.BatchError):
        pair().report(input_ids=batch()["input_ids"], labels=[1, 2])


def test_warnings():
    class Dropping(Toy):
        def __init__(self, depth):
            super().__init__(depth, dropout=0.1)
            self.config = type("Config", (), {"pad_token_id": 0})()
            self.unused = nn.Linear(2, 2)

        def forward(self, input_ids):
            return super().forward(input_ids)

    distiller = fxdistill.wrap(
        Dropping(2), Dropping(3), MAPPING, task="causal_lm", freeze_teacher=False, compile=AOT
    )
    ids = tokens()
    ids[0, -2:] = 0
    text = "\n".join(distiller.report(input_ids=ids, labels=torch.full_like(ids, -100)).warnings)
    assert "every label is -100" in text
    assert "padding token 0" in text
    assert "drops values at random in blocks.0.dropout" in text
    assert "get no gradient" in text
    ids = tokens().clamp(min=1)
    quiet = fxdistill.wrap(*toy_pair(), MAPPING, task="causal_lm", compile=AOT)
    assert quiet.report(ids=ids, labels=ids).warnings == ()


def test_other_modes_say_whose_costs_they_are():
    report = pair("regional").report(**batch())
    assert report.memory.peak > 0
    assert any("one graph" in note for note in report.notes)


# ---------------------------------------------------------------------- the program as text


def test_a_program_prints_modules_and_losses_with_their_costs():
    distiller = pair(logit_loss=None)
    text = str(distiller.check(**batch(2, 16)))
    lines = text.splitlines()
    assert lines[0].startswith("joint -> loss, labels, features")
    assert [line for line in lines if not line.startswith(" ")][1:] == [
        "teacher",
        "student",
        "objective",
    ]
    gate = [line for line in lines if "model.layers.1.mlp.gate_proj" in line][-1]
    assert gate.split() == [
        "model.layers.1.mlp.gate_proj",
        "Linear",
        "float32[2,",
        "16,",
        "192]",
        "786",
        "kFLOP",
        "24.0",
        "KiB",
    ]
    assert sum("mse" in line for line in lines) == 2


def test_a_pass_shows_what_it_did():
    program = pair({**AOT, "fuse_head": False}, logit_loss=None).check(**batch(2, 16))
    text = program.diff("PruneTeacher")
    removed = [line for line in text.splitlines() if line.startswith("-")]
    assert any("linear" in line for line in removed)
    assert not [line for line in text.splitlines() if line.startswith("+") and "linear" in line]
    with pytest.raises(errors.OptionError, match="PruneTeacher"):
        program.diff("PruneTeachers")


MADE = {**AOT, "fuse_head": False}  # a teacher that learns has its logits made


def test_a_teacher_that_learns_is_a_teacher_still():
    student, teacher = toy_pair()
    frozen = fxdistill.wrap(student, teacher, MAPPING, compile=MADE).report(tokens()).flops
    student, teacher = toy_pair()
    learning = fxdistill.wrap(student, teacher, MAPPING, freeze_teacher=False, compile=MADE)
    found = learning.report(tokens()).flops
    assert found.forward == frozen.forward
    assert found.teacher > 2 * frozen.teacher  # its backward is in it
