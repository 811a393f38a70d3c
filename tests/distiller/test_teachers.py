"""Several teachers, none, and the student as its own: against plain PyTorch, in all modes."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.utils import counters

import fxdistill
from fxdistill import Match, errors, losses
from fxdistill.losses.fused.sizes import chunk_tokens_for
from fxdistill.losses.names import LOGIT_LOSSES
from fxdistill.objective.logit_terms import pooled_by
from toys import AOT, MODES, VOCABULARY, Toy, assert_same_gradients, gradients, tokens, toys, values

TAU = 2.0


def target_of(logits, share):
    """Σ w_k softmax(z_k / τ), in float64."""
    return sum(w * (z.double() / TAU).softmax(-1) for w, z in zip(share, logits, strict=True))


def by_hand(name, s, teachers, share):
    """A divergence of one prediction from the mean of teachers, from the formula."""
    if name == "mse_logits":
        z = sum(w * t.double() for w, t in zip(share, teachers, strict=True))
        return (s.double() - z).square().mean(-1)
    if name == "sigmoid_kl":
        p = sum(w * (t.double() / TAU).sigmoid() for w, t in zip(share, teachers, strict=True))
        q = (s.double() / TAU).sigmoid()
        one = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
        return TAU**2 * one.mean(-1)
    p, q = target_of(teachers, share), (s.double() / TAU).softmax(-1)
    if name == "forward_kl":
        return TAU**2 * (p * (p / q).log()).sum(-1)
    if name == "reverse_kl":
        return TAU**2 * (q * (q / p).log()).sum(-1)
    if name == "jsd":
        m = (p + q) / 2
        return TAU**2 * ((p * (p / m).log()).sum(-1) + (q * (q / m).log()).sum(-1)) / 2
    if name == "soft_cross_entropy":
        return -(TAU**2) * (p * q.log()).sum(-1)
    assert name == "total_variation"
    return (p - q).abs().sum(-1) / 2


@pytest.mark.parametrize("name", list(LOGIT_LOSSES))
def test_the_target_is_a_mean_of_probabilities(name):
    torch.manual_seed(0)
    s = torch.randn(2, 5, 11, requires_grad=True)
    teachers = [3 * torch.randn(2, 5, 11) for _ in range(3)]
    weights = torch.tensor([3.0, 1.0, 0.0])
    loss = LOGIT_LOSSES[name]
    target = losses.mean_of_teachers(teachers, weights, temperature=TAU, pooled=pooled_by(loss))
    value = loss(s, target, temperature=TAU)
    want = by_hand(name, s, teachers, (0.75, 0.25, 0.0)).mean()
    torch.testing.assert_close(value.double(), want, rtol=1e-5, atol=1e-6)
    got, expected = (torch.autograd.grad(x, s, retain_graph=True)[0] for x in (value, want))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", list(LOGIT_LOSSES))
def test_fused_heads_of_several_teachers(name):
    """Widths, vocabularies, biases, scales and caps of their own; a token without weight is NaN."""
    torch.manual_seed(0)
    kind, size = torch.float64, 100

    def head(width, columns):
        return torch.randn(37, width, dtype=kind), torch.randn(columns, width, dtype=kind)

    h, w = (x.requires_grad_() for x in head(12, 101))
    (a, wa), (b, wb), (c, wc) = head(10, 104), head(6, 101), head(8, 102)
    bias, weights, shares = torch.randn(104, dtype=kind), torch.rand(37), torch.tensor([3.0, 1, 2])
    weights[3] = 0.0
    b[3] = torch.nan
    pooled = pooled_by(LOGIT_LOSSES[name])
    found = losses.vocab_loss(
        *(h, w, a, wa),
        divergence=name,
        temperature=TAU,
        weights=weights,
        teacher_bias=bias,
        teacher_scale=0.5,
        teacher_softcap=5.0,
        other_teachers=[(b, wb, None, 1.0, None), (c, wc, None, 0.3, None)],
        teacher_shares=shares,
        pooled=pooled,
        vocab_size=size,
        chunk_tokens=16,
        compile=False,
    ).loss
    logits = [5 * torch.tanh((a @ wa.T + bias) * 0.5 / 5), b.nan_to_num() @ wb.T, 0.3 * c @ wc.T]
    logits = [z[:, :size] for z in logits]
    target = losses.mean_of_teachers(logits, shares, temperature=TAU, pooled=pooled)
    loss = LOGIT_LOSSES[name]
    want = loss((h @ w.T)[:, :size], target, temperature=TAU, weights=weights)
    torch.testing.assert_close(found, want)
    got, expected = (torch.autograd.grad(x, (h, w)) for x in (found, want))
    torch.testing.assert_close(got, expected)
    with pytest.raises(errors.ShapeError, match="other teacher's hidden"):
        losses.vocab_loss(h, w, a, wa, other_teachers=[(b, wc, None, 1.0, None)])


def test_fused_teachers_of_other_precisions():
    """Each head makes its logits in its own dtype; the mean is float32, and so is the loss."""
    torch.manual_seed(0)
    h, w = (x.requires_grad_() for x in (torch.randn(37, 8), torch.randn(50, 8)))
    kinds = torch.float16, torch.bfloat16, torch.float32
    sides = [(torch.randn(37, 6).to(kind), torch.randn(50, 6).to(kind)) for kind in kinds]
    target = losses.mean_of_teachers([a @ b.T for a, b in sides], torch.ones(3), temperature=TAU)
    want = losses.forward_kl(h @ w.T, target, temperature=TAU)
    for first in range(3):
        ordered = sides[first:] + sides[:first]
        others = [(*side, None, 1.0, None) for side in ordered[1:]]
        given = {"other_teachers": others, "temperature": TAU, "chunk_tokens": 16}
        found = losses.vocab_loss(h, w, *ordered[0], compile=False, **given).loss
        torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-6)
        got, expected = (torch.autograd.grad(x, (h, w), retain_graph=True) for x in (found, want))
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


def test_entries_that_teachers_rule_out():
    """-inf where all teachers rule an entry out, the others' probability where one does."""
    a, b = torch.tensor([0.0, -torch.inf, -torch.inf]), torch.tensor([0.0, 0.0, -torch.inf])
    found = losses.mean_of_teachers([a, b], torch.ones(2)).softmax(-1)
    torch.testing.assert_close(found, torch.tensor([0.75, 0.25, 0.0]))
    one = losses.mean_of_teachers([a], torch.ones(1), temperature=3.0)
    torch.testing.assert_close(one.softmax(-1), a.softmax(-1))


