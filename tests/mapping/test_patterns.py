"""Patterns on real architectures: what they pair, and what is said where they cannot."""

import functools

import pytest
from torch import nn

from architectures import ARCHITECTURES
from fxdistill import Match, errors, losses, resolve, wrap
from toys import Toy, tokens


@functools.cache
def model(name, layers):
    return ARCHITECTURES[name].build(layers)


llama = functools.partial(model, "LlamaForCausalLM")
bamba = functools.partial(model, "BambaForCausalLM")
swin = functools.partial(model, "SwinForImageClassification")
t5 = functools.partial(model, "T5ForConditionalGeneration")
resnet = functools.partial(model, "torchvision_resnet")


def mlp(i):
    return f"model.layers.{i}.mlp"


def attention(i, inner=""):
    return f"model.layers.{i}.self_attn{inner}"


def stage(s, i):
    return f"swin.encoder.layers.{s}.blocks.{i}.mlp"


def mlps(*indices):
    return [(mlp(i), mlp(j)) for i, j in indices]


def pairs(student, teacher, mapping):
    return [(m.student, m.teacher) for m in resolve(student, teacher, mapping)]


def refused(kind, mapping, *said, student=None, teacher=None):
    """The message of the one error that ``mapping`` gives; ``said`` must stand in it."""
    with pytest.raises(errors.FxDistillError) as caught:
        resolve(student or llama(3), teacher or llama(6), mapping)
    assert type(caught.value) is kind
    for part in said:
        assert part in str(caught.value)
    return str(caught.value)


# ---- * and **


def test_a_star_pairs_in_natural_order():
    blocks = [stage(s, i) for s in (0, 1) for i in range(6)]
    expected = [(mlp(i), block) for i, block in enumerate(blocks)]
    assert pairs(llama(12), swin(6), {mlp("*"): stage("*", "*")}) == expected
    back = pairs(swin(6), llama(12), {stage("*", "*"): mlp("*")})
    assert [pair[::-1] for pair in back] == expected


def test_eleven_layers_come_out_as_they_are_counted():
    expected = mlps(*((i, i) for i in range(11)))
    assert pairs(llama(11), llama(11), {mlp("*"): mlp("*")}) == expected


def test_a_star_is_one_segment_and_never_none():
    found = pairs(llama(3), llama(3), {"model.layers.*": "model.layers.*"})
    assert found == [(f"model.layers.{i}", f"model.layers.{i}") for i in range(3)]
    refused(errors.PathError, {"model.*.mlp": "lm_head"}, "'model.*.mlp'", "Nearest")
    refused(errors.PathError, {"model.norm.*": "lm_head"}, "'model.norm.*'", "'model.norm'")


def test_a_star_can_be_a_part_of_a_segment():
    found = pairs(llama(2), llama(2), {attention("*", ".*_proj"): "model.*s.*.s*n.*_p*j"})
    names = [attention(i, f".{n}_proj") for i in (0, 1) for n in "koqv"]
    assert found == [(name, name) for name in names]
    found = pairs(resnet(2), resnet(2), {"layer*.1.bn2": "layer*.1.bn2"})
    assert found == [(f"layer{i}.1.bn2", f"layer{i}.1.bn2") for i in (1, 2, 3, 4)]


def test_two_stars_stand_for_no_segment_one_or_many():
    for pattern, paths in {
        "**.lm_head": ["lm_head"],
        "model.**.norm": ["model.norm"],
        "**.norm": ["model.norm"],  # and no layernorm
        "**.mlp": [mlp(0), mlp(1)],
        "model.**.mlp": [mlp(0), mlp(1)],
        "**.1.**.o_proj": [attention(1, ".o_proj")],
    }.items():
        assert pairs(llama(2), llama(2), {pattern: pattern}) == [(path, path) for path in paths]


