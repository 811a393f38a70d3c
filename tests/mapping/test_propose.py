"""``match`` on real pairs: which layers, by which strategy, with what projection, and why."""

import functools
import random
import time

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fxdistill
from architectures import ARCHITECTURES
from fxdistill import Match, Matches, errors, match, resolve

ROLES = ("embedding", "block", "mixer", "mlp", "norm", "logits")
T5, SWIN = "T5ForConditionalGeneration", "SwinForImageClassification"


@functools.cache
def model(name, layers, width=32):
    return ARCHITECTURES[name].build(layers, width)


llama = functools.partial(model, "LlamaForCausalLM")


def pairs(student, teacher, **options):
    return [(m.student, m.teacher) for m in match(student, teacher, **options)]


def refused(kind, student, teacher, *said, **options):
    with pytest.raises(errors.FxDistillError) as caught:
        match(student, teacher, **options)
    assert type(caught.value) is kind
    for part in said:
        assert part in str(caught.value)


# ---- every architecture


@functools.cache
def halved(name):
    """Two layers learn from four, half as wide."""
    student, teacher = model(name, 2), model(name, 4, 64)
    return student, teacher, match(student, teacher, ROLES)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_mixers_and_mlps_of_the_last_of_each_share_are_paired(name):
    expected = set()
    stacks = ARCHITECTURES[name].expected(2), ARCHITECTURES[name].expected(4)
    for ours, theirs in zip(*stacks, strict=True):
        for i, j in ((0, 1), (1, 3)):
            expected |= set(zip(ours.mixers[i], theirs.mixers[j], strict=True))
            expected |= set(zip(ours.mlps[i], theirs.mlps[j], strict=True))
    found = pairs(model(name, 2), model(name, 4))
    assert sorted(found) == sorted(expected)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_embedding_norms_and_logits_are_paired_where_they_are(name):
    expected = ARCHITECTURES[name]
    ends = {expected.embedding, expected.logits, *(s.norm for s in expected.expected(2))} - {None}
    found = pairs(model(name, 2), model(name, 4), roles=("embedding", "norm", "logits"))
    assert sorted(found) == sorted((path, path) for path in ends)


def shapes(name, network, paths):
    """What really comes out at ``paths``."""
    found, hooks = {}, []

    def keep(path, module, args, output):
        found.setdefault(path, (output if isinstance(output, Tensor) else output[0]).shape)

    for path in paths:
        module = network.get_submodule(path)
        hooks.append(module.register_forward_hook(functools.partial(keep, path)))
    with torch.no_grad():
        network.eval()(**ARCHITECTURES[name].batch(7))
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_proposed_module_runs_and_is_projected_where_the_widths_differ(name):
    student, teacher, found = halved(name)
    ours = shapes(name, student, [m.student for m in found])
    theirs = shapes(name, teacher, [m.teacher for m in found])
    assert {m.student for m in found} - set(ours) == set()
    assert {m.teacher for m in found} - set(theirs) == set()
    wanted = [None if ours[m.student] == theirs[m.teacher] else "auto" for m in found]
    assert [(m.student, m.project) for m in found] == list(zip(found.keys(), wanted, strict=True))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_proposal_is_explicit_and_prints_within_80_columns(name):
    student, teacher, found = halved(name)
    assert resolve(student, teacher, found) == found
    lines = str(found).splitlines()
    assert max(map(len, lines)) <= 80
    words = {word for line in lines for word in line.split()}
    assert words >= {path for m in found for path in (m.student, m.teacher)}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_pair_has_one_line_with_layers_strategy_and_evidence(name):
    _, _, found = halved(name)
    stacks = ARCHITECTURES[name].expected(2)
    number = {block: i for stack in stacks for i, block in enumerate(stack.blocks)}
    for m in found:
        assert m.reason
        assert "\n" not in m.reason
        block = next((b for b in number if m.student == b or m.student.startswith(f"{b}.")), None)
        if block is None:
            assert m.reason.startswith(("embedding", "final norm", "logits"))
            continue
        i = number[block]
        assert m.reason.startswith(f"{i} of 2 ← {2 * i + 1} of 4, uniform: ")
        assert m.student == block or "(" in m.reason
        assert m.project is None or " wide" in m.reason


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("LlamaForCausalLM", ["attention (head_dim = 8)", "MLP (inner width 48)"]),
        ("MixtralForCausalLM", ["attention (head_dim = 8)", "mixture of experts (4 experts)"]),
        ("Mamba2ForCausalLM", ["state space (A_log, D and dt)"]),
        ("ConvNextForImageClassification", ["convolution (1 convolution)", "MLP (inner width 64)"]),
        ("torchvision_resnet", ["convolution (2 convolutions)"]),
        ("odd_names", ["attention (3 projections of the stream)", "MLP (inner width 64)"]),
        ("mlp_mixer", ["token MLP (16 positions, not 32 features)", "MLP (inner width 64)"]),
    ],
)
def test_the_evidence_is_what_the_models_have(name, kinds):
    found = match(model(name, 1), model(name, 1))
    assert [m.reason for m in found][: len(kinds)] == [
        f"0 of 1 ← 0 of 1, uniform: {kind}" for kind in kinds
    ]