def test_teachers_without_weight_get_no_gradient():
    """Two of them: the mean begins with log 0 + log 0, whose derivative is not a number."""
    torch.manual_seed(0)
    z = [torch.randn(2, 5, requires_grad=True) for _ in range(3)]
    for pooled in ("probabilities", "classes", "logits"):
        mean = losses.mean_of_teachers(z, torch.tensor([0.0, 0.0, 2.0]), pooled=pooled)
        values = mean.sigmoid() if pooled == "classes" else mean.softmax(-1)
        want = z[2].sigmoid() if pooled == "classes" else z[2].softmax(-1)
        first, second, third = torch.autograd.grad(values[:, 0].sum(), z)
        (expected,) = torch.autograd.grad(want[:, 0].sum(), z[2])
        assert not first.any()
        assert not second.any()
        torch.testing.assert_close(third, expected)


def test_a_chunk_has_room_for_the_mean():
    """Of bf16 heads the mean of teachers is float32: it takes twice their columns."""
    torch.manual_seed(0)
    student, one, two = (Toy(1).bfloat16() for _ in range(3))
    distiller = fxdistill.wrap(student, [one, two], task="causal_lm", compile=AOT)
    distiller(tokens(), labels=tokens())
    nodes = distiller.program.gm.graph.nodes
    (fused,) = [n for n in nodes if n.target is losses.vocab_loss]
    assert fused.kwargs["chunk_tokens"] == chunk_tokens_for(
        3 * VOCABULARY + 2 * VOCABULARY, 2, torch.device("cpu")
    )


@MODES
def test_two_teachers_by_name(compile):
    student, big, small = toys(2, 4, 1)
    plain, ids, others = copy.deepcopy(student), tokens(), tokens().flip(1)
    matches = [
        Match("blocks.0.mlp", "blocks.3.mlp", of="big"),
        Match("blocks.1.mixer", "blocks.0.mixer", of="small", weight=0.25),
        Match("blocks.1.mlp", "blocks.0.mlp"),  # of the first
    ]
    distiller = fxdistill.wrap(
        student,
        {"big": big, "small": small},
        matches,
        teacher_weights={"big": 3.0, "small": 1.0},
        temperature=TAU,
        label_weight=0.5,
        task="causal_lm",
        compile=compile,
    )
    out = distiller(ids, labels=ids, small_inputs={"ids": others})
    out.loss.backward()

    s, f = values(plain, ids, "blocks.0.mlp", "blocks.1.mixer", "blocks.1.mlp")
    with torch.no_grad():
        b, of_big = values(big, ids, "blocks.3.mlp", "blocks.0.mlp")
        t, of_small = values(small, others, "blocks.0.mixer")
    want = {
        "logits": by_hand("forward_kl", s, (b, t), (0.75, 0.25))[:, :-1].mean().float(),
        "labels": F.cross_entropy(s[:, :-1].flatten(0, 1), ids[:, 1:].flatten()),
        "big/blocks.0.mlp": F.mse_loss(f["blocks.0.mlp"], of_big["blocks.3.mlp"]),
        "small/blocks.1.mixer": F.mse_loss(f["blocks.1.mixer"], of_small["blocks.0.mixer"]),
        "blocks.1.mlp": F.mse_loss(f["blocks.1.mlp"], of_big["blocks.0.mlp"]),
    }
    # Features count every token that has a label: all.
    want["features"] = (
        want["big/blocks.0.mlp"] + 0.25 * want["small/blocks.1.mixer"] + want["blocks.1.mlp"]
    ) / 3
    total = want["logits"] + 0.5 * want["labels"] + want["features"]
    total.backward()
    assert set(out.losses) == set(want)
    for name, value in want.items():
        torch.testing.assert_close(out.losses[name], value.detach(), msg=name)
    torch.testing.assert_close(out.loss, total)
    assert_same_gradients(gradients(student), gradients(plain))
    if compile == AOT:  # and the heads of all three are fused with the loss
        (said,) = (r.remarks for r in distiller.program.history if r.name == "FuseHead")
        assert said[0].count("[3, 7, 50]") == 3
    assert all(p.grad is None for model in (big, small) for p in model.parameters())


