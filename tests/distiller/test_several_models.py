"""Three models in one distiller, by name: nothing assumes one student and one teacher.

Two frozen teachers of one student, and two students that both learn from one teacher and from each
other. Values and gradients are those of plain PyTorch, in one graph, regional and eager.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxdistill import Matches, losses
from fxdistill.compiler.lower import Lowering
from fxdistill.distiller.distiller import Distiller
from fxdistill.distiller.options import Options
from fxdistill.distiller.towers import Model
from fxdistill.models.tap import Tap
from fxdistill.objective.objective import Objective
from fxdistill.objective.term import LabelTerm, LogitTerm, Term
from toys import assert_same_gradients, gradients, tokens, toys, values

MODES = ("one_graph", "regional", "eager")
WEIGHTS = {"logit_weight": 0.7, "feature_weight": 0.3, "label_weight": 0.5, "temperature": 2.0}


def distiller(named, objective, mode, main):
    settings = {**WEIGHTS, **{term.name: term.weight for term in objective.features}}
    options = Options(mode=mode, lowering=Lowering("aot_eager"))
    beside = nn.ModuleList(), nn.ModuleDict()
    return Distiller(named, objective, *beside, Matches(), settings, options, main)


def divergence(student, teacher, temperature=2.0):
    """Over the predictions that count, the last of each row too: KL(teacher ‖ student) · τ²."""
    log_s, log_t = (F.log_softmax(z / temperature, -1) for z in (student, teacher))
    return (log_t.exp() * (log_t - log_s)).sum(-1).mean() * temperature**2


def fused(made):
    """How many pairs of heads are fused with their losses."""
    history = () if made.program is None else made.program.history
    said = [text for record in history if record.name == "FuseHead" for text in record.remarks]
    return sum(text.startswith("logits fused") for text in said)


def assert_losses(out, total, want):
    torch.testing.assert_close(out.loss, total)
    assert set(out.losses) == set(want)
    for name, value in want.items():
        torch.testing.assert_close(out.losses[name], value.detach(), msg=name)


def next_token(logits, ids):
    return F.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]), ids[:, 1:].reshape(-1))


# ---- two teachers


def two_teachers():
    pairs = (
        ("big", "blocks.0.mlp", "blocks.3.mlp", 1.0),
        ("small", "blocks.1.mixer", "blocks.0.mixer", 0.25),
    )
    return Objective(
        features=tuple(
            Term(f"{of}/{s}", losses.mse, Tap(s), Tap(t), weight, of=("student", of))
            for of, s, t, weight in pairs
        ),
        logits=(
            LogitTerm(losses.forward_kl, "big/logits", teachers=("big",), share=0.75),
            LogitTerm(losses.forward_kl, "small/logits", teachers=("small",), share=0.25),
        ),
        task="causal_lm",
    )


@pytest.mark.parametrize("mode", MODES)
def test_two_teachers(mode):
    student, big, small = toys(2, 4, 1)
    plain = copy.deepcopy(student)
    ids, others = tokens(), tokens(3, 7).flip(1)
    made = distiller(
        {"big": Model(big, False), "small": Model(small, False), "student": Model(student)},
        two_teachers(),
        mode,
        "student",
    )
    out = made(ids, small_inputs={"ids": others})  # each model has inputs of its own
    out.loss.backward()

    logits, s = values(plain, ids, "blocks.0.mlp", "blocks.1.mixer")
    with torch.no_grad():
        of_big, b = values(big, ids, "blocks.3.mlp")
        of_small, t = values(small, others, "blocks.0.mixer")
    want = {
        "big/logits": divergence(logits, of_big),
        "small/logits": divergence(logits, of_small),
        "big/blocks.0.mlp": F.mse_loss(s["blocks.0.mlp"], b["blocks.3.mlp"]),
        "small/blocks.1.mixer": F.mse_loss(s["blocks.1.mixer"], t["blocks.0.mixer"]),
    }
    want["features"] = (want["big/blocks.0.mlp"] + 0.25 * want["small/blocks.1.mixer"]) / 2
    of_logits = 0.75 * want["big/logits"] + 0.25 * want["small/logits"]
    total = 0.7 * of_logits + 0.3 * want["features"]
    total.backward()
    assert_losses(out, total, want)
    assert_same_gradients(gradients(student), gradients(plain))
    assert all(p.grad is None for model in (big, small) for p in model.parameters())
    assert {name.split(".")[0] for name, _ in made.named_parameters()} == {"student"}
    assert fused(made) == (2 if mode == "one_graph" else 0)  # one for each teacher


# ---- two students


def two_students():
    return Objective(
        features=(
            Term("a", losses.mse, Tap("blocks.0.mlp"), Tap("blocks.2.mlp"), of=("a", "teacher")),
            # Both learn: the gradient of what they compare goes to either.
            Term("a<-b", losses.mse, Tap("blocks.1.mlp"), Tap("blocks.0.mlp"), of=("a", "b")),
        ),
        logits=(
            LogitTerm(losses.forward_kl, "a/logits", "a", ("teacher",)),
            LogitTerm(losses.forward_kl, "b/logits", "b", ("teacher",), share=0.5),
        ),
        labels=(
            LabelTerm(losses.cross_entropy, "a/labels", "a"),
            LabelTerm(losses.cross_entropy, "b/labels", "b"),
        ),
        task="causal_lm",
    )


@pytest.mark.parametrize("mode", MODES)
def test_two_students(mode):
    a, b, teacher = toys(2, 1, 3)
    plain_a, plain_b = copy.deepcopy(a), copy.deepcopy(b)
    ids = tokens()
    named = {"teacher": Model(teacher, False), "a": Model(a), "b": Model(b)}
    made = distiller(named, two_students(), mode, "a")
    out = made(ids, labels=ids)
    out.loss.backward()

    z_a, s_a = values(plain_a, ids, "blocks.0.mlp", "blocks.1.mlp")
    z_b, s_b = values(plain_b, ids, "blocks.0.mlp")
    with torch.no_grad():
        z_t, t = values(teacher, ids, "blocks.2.mlp")
    first = ids.shape[1] - 1  # with labels, the last position predicts nothing that is known
    want = {
        "a/logits": divergence(z_a[:, :first], z_t[:, :first]),
        "b/logits": divergence(z_b[:, :first], z_t[:, :first]),
        "a/labels": next_token(z_a, ids),
        "b/labels": next_token(z_b, ids),
        "a": F.mse_loss(s_a["blocks.0.mlp"], t["blocks.2.mlp"]),
        "a<-b": F.mse_loss(s_a["blocks.1.mlp"], s_b["blocks.0.mlp"]),
    }
    want["features"] = (want["a"] + want["a<-b"]) / 2
    of_logits = want["a/logits"] + 0.5 * want["b/logits"]
    labels = want["a/labels"] + want["b/labels"]
    total = 0.7 * of_logits + 0.5 * labels + 0.3 * want["features"]
    total.backward()
    assert_losses(out, total, want)
    assert_same_gradients(gradients(a), gradients(plain_a))
    assert_same_gradients(gradients(b), gradients(plain_b))
    assert {name.split(".")[0] for name, _ in made.named_parameters()} == {"a", "b"}
    assert fused(made) == (2 if mode == "one_graph" else 0)  # one for each student


# ---- what is said of them


def test_a_report_of_three_models():
    student, big, small = toys(2, 4, 1)
    named = {"big": Model(big, False), "small": Model(small, False), "student": Model(student)}
    made = distiller(named, two_teachers(), "one_graph", "student")
    report = made.report(tokens())
    assert report.stopped is None
    assert [tower.name for tower in report.towers] == ["big", "small", "student"]
    assert [(p.student_model, p.teacher_model) for p in report.pairs] == [
        ("student", "big"),
        ("student", "small"),
    ]
    assert set(report.nodes) == {"inputs", "big", "small", "student", "objective"}
    costs = {t.name: sum(block.forward for block in t.blocks) for t in report.towers}
    assert costs["big"] > costs["student"] > costs["small"] > 0
    # What was pruned is no cost: above its only match the small teacher makes logits, no more.
    assert report.flops.teacher == costs["big"] + costs["small"]
    beside = {"projections", "loss_modules", "heads"}
    assert report.memory.weights.keys() == {"student", "big", "small", *beside}


def test_a_model_that_no_term_reads_does_not_run():
    student, big, small = toys(2, 4, 1)
    named = {"big": Model(big, False), "small": Model(small, False), "student": Model(student)}
    objective = Objective(
        logits=(LogitTerm(losses.forward_kl, teachers=("big",)),),
        task="causal_lm",
    )
    made = distiller(named, objective, "eager", "student")
    ran = []
    small.register_forward_hook(lambda *_: ran.append("small"))
    big.register_forward_hook(lambda *_: ran.append("big"))
    made(tokens()).loss.backward()
    assert ran == ["big"]
