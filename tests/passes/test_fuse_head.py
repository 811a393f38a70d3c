"""FuseHead: what it takes for a head, what it leaves, and that no number changes."""

import functools
import io
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

import fxdistill
import heads
from families import FAMILIES
from fxdistill import errors
from fxdistill.losses import forward_kl, jsd, reverse_kl, vocab_loss
from heads import LEFT, READ, Adapted, B, D, L, Model, Twice, V, batch, remarks, run, variant

EAGER = {"backend": "eager"}
AOT = {"backend": "aot_eager"}


def fuses(student: nn.Module, teacher: nn.Module, *, fused: bool = True, **options: Any) -> str:
    remark = heads.agree(student, teacher, AOT, **options)
    assert remark.startswith("logits fused" if fused else "logits are made"), remark
    return remark


@pytest.mark.parametrize("kind", READ)
def test_heads_that_are_read(kind: str) -> None:
    student, teacher = variant(READ[kind])(0), variant(READ[kind])(1)
    fuses(student, teacher)


OPTIONS: dict[str, dict[str, Any]] = {
    "logits only": {"label_loss": None},
    "labels only": {"logit_loss": None},
    "no labels": {"call": {}},
    "mask only": {"call": {"loss_mask": torch.arange(L).expand(B, L) > 2}},
    "reverse": {"logit_loss": "reverse_kl", "temperature": 2.0},
    "soft": {"logit_loss": "soft_cross_entropy", "logit_weight": 0.3, "label_weight": 2.0},
    "jsd": {"logit_loss": functools.partial(jsd, beta=0.2)},
    "jsd at its end": {"logit_loss": functools.partial(jsd, beta=1.0)},
    "variation": {"logit_loss": "total_variation", "temperature": 2.0},
    "squares": {"logit_loss": "mse_logits", "vocab_size": 40},
    "sigmoids": {"logit_loss": "sigmoid_kl", "temperature": 3.0},
    "label options": {
        "label_loss": functools.partial(
            fxdistill.losses.cross_entropy, label_smoothing=0.1, z_loss=0.01
        )
    },
    "items": {"call": {**batch()[1], "num_items": 40}},
    "columns": {"vocab_size": 40},
    "masked": {"task": "masked_lm"},
    "with features": {"mapping": {"body": "body"}},
}


@pytest.mark.parametrize("kind", OPTIONS)
def test_options(kind: str) -> None:
    fuses(Model(0), Model(1), **OPTIONS[kind])


def test_mix_of_a_user() -> None:
    def mixed(s: Tensor, t: Tensor, *, temperature: Tensor, weights: Tensor) -> Tensor:
        both = {"temperature": temperature, "weights": weights}
        return 0.3 * forward_kl(s, t, **both) + reverse_kl(s, t, **both) * 0.7

    fuses(Model(0), Model(1), logit_loss=mixed, temperature=1.5)


@pytest.mark.parametrize(("ours", "theirs"), [(V, V - 2), (V - 2, V)])
def test_padded_vocabularies(ours: int, theirs: int) -> None:
    fuses(Model(0, ours), Model(1, theirs))
    fuses(Model(0, ours), Model(1, theirs), label_loss=None)


def test_widths_and_biases_differ() -> None:
    student = variant(READ["bias"])(0)
    teacher = variant(lambda self, x: torch.tanh(self.lm_head(x) / 5) * 5)(1, V, 24)
    fuses(student, teacher)


def test_no_logits_in_the_graph() -> None:
    distiller = fxdistill.wrap(Model(0), Model(1), task="causal_lm", compile=EAGER)
    ids, own = batch()
    distiller(ids, **own)
    assert distiller.program is not None
    values = [node.meta.get("example_value") for node in distiller.program.gm.graph.nodes]
    shapes = {tuple(value.shape) for value in values if isinstance(value, Tensor)}
    assert (B, L, D) in shapes
    assert (B, L, V) not in shapes


@pytest.mark.parametrize("kind", LEFT)
def test_what_is_left_alone(kind: str) -> None:
    made, why, options = LEFT[kind]
    if kind == "own loss":
        options = {**options, "label_loss": None}
    remark = fuses(made(0), made(1), fused=False, **options)
    assert why in remark


def test_only_one_head_is_plain() -> None:
    assert "the teacher's logits" in fuses(Model(0), Adapted(1), fused=False)
    assert "the student's logits" in fuses(Adapted(0), Model(1), fused=False)


def test_a_value_beside_the_logits_is_no_hindrance() -> None:
    """What the model makes of its logits for others, and nobody reads, is not in the graph."""
    distiller = fxdistill.wrap(Twice(0), Twice(1), task="causal_lm", compile=EAGER)
    ids, own = batch()
    distiller(ids, **own)
    assert (remarks(distiller) or "").startswith("logits fused")


