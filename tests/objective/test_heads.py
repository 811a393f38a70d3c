"""Further logits of a student: auxiliary classifiers and heads that predict further ahead."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

import fxdistill
from fxdistill import Head, errors
from toys import AOT, MODES, VOCABULARY, WIDTH, Toy, assert_same_gradients, gradients, tokens

TAU = 2.0


class Further(nn.Module):
    """A language model whose output also has logits of the second and the third next token."""

    def __init__(self, depth=1, *, tied=True):
        super().__init__()
        self.model = Toy(depth)
        self.ahead = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.out = None if tied else nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids, attention_mask=None):
        x = self.model.embed(ids)
        for block in self.model.blocks:
            x = block(x)
        read = self.out if self.out is not None else lambda h: h @ self.model.embed.weight.T
        return {"logits": read(x), "mtp_logits": [read(h(x).tanh()) for h in self.ahead]}


def further(*, tied=True):
    torch.manual_seed(0)
    return Further(1, tied=tied), Further(2, tied=tied)


def counted(mask):
    """The (sample, position of the prediction) and its token of all tokens that count."""
    return [(b, t) for b in range(mask.shape[0]) for t in range(mask.shape[1]) if mask[b, t]]


def of_labels(logits, ids, mask, shift):
    """Cross entropy of the token ``shift`` places on; both ends are attended."""
    found = [
        F.cross_entropy(logits[b, t], ids[b, t + shift])
        for b, t in counted(mask)
        if t + shift < ids.shape[1] and mask[b, t + shift]
    ]
    return torch.stack(found).mean()


def of_teacher(logits, teacher, mask, shift):
    """KL from what the teacher says of the same token, one place before it."""
    found = []
    for b, t in counted(mask):
        if t + shift < mask.shape[1] and mask[b, t + shift]:
            p = (teacher[b, t + shift - 1] / TAU).softmax(-1)
            found.append(TAU**2 * (p * (p.log() - F.log_softmax(logits[b, t] / TAU, -1))).sum())
    return torch.stack(found).mean()


def padded():
    ids, mask = tokens(3, 7), torch.ones(3, 7, dtype=torch.long)
    mask[1, 5:] = 0
    return ids, mask, torch.where(mask == 1, ids, -100)


HEADS = {
    "second": Head(":mtp_logits[0]", shift=2, logit_weight=0.3, label_weight=0.6),
    "third": Head(":output.mtp_logits[1]", shift=3),
    "paired": Head(
        ":mtp_logits[1]", shift=3, teacher=":mtp_logits[1]", logit_weight=0.1, label_weight=0
    ),
}


def with_heads(student, teacher, compile):
    options = {"logit_weight": 0.5, "label_weight": 0.8, "temperature": TAU, "task": "causal_lm"}
    return fxdistill.wrap(student, teacher, heads=HEADS, compile=compile, **options)


def expected(student, teacher, ids, mask):
    """The terms of ``with_heads`` and the total, token by token."""
    s = student(ids)
    with torch.no_grad():
        t = teacher(ids)
    second, third = s["mtp_logits"]
    want = {
        "logits": of_teacher(s["logits"], t["logits"], mask, 1),
        "labels": of_labels(s["logits"], ids, mask, 1),
        "second:logits": of_teacher(second, t["logits"], mask, 2),
        "second:labels": of_labels(second, ids, mask, 2),
        "third:labels": of_labels(third, ids, mask, 3),
        # The teacher's own third head stands at the same place.
        "paired:logits": of_teacher(third, t["mtp_logits"][1].roll(2, 1), mask, 3),
    }
    total = 0.5 * (want["logits"] + 0.3 * want["second:logits"] + 0.1 * want["paired:logits"])
    total = total + 0.8 * (want["labels"] + 0.6 * want["second:labels"] + want["third:labels"])
    return want, total


@MODES
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "module"])
def test_heads_that_predict_further(compile, tied):
    """MTP: labels for every head, the teacher for the second by choice, of the same token."""
    student, teacher = further(tied=tied)
    plain, (ids, mask, labels) = copy.deepcopy(student), padded()
    distiller = with_heads(student, teacher, compile)
    out = distiller(ids, attention_mask=mask, labels=labels)
    out.loss.backward()
    want, total = expected(plain, teacher, ids, mask)
    total.backward()
    assert set(out.losses) == set(want)
    for name, value in want.items():
        torch.testing.assert_close(out.losses[name], value.detach(), msg=name)
    torch.testing.assert_close(out.loss, total)
    assert_same_gradients(gradients(student), gradients(plain))


@MODES
@pytest.mark.parametrize("counted_apart", [True, False])
def test_accumulation_equals_one_large_batch(compile, counted_apart):
    """A head that looks k tokens ahead makes fewer predictions than ``num_items`` counts.

    Rows of one length have as many of its predictions for each of the next token, others not: then
    the call says how many there are.
    """
    student, teacher = further()
    plain, (ids, mask, _) = copy.deepcopy(student), padded()
    mask = mask if counted_apart else torch.ones_like(mask)
    lengths = mask.sum(1)
    items = {"num_items": (lengths - 1).sum()}
    if counted_apart:
        further_on = {name: (lengths - head.shift).sum() for name, head in HEADS.items()}
        items["num_head_items"] = further_on
    distiller = with_heads(student, teacher, compile)
    found = []
    for rows, length in ((slice(0, 1), 7), (slice(1, 2), int(lengths[1])), (slice(2, 3), 7)):
        part = ids[rows, :length]
        found.append(distiller(part, labels=part, **items))
        found[-1].loss.backward()
    want, total = expected(plain, teacher, ids, mask)
    total.backward()
    for name, value in want.items():
        got = sum(out.losses[name] for out in found)
        torch.testing.assert_close(got, value.detach(), msg=name)
    torch.testing.assert_close(sum(out.loss for out in found), total)
    assert_same_gradients(gradients(student), gradients(plain))


def test_items_of_no_head():
    student, teacher = further()
    distiller = with_heads(student, teacher, False)
    for given, says in (({"fourth": 3}, "heads= has 'second', 'third'"), (3, "a dict of numbers")):
        with pytest.raises(errors.BatchError, match=says):
            distiller(tokens(), labels=tokens(), num_head_items=given)


@pytest.mark.parametrize(
    ("compile", "compared"),
    [(False, "logits"), (AOT, "logits"), (False, ":logits"), (False, ":output.logits")],
)
def test_without_labels(compile, compared):
    """The last predictions of a head ahead have no counterpart of the teacher's in the batch."""
    student, teacher = further()
    ids = tokens()
    head = Head(":mtp_logits[0]", shift=2, teacher=compared, logit_weight=1.0)
    distiller = fxdistill.wrap(
        student, teacher, heads={"second": head}, temperature=TAU, task="causal_lm", compile=compile
    )
    out = distiller(ids)
    s, t = student(ids)["mtp_logits"][0], teacher(ids)["logits"]
    p = (t[:, 1:] / TAU).softmax(-1)
    want = TAU**2 * (p * (p.log() - F.log_softmax(s[:, :-1] / TAU, -1))).sum(-1).mean()
    torch.testing.assert_close(out.losses["second:logits"], want.detach())
    assert set(out.losses) == {"logits", "second:logits"}


