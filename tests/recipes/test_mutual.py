"""Students that teach each other, against a plain loop of PyTorch, in all modes."""

import copy
import functools
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxdistill
from fxdistill import Importance, Match, errors, losses
from toys import AOT, MODES, assert_same_gradients, gradients, tokens, toys, values

TAU, MLP = 2.0, "blocks.0.mlp"


def kl(target, logits):
    """τ² KL(target ‖ softmax(logits/τ)), a mean over the predictions of known tokens."""
    log_q = F.log_softmax(logits / TAU, -1)
    return TAU**2 * F.kl_div(log_q[:, :-1], target[:, :-1], reduction="none").sum(-1).mean()


def term(logits, others, peers):
    others = [z.detach() for z in others]
    if peers == "each":
        return sum(kl((z / TAU).softmax(-1), logits) for z in others) / len(others)
    if peers == "logits":
        return kl((sum(others) / len(others) / TAU).softmax(-1), logits)
    return kl(sum((z / TAU).softmax(-1) for z in others) / len(others), logits)


@pytest.mark.parametrize(
    ("peers", "compile"),
    [
        *itertools.product(["logits", "probabilities", "each"], [False, AOT]),
        ("each", "regional"),  # Inductor compiles its terms; their kinds differ in the graph alone
    ],
)
def test_three_students(peers, compile):
    students = toys(2, 3, 1)
    plain, ids = copy.deepcopy(students), tokens()
    distiller = fxdistill.mutual(
        students,
        {MLP: MLP},
        temperature=TAU,
        logit_weight=0.7,
        label_weight=0.5,
        feature_weight=0.3,
        peers=peers,
        task="causal_lm",
        compile=compile,
    )
    out = distiller(ids, labels=ids)
    out.loss.backward()

    logits, features = zip(*(values(model, ids, MLP) for model in plain), strict=True)
    want, total = {}, 0.0
    for i, z in enumerate(logits):
        want[f"{i}:logits"] = term(z, [*logits[:i], *logits[i + 1 :]], peers)
        want[f"{i}:labels"] = F.cross_entropy(z[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        total = total + 0.7 * want[f"{i}:logits"] + 0.5 * want[f"{i}:labels"]
    pairs = list(itertools.permutations(range(3), 2))
    for i, j in pairs:
        want[f"{i}<-{j}/{MLP}"] = F.mse_loss(features[i][MLP], features[j][MLP].detach())
    want["features"] = sum(want[f"{i}<-{j}/{MLP}"] for i, j in pairs) / len(pairs)
    total = total + 0.3 * want["features"]
    total.backward()
    assert set(out.losses) == set(want)
    for name, value in want.items():
        torch.testing.assert_close(out.losses[name], value.detach(), msg=name)
    torch.testing.assert_close(out.loss, total)
    for model, other in zip(students, plain, strict=True):
        assert_same_gradients(gradients(model), gradients(other))


@MODES
def test_each_student_weighs_its_own_features(compile):
    """Student i learns from every peer at the positions that its own scores keep."""
    students = toys(2, 3, 1)
    plain, ids = copy.deepcopy(students), tokens()
    logits, features = zip(*(values(model, ids, MLP) for model in plain), strict=True)
    scores = []
    for z in logits:
        log_q = F.log_softmax(z.detach()[:, :-1] / TAU, -1)
        scores.append(-(log_q.exp() * log_q).sum(-1))
    ordered = torch.stack(scores).flatten().sort().values
    threshold = float(ordered[26:28].mean())  # between two scores, so that rounding moves none
    kept = [(score > threshold).float() for score in scores]
    shares = [float(k.mean()) for k in kept]
    assert len(set(shares)) > 1

    importance = Importance("student_entropy", threshold=threshold, features=True)
    options = {"temperature": TAU, "label_loss": None, "task": "causal_lm", "compile": compile}
    distiller = fxdistill.mutual(students, {MLP: MLP}, importance=importance, **options)
    out = distiller(ids, labels=ids)
    out.loss.backward()

    want, total = {}, 0.0
    for i, z in enumerate(logits):
        target = (sum(logits[:i] + logits[i + 1 :]) / 2 / TAU).softmax(-1).detach()[:, :-1]
        log_q = F.log_softmax(z[:, :-1] / TAU, -1)
        each = TAU**2 * F.kl_div(log_q, target, reduction="none").sum(-1)
        want[f"{i}:logits"] = (each * kept[i]).sum() / kept[i].sum()
        total = total + want[f"{i}:logits"]
    for i, j in itertools.permutations(range(3), 2):
        s, t = features[i][MLP][:, :-1], features[j][MLP][:, :-1].detach()
        each = (s - t).square().mean(-1)
        want[f"{i}<-{j}/{MLP}"] = (each * kept[i]).sum() / kept[i].sum()
        total = total + want[f"{i}<-{j}/{MLP}"] / 6
    total.backward()
    for name, value in want.items():
        torch.testing.assert_close(out.losses[name], value.detach(), msg=name)
    torch.testing.assert_close(out.loss, total)
    assert float(out.metrics["kept"]) == pytest.approx(sum(shares) / 3)
    for model, other in zip(students, plain, strict=True):
        assert_same_gradients(gradients(model), gradients(other))


def test_a_score_against_each_peer_is_their_mean():
    """As the term is the mean of the divergences, so is the score of a token."""
    students, ids = toys(2, 3, 1), tokens()
    importance = Importance("divergence")
    distiller = fxdistill.mutual(
        students, peers="each", importance=importance, task="causal_lm", compile=False
    )
    out = distiller(ids)
    logits = [model(ids)["logits"].detach() for model in students]
    for i, z in enumerate(logits):
        log_q = z.log_softmax(-1)
        others = [other.softmax(-1) for j, other in enumerate(logits) if j != i]
        each = sum((p * (p.log() - log_q)).sum(-1) for p in others) / 2
        wanted = (each * each).sum() / each.sum()  # the weights are the values themselves
        torch.testing.assert_close(out.losses[f"{i}:logits"], wanted)


def test_students_are_trained_saved_and_moved():
    students = toys(1, 2)
    distiller = fxdistill.mutual(students, task="causal_lm", compile=AOT)
    assert distiller.students == tuple(students)
    assert (distiller.teachers, distiller.teacher) == ({}, None)
    (group,) = distiller.param_groups()
    assert {id(p) for p in group["params"]} == {id(p) for m in students for p in m.parameters()}
    state = distiller.state_dict()
    assert set(state) == {
        f"students.{i}.{k}" for i, m in enumerate(students) for k in m.state_dict()
    }
    other = fxdistill.mutual(toys(1, 2), task="causal_lm", compile=False)
    for model in other.students:
        nn.init.zeros_(model.embed.weight)
    other.load_state_dict(state)
    ids = tokens()
    torch.testing.assert_close(other(ids, labels=ids).loss, distiller(ids, labels=ids).loss)
    distiller.eval()
    assert not any(m.training for model in students for m in model.modules())
    with torch.no_grad():  # an evaluation returns the first student's logits
        torch.testing.assert_close(distiller(ids).logits, students[0](ids)["logits"])
    distiller.to(torch.float64)
    assert {p.dtype for model in students for p in model.parameters()} == {torch.float64}


def test_report_shows_every_student():
    distiller = fxdistill.mutual(toys(1, 2), task="causal_lm", compile=AOT)
    report = distiller.report(tokens(), labels=tokens())
    assert [tower.name for tower in report.towers] == ["student0", "student1"]
    assert [line.name for line in report.terms] == ["0:logits", "1:logits", "0:labels", "1:labels"]
    assert report.flops.teacher == 0


def test_every_two_vocabularies_must_fit():
    """100 columns are 96 with padding, and 104 are; but 104 and 96 have more than padding apart."""
    models = [nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, size)) for size in (100, 104, 96)]
    for model in models:
        model.get_output_embeddings = functools.partial(lambda m: m[1], model)
    with pytest.raises(
        errors.VocabularyError, match=r"student1's vocabulary has 104 entries and student2's 96"
    ):
        fxdistill.mutual(models, task="causal_lm")