def test_one_convolution_is_one():
    assert "1 convolutions" not in str(halved("ResNetForImageClassification")[2])


# ---- depth

DEPTHS = [  # student's layers, teacher's, strategy: the teacher's block of each, worked out by hand
    (3, 6, "uniform", [1, 3, 5]),
    (3, 6, "first", [0, 1, 2]),
    (3, 6, "last", [3, 4, 5]),
    (3, 6, "skip", [0, 2, 4]),
    (5, 12, "uniform", [2, 4, 7, 9, 11]),
    (5, 12, "first", [0, 1, 2, 3, 4]),
    (5, 12, "last", [7, 8, 9, 10, 11]),
    (5, 12, "skip", [0, 2, 4, 6, 8]),
    *((4, 4, strategy, [0, 1, 2, 3]) for strategy in ("uniform", "first", "last", "skip")),
    (1, 4, "uniform", [3]),
    (5, 3, "uniform", [0, 1, 1, 2, 2]),
    (12, 5, "uniform", [0, 0, 1, 1, 2, 2, 2, 3, 3, 4, 4, 4]),
]


@pytest.mark.parametrize(("n", "m", "strategy", "chosen"), DEPTHS)
def test_a_strategy_chooses_these_layers(n, m, strategy, chosen):
    found = match(llama(n), llama(m), ["mlp"], strategy)
    assert [(x.student, x.teacher) for x in found] == [
        (f"model.layers.{i}.mlp", f"model.layers.{j}.mlp") for i, j in enumerate(chosen)
    ]
    reasons = [f"{i} of {n} ← {j} of {m}, {strategy}: MLP" for i, j in enumerate(chosen)]
    assert [x.reason.split(" (")[0] for x in found] == reasons


def test_explicit_layers_are_taken_as_they_are_and_the_others_left_out():
    found = match(llama(3), llama(6), "mlp", {2: 5, 0: 5})
    assert [(m.student, m.teacher) for m in found] == [
        ("model.layers.0.mlp", "model.layers.5.mlp"),
        ("model.layers.2.mlp", "model.layers.5.mlp"),
    ]
    assert "0 of 3 ← 5 of 6, explicit" in found[0].reason


@pytest.mark.parametrize("strategy", ["first", "last", "skip"])
def test_a_strategy_that_needs_more_teacher_layers_says_so(strategy):
    said = [f"'{strategy}'", "'model.layers'", "6 blocks", "3 in the teacher", "uniform", "{0: 0"]
    refused(errors.CountError, llama(6), llama(3), *said, layers=strategy)


@pytest.mark.parametrize(
    ("layers", "said"),
    [
        ({0: 6}, ["teacher", "no block 6", "0 to 5"]),
        ({3: 0}, ["student", "no block 3", "0 to 2"]),
        ({-1: 0}, ["student", "no block -1", "0 to 2"]),
        ({0: 1.5}, ["teacher", "1.5", "0 to 5"]),
        ({}, ["layers={}", "{0: 1"]),
        ("unifrom", ["'unifrom'", "Nearest: 'uniform'", "{0: 1, 1: 3}"]),
        (2, ["layers=2", "uniform, first, last, skip"]),
        ({"model.layer": "last"}, ["'model.layer'", "Nearest: 'model.layers'"]),
        ({"model.layers": "lats"}, ["'lats'", "Nearest: 'last'"]),
        ({"model.layers": {0: 9}}, ["'model.layers'", "no block 9"]),
    ],
)
def test_layers_that_cannot_be_say_what_can(layers, said):
    refused(errors.OptionError, llama(3), llama(6), *said, layers=layers)