def test_a_head_that_predicts_beyond_the_text():
    """Of L tokens, the prediction L places ahead is the teacher's last; further, nothing counts."""
    student, teacher = further()
    ids = tokens(2, 3)

    def value(shift):
        head = Head(":mtp_logits[0]", shift=shift, logit_weight=1.0, label_weight=0.0)
        options = {"temperature": TAU, "task": "causal_lm", "compile": False}
        distiller = fxdistill.wrap(student, teacher, heads={"far": head}, **options)
        out = distiller(ids)
        (out.loss - out.losses["logits"]).backward()
        return out.losses["far:logits"]

    s, t = student(ids)["mtp_logits"][0][:, 0], teacher(ids)["logits"][:, 2]
    p = (t / TAU).softmax(-1)
    want = TAU**2 * (p * (p.log() - F.log_softmax(s / TAU, -1))).sum(-1).mean()
    torch.testing.assert_close(value(3), want.detach())
    gradients(student)
    assert value(4) == 0
    assert value(9) == 0
    assert not any(g.any() for n, g in gradients(student.ahead).items() if g is not None)


def test_heads_that_learn_from_labels_alone_say_so_where_there_are_none():
    student, _ = further()
    head = Head(":mtp_logits[0]", shift=2)
    distiller = fxdistill.wrap(
        student, None, heads={"second": head}, task="causal_lm", compile=False
    )
    with pytest.warns(errors.MatchWarning, match="no term is in the loss"):
        assert distiller(tokens()).loss == 0


