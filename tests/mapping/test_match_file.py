"""A mapping as an object: its forms, editing, printing, and keeping it in files."""

import functools
import json
from dataclasses import fields

import pytest
import torch
from torch import nn

import fxdistill
from architectures import ARCHITECTURES
from fxdistill import Match, Matches, errors, losses, resolve

KINDS = pytest.mark.parametrize("kind", ["toml", "json"])


@functools.cache
def llama(layers, width=32):
    return ARCHITECTURES["LlamaForCausalLM"].build(layers, width)


def mlp(i):
    return f"model.layers.{i}.mlp"


@pytest.fixture
def matches():
    return Matches([Match(mlp(i), mlp(2 * i)) for i in range(3)], ["nothing for lm_head"])


# ---- forms

ENTRY, HEAD = Match(mlp("{i}"), mlp("{2*i}")), Match("lm_head", "lm_head", weight=2.0)
FORMS = {
    "dict": {ENTRY.student: ENTRY.teacher, "lm_head": Match(teacher="lm_head", weight=2.0)},
    "list of Match": [ENTRY, HEAD],
    "pairs": [(ENTRY.student, ENTRY.teacher), ["lm_head", HEAD]],
    "dict and Match": [{ENTRY.student: ENTRY.teacher}, HEAD],
    "pair and dict": ((ENTRY.student, ENTRY.teacher), {"lm_head": HEAD}),
    "Matches": Matches([ENTRY, HEAD]),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_mapping_means_the_same_in_every_form(form):
    explicit = Matches([*(Match(mlp(i), mlp(2 * i)) for i in range(3)), HEAD])
    assert resolve(llama(3), llama(6), FORMS[form]) == explicit


@pytest.mark.parametrize("nothing", [None, {}, [], (), Matches()])
def test_no_mapping_is_no_match(nothing):
    assert list(resolve(llama(3), llama(6), nothing)) == []


@pytest.mark.parametrize(
    "mapping",
    [
        FORMS["dict"],
        {"model.layers.{i}.self_attn.*_proj": "model.layers.{i+2}.self_attn.*_proj"},
        [Match(mlp("{i}") + "@1", mlp("{i}"), student_port="input", project="auto", reason="so")],
        [(mlp(0), mlp(1)), (mlp(0), mlp(2)), (mlp(0), mlp(3))],
    ],
)
def test_what_was_resolved_resolves_to_itself(mapping):
    once = resolve(llama(3), llama(6), mapping)
    assert resolve(llama(3), llama(6), once) == once
    assert resolve(llama(3), llama(6), list(once)) == once
    assert [m.reason for m in resolve(llama(3), llama(6), once)] == [m.reason for m in once]


NO_MAPPINGS = {
    "number": (3, "mapping=3"),
    "path": ("lm_head", "mapping='lm_head'"),
    "one Match": (HEAD, "mapping=Match("),
    "one pair": (("lm_head", "lm_head"), "not 'lm_head'"),
    "paths": (["ab"], "not 'ab'"),
    "tensor": (torch.zeros(1), "not tensor"),
    "key": ({3: "lm_head"}, "key 3"),
    "value": ({"lm_head": None}, "mapping['lm_head']"),
    "values": ({"lm_head": ["lm_head"]}, "mapping['lm_head']"),
    "other key": ({"lm_head": Match("model.norm", "lm_head")}, "'model.norm'"),
    "no teacher": ({"lm_head": Match()}, "Match(teacher=...)"),
    "no student": ([Match(teacher="lm_head")], "Match(student, teacher, ...)"),
}


@pytest.mark.parametrize("case", NO_MAPPINGS)
def test_what_is_no_mapping_is_told_what_one_is(case):
    mapping, asked = NO_MAPPINGS[case]
    with pytest.raises(errors.OptionError) as caught:
        resolve(llama(3), llama(6), mapping)
    assert asked in str(caught.value)
    assert {"Match", "path"} & set(str(caught.value).replace("(", " ").replace(",", " ").split())


def test_every_entry_that_is_none_is_told_at_once():
    mapping = {"lm_head": 3, mlp("*"): mlp("*"), "model.norm": None}
    with pytest.raises(errors.FxDistillError) as caught:
        resolve(llama(3), llama(6), mapping)
    assert all(repr(path) in str(caught.value) for path in mapping)


def test_a_path_that_is_matched_again_means_its_first_match():
    twice = Matches([Match("norm", "a"), Match("other", "b"), Match("norm", "c", loss="l1")])
    assert twice["norm"].teacher == "a"
    del twice["norm"]
    assert [m.teacher for m in twice] == ["b", "c"]
    twice["norm"] = "d"
    assert [m.teacher for m in twice] == ["b", "d"]


# ---- editing


def test_it_is_a_list(matches):
    first, second, third = matches
    assert (len(matches), matches[0], matches[-1]) == (3, first, third)
    del matches[1]
    assert list(matches) == [first, third]
    matches.insert(1, second)
    matches.append(HEAD)
    matches[0] = Match("model.norm", "model.norm")
    assert matches.keys() == ["model.norm", mlp(1), mlp(2), "lm_head"]
    matches.reverse()
    assert matches.keys() == ["lm_head", mlp(2), mlp(1), "model.norm"]
    assert matches.pop(0) is HEAD
    matches[1:] = [HEAD]
    assert matches.keys() == [mlp(2), "lm_head"]
    with pytest.raises(IndexError):
        matches[9]


def test_it_goes_by_the_students_path(matches):
    assert matches[mlp(1)] is matches[1]
    assert mlp(1) in matches
    assert "lm_head" not in matches
    assert dict(matches.items())[mlp(2)] is matches[2]
    matches[mlp(1)] = mlp(5)
    assert matches[1] == Match(mlp(1), mlp(5))
    matches[mlp(0)] = Match(teacher=mlp(3), loss="cosine")
    matches["lm_head"] = HEAD
    del matches[mlp(1)]
    assert list(matches) == [Match(mlp(0), mlp(3), loss="cosine"), Match(mlp(2), mlp(4)), HEAD]


def test_a_path_that_is_not_there_names_the_nearest(matches):
    for use in (matches.__getitem__, matches.__delitem__):
        with pytest.raises(KeyError, match=r"student .*Nearest: 'model\.layers\.0\.mlp'"):
            use("model.layers.0.mlq")


def test_equality_is_by_pairs_and_options_not_by_reasons(matches):
    same = Matches([Match(m.student, m.teacher, reason="because") for m in matches])
    assert matches == same
    assert matches[0] in same
    same[mlp(0)] = Match(teacher=mlp(0), weight=2.0)
    assert matches != same
    assert matches[0] not in same


def test_notes_stay_through_editing(matches):
    matches.append(HEAD)
    del matches[0]
    matches[mlp(1)] = mlp(1)
    assert matches.notes == matches[1:].notes == ("nothing for lm_head",)
    assert resolve(llama(3), llama(6), matches).notes == matches.notes


NO_MATCHES = {"number": 3, "path": mlp(0), "triple": (mlp(0),) * 3, "no teacher": Match(mlp(0))}


@pytest.mark.parametrize("way", ["append", "insert", "set", "slice", "make"])
@pytest.mark.parametrize("case", NO_MATCHES)
def test_only_a_match_goes_in(matches, case, way):
    entry, before = NO_MATCHES[case], list(matches)
    ways = {
        "append": lambda: matches.append(entry),
        "insert": lambda: matches.insert(0, entry),
        "set": lambda: matches.__setitem__(0, entry),
        "slice": lambda: matches.__setitem__(slice(0, 1), [entry]),
        "make": lambda: Matches([entry]),
    }
    with pytest.raises(errors.OptionError, match=r"Match\(student, teacher"):
        ways[way]()
    assert list(matches) == before


def test_a_pair_of_paths_becomes_a_match(matches):
    matches.append((mlp(0), mlp(0)))
    assert matches[-1] == Matches([(mlp(0), mlp(0))])[0] == Match(mlp(0), mlp(0))


@pytest.mark.parametrize("value", [3, None, Match(mlp(1), mlp(0)), Match()])
def test_a_path_takes_a_teacher_or_a_match_of_its_own(matches, value):
    with pytest.raises(errors.OptionError, match=r"model\.layers\.0\.mlp"):
        matches[mlp(0)] = value
    assert matches[mlp(0)] == Match(mlp(0), mlp(0))


def test_an_edited_proposal_goes_through_wrap():
    student, teacher = llama(2), llama(4, 48)
    proposal = fxdistill.match(student, teacher)
    del proposal["model.layers.0.self_attn"]
    proposal[mlp(0)] = Match(teacher=mlp(0), project="linear", loss="cosine")
    proposal["model.norm"] = Match(teacher="model.norm", project="auto")
    distiller = fxdistill.wrap(student, teacher, proposal, compile=False)
    out = distiller(**ARCHITECTURES["LlamaForCausalLM"].batch(5))
    assert set(proposal.keys()) == {mlp(0), mlp(1), "model.layers.1.self_attn", "model.norm"}
    assert set(proposal.keys()) < set(out.losses)
    out.loss.backward()


# ---- printing


def test_it_prints_a_line_a_pair_and_what_it_asks_for_below():
    loss = functools.partial(losses.smooth_l1, beta=2.0)
    pair = Match(mlp(0), mlp(1), weight=0.5, loss=loss, reason="so")
    port = Match("lm_head", "lm_head", project=nn.Linear(1, 1), teacher_port="input[0]")
    assert str(Matches([pair, port], ["a note"])) == (
        "model.layers.0.mlp ← model.layers.1.mlp\n"
        "    so; smooth_l1, weight 0.5\n"
        "lm_head            ← lm_head:input[0]\n"
        "    project Linear\n"
        "note: a note"
    )
    assert str(Matches()) == ""


@pytest.mark.parametrize("length", [30, 41, 79, 80, 81, 200])
def test_a_printed_mapping_fits_80_columns(length):
    path, long = "a" * length, ".".join(["layers"] * (length // 7 + 1))
    entries = [Match(path, path), Match(long, long, reason="why " * length, loss="cosine")]
    entries += [Match("b", path, student_port="output.last_hidden_state", project="auto")]
    entries += [Match("c", "c", rearrange=(path, long), reason="[bold]no markup[/] :smile:")]
    printed = str(Matches(entries, [path, "word " * length]))
    assert max(map(len, printed.splitlines())) <= 80
    joined = "".join(printed.split())
    assert joined.count(path) == 5
    assert "[bold]nomarkup[/]:smile:" in joined


# ---- files

EVERYTHING = Match(
    "model.layers.0.mlp@1",
    mlp("{i}"),
    loss=functools.partial(losses.smooth_l1, beta=0.5),
    weight=0.25,
    project="linear",
    rearrange=("b n d -> n b d", None),
    reduce=(None, ("b d -> b", "mean")),
    student_port="output[0]",
    teacher_port="input.hidden_states",
    reason='0 of 3 ← 1 of 6: "größer" \\ → 層\n\t\x00\x7f\u2028🙂',
)
KEPT = {
    "everything": EVERYTHING,
    "nothing": Match(mlp(0), mlp(1)),
    "heads": Match(
        "a",
        "b",
        loss=functools.partial(losses.attention_kl, heads=[[0, 1], [1, 3]]),
        student_port="attention",
        teacher_port="attention",
    ),
    "one layout": Match("a", "b", rearrange="b n d -> n b d", loss="cosine", project="auto"),
    "one reduction": Match("a", "b", reduce=("b n d -> b d", "max"), weight=0.0),
    "two reductions": Match("a", "b", reduce=(("b n d -> b d", "max"), ("b n -> b", "sum"))),
}


def plain(match):
    """Every field, with a configured loss as what it is made of."""
    values = {field.name: getattr(match, field.name) for field in fields(match)}
    if isinstance(loss := values["loss"], functools.partial):
        values["loss"] = loss.func, loss.args, loss.keywords
    return values


@KINDS
@pytest.mark.parametrize("case", KEPT)
def test_every_field_comes_back(tmp_path, kind, case):
    path = tmp_path / f"mapping.{kind}"
    Matches([KEPT[case]] * 2).save(str(path))
    assert [plain(match) for match in Matches.load(path)] == [plain(KEPT[case])] * 2
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_a_loss_of_the_library_is_kept_by_its_name(tmp_path):
    given = losses.cosine, functools.partial(losses.mse)
    Matches([Match("a", "b", loss=loss) for loss in given]).save(path := tmp_path / "mapping.toml")
    assert [match.loss for match in Matches.load(path)] == ["cosine", "mse"]


@KINDS
def test_a_proposal_comes_back_with_its_reasons_and_notes(tmp_path, kind):
    student = ARCHITECTURES["Mamba2ForCausalLM"].build(2)
    proposal = fxdistill.match(student, llama(4, 48))
    proposal.save(path := tmp_path / f"mapping.{kind}")
    loaded = Matches.load(path)
    assert loaded == proposal
    assert str(loaded) == str(proposal)
    assert loaded.notes == proposal.notes
    assert resolve(student, llama(4, 48), loaded) == proposal


def test_a_file_written_by_hand_is_read(tmp_path):
    path = tmp_path / "by hand.TOML"
    path.write_text("""
        # Every second layer.
        [[match]]
        student = "model.layers.{i}.mlp"
        teacher = 'model.layers.{2*i+1}.mlp'
        loss = { name = "smooth_l1", beta = 0.5 }
        rearrange = ["b n d -> n b d", ""]

        [[match]]
        student = "lm_head"
        teacher = "lm_head"
        weight = 2
    """)
    pattern, head = Matches.load(path)
    assert plain(pattern)["loss"] == (losses.smooth_l1, (), {"beta": 0.5})
    assert pattern.rearrange == ("b n d -> n b d", None)
    assert head == Match("lm_head", "lm_head", weight=2)
    assert len(resolve(llama(3), llama(6), Matches.load(path))) == 4


UNKEPT = [
    ({"loss": lambda s, t, weights: s.sum()}, ["loss", "smooth_l1", "functools.partial"]),
    ({"loss": functools.partial(losses.mse, scale=torch.ones(1))}, ["loss", "smooth_l1"]),
    ({"project": nn.Linear(2, 2)}, ["Linear", '"linear"', '"auto"', "after loading"]),
]


@KINDS
@pytest.mark.parametrize(("asked", "said"), UNKEPT)
def test_what_no_file_can_hold_is_said_and_the_old_file_stays(tmp_path, kind, asked, said):
    path = tmp_path / f"mapping.{kind}"
    Matches([HEAD]).save(path)
    with pytest.raises(errors.MappingFileError) as caught:
        Matches([KEPT["nothing"], Match("lm_head", "lm_head", **asked)]).save(path)
    assert all(part in str(caught.value) for part in ["'lm_head'", *said])
    assert list(tmp_path.iterdir()) == [path]
    assert list(Matches.load(path)) == [HEAD]


def test_a_save_that_breaks_off_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "mapping.toml"
    Matches([HEAD]).save(path)
    with pytest.raises((OSError, ValueError)):
        Matches([Match("a", "b", reason="\ud800 is no character")]).save(path)
    assert list(Matches.load(path)) == [HEAD]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["folder.toml", "missing/mapping.json"])
def test_a_place_that_cannot_be_written_is_named_and_left_as_it_was(tmp_path, name):
    (folder := tmp_path / "folder.toml").mkdir()
    with pytest.raises(errors.MappingFileError) as caught:
        Matches([HEAD]).save(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)
    assert ".part" not in str(caught.value)
    assert list(tmp_path.iterdir()) == [folder]


PAIR = {"student": "a", "teacher": "b"}
UNREADABLE = {
    "unknown field": ({"match": [PAIR, {**PAIR, "wieght": 2}]}, "match 2", "'wieght'", "'weight'"),
    "no teacher": ({"match": [{"student": "a"}]}, "match 1", "teacher"),
    "no table": ({"match": [PAIR, 3]}, "match 2", "student and teacher"),
    "nothing": ({}, "[[match]]"),
    "later format": ({"format": 2, "match": [PAIR]}, "format 2", "reads 1"),
    "misspelt format": ({"fromat": 2, "match": [PAIR]}, "'fromat'", "'format'"),
    "loss": ({"match": [{**PAIR, "loss": "cosin"}]}, "match 1", "cosin", "'cosine'"),
    "loss by table": ({"match": [{**PAIR, "loss": {"name": "cosin"}}]}, "match 1", "'cosine'"),
    "loss without a name": ({"match": [{**PAIR, "loss": {"beta": 1}}]}, "match 1", "name"),
    "loss option": (
        {"match": [{**PAIR, "loss": {"name": "smooth_l1", "bta": 1}}]}, "match 1", "'bta'", "beta",
    ),
    "path": ({"match": [{"student": 3, "teacher": "b"}]}, "match 1", "student", "3"),
    "weight": ({"match": [{**PAIR, "weight": "heavy"}]}, "match 1", "weight", "'heavy'"),
}  # fmt: skip


@pytest.mark.parametrize("case", UNREADABLE)
def test_what_is_wrong_in_a_file_is_named(tmp_path, case):
    data, *said = UNREADABLE[case]
    path = tmp_path / "mapping.json"
    path.write_text(json.dumps(data))
    with pytest.raises(errors.MappingFileError) as caught:
        Matches.load(path)
    assert all(part in str(caught.value) for part in [str(path), *said])


@KINDS
@pytest.mark.parametrize("content", [b"[[match]\n{", b"\xff\xfe\x00", None])
def test_a_file_that_cannot_be_read(tmp_path, kind, content):
    path = tmp_path / f"mapping.{kind}"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(errors.MappingFileError, match=f"cannot be read as {kind}") as caught:
        Matches.load(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("name", ["mapping.yaml", "mapping", "mapping.toml.bak"])
def test_the_ending_says_what_a_file_is(tmp_path, name):
    for use in (Matches.load, Matches([HEAD]).save):
        with pytest.raises(errors.MappingFileError, match=r"\.toml or a \.json"):
            use(tmp_path / name)
    assert list(tmp_path.iterdir()) == []