def test_two_stars_at_the_end_take_the_module_itself_and_all_in_it():
    top = "encoder.block.1.layer.1"
    inside = [f".DenseReluDense{end}" for end in ("", ".act", ".dropout", ".wi_0", ".wi_1", ".wo")]
    paths = [top + end for end in ("", *inside, ".dropout", ".layer_norm")]
    assert pairs(t5(2), t5(2), {f"{top}.**": f"{top}.**"}) == [(path, path) for path in paths]


def test_everything_else_in_a_pattern_is_meant_literally():
    refused(errors.PathError, {"model.layers.[0-9].*": "lm_head"}, "'model.layers.[0-9].*'")
    refused(errors.PathError, {"model.layers.*.self.attn": "lm_head"}, "self.attn")


# ---- {i}


@pytest.mark.parametrize(
    ("student", "teacher", "expression", "expected"),
    [
        (3, 6, "2*i+1", [1, 3, 5]),
        (3, 6, " 5 - (2 * i) ", [5, 3, 1]),
        (6, 3, "i//2", [0, 0, 1, 1, 2, 2]),
        (6, 3, "-i%3", [0, 2, 1, 0, 2, 1]),
        (3, 3, "1", [1, 1, 1]),
    ],
)
def test_an_expression_on_the_teachers_side(student, teacher, expression, expected):
    found = pairs(llama(student), llama(teacher), {mlp("{i}"): mlp(f"{{{expression}}}")})
    assert found == mlps(*enumerate(expected))


def test_an_expression_on_the_students_side():
    found = pairs(llama(6), llama(3), {mlp("{2*i+1}"): mlp("{i}")})
    assert found == mlps((1, 0), (3, 1), (5, 2))


def test_only_the_blocks_that_have_the_module_give_a_number():
    # Every second block of Bamba has attention, the others have Mamba.
    found = pairs(bamba(4), llama(4), {attention("{i}"): attention("{i}")})
    assert found == [(attention(1), attention(1)), (attention(3), attention(3))]


def test_braces_match_a_number_and_nothing_else():
    refused(errors.PathError, {"model.{i}": "lm_head"}, "'model.{i}'")


def test_braces_can_be_a_part_of_a_segment():
    found = pairs(resnet(2), resnet(4), {"layer{s}.{i}.bn2": "layer{s}.{2*i+1}.bn2"})
    indices = [(s, i) for s in (1, 2, 3, 4) for i in (0, 1)]
    assert found == [(f"layer{s}.{i}.bn2", f"layer{s}.{2 * i + 1}.bn2") for s, i in indices]


def test_one_name_twice_in_a_path_is_one_number():
    found = pairs(swin(2), swin(4), {stage("{i}", "{i}"): stage("{i}", "{2*i+1}")})
    assert found == [(stage(0, 0), stage(0, 1)), (stage(1, 1), stage(1, 3))]


