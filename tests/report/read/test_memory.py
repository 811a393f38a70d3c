"""Numbers of a report that look right when they are wrong: whose memory, whose gradients."""

import json
import math

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import fxdistill
from fxdistill.graph.flops import LACKING

AOT = {"backend": "aot_eager"}
# All matched values live together, as a step is traced: they can be counted.
TOGETHER = {**AOT, "disable": ("FormGradients", "MeetEarly")}
BATCH, LENGTH, WIDTH = 2, 16, 32
VALUE = BATCH * LENGTH * WIDTH * 4  # bytes of one matched value


def llama(layers, vocabulary=200, **options):
    sizes = {"num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 64}
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=WIDTH, num_hidden_layers=layers, **sizes, **options
    )
    return LlamaForCausalLM(config)


def ids(vocabulary=200):
    return torch.randint(0, vocabulary, (BATCH, LENGTH))


def matched(part, ours="model.layers", theirs="model.layers"):
    return {f"{ours}.0{part}": f"{theirs}.1{part}"}


# ---------------------------------------------------------------------- owners of memory


@pytest.mark.parametrize(
    ("part", "options"),
    [
        (".mlp", {}),
        (".self_attn", {}),
        ("", {}),
        (".mlp", {"tie_word_embeddings": True}),
    ],
    ids=["mlp", "attention", "block", "tied"],
)
def test_taps_are_the_matched_values(part, options):
    distiller = fxdistill.wrap(
        llama(1, **options), llama(2, **options).eval(), matched(part), compile=TOGETHER
    )
    x = ids()
    memory = distiller.report(input_ids=x, labels=x).memory
    assert memory.taps == 2 * VALUE
    last = memory.timeline[-1]
    assert last.held.get("taps", 0) == 0  # no gradient is taken for one


def test_taps_of_transposed_products():
    config = {"vocab_size": 200, "n_embd": WIDTH, "n_head": 2, "use_cache": False}
    student, teacher = (GPT2LMHeadModel(GPT2Config(n_layer=n, **config)) for n in (1, 2))
    pairs = {"transformer.h.0.mlp": "transformer.h.1.mlp"}
    distiller = fxdistill.wrap(student, teacher.eval(), pairs, compile=TOGETHER)
    x = ids()
    assert distiller.report(input_ids=x, labels=x).memory.taps == 2 * VALUE


@pytest.mark.parametrize("vocabulary", [WIDTH, 200])
def test_values_as_wide_as_the_vocabulary_are_no_logits(vocabulary):
    distiller = fxdistill.wrap(
        llama(1, vocabulary), llama(2, vocabulary).eval(), matched(".mlp"), compile=TOGETHER
    )
    x = ids(vocabulary)
    memory = distiller.report(input_ids=x, labels=x).memory
    assert memory.taps == 2 * VALUE
    first = next(m for m in memory.timeline if "layers.1" in m.at)
    assert first.held.get("head", 0) == 0


def test_logits_that_are_made_are_the_heads():
    distiller = fxdistill.wrap(
        llama(1), llama(2).eval(), matched(".mlp"), compile=TOGETHER, outputs=("logits",)
    )
    x = ids()
    memory = distiller.report(input_ids=x, labels=x).memory
    logits = BATCH * LENGTH * 200 * 4
    assert memory.head >= 2 * logits
    assert memory.taps == 2 * VALUE


def test_the_worst_moment_adds_up_to_the_peak():
    distiller = fxdistill.wrap(llama(1), llama(2).eval(), matched(".mlp"), compile=AOT)
    x = ids()
    memory = distiller.report(input_ids=x, labels=x).memory
    worst = max(memory.timeline, key=lambda moment: moment.total)
    assert sum(worst.held.values()) == memory.peak


# ---------------------------------------------------------------------- gradients


def test_gradients_and_states_are_of_what_is_reached():
    student, teacher = llama(1), llama(2).eval()
    student.unused = nn.Linear(500, 500)
    pairs = {"model.layers.0.mlp": "model.layers.1.mlp"}
    distiller = fxdistill.wrap(student, teacher, pairs, logit_loss=None, compile=AOT)
    x = ids()
    memory = distiller.report(input_ids=x).memory
    distiller(input_ids=x).loss.backward()
    there = sum(4 * p.grad.numel() for p in distiller.parameters() if p.grad is not None)
    assert memory.gradients == there
    optimizer = torch.optim.AdamW(distiller.parameters())
    optimizer.step()
    states = sum(
        4 * s[name].numel() for s in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")
    )
    assert memory.optimizers["Adam, AdamW"] == states