class Pictures(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.first = nn.Conv2d(1, width, 3, padding=1)
        self.second = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.head = nn.Linear(2 * width, 10)

    def forward(self, x):
        h = self.second(self.first(x).relu()).relu()
        return self.head(h.mean((2, 3)))


@MODES
def test_an_auxiliary_classifier(compile):
    """module="auto" pools a map and adds a linear layer, which the student does not have."""
    torch.manual_seed(0)
    student, teacher = Pictures(), Pictures(8)
    names = set(student.state_dict())
    x, y = torch.randn(5, 1, 8, 8), torch.tensor([1, 2, 3, 4, 5])
    distiller = fxdistill.wrap(
        student,
        teacher,
        heads={
            "early": Head("first", module="auto", teacher="self", logit_weight=0.4),
            "given": Head("head", module=nn.Linear(10, 10), logit_weight=0.2, label_weight=0.0),
        },
        temperature=TAU,
        task="classification",
        compile=compile,
    )
    heads, plain = copy.deepcopy(distiller.heads), copy.deepcopy(student)
    assert heads["early"].linear.weight.shape == (10, 4)
    assert set(student.state_dict()) == names
    assert {k.split(".")[0] for k in distiller.state_dict()} == {"student", "heads"}
    assert len(distiller.param_groups()) == 2
    out = distiller(x, labels=y)
    out.loss.backward()

    seen = []
    plain.first.register_forward_hook(lambda m, a, h: seen.append(h))
    z = plain(x)
    early = heads["early"].linear(seen[0].mean((2, 3)))
    given = heads["given"](z)
    with torch.no_grad():
        t = teacher(x)

    def kl(logits, target):
        p = (target / TAU).softmax(-1)
        return TAU**2 * F.kl_div(F.log_softmax(logits / TAU, -1), p, reduction="batchmean")

    want = {
        "logits": kl(z, t),
        "labels": F.cross_entropy(z, y),
        "early:logits": kl(early, z.detach()),
        "early:labels": F.cross_entropy(early, y),
        "given:logits": kl(given, t),
    }
    weights = {"early:logits": 0.4, "given:logits": 0.2}
    total = sum(weights.get(name, 1.0) * value for name, value in want.items())
    total.backward()
    assert set(out.losses) == set(want)
    for name, value in want.items():
        torch.testing.assert_close(out.losses[name], value.detach(), msg=name)
    torch.testing.assert_close(out.loss, total)
    assert_same_gradients(gradients(student), gradients(plain))
    assert_same_gradients(gradients(distiller.heads), gradients(heads))

    distiller.set(weights={"early:logits": 0.0, "given:logits": 1.0})
    torch.testing.assert_close(
        distiller(x, labels=y).loss, total - 0.4 * want["early:logits"] + 0.8 * want["given:logits"]
    )


def test_padding_has_no_part_in_a_pooled_text():
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "vocab_size": 30}
    config = BertConfig(num_hidden_layers=2, num_labels=3, **sizes)
    student = BertForSequenceClassification(config).eval()
    ids = torch.randint(0, 30, (2, 6), generator=torch.Generator().manual_seed(0))
    head = Head("bert.encoder.layer.0", module="auto")
    distiller = fxdistill.wrap(student, None, heads={"early": head}, compile=False).eval()
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[0, 4:] = 0
    labels = torch.tensor([0, 2])
    one = distiller(input_ids=ids, attention_mask=mask, labels=labels)
    ids[0, 4:] = 7
    two = distiller(input_ids=ids, attention_mask=mask, labels=labels)
    torch.testing.assert_close(one.losses["early:labels"], two.losses["early:labels"])
    assert distiller.heads["early"].linear.weight.shape == (3, 8)


@pytest.mark.parametrize(
    ("heads", "options", "says"),
    [
        ([Head("blocks.0")], {}, "a dict of fxdistill.Head by name"),
        ({"a b": Head("blocks.0")}, {}, "letters, digits and _"),
        ({"keys": Head("blocks.0", module="auto")}, {}, "has an attribute called so"),
        ({"a": "blocks.0"}, {}, r"fxdistill\.Head"),
        ({"a": Head("block.0")}, {}, r"Nearest: 'blocks\.0'"),
        ({"a": Head("")}, {}, "the path of a module"),
        ({"a": Head("blocks.0:output(1)")}, {}, "stands a port"),
        ({"a": Head("blocks.0", shift=0)}, {}, "1 or more"),
        ({"a": Head("blocks.0", shift=2)}, {"task": "masked_lm"}, "only a causal model"),
        ({"a": Head("blocks.0", module="linear")}, {}, "'auto', an nn.Module"),
        ({"a": Head("blocks.0", label_weight=float("nan"))}, {}, "a finite number"),
        ({"a": Head("blocks.0", label_weight=0)}, {}, "learns from nothing"),
        ({"a": Head("blocks.0", logit_weight=1)}, {"logit_loss": None}, "name a logit_loss"),
        ({"a": Head("blocks.0", logit_weight=1)}, {"teacher": None}, "there is none"),
        ({"a": Head("blocks.0", logit_weight=1, teacher="x")}, {}, "no module 'x'"),
    ],
)
def test_bad_input(heads, options, says):
    student, teacher = Toy(1), Toy(1)
    options = {"task": "causal_lm", "teacher": teacher, **options}
    with pytest.raises(errors.FxDistillError, match=says):
        fxdistill.wrap(student, options.pop("teacher"), heads=heads, **options)