def test_weights_of_teachers_change_without_a_compile():
    student, one, two = toys(1, 1, 1)
    two.load_state_dict({k: v + 0.1 for k, v in two.state_dict().items()})
    ids = tokens()
    distiller = fxdistill.wrap(student, [one, two], label_loss=None, task="causal_lm", compile=AOT)
    assert distiller.settings["teacher_weights.teacher0"] == 1.0

    def value(weights):
        distiller.set(teacher_weights=weights)
        return distiller(ids).losses["logits"]

    distiller(ids)
    counters.clear()
    found = [value(w) for w in ((1, 0), (0, 2), (0.5, 0.5), (7, 7))]
    assert not counters["stats"]
    alone = [
        fxdistill.wrap(student, t, label_loss=None, task="causal_lm", compile=False)(ids).loss
        for t in (one, two)
    ]
    torch.testing.assert_close(torch.stack(found[:2]), torch.stack(alone).detach())
    torch.testing.assert_close(found[2], found[3])
    torch.testing.assert_close(value({0: 0, 1: 3}), found[1])
    torch.testing.assert_close(value(torch.tensor([2.0, 0.0])), found[0])
    nan = torch.tensor([torch.nan, 1])
    for wrong in ((1,), (0, 0), (-1, 2), {"one": 1}, {0: 1, 2: 1}, (float("nan"), 1), nan, "ab"):
        before = distiller.settings
        with pytest.raises(errors.OptionError, match="teacher"):
            distiller.set(teacher_weights=wrong)
        assert distiller.settings == before
    distiller.set(teacher_weights=(7, 6))
    saved = distiller.state_dict()
    assert saved._metadata[""]["settings"]["teacher_weights.teacher1"] == 6.0


@MODES
def test_teachers_that_learn_too(compile):
    student, one, two = toys(1, 2, 1)
    plain, ids = copy.deepcopy([student, one, two]), tokens()
    distiller = fxdistill.wrap(
        student,
        [one, two],
        [Match("blocks.0.mlp", "blocks.0.mlp", of=1)],
        freeze_teacher=False,
        temperature=TAU,
        label_loss=None,
        task="causal_lm",
        compile=compile,
    )
    distiller(ids).loss.backward()
    s, f = values(plain[0], ids, "blocks.0.mlp")
    a, _ = values(plain[1], ids)
    b, g = values(plain[2], ids, "blocks.0.mlp")
    total = by_hand("forward_kl", s, (a, b), (0.5, 0.5)).mean().float()
    (total + F.mse_loss(f["blocks.0.mlp"], g["blocks.0.mlp"])).backward()
    for model, other in zip((student, one, two), plain, strict=True):
        assert_same_gradients(gradients(model), gradients(other))