def test_switched_off() -> None:
    numbers, _, remark = run(Model(0), Model(1), {**AOT, "fuse_head": False})
    assert remark is None
    torch.testing.assert_close(numbers["loss"], run(Model(0), Model(1), False)[0]["loss"])


def test_classes_are_left_alone() -> None:
    class Classifier(Model):
        def head(self, x: Tensor) -> Tensor:
            return self.lm_head(x[:, 0])

    call = {"labels": torch.tensor([1, -100, 4])}
    fuses(Classifier(0), Classifier(1), fused=False, task="classification", call=call)


def test_the_report_tells() -> None:
    for options, said in (({}, "one chunk"), ({"outputs": ("logits",)}, "are made")):
        distiller = fxdistill.wrap(Model(0), Model(1), task="causal_lm", compile=EAGER, **options)
        ids, own = batch()
        distiller(ids, **own)
        text = io.StringIO()
        Console(file=text, width=200).print(distiller.summary())
        assert said in text.getvalue()


def test_other_shapes_and_settings() -> None:
    """Weights, temperature and lengths change; the numbers follow."""
    student, teacher = Model(0), Model(1)
    fused = fxdistill.wrap(student, teacher, task="causal_lm", compile=AOT)
    plain = fxdistill.wrap(student, teacher, task="causal_lm", compile=False)
    ids, own = batch()
    for length in (7, 5, 6, 4):
        call = {name: value[:, :length] for name, value in own.items()}
        found = []
        for distiller in (fused, plain):
            distiller.set(temperature=length / 3, logit_weight=0.1 * length, label_weight=0.5)
            student.zero_grad()
            out = distiller(ids[:, :length], **call)
            (out.loss * 3).backward()
            gradients = [p.grad.clone() for p in student.parameters() if p.grad is not None]
            found.append([out.loss.detach(), *out.losses.values(), *gradients])
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_evaluation_forms_no_gradient() -> None:
    student, teacher = Model(0), Model(1)
    distiller = fxdistill.wrap(student, teacher, task="causal_lm", compile=AOT)
    ids, own = batch()
    with torch.no_grad():
        out = distiller(ids, **own)
    assert not out.loss.requires_grad
    assert remarks(distiller) is not None
    expected = fxdistill.wrap(student, teacher, task="causal_lm", compile=False)(ids, **own)
    torch.testing.assert_close(out.loss, expected.loss.detach())


def test_under_autocast() -> None:
    """The fused head is no less precise than the unfused one."""
    student, teacher = Model(0), Model(1)
    exact = run(student.double(), teacher.double(), False)[1]["lm_head.weight"]
    student.float(), teacher.float()
    errors = []
    for compile in (AOT, {**AOT, "fuse_head": False}):
        with torch.autocast("cpu", torch.bfloat16):
            _, gradients, _ = run(student, teacher, compile)
        errors.append((gradients["lm_head.weight"] - exact).norm() / exact.norm())
    assert errors[0] <= errors[1] * 1.1


def test_bad_numbers_and_labels() -> None:
    """NaN where it counts is NaN, as it is unfused; all labels ignored: 0 and zero gradients."""
    student, teacher = Model(0), Model(1)
    ids, own = batch()
    nothing = {"labels": torch.full_like(ids, -100)}
    numbers, gradients, _ = run(student, teacher, AOT, call=nothing)
    assert numbers["loss"] == 0
    assert all((g == 0).all() for g in gradients.values())
    with torch.no_grad():
        student.embed.weight[ids[1, 2]] = torch.nan
    numbers, _, _ = run(student, teacher, AOT, call=own)
    assert numbers["loss"].isnan()
    far = {"labels": own["labels"].clone()}
    far["labels"][1, 3] = V
    with pytest.raises(errors.BatchError, match=f"labels hold {V}, .* {V} classes"):
        run(Model(0), teacher, AOT, call=far)


def test_running_it_again_changes_nothing() -> None:
    distiller = fxdistill.wrap(Model(0), Model(1), task="causal_lm", compile=EAGER)
    ids, own = batch()
    distiller(ids, **own)
    program = distiller.program
    assert program is not None
    assert fxdistill.passes.FuseHead()(program) is program
    assert program.outputs == ("loss", "logits", "labels")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
@pytest.mark.parametrize("name", ["gemma2", "cohere", "gpt2"])
def test_curves_of_captured_models(name: str) -> None:
    """The cap of Gemma 2, the scale of Cohere and the tied head of GPT-2 are in the fused call."""
    family = FAMILIES[name]()
    distiller = fxdistill.wrap(family.student, family.teacher, compile=EAGER)
    distiller(**family.batch, labels=family.labels)
    assert distiller.program is not None
    (fused,) = distiller.program.gm.graph.find_nodes(op="call_function", target=vocab_loss)
    curve = {"gemma2": (1.0, 30.0), "cohere": (0.25, None), "gpt2": (1.0, None)}[name]
    for tower in ("student", "teacher"):
        assert fused.kwargs[f"{tower}_scale"] == pytest.approx(curve[0])
        assert fused.kwargs[f"{tower}_softcap"] == curve[1]
    tied = "wte" if name == "gpt2" else "embed_tokens"
    assert tied in str(fused.args[1])