@pytest.mark.parametrize("compile", [False, AOT], ids=["eager", "graph"])
@pytest.mark.parametrize(
    ("head", "says"),
    [
        (Head("blocks.0:output[3]"), "no tensor at port"),
        (Head(":nothing"), "no tensor at port"),
        (Head("blocks.0", logit_weight=1.0), rf"'a' gives \[.*, 8\].*, {VOCABULARY}\].*module"),
        (Head("blocks.0"), rf"'a' gives \[.*, 8\].*, {VOCABULARY}\].*module"),
        (Head("embed", module=nn.Linear(8, 9)), "its module has to make logits"),
        (
            Head(":logits", teacher="blocks.0", logit_weight=1.0),
            r"head a's vocabulary has .* entries and the teacher's 8",
        ),
        (
            Head("embed", module=nn.Flatten(0, 1), label_weight=1.0),
            r"\[21, 8\].*has to make logits",
        ),
    ],
)
def test_values_that_are_no_logits(compile, head, says):
    student, teacher = Toy(1), Toy(1)
    distiller = fxdistill.wrap(
        student, teacher, heads={"a": head}, task="causal_lm", compile=compile
    )
    before = {k: v.clone() for k, v in student.state_dict().items()}
    with pytest.raises(errors.FxDistillError, match=says):
        distiller(tokens(), labels=tokens())
    assert all(torch.equal(v, before[k]) for k, v in student.state_dict().items())


def test_report_shows_heads():
    student, teacher = further()
    heads = {"second": Head(":mtp_logits[0]", shift=2, logit_weight=0.5)}
    distiller = fxdistill.wrap(
        student, teacher, heads=heads, label_weight=0.5, task="causal_lm", compile=AOT
    )
    report = distiller.report(tokens(), labels=tokens())
    found = {line.name: line.weight for line in report.terms}
    assert found == {"logits": 1, "labels": 0.5, "second:logits": 0.5, "second:labels": 0.5}
    text = " ".join(str(distiller.summary()).split())
    assert "head second logits forward_kl tokens" in text


def test_report_names_logits_that_no_head_trains():
    student, teacher = further()
    ids = tokens()
    options = {"task": "causal_lm", "compile": AOT}

    def notes(heads):
        found = fxdistill.wrap(student, teacher, heads=heads, **options).report(ids)
        return [note for note in found.notes if "also returns" in note]

    (note,) = notes({})
    assert "the student also returns mtp_logits[0], mtp_logits[1], which no head trains" in note
    second = {"second": Head(":mtp_logits[0]", shift=2)}
    (note,) = notes(second)
    advised = 'heads={"mtp_logits_1": fxdistill.Head(":mtp_logits[1]", shift=3)}'
    assert "returns mtp_logits[1], which" in note
    assert advised in note
    assert not notes({**second, **eval(advised.removeprefix("heads="), {"fxdistill": fxdistill})})


def test_report_advises_no_heads_to_students_that_have_none():
    distiller = fxdistill.mutual(further(), task="causal_lm", compile=AOT)
    notes = [n for n in distiller.report(tokens(), labels=tokens()).notes if "also returns" in n]
    assert [note.split(",")[0] for note in notes] == [
        f"the student{i} also returns mtp_logits[0]" for i in range(2)
    ]
    assert not [note for note in notes if "wrap" in note]


@pytest.mark.parametrize("compile", [False, AOT], ids=["eager", "graph"])
def test_a_list_of_logits_is_not_its_first_entry(compile):
    student, _ = further()
    heads = {"second": Head(":mtp_logits", shift=2)}
    options = {"task": "causal_lm", "compile": compile}
    distiller = fxdistill.wrap(student, None, heads=heads, **options)
    says = r"2 tensors.*'output\.mtp_logits\[0\]', 'output\.mtp_logits\[1\]'"
    with pytest.raises(errors.PortError, match=says):
        distiller(tokens(), labels=tokens())