@MODES
def test_the_student_teaches_itself(compile):
    """Be Your Own Teacher: the deeper value is a target, and gets no gradient from the term."""
    (student,) = toys(3)
    plain, ids = copy.deepcopy(student), tokens()
    mapping = [
        Match("blocks.0", "blocks.2", of="self"),
        Match("blocks.1.mlp", "blocks.2.mlp", of="self", loss="cosine"),
    ]
    distiller = fxdistill.wrap(
        student, None, mapping, feature_weight=0.5, task="causal_lm", compile=compile
    )
    assert distiller.teacher is None
    out = distiller(ids, labels=ids)
    out.loss.backward()
    s, f = values(plain, ids, "blocks.0", "blocks.2", "blocks.1.mlp", "blocks.2.mlp")
    first = F.mse_loss(f["blocks.0"], f["blocks.2"].detach())
    second = (1 - F.cosine_similarity(f["blocks.1.mlp"], f["blocks.2.mlp"].detach(), -1)).mean()
    labels = F.cross_entropy(s[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    (labels + 0.5 * (first + second) / 2).backward()
    assert list(out.losses) == ["labels", "features", "self/blocks.0", "self/blocks.1.mlp"]
    torch.testing.assert_close(out.losses["self/blocks.0"], first.detach())
    assert_same_gradients(gradients(student), gradients(plain))


@pytest.mark.parametrize("compile", [False, AOT], ids=["eager", "graph"])
def test_no_teacher(compile):
    (student,) = toys(1)
    plain, ids = copy.deepcopy(student), tokens()
    distiller = fxdistill.wrap(student, None, task="causal_lm", compile=compile)
    out = distiller(ids, labels=ids)
    out.loss.backward()
    assert list(out.losses) == ["labels"]
    logits = plain(ids)["logits"]
    F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    assert_same_gradients(gradients(student), gradients(plain))
    with pytest.warns(UserWarning, match="no term is in the loss"):
        distiller(ids)


def test_vocabularies_with_padding_of_their_own():
    """Columns that one teacher lacks have no part in the mean of all."""
    torch.manual_seed(0)
    z = [torch.randn(2, 6, size) for size in (100, 104, 102)]

    class Model(nn.Module):
        def __init__(self, logits):
            super().__init__()
            self.logits = nn.Parameter(logits)

        def forward(self, x):
            return self.logits * x

    distiller = fxdistill.wrap(
        Model(z[1]), [Model(z[0]), Model(z[2])], task="masked_lm", label_loss=None, compile=False
    )
    found = distiller(torch.ones(())).loss
    s, a, b = (x[..., :100] for x in (z[1], z[0], z[2]))
    want = losses.forward_kl(s, ((a.softmax(-1) + b.softmax(-1)) / 2).log())
    torch.testing.assert_close(found, want)


def test_report_shows_every_teacher():
    student, big, small = toys(1, 2, 1)
    distiller = fxdistill.wrap(
        student,
        {"big": big, "small": small},
        [Match("blocks.0.mlp", "blocks.0.mlp", of="small")],
        task="causal_lm",
        compile=AOT,
    )
    report = distiller.report(tokens(), labels=tokens())
    assert [tower.name for tower in report.towers] == ["big", "small", "student"]
    assert (report.pairs[0].name, report.pairs[0].teacher_model) == ("small/blocks.0.mlp", "small")
    assert "big/logits, small/logits" in " ".join(str(distiller.summary()).split())


MANY = [nn.Linear(2, 2), nn.Linear(2, 2)]


@pytest.mark.parametrize(
    ("teacher", "options", "says"),
    [
        ([], {}, "holds no model"),
        ("gpt2", {}, "a list or a dict"),
        ({"a": nn.Linear(2, 2), "b": "gpt2"}, {}, "'b' is a str"),
        ({"self": nn.Linear(2, 2)}, {}, "'self'"),
        ({"my teacher": nn.Linear(2, 2)}, {}, "NAME_inputs"),
        (MANY, {"mapping": [Match("0", "", of=2)]}, "no such teacher"),
        (MANY, {"mapping": [Match("0", "x", of=1)]}, "no module of the teacher matches 'x'"),
        (MANY, {"teacher_weights": (1, 2, 3)}, "teacher0, teacher1"),
        (MANY, {"teacher_weights": (1, -2)}, "at least 0"),
        (MANY, {"teacher_weights": (1, 2), "logit_loss": None}, "no logit loss"),
        (nn.Linear(2, 2), {"teacher_weights": (1,)}, "not several"),
        (None, {"mapping": {"0": "1"}}, "there is no teacher"),
        (None, {"mapping": [Match("0", "0", of="self")]}, "with itself"),
    ],
)
def test_bad_input(teacher, options, says):
    student = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with pytest.raises(errors.FxDistillError, match=says):
        fxdistill.wrap(student, teacher, options.pop("mapping", None), **options)


def test_teachers_with_other_vocabularies():
    from transformers import LlamaConfig, LlamaForCausalLM

    def model(size):
        sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1}
        return LlamaForCausalLM(LlamaConfig(vocab_size=size, num_hidden_layers=1, **sizes))

    with pytest.raises(errors.VocabularyError, match=r"64 entries and teacher1's 128"):
        fxdistill.wrap(model(64), [model(64), model(128)])


@pytest.mark.slow
def test_teachers_are_mixed_by_compiled_code():
    """As a user runs it: Inductor compiles the mixing inside of the operator, for both dtypes."""
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        h, w = torch.randn(40, 8, dtype=dtype), torch.randn(64, 8, dtype=dtype)
        given = {"other_teachers": [(h * 2, w + 1, None, 1.0, 30.0)], "temperature": TAU}
        found = [losses.vocab_loss(h, w, h, w, compile=c, **given).loss for c in (True, False)]
        torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)