@pytest.mark.parametrize("roles", [("mixr",), "mixr", ("mlp", "mixr")])
def test_an_unknown_role_names_the_nearest_and_all(roles):
    said = ["'mixr'", "Nearest: 'mixer'", *ROLES]
    refused(errors.OptionError, llama(3), llama(6), *said, roles=roles)


def test_no_role_is_told_what_there_is():
    refused(errors.OptionError, llama(3), llama(6), "roles=()", *ROLES, roles=())


# ---- pairs of families


def test_encoder_and_decoder_each_have_a_strategy():
    layers = {"decoder.block": "last", "encoder.block": {1: 0}}
    assert pairs(model(T5, 2), model(T5, 4), layers=layers) == [
        ("encoder.block.1.layer.0.SelfAttention", "encoder.block.0.layer.0.SelfAttention"),
        ("encoder.block.1.layer.1.DenseReluDense", "encoder.block.0.layer.1.DenseReluDense"),
        *(
            (f"decoder.block.{i}.layer.{end}", f"decoder.block.{i + 2}.layer.{end}")
            for i in (0, 1)
            for end in ("0.SelfAttention", "1.EncDecAttention", "2.DenseReluDense")
        ),
    ]


def test_a_stack_that_is_not_named_is_uniform():
    found = match(model(T5, 2), model(T5, 4), "block", {"decoder.block": "first"})
    expected = [("encoder", 0, 1), ("encoder", 1, 3), ("decoder", 0, 0), ("decoder", 1, 1)]
    assert [(m.student, m.teacher) for m in found] == [
        (f"{stack}.block.{i}", f"{stack}.block.{j}") for stack, i, j in expected
    ]


def test_self_attention_is_never_paired_with_cross_attention():
    whisper = model("WhisperForConditionalGeneration", 2)
    decoder = [pair for pair in pairs(model(T5, 2), whisper, roles="mixer") if "dec" in pair[0]]
    assert decoder == [
        (f"decoder.block.{i}.layer.{j}.{kind}Attention", f"model.decoder.layers.{i}.{other}_attn")
        for i in (0, 1)
        for j, kind, other in ((0, "Self", "self"), (1, "EncDec", "encoder"))
    ]


def test_stages_are_paired_with_stages():
    assert pairs(model(SWIN, 1), model(SWIN, 2), layers="last") == [
        (f"swin.encoder.layers.{s}.blocks.0.{part}", f"swin.encoder.layers.{s}.blocks.1.{part}")
        for s in (0, 1)
        for part in ("attention", "mlp")
    ]
    found = match(model(SWIN, 2), model("ConvNextForImageClassification", 2), "mlp")
    assert [m.teacher.split(".")[3] for m in found] == ["0", "0", "1", "1"]


def test_a_distilbert_learns_from_a_bert():
    student = model("DistilBertForSequenceClassification", 1)
    bert, distilbert = "bert.encoder.layer.1", "distilbert.transformer.layer.0"
    found = match(student, model("BertForMaskedLM", 2, 64), ("embedding", "block", "mixer", "mlp"))
    assert [(m.student, m.teacher, m.project) for m in found] == [
        ("distilbert.embeddings.word_embeddings", "bert.embeddings.word_embeddings", "auto"),
        (f"{distilbert}.attention", f"{bert}.attention.output.dense", "auto"),
        (f"{distilbert}.ffn", f"{bert}.output.dense", "auto"),
        (distilbert, bert, "auto"),
    ]
    assert all("32 ← 64" in m.reason for m in found)
    assert found.notes == ()


def test_a_hybrid_whose_blocks_have_one_mixer_each_has_counterparts_for_all():
    found = match(model("BambaForCausalLM", 2), llama(2))
    assert [(m.student, m.teacher) for m in found] == [
        ("model.layers.0.mamba", "model.layers.0.self_attn"),
        ("model.layers.0.feed_forward", "model.layers.0.mlp"),
        ("model.layers.1.self_attn", "model.layers.1.self_attn"),
        ("model.layers.1.feed_forward", "model.layers.1.mlp"),
    ]
    assert "state space (A_log, D and dt) ← attention (head_dim = 8)" in found[0].reason
    assert found.notes == ()


def test_a_hybrid_with_two_mixers_a_block_pairs_its_attention_and_notes_the_rest():
    falcon = model("FalconH1ForCausalLM", 2)
    mixers = [(f"model.layers.{i}.self_attn",) * 2 for i in (0, 1)]
    for student, teacher, tower in ((falcon, llama(2), "student"), (llama(2), falcon, "teacher")):
        found = match(student, teacher, "mixer")
        assert [(m.student, m.teacher) for m in found] == mixers
        (note,) = found.notes  # one for all blocks
        other = "teacher" if tower == "student" else "student"
        assert note.startswith(f"{tower} model.layers.0.mamba and 1 more (state space) have")
        assert note.endswith(f"no counterpart in the {other}")
        assert f"note: {tower} model.layers.0.mamba" in str(found)