def test_the_same_parts_without_distillation():
    distiller = fxdistill.wrap(llama(1), llama(2).eval(), matched(".mlp"), compile=AOT)
    x = ids()
    report = distiller.report(input_ids=x, labels=x)
    assert report.plain.gradients == report.memory.gradients
    assert report.plain.saved > 0
    assert report.plain.head >= BATCH * LENGTH * 200 * 4
    assert report.plain.peak < report.memory.peak


def test_labels_that_teach_nothing_have_no_plain_training():
    class Aside(Mixing):
        def __init__(self):
            super().__init__()
            self.aside, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x):
            self.aside(x)
            return self.head(super().forward(x))

    student, teacher = Aside(), Aside().eval()
    student.requires_grad_(False)
    student.aside.requires_grad_(True)
    distiller = fxdistill.wrap(
        student, teacher, {"aside": "aside"}, task="classification", compile=AOT
    )
    report = distiller.report(torch.randn(4, 8), labels=torch.zeros(4, dtype=torch.long))
    assert report.stopped is None
    assert report.plain is None
    assert report.memory.gradients == 4 * (8 * 8 + 8)


# ---------------------------------------------------------------------- operations


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, 4, 64, dropout=0.0, batch_first=True)
            for _ in range(2)
        )

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def test_a_layer_that_is_one_operator_in_evaluation_counts_as_its_parts():
    teacher = Encoder().eval()
    distiller = fxdistill.wrap(
        Encoder(), teacher, {"blocks.1": "blocks.1"}, logit_loss=None, compile=AOT
    )
    x = torch.randn(3, 7, WIDTH)
    report = distiller.report(x)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        Encoder().train()(x)
    assert counter.get_total_flops() > 0
    towers = {tower.name: tower for tower in report.towers}
    blocks = [[block.forward for block in towers[name].blocks] for name in ("student", "teacher")]
    assert blocks[0] == blocks[1]
    assert report.flops.teacher == report.flops.forward


def test_attention_that_is_one_operator_counts_as_its_parts():
    attention = nn.MultiheadAttention(WIDTH, 4, batch_first=True)
    x = torch.randn(3, 7, WIDTH)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        attention(x, x, x, need_weights=True)  # in training, as its parts
    formula = LACKING[torch.ops.aten._native_multi_head_attention]
    assert formula(x, x, x, WIDTH, 4, attention.in_proj_weight) == counter.get_total_flops() > 0


class Mixing(nn.Module):
    """Multiplies in its own forward."""

    def __init__(self):
        super().__init__()
        self.mix, self.body = nn.Parameter(torch.randn(8, 8)), nn.Linear(8, 8)

    def forward(self, x):
        return self.body(torch.matmul(x, self.mix))


def test_a_program_shows_what_a_model_multiplies_itself():
    distiller = fxdistill.wrap(
        Mixing(), Mixing().eval(), {"body": "body"}, logit_loss=None, compile=AOT
    )
    lines = str(distiller.check(torch.randn(4, 8))).splitlines()
    own = [line.split() for line in lines if "(itself)" in line]
    assert len(own) == 2
    assert all(line[-4:] == ["512", "FLOP", "128", "B"] for line in own)


# ---------------------------------------------------------------------- modes and places


def test_eager_makes_its_logits():
    made = {
        mode: fxdistill.wrap(llama(1), llama(2).eval(), matched(".mlp"), compile=mode)
        for mode in (False, "regional")
    }
    x = ids()
    eager, regional = (d.report(input_ids=x, labels=x) for d in made.values())
    assert "FuseHead" not in [line.name for line in eager.passes]
    assert "FuseHead" in [line.name for line in regional.passes]
    assert (eager.mode, eager.backend) == ("eager", "")
    assert eager.memory.head > 0


def test_a_teacher_is_in_the_mode_that_a_step_has():
    distiller = fxdistill.wrap(llama(1), llama(2), matched(".mlp"), compile=AOT)
    distiller.teacher.train()
    report = distiller.report(input_ids=ids())
    assert {tower.name: tower.training for tower in report.towers} == {
        "teacher": False,
        "student": True,
    }


def test_models_without_weights_say_where_they_lie():
    with torch.device("meta"):
        models = llama(1), llama(2).eval()
    report = fxdistill.wrap(*models, matched(".mlp"), compile=AOT).report(input_ids=ids())
    assert {tower.devices for tower in report.towers} == {("meta",)}