@pytest.mark.parametrize(
    ("students", "options", "says"),
    [
        (toys(1), {}, "got 1 student: its teachers are other students"),
        (toys(1)[0], {}, "got 1 student"),
        ([], {}, "got 0 student"),
        (toys(1) * 2, {}, "one model"),
        (["gpt2", "gpt2"], {}, "student0 is a str"),
        (toys(1, 1), {"peers": "mean"}, "'probabilities'"),
        (toys(1, 1), {"mapping": {"blocks.9": "blocks.0"}}, r"Nearest: 'blocks\.0'"),
        (toys(1, 1), {"mapping": [Match("blocks.0", "blocks.0", of=0)]}, "every other"),
        (toys(1, 1), {"student_plan": [None]}, "1 entries, and there are 2"),
    ],
)
def test_bad_input(students, options, says):
    with pytest.raises(errors.FxDistillError, match=says):
        fxdistill.mutual(students, **options)


@pytest.mark.parametrize("by", ["match", "default"])
def test_one_queue_holds_samples_of_one_student(by):
    """One object for all ordered pairs would mix what several students give."""
    models, one = toys(1, 1), losses.CRD(size=4, width=4)
    mapping = {MLP: Match(teacher=MLP, loss=one if by == "match" else None)}
    options = {} if by == "match" else {"feature_loss": one}
    with pytest.raises(errors.OptionError, match=r"share one CRD.*functools\.partial") as said:
        fxdistill.mutual(models, mapping, task="causal_lm", compile=False, **options)
    assert f"'0<-1/{MLP}' and '1<-0/{MLP}'" in str(said.value)