def test_two_mixers_are_paired_by_what_they_are_not_by_their_order():
    turned = ARCHITECTURES["FalconH1ForCausalLM"].build(1)
    inside = turned.model.layers[0]._modules
    inside["mamba"] = inside.pop("mamba")  # now behind self_attn
    found = pairs(turned, model("FalconH1ForCausalLM", 1), roles="mixer")
    assert found == [(f"model.layers.0.{name}",) * 2 for name in ("self_attn", "mamba")]


def test_a_mamba_learns_mixers_alone_from_a_transformer_and_it_is_noted():
    mamba = model("Mamba2ForCausalLM", 2)
    found = match(mamba, llama(4))
    assert [(m.student, m.teacher) for m in found] == [
        ("backbone.layers.0.mixer", "model.layers.1.self_attn"),
        ("backbone.layers.1.mixer", "model.layers.3.self_attn"),
    ]
    wanted = "teacher model.layers.1.mlp and 1 more (MLP) have no counterpart in the student"
    assert found.notes == (wanted,)
    refused(errors.StructureError, mamba, llama(2), "(MLP) have no counterpart", roles="mlp")


def test_a_role_that_was_asked_for_and_is_nowhere_is_noted():
    bert = model("BertForMaskedLM", 2)
    assert any("final norm" in note for note in match(bert, llama(2), ("mlp", "norm")).notes)
    assert any("final norm" in note for note in match(bert, bert, ("mlp", "norm")).notes)


# ---- what cannot be matched


def test_a_model_without_repeated_blocks():
    plain = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    for student, teacher, tower in ((plain, llama(2), "student"), (llama(2), plain, "teacher")):
        said = [f"in the {tower} (Sequential)", "{student path: teacher path}"]
        refused(errors.StructureError, student, teacher, *said, f"fxdistill.module_names({tower})")


def test_models_with_different_numbers_of_stacks():
    said = ["1 stack of blocks ('model.layers' of 2)", "'encoder.block' of 4", "'decoder.block' of"]
    refused(errors.StructureError, llama(2), model(T5, 4), *said, "{student path: teacher path}")


# ---- what it costs, and what it leaves alone


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "Qwen3NextForCausalLM", "MixtralForCausalLM"])
def test_a_hundred_layers_take_less_than_a_second(name):
    student, teacher = (ARCHITECTURES[name].build(layers) for layers in (50, 100))
    times = []
    for _ in range(3):
        start = time.perf_counter()
        found = match(student, teacher, ROLES)
        times.append(time.perf_counter() - start)
    assert len(found) == 3 + 3 * 50
    assert min(times) < 1


def test_models_on_the_meta_device_are_as_good():
    with torch.device("meta"):
        empty = [ARCHITECTURES["LlamaForCausalLM"].build(layers) for layers in (2, 4)]
    found, expected = match(*empty, ROLES), match(llama(2), llama(4), ROLES)
    assert found == expected
    assert str(found) == str(expected)


def test_nothing_of_either_model_is_changed_and_no_random_number_is_drawn():
    models = ARCHITECTURES[T5].build(2).train(), model(T5, 4).eval()
    models[0].encoder.requires_grad_(False)

    def state():
        parts = [
            (name, id(m), m.training, sorted(vars(m)), len(m._forward_hooks))
            for network in models
            for name, m in network.named_modules()
        ]
        tensors = [
            (name, id(p), p._version, p.requires_grad, p.grad)
            for network in models
            for name, p in [*network.named_parameters(), *network.named_buffers()]
        ]
        draws = torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()
        return parts, tensors, draws

    before = state()
    proposal = match(*models, ROLES)
    proposal["lm_head"] = Match(teacher="lm_head", weight=2.0)
    resolve(*models, Matches(proposal))
    assert state() == before


def test_a_proposal_trains():
    student, teacher = llama(2), llama(4, 48)
    proposal = match(student, teacher, ROLES)
    distiller = fxdistill.wrap(student, teacher, proposal, compile=False)
    out = distiller(**ARCHITECTURES["LlamaForCausalLM"].batch(5))
    assert set(proposal.keys()) <= set(out.losses)
    out.loss.backward()