class Counting(nn.Module):
    """Keeps a tensor that is neither parameter nor buffer."""

    def __init__(self):
        super().__init__()
        self.places, self.body = torch.arange(8) * 1.0, nn.Linear(8, 8)

    def forward(self, x):
        return self.body(x + self.places)


def test_models_without_weights_may_keep_plain_tensors():
    with torch.device("meta"):
        models = Counting(), Counting().eval()
    places = models[0].places
    distiller = fxdistill.wrap(*models, {"body": "body"}, logit_loss=None, compile=AOT)
    assert distiller.report(torch.randn(4, 8)).stopped is None
    assert models[0].places is places


# ---------------------------------------------------------------------- odd numbers


def test_an_empty_batch_has_no_ignored_labels():
    distiller = fxdistill.wrap(llama(1), llama(2).eval(), matched(".mlp"), compile=AOT)
    x = ids()[:0]
    report = distiller.report(input_ids=x, labels=x)
    assert not [warning for warning in report.warnings if "every label" in warning]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_weight_that_is_no_number_is_told(value, tmp_path):
    distiller = fxdistill.wrap(
        Mixing(), Mixing().eval(), {"body": "body"}, logit_loss=None, compile=AOT
    )
    distiller.set(feature_weight=torch.tensor(value))
    report = distiller.report(torch.randn(4, 8))
    assert f"the weight of features is {value}, and so will the total be" in report.warnings
    data = json.loads(report.to_json(), parse_constant=pytest.fail)
    assert data["terms"][0]["weight"] == str(value)
    assert report.to_html(tmp_path / "report.html").exists()


# ---------------------------------------------------------------------- what stops a capture


class Sized(nn.Module):
    """The size of a value depends on the numbers in it."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        x = self.body(x)
        rows = torch.nonzero(x[:, 0] > 0).squeeze(1)
        return self.head(torch.zeros_like(x).index_add(0, rows, x[rows]))


def test_sizes_that_depend_on_values_name_their_line_and_leave_the_rest():
    distiller = fxdistill.wrap(Sized(), Sized().eval(), {"body": "body"}, compile=AOT)
    report = distiller.report(torch.randn(5, 8))
    assert report.stopped.splitlines()[-1].strip() == (
        "rows = torch.nonzero(x[:, 0] > 0).squeeze(1)"
    )
    assert "test_memory.py" in report.stopped
    assert report.pairs[0].student_value.shape == (5, 8)
    assert report.passes
    assert report.nodes["student"] > 0
    assert str(distiller.check(torch.randn(5, 8))).startswith("joint -> loss")


class Asking(Sized):
    def forward(self, x):
        if self.body(x).sum().item() > 0:
            x = x + 1
        return self.head(self.body(x))


@pytest.mark.parametrize("mode", [False, "regional"])
def test_a_step_that_needs_no_graph_is_said_to_run(mode):
    distiller = fxdistill.wrap(Asking(), Asking().eval(), {"body@1": "body@1"}, compile=mode)
    report = distiller.report(torch.randn(5, 8))
    assert "if self.body(x).sum().item() > 0" in report.stopped
    assert "The step itself runs" in report.stopped
    assert "What to do" not in report.stopped
    assert not any("costs are those" in note for note in report.notes)
    assert distiller(torch.randn(5, 8)).loss > 0


class Failing(Sized):
    def forward(self, x):
        raise ValueError("no such token")


def test_what_a_model_raises_is_told():
    distiller = fxdistill.wrap(Failing(), Failing().eval(), {"body": "body"}, compile=AOT)
    stopped = distiller.report(torch.randn(5, 8)).stopped
    assert 'raise ValueError("no such token")' in stopped
    assert "ValueError('no such token')" in stopped


@torch.library.custom_op("fxdistill_tests::unknown_shape", mutates_args=())
def unknown_shape(x: torch.Tensor) -> torch.Tensor:
    return x * 2


class Opaque(Sized):
    def forward(self, x):
        return self.head(unknown_shape(self.body(x)))


def test_an_operator_without_shapes_names_the_models_line():
    distiller = fxdistill.wrap(Opaque(), Opaque().eval(), {"body": "body"}, compile=AOT)
    stopped = distiller.report(torch.randn(5, 8)).stopped
    assert stopped.startswith("CaptureError")
    assert "return self.head(unknown_shape(self.body(x)))" in stopped
    assert "register_fake" in stopped