def test_two_names_may_meet_in_one_expression():
    found = pairs(swin(2), llama(4), {stage("{s}", "{block}"): mlp("{2*s+block}")})
    assert found == [(stage(i // 2, i % 2), mlp(i)) for i in range(4)]


def test_a_star_pairs_within_each_number():
    found = pairs(llama(2), llama(2), {attention("{i}", ".*_proj"): attention("{1-i}", ".*_proj")})
    ends = [f".{n}_proj" for n in "koqv"]
    assert found == [(attention(i, end), attention(1 - i, end)) for i in (0, 1) for end in ends]


def test_two_stars_pair_within_each_number():
    pattern = "decoder.block.{i}.**.layer_norm"
    names = [f"decoder.block.{i}.layer.{j}.layer_norm" for i in (0, 1) for j in (0, 1, 2)]
    assert pairs(t5(2), t5(2), {pattern: pattern}) == [(name, name) for name in names]


def test_a_name_may_begin_with_an_underscore():
    assert pairs(llama(3), llama(6), {mlp("{_i}"): mlp("{2*_i}")}) == mlps((0, 0), (1, 2), (2, 4))


# ---- what a pattern carries along


def test_the_call_behind_a_pattern_is_kept():
    found = pairs(llama(2), llama(4), {mlp("{i}") + "@1": mlp("{2*i}") + "@2"})
    assert found == [(f"{mlp(0)}@1", f"{mlp(0)}@2"), (f"{mlp(1)}@1", f"{mlp(2)}@2")]


def test_a_pattern_of_second_calls_reads_second_calls():
    student, teacher = Toy(2, "twice"), Toy(2, "twice")
    distiller = wrap(student, teacher, {"blocks.*.mlp@1": "blocks.*.mlp"}, compile=False)
    names = ["blocks.0.mlp@1", "blocks.1.mlp@1"]
    assert [name for name in distiller(tokens()).losses if name in names] == names


def test_every_expanded_pair_keeps_what_the_pattern_asked_for():
    asked = Match(
        attention("*"),
        attention("*"),
        loss=functools.partial(losses.smooth_l1, beta=0.5),
        weight=0.25,
        project=nn.Linear(32, 32),
        rearrange=("b n d -> n b d", None),
        reduce=(None, ("b n d -> b d", "mean")),
        student_port="output[0]",
        teacher_port="input.hidden_states",
        reason="told so",
    )
    found = resolve(llama(2), llama(2), [asked])
    assert found.keys() == [attention(0), attention(1)]
    for field in set(Match.__dataclass_fields__) - {"student", "teacher"}:
        assert all(getattr(m, field) is getattr(asked, field) for m in found), field


# ---- one student value, several matches


def test_a_path_may_be_named_many_times_on_purpose():
    mapping = mlps((0, 1), (0, 2), (1, 2))
    assert pairs(llama(3), llama(6), mapping) == mapping
    distiller = wrap(llama(3), llama(6), mapping, compile=False)
    out = distiller(**ARCHITECTURES["LlamaForCausalLM"].batch(5))
    names = [mlp(0), f"{mlp(0)}#2", mlp(1)]
    assert [name for name in out.losses if name.startswith("model.layers")] == names


@pytest.mark.parametrize(
    "other", [{"loss": "cosine"}, {"student_port": "input", "teacher_port": "input"}]
)
def test_one_pattern_twice_with_another_loss_or_port(other):
    mapping = [Match(mlp("{i}"), mlp("{2*i}")), Match(mlp("{i}"), mlp("{2*i}"), **other)]
    assert pairs(llama(3), llama(6), mapping) == mlps((0, 0), (1, 2), (2, 4)) * 2


@pytest.mark.parametrize(
    ("second", "teacher", "claimed"),
    [(mlp("*"), mlp("*"), 0), (mlp("{j}"), mlp("{j}"), 0), (mlp(2), "model.norm", 2)],
)
def test_two_patterns_cannot_claim_one_student_path(second, teacher, claimed):
    mapping = {mlp("{i}"): mlp("{2-i}"), second: teacher}
    said = [repr(path) for path in (*mapping, mlp(claimed), mlp(2 - claimed))]
    refused(errors.DuplicateError, mapping, *said, "Narrow one of them", teacher=llama(3))


@pytest.mark.parametrize("student", [mlp("{i//2}"), mlp("{i%3}"), mlp(0)])
def test_one_pattern_cannot_claim_a_student_path_many_times(student):
    refused(errors.DuplicateError, {student: mlp("{i}")}, repr(student), repr(mlp(0)))


SAME = [(mlp(0), mlp(1)), Match(f"{mlp(0)}@0", mlp(1)), Match(mlp(0), mlp(1), weight=2.0)]


@pytest.mark.parametrize("second", SAME, ids=["as it is", "call 0", "another weight"])
def test_the_same_pair_twice_is_a_slip(second):
    message = refused(errors.DuplicateError, [*mlps((0, 1)), second], repr(mlp(0)), repr(mlp(1)))
    assert "name both pairs" not in message  # both are named, and it does not help


def test_one_module_under_two_paths_is_told_apart_by_its_calls():
    shared = ARCHITECTURES["LlamaForCausalLM"].build(3)
    shared.model.layers[1] = shared.model.layers[0]
    for models in ({"student": shared, "teacher": llama(3)}, {"teacher": shared}):
        said = [next(iter(models)), repr(mlp(0)), repr(mlp(1)), "@1"]
        refused(errors.PathError, {mlp("*"): mlp("*")}, *said, **models)
    by_calls = [(mlp(0), mlp(0)), (f"{mlp(1)}@1", mlp(1))]
    assert pairs(shared, llama(3), by_calls) == by_calls


# ---- what cannot be paired


def test_unequal_counts_tell_both_and_three_ways_out():
    said = [" 3 ", " 6 ", mlp(0), mlp(2), mlp(5), "name the pairs", "{2*i+1}", "fxdistill.match("]
    refused(errors.CountError, {mlp("*"): mlp("*")}, *said)


def test_unequal_counts_within_one_number_say_which():
    pattern, models = stage("{i}", "*"), {"student": swin(2), "teacher": swin(4)}
    refused(errors.CountError, {pattern: pattern}, "i=0", " 2 ", " 4 ", **models)


def test_a_pattern_that_fits_by_half_tells_which_half():
    mapping = {mlp("{i}"): mlp("{6-2*i}")}
    said = [mlp("{i}"), mlp("{6-2*i}"), f"{mlp(6)!r} for i=0", "Nearest", "i=1, i=2", "name those"]
    refused(errors.PathError, mapping, "by half", *said, "fxdistill.match(")
    mapping, models = {attention("{i}"): attention("{i}")}, {"teacher": bamba(3)}
    refused(errors.PathError, mapping, "for i=0", "for i=2", "It fits for i=1", **models)
    models = {"student": llama(6), "teacher": llama(3)}
    refused(errors.PathError, {mlp("{i}"): mlp("{i}")}, repr(mlp(3)), "fits for i=0", **models)


def test_a_long_list_of_what_is_missing_is_cut():
    models = {"student": llama(11), "teacher": llama(3)}
    refused(errors.PathError, {mlp("{i}"): mlp("{2*i}")}, repr(mlp(4)), "and 3 more", **models)


@pytest.mark.parametrize(
    ("student", "teacher"), [(mlp(0), mlp(6)), (mlp("{i}"), mlp("{i+6}")), (mlp(1), mlp("{6}"))]
)
def test_an_index_out_of_range_names_what_exists(student, teacher):
    said = [f"teacher matches {teacher!r}", repr(mlp(5)), "fxdistill.module_names(teacher)"]
    refused(errors.PathError, {student: teacher}, *said)


@pytest.mark.parametrize("i", [0, "*", "{i}"])
def test_what_both_sides_lack_is_told_at_once(i):
    student, teacher = f"model.layers.{i}.mlq", f"model.layers.{i}.mlr"
    said = [f"student matches {student!r}", f"teacher matches {teacher!r}", repr(mlp(0))]
    refused(errors.PathError, {student: teacher}, *said)


def test_what_many_entries_lack_is_one_numbered_list():
    mapping = {"model.norn": "model.nrom", "model.*.mlq": mlp("*"), "lm_haed": "lm_head"}
    message = refused(errors.PathError, mapping, *map(repr, [*mapping, "model.nrom"]))
    assert message.startswith("4 things are wrong:")
    numbers = [line.split(".")[0].strip() for line in message.splitlines()[1:]]
    assert numbers == ["1", "2", "3", "4"]


def test_what_is_wrong_in_different_ways_is_told_at_once():
    mapping = [
        {"model.norn": "model.norm", mlp("*"): mlp("*"), "": "lm_head"},
        Match("lm_head", "lm_head", student_port="outptu"),
        *[("model.norm", "model.norm")] * 2,
    ]
    kinds = ["PathError", "CountError", "PatternError", "PortError", "DuplicateError"]
    with pytest.raises(errors.Problems) as caught:
        resolve(llama(3), llama(6), mapping)
    assert [type(problem).__name__ for problem in caught.value.problems] == kinds
    assert all(str(problem) in str(caught.value) for problem in caught.value.problems)


# ---- what is no pattern


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("path", ["", " ", ".", "model..norm", "model.", ".model", "@1"])
def test_an_empty_path_or_segment(side, path):
    mapping = {path: "lm_head"} if side == "student" else {"lm_head": path}
    refused(errors.PatternError, mapping, f"{side} path {path!r}", "empty", "'model.layers.*.mlp'")


@pytest.mark.parametrize("path", ["lm_head@", "lm_head@x", "lm_head@-1", "lm_head@1@2"])
def test_a_call_is_a_number(path):
    refused(errors.PatternError, {path: "lm_head"}, repr(path), "'a@1'")


@pytest.mark.parametrize("brace", ["{i", "i}", "{{i}}"])
def test_a_brace_that_is_not_closed(brace):
    refused(errors.PatternError, {mlp(brace): mlp("{i}")}, repr(mlp(brace)), "brace", "{i}")


NO_EXPRESSIONS = (
    "", "i**2", "i/2", "i+", "i j", "1.5", "'0'", "True", "i[0]", "i.real", "i=1", "i<2", "~i",
    "i if i else 0", "__import__('os')", "(lambda: 0)()", "[0][i]", "class", "i := 1",
)  # fmt: skip


@pytest.mark.parametrize("side", [1, -1], ids=["student", "teacher"])
@pytest.mark.parametrize("expression", NO_EXPRESSIONS)
def test_what_is_no_index_expression_is_not_evaluated(side, expression):
    braced = f"{{{expression}}}"
    mapping = dict([(mlp(braced), mlp("{i}"))[::side]])
    refused(errors.PatternError, mapping, mlp(braced), braced, "+ - * // %", "{2*i+1}")


@pytest.mark.parametrize(("expression", "number"), [("1//i", 0), ("1%i", 0), ("5//(i-2)", 2)])
def test_a_division_by_zero_says_where_and_for_which_number(expression, number):
    teacher = mlp(f"{{{expression}}}")
    refused(errors.PatternError, {mlp("{i}"): teacher}, "zero", f"i={number}", repr(teacher))


@pytest.mark.parametrize(
    ("student", "teacher", "names"),
    [
        (mlp("{i}"), mlp("{j}"), "ij"),
        (mlp("*"), mlp("{2*i+1}"), "i"),
        (mlp("{2*i}"), mlp("{2*i+1}"), "i"),
        (mlp("{i}"), mlp("{i+j}"), "j"),
        (mlp("{j+1}"), mlp("{i-1}"), "ij"),
        (stage("{i}", "{j+1}"), stage("{i+1}", "{j}"), "ij"),  # each side needs the other
    ],
)
def test_a_number_that_nothing_gives_or_that_goes_in_circles(student, teacher, names):
    said = [repr(student), repr(teacher), *(f"{{{name}}}" for name in names), "one side"]
    refused(errors.PatternError, {student: teacher}, *said, "'layers.{2*i+1}.mlp'")


PORTS = ("", "out", "output[x]", "output[-1]", "output[0]x", "inputs", "input.", None, 3)


@pytest.mark.parametrize("side", ["student_port", "teacher_port"])
@pytest.mark.parametrize("port", PORTS)
def test_what_is_no_port(side, port):
    mapping = [Match("lm_head", "lm_head", **{side: port})]
    refused(errors.PortError, mapping, f"{side}={port!r}", "'output[i]'", "'input.name'")