# ---- losses of a user's own, made of ours


def weighted(loss: Any, s: Tensor, t: Tensor, o: dict[str, Any]) -> Tensor:
    return loss(s, t, temperature=o["temperature"], weights=o["weights"])


OWN: dict[str, tuple[Any, bool]] = {
    "cut": (lambda s, t, **o: weighted(forward_kl, s[..., :40], t[..., :40], o), True),
    "other columns": (lambda s, t, **o: weighted(forward_kl, s[..., 1:], t[..., :-1], o), False),
    "by keyword": (lambda s, t, **o: forward_kl(student_logits=s, teacher_logits=t, **o), False),
    "one teacher": (lambda s, t, **o: weighted(forward_kl, s, t[:1].expand_as(s), o), False),
    "of two": (lambda s, t, **o: weighted(forward_kl, s, t, o) * weighted(jsd, s, t, o), False),
}


@pytest.mark.parametrize("kind", OWN)
@pytest.mark.parametrize("labels", [True, False])
def test_losses_of_a_user(kind: str, labels: bool) -> None:
    loss, fused = OWN[kind]
    options = {} if labels else {"label_loss": None}
    fuses(Model(0), Model(1), fused=fused, logit_loss=loss, **options)


def test_label_losses_of_a_user() -> None:
    def twice(s: Tensor, labels: Tensor, *, weights: Tensor) -> Tensor:
        one = fxdistill.losses.cross_entropy(s, labels, weights=weights)
        return one + 0.5 * fxdistill.losses.cross_entropy(s, labels, weights=weights)

    fuses(Model(0), Model(1), fused=False, label_loss=twice)


def test_what_learns_besides_the_models() -> None:
    """A temperature, or weights, that learn get their gradient."""
    ids, own = batch()
    found = []
    for compile in (AOT, False):
        tau = torch.tensor(1.5, requires_grad=True)
        weights = own["token_weights"].clone().requires_grad_()

        def loss(s: Tensor, t: Tensor, *, tau: Tensor = tau, **o: Tensor) -> Tensor:
            return forward_kl(s, t, temperature=tau, weights=o["weights"])

        distiller = fxdistill.wrap(
            Model(0), Model(1), task="causal_lm", logit_loss=loss, compile=compile
        )
        distiller(ids, labels=own["labels"], token_weights=weights).loss.backward()
        found.append((tau.grad, weights.grad))
    for fused, plain in zip(*found, strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-6)


def test_float16_has_a_loss_scale() -> None:
    student, teacher = Model(0), Model(1)
    with torch.autocast("cpu", torch.float16):
        _, _, remark = run(student, teacher, AOT)
    assert "float16" in (remark or "")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
@pytest.mark.parametrize("name", ["bert_mlm", "bart", "llama"])
def test_under_autocast_with_a_bias(name: str) -> None:
    family = FAMILIES[name]()
    losses = []
    for compile in (AOT, False):
        distiller = fxdistill.wrap(
            family.student, family.teacher, task=family.wrap_task, compile=compile
        )
        with torch.autocast("cpu", torch.bfloat16):
            out = distiller(**family.batch, labels=family.labels)
        out.loss.backward()
        losses.append(out.loss.detach())
    torch.testing.assert_close(*losses, rtol=2e-2, atol=0)


class Classifier(torch.nn.Module):
    """Flattened tokens, or extreme classification: logits [N, C] with many columns."""

    def __init__(self, classes: int, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.body, self.head = torch.nn.Linear(8, 8), torch.nn.Linear(8, classes, bias=False)

    def forward(self, x: Any) -> Any:
        return self.head(self.body(x).tanh())


@pytest.mark.parametrize(("classes", "said"), [(5000, "logits fused"), (50, "logits are made")])
def test_two_axes_with_many_columns_are_fused(classes: int, said: str) -> None:
    x, y = torch.randn(12, 8), torch.arange(12)
    results = []
    for compile in (False, {"backend": "aot_eager"}):
        student, teacher = Classifier(classes, 0), Classifier(classes, 1)
        distiller = fxdistill.wrap(student, teacher, task="classification", compile=compile)
        out = distiller(x, labels=y)
        out.loss.backward()
        results.append([out.loss.detach(), *(p.grad for p in student.parameters())])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    assert remarks(distiller).startswith(said)
