"""Agreement of student and teacher, against plain PyTorch: which predictions count, and what of."""

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxdistill
from fxdistill import errors
from fxdistill.distiller import agreement as measures
from toys import VOCABULARY, Toy, tokens

MODES = ({"backend": "aot_eager"}, "regional", False)


def towers(dropout=0.0):
    torch.manual_seed(0)
    student, teacher = Toy(2, dropout=dropout), Toy(3)
    for model in (student, teacher):  # logits that differ
        nn.init.normal_(model.embed.weight, std=1.0)
    return student, teacher


def oracle(student, teacher, ids, weights, columns=None):
    """One prediction after the other; position j - 1 predicts token j."""
    s, t = (model.eval()(ids)["logits"].detach()[..., :columns] for model in (student, teacher))
    same = divergence = total = 0.0
    for row in range(ids.shape[0]):
        for j in range(1, ids.shape[1]):
            w = float(weights[row, j])
            p, q = F.softmax(t[row, j - 1], -1), F.softmax(s[row, j - 1], -1)
            same += w * (int(p.argmax()) == int(q.argmax()))
            divergence += w * sum(float(a) * math.log(a / b) for a, b in zip(p, q, strict=True))
            total += w
    return same / total, divergence / total


@pytest.mark.parametrize("compile", MODES, ids=["one graph", "regional", "eager"])
def test_it_is_the_mean_over_what_the_logit_term_counts(compile, monkeypatch):
    monkeypatch.setattr(measures, "CHUNK", 5 * VOCABULARY)  # several chunks, the last one short
    student, teacher = towers(dropout=0.5)  # which is off
    distiller = fxdistill.wrap(
        student, teacher, {"blocks.0": "blocks.1"}, temperature=3.0, task="causal_lm",
        compile=compile, importance=fxdistill.Importance("student_entropy", keep=0.2),
    )  # fmt: skip
    ids = tokens(3, 6)
    weights = torch.rand(3, 6)
    labels = ids.clone()
    labels[0, :3] = -100
    batch = {"ids": ids, "labels": labels, "token_weights": weights, "num_items": 3}
    state = torch.get_rng_state()
    top1, divergence = distiller.agreement(batch)
    assert torch.equal(torch.get_rng_state(), state)
    expected = oracle(student, teacher, ids, weights * (labels != -100))
    assert (float(top1), float(divergence)) == pytest.approx(expected, rel=1e-5)
    assert 0 < top1 < 1
    assert not divergence.requires_grad
    assert all(p.grad is None for p in distiller.parameters())


def test_modes_are_put_back_after_an_error_too():
    student, teacher = towers()
    student.train()
    student.blocks[0].eval()
    distiller = fxdistill.wrap(student, teacher, task="causal_lm", compile=False)
    before = {n: m.training for n, m in distiller.named_modules()}
    distiller.agreement({"ids": tokens(2, 4)})
    assert {n: m.training for n, m in distiller.named_modules()} == before
    with pytest.raises(errors.BatchError, match="no model takes"):
        distiller.agreement({"ids": tokens(2, 4), "mask": None})
    with pytest.raises(IndexError):
        distiller.agreement({"ids": tokens(2, 4) + VOCABULARY})
    assert {n: m.training for n, m in distiller.named_modules()} == before


class Padded(Toy):
    """A vocabulary padded by two columns, which win every time."""

    def forward(self, ids):
        logits = super().forward(ids)["logits"]
        return {"logits": F.pad(logits, (0, 2), value=50.0)}


def test_the_vocabularies_are_compared_where_both_are_real():
    student, _ = towers()
    teacher = Padded(3)
    distiller = fxdistill.wrap(student, teacher, task="causal_lm", compile=False)
    ids = tokens(2, 5)
    found = distiller.agreement({"ids": ids, "loss_mask": torch.ones_like(ids)})
    expected = oracle(student, teacher, ids, torch.ones(2, 5), VOCABULARY)
    assert tuple(map(float, found)) == pytest.approx(expected, rel=1e-5)


def test_equal_models_agree_and_nothing_counted_is_0():
    _, teacher = towers()
    student = Toy(3)
    student.load_state_dict(teacher.state_dict())
    distiller = fxdistill.wrap(student, teacher, task="causal_lm", compile=False)
    assert tuple(map(float, distiller.agreement({"ids": tokens(2, 4)}))) == (1.0, 0.0)
    nothing = {"ids": tokens(2, 4), "loss_mask": torch.zeros(2, 4)}
    assert tuple(map(float, distiller.agreement(nothing))) == (0.0, 0.0)


def test_classes_without_a_logit_term_and_with_a_label_loss_of_ones_own():
    torch.manual_seed(0)
    student, teacher = nn.Linear(4, 3), nn.Linear(4, 3)
    x = torch.randn(8, 4)
    distiller = fxdistill.wrap(
        student, teacher, logit_loss=None, compile=False, task="classification",
        label_loss=lambda logits, labels, *, weights: logits.sum() * 0,
    )  # fmt: skip
    labels = torch.tensor([0, 1, 2, 0, 1, 2, -100, -100])
    top1, divergence = distiller.agreement({"input": x, "labels": labels})
    s, t = student(x)[:6].detach(), teacher(x)[:6].detach()
    assert float(top1) == pytest.approx(float((s.argmax(-1) == t.argmax(-1)).float().mean()))
    expected = F.kl_div(s.log_softmax(-1), t.softmax(-1), reduction="batchmean")
    assert float(divergence) == pytest.approx(float(expected), rel=1e-5)


def test_several_models_without_a_logit_term():
    """Of several teachers the mean of probabilities; of students, each against the others."""
    student, one = towers()
    two, ids = towers()[1], tokens(3, 6)
    nn.init.normal_(two.embed.weight, std=2.0)
    options = {"logit_loss": None, "task": "causal_lm", "compile": False}
    z = [model(ids)["logits"].detach() for model in (student, one, two)]

    def kl(i, *others):
        p = sum(z[j].softmax(-1) for j in others) / len(others)
        return (p * (p.log() - z[i].log_softmax(-1))).sum(-1).mean()

    mapping = {"blocks.0": "blocks.0"}
    distiller = fxdistill.wrap(student, [one, two], mapping, **options)
    torch.testing.assert_close(distiller.agreement({"ids": ids}).divergence, kl(0, 1, 2))
    distiller = fxdistill.mutual([student, one, two], mapping, **options)
    want = (kl(0, 1, 2) + kl(1, 0, 2) + kl(2, 0, 1)) / 3
    torch.testing.assert_close(distiller.agreement({"ids": ids}).divergence, want)


def test_it_neither_compiles_nor_disturbs_the_step():
    student, teacher = towers()
    compile = {"backend": "aot_eager"}
    distiller = fxdistill.wrap(student, teacher, task="causal_lm", compile=compile)
    ids, counts, stats = tokens(2, 4), [], torch._dynamo.utils.counters["stats"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            distiller(ids).loss.backward()
            distiller.agreement({"ids": ids})
            counts.append(stats["unique_graphs"])
    assert counts == [counts[0]] * 3


def test_without_a_teacher_or_logits_there_is_nothing_to_agree_on():
    distiller = fxdistill.wrap(
        nn.Sequential(nn.Linear(3, 3)), Words(), {"0": "inner"}, logit_loss=None, label_loss=None,
        compile=False,
    )  # fmt: skip
    with pytest.raises(errors.LogitsError, match="teacher returns no logits"):
        distiller.agreement({"input": torch.randn(2, 3)})


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 3)

    def forward(self, input):
        return {"hidden": self.inner(input)}
