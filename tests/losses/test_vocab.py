"""The fused head against float64 autograd of logits that do exist, by torch's own functions."""

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fxdistill
from fxdistill import errors
from fxdistill.losses import vocab_loss, vocab_loss_topk
from fxdistill.losses.fused import head_gradients, operator
from fxdistill.losses.fused.call import HeadSide
from fxdistill.losses.fused.chunk import ChunkSpec
from fxdistill.losses.fused.teachers import MixSpec, packed

TOKENS, D, D_T, V = 37, 12, 20, 101
PARTS = ("student_hidden", "student_weight", "student_bias")


def operands(dtype: torch.dtype = torch.float32, v_t: int = V, **changes: Any) -> dict[str, Any]:
    g = torch.Generator().manual_seed(0)
    made = {
        "student_hidden": torch.randn(TOKENS, D, generator=g),
        "student_weight": torch.randn(V, D, generator=g) * 0.4,
        "student_bias": torch.randn(V, generator=g),
        "teacher_hidden": torch.randn(TOKENS, D_T, generator=g),
        "teacher_weight": torch.randn(v_t, D_T, generator=g) * 0.4,
        "teacher_bias": torch.randn(v_t, generator=g),
        "labels": torch.randint(0, V, (TOKENS,), generator=g),
        "weights": torch.rand(TOKENS, generator=g),
    }
    made["labels"][::5] = -100
    made["weights"][::7] = 0
    return cast({**made, **changes}, dtype)


def cast(x: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    real = {k for k, v in x.items() if v is not None and v.is_floating_point()}
    return {k: v.to(dtype) if k in real else v for k, v in x.items()}


def divergence_value(name: str, s: Tensor, t: Tensor, beta: float, tau: float) -> Tensor:
    """Of logits over τ, before the factor τ²."""
    if name == "mse_logits":
        return F.mse_loss(s, t, reduction="none").mean(-1)
    if name == "sigmoid_kl":
        p = t.sigmoid()
        both = [F.binary_cross_entropy_with_logits(x, p, reduction="none") for x in (s, t)]
        return (both[0] - both[1]).mean(-1)
    log_q, log_p = F.log_softmax(s, -1), F.log_softmax(t, -1)
    q, p = log_q.exp(), log_p.exp()
    if name == "total_variation":
        return (q - p).clamp(min=0).sum(-1) / tau**2
    if name == "jsd" and 0 < beta < 1:
        log_m = (beta * p + (1 - beta) * q).log()
        of_p = F.kl_div(log_m, p, reduction="none").sum(-1)
        return beta * of_p + (1 - beta) * F.kl_div(log_m, q, reduction="none").sum(-1)
    if name == "reverse_kl" or (name == "jsd" and beta == 1):
        return F.kl_div(log_p, q, reduction="none").sum(-1)
    if name == "soft_cross_entropy":
        return F.cross_entropy(s, p, reduction="none")
    return F.kl_div(log_q, p, reduction="none").sum(-1)


def head(x: Tensor, scale: float, cap: float | None) -> Tensor:
    return x * scale if cap is None else cap * torch.tanh(x * scale / cap)


def oracle(x: dict[str, Any], mix: dict[str, tuple[float, float]], **o: Any) -> Any:
    """Loss, terms and gradients in float64; ``mix`` is ``{name: (weight, beta)}``."""
    x = cast(x, torch.float64)
    leaves = [x[name].detach().requires_grad_() for name in PARTS if x[name] is not None]
    h, w = leaves[:2]
    s = head(F.linear(h, w, leaves[2] if len(leaves) > 2 else None), *o.get("student", (1.0, None)))
    t = F.linear(x["teacher_hidden"], x["teacher_weight"], x["teacher_bias"])
    t = head(t, *o.get("teacher", (1.0, None)))
    tau, n = o.get("temperature", 1.0), o.get("columns", min(s.shape[-1], t.shape[-1]))
    weights = torch.ones(len(h)).double() if x["weights"] is None else x["weights"]
    value = sum(
        c * divergence_value(k, s[:, :n] / tau, t[:, :n] / tau, b, tau) for k, (c, b) in mix.items()
    )
    logits = tau**2 * (weights * value).sum() / o.get("items", weights.sum())
    labels = torch.zeros(()).double()
    if x["labels"] is not None:
        kept = weights * (x["labels"] != -100)
        smoothing = o.get("label_smoothing", 0.0)
        ce = F.cross_entropy(s, x["labels"], reduction="none", label_smoothing=smoothing)
        ce = ce + o.get("z_loss", 0.0) * s.logsumexp(-1).square()
        labels = (kept * ce).sum() / o.get("items", kept.sum())
    loss = o.get("logit_weight", 1.0) * logits + o.get("label_weight", 0.0) * labels
    return loss.detach(), logits.detach(), labels.detach(), torch.autograd.grad(loss, leaves)


def compare(
    x: dict[str, Any], wanted: Any, call: Any = vocab_loss, rtol: float = 1e-5, **o: Any
) -> None:
    x = {
        k: v.detach().requires_grad_() if k in PARTS and v is not None else v for k, v in x.items()
    }
    leaves = [x[name] for name in PARTS if x[name] is not None]
    got = call(**x, chunk_tokens=o.pop("chunk_tokens", 16), compile=o.pop("compile", False), **o)
    gradients = torch.autograd.grad(got.loss * 3, leaves)
    for value, want in zip(got, wanted[:3], strict=True):
        torch.testing.assert_close(value.double(), want, rtol=rtol, atol=rtol)
    assert not got.logits.requires_grad
    largest = max(g.norm() for g in wanted[3])
    for g, want in zip(gradients, wanted[3], strict=True):
        assert (g.double() / 3 - want).norm() <= rtol * want.norm() + 1e-6 * largest
        assert g.dtype == x["student_weight"].dtype


STORED = ["forward_kl", "reverse_kl", "jsd", "soft_cross_entropy", "total_variation"]
NAMES = [*STORED, "mse_logits", "sigmoid_kl"]


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("name", NAMES)
def test_every_divergence_with_labels(name: str, temperature: float) -> None:
    weights = {"logit_weight": 0.7, "label_weight": 0.4}
    wanted = oracle(operands(), {name: (1.0, 0.5)}, temperature=temperature, **weights)
    compare(operands(), wanted, divergence=name, temperature=temperature, **weights)


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.9, 1.0])
def test_jsd_with_another_beta(beta: float) -> None:
    wanted = oracle(operands(), {"jsd": (1.0, beta)})
    compare(operands(), wanted, divergence=functools.partial(fxdistill.losses.jsd, beta=beta))


def test_a_mix_in_one_pass() -> None:
    mix = {"forward_kl": 0.3, "jsd": 2.0, "total_variation": 0.5, "mse_logits": 0.2}
    wanted = oracle(operands(), {name: (w, 0.5) for name, w in mix.items()}, temperature=2.0)
    compare(operands(), wanted, divergence=mix, temperature=2.0)


def test_labels_alone_need_no_teacher() -> None:
    wanted = oracle(operands(), {"forward_kl": (0.0, 0)}, label_weight=1.0)
    x = {**operands(), "teacher_hidden": None, "teacher_weight": None, "teacher_bias": None}
    compare(x, wanted, divergence=None, label_weight=1.0)


@pytest.mark.parametrize("o", [{"label_smoothing": 0.1}, {"z_loss": 1e-2}])
def test_options_of_cross_entropy(o: dict[str, float]) -> None:
    compare(operands(), oracle(operands(), {"jsd": (1.0, 0.5)}, label_weight=2.0, **o),
            divergence="jsd", label_weight=2.0, **o)  # fmt: skip


@pytest.mark.parametrize("name", ["forward_kl", *NAMES[-3:]])
def test_softcaps_and_scales(name: str) -> None:
    wanted = oracle(operands(), {name: (1.0, 0)}, label_weight=1.0,
                    student=(0.5, 3.0), teacher=(2.0, None))  # fmt: skip
    compare(operands(), wanted, divergence=name, label_weight=1.0, student_scale=0.5,
            student_softcap=3.0, teacher_scale=2.0)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("v_t", [90, 120])
def test_vocabularies_that_differ_by_padding(name: str, v_t: int) -> None:
    x = operands(v_t=v_t)
    compare(x, oracle(x, {name: (1.0, 0.5)}, label_weight=1.0), divergence=name, label_weight=1.0)
    wanted = oracle(x, {name: (1.0, 0.5)}, columns=80)
    compare(x, wanted, divergence=name, vocab_size=80)


@pytest.mark.parametrize("without", ["student_bias", "teacher_bias", "labels", "weights"])
def test_what_may_be_missing(without: str) -> None:
    x = operands(**{without: None})
    compare(x, oracle(x, {"forward_kl": (1.0, 0)}))


@pytest.mark.parametrize("chunk", [1, 16, 36, 37, 38, 4096, None])
def test_the_size_of_chunks_changes_nothing(chunk: int | None) -> None:
    compare(operands(), oracle(operands(), {"reverse_kl": (1.0, 0)}, label_weight=1.0),
            divergence="reverse_kl", label_weight=1.0, chunk_tokens=chunk)  # fmt: skip


def test_items_are_the_denominator() -> None:
    wanted = oracle(operands(), {"forward_kl": (1.0, 0)}, label_weight=1.0, items=50)
    compare(operands(), wanted, label_weight=1.0, num_items=torch.tensor(50))


def test_leading_axes_are_tokens() -> None:
    x = operands()
    wanted = oracle(x, {"forward_kl": (1.0, 0)}, label_weight=1.0)
    grid = {k: v.unflatten(0, (1, TOKENS)) for k, v in x.items() if v.shape[0] == TOKENS}
    compare({**x, **grid}, (*wanted[:3], (wanted[3][0][None], *wanted[3][1:])), label_weight=1.0)


def test_heads_that_predict_several_tokens() -> None:
    """MTP: N hidden states a position, one head; each prediction is a token of its own."""
    x = operands()
    shapes = {"student_hidden": (6, 2, 3, D), "teacher_hidden": (6, 2, 3, D_T)}
    x = {k: v[:36] if v.shape[0] == TOKENS else v for k, v in x.items()}
    grids = {k: v.reshape(shapes[k]) if k in shapes else v for k, v in x.items()}
    grids |= {k: x[k].reshape(6, 2, 3) for k in ("labels", "weights")}
    found = vocab_loss(**grids, label_weight=0.5, compile=False)
    wanted = vocab_loss(**x, label_weight=0.5, compile=False)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_inside_a_compiled_function(backend: str) -> None:
    @functools.partial(torch.compile, fullgraph=True, backend=backend)
    def call(**kwargs: Any) -> Any:
        return vocab_loss(**kwargs)

    compiled = {"compile": backend == "inductor"}
    weights = {"label_weight": torch.tensor(0.4), "temperature": torch.tensor(2.0)}
    for count in (TOKENS, 30, 21):
        x = {k: v[:count] if v.shape[0] == TOKENS else v for k, v in operands().items()}
        wanted = oracle(x, {"jsd": (1.0, 0.5)}, label_weight=0.4, temperature=2.0)
        compare(x, wanted, call, divergence="jsd", **weights, **compiled)


def test_bf16_is_no_worse_than_logits_in_bf16() -> None:
    x = operands(torch.bfloat16)
    wanted = oracle(x, {"forward_kl": (1.0, 0)}, label_weight=1.0)
    leaves = [x[name].detach().requires_grad_() for name in PARTS]
    s = F.linear(*leaves)
    t = F.linear(x["teacher_hidden"], x["teacher_weight"], x["teacher_bias"])
    w = x["weights"]
    plain = fxdistill.losses.forward_kl(s, t, weights=w)
    plain = plain + fxdistill.losses.cross_entropy(s, x["labels"], weights=w)
    unfused = torch.autograd.grad(plain, leaves)
    mine = [x[name].detach().requires_grad_() for name in PARTS]
    given = {**x, **dict(zip(PARTS, mine, strict=True))}
    got = vocab_loss(**given, label_weight=1.0, chunk_tokens=16, compile=False)
    for g, u, want in zip(torch.autograd.grad(got.loss, mine), unfused, wanted[3], strict=True):
        assert (g.double() - want).norm() <= 1.1 * (u.double() - want).norm()
    assert got.loss.dtype == torch.float32


def test_a_gradient_in_low_precision_is_added_some_columns_at_a_time(monkeypatch: Any) -> None:
    x = operands(torch.bfloat16)
    found = []
    for size in (head_gradients.ADDEND, 7 * D * 2):
        monkeypatch.setattr(head_gradients, "ADDEND", size)
        x["student_weight"].requires_grad_().grad = None
        vocab_loss(**x, chunk_tokens=16, compile=False).loss.backward()
        found.append(x["student_weight"].grad)
    torch.testing.assert_close(*found)


def test_only_the_gradients_that_are_wanted() -> None:
    x = operands()
    with torch.no_grad():
        assert not vocab_loss(**x, label_weight=1.0, compile=False).loss.requires_grad
    x["student_hidden"].requires_grad_()  # a frozen head: LoRA below it
    loss = vocab_loss(**x, label_weight=1.0, compile=False).loss
    shapes = [tuple(t.shape) for t in loss.grad_fn.saved_tensors]
    assert shapes == [(TOKENS, D), (0,), (0,)]
    (gradient,) = torch.autograd.grad(loss, [x["student_hidden"]])
    wanted = oracle(operands(), {"forward_kl": (1.0, 0)}, label_weight=1.0)[3][0]
    torch.testing.assert_close(gradient.double(), wanted, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("options", [{}, {"student_softcap": 5.0}])
def test_tokens_that_do_not_count_may_hold_anything(bad: float, options: Any) -> None:
    x = operands()
    dead = x["weights"] == 0
    clean = oracle(x, {"forward_kl": (1.0, 0)}, label_weight=1.0,
                   student=(1.0, options.get("student_softcap")))  # fmt: skip
    x["student_hidden"][dead] = bad
    x["teacher_hidden"][dead] = bad
    compare(x, clean, label_weight=1.0, **options)


def test_nothing_that_counts_gives_zero_and_zero_gradients() -> None:
    zero = torch.zeros(TOKENS)
    for x in (operands(weights=zero), operands(labels=torch.full((TOKENS,), -100))):
        leaves = [x[name].requires_grad_() for name in PARTS]
        weight = 0.0 if x["weights"].any() else 1.0
        got = vocab_loss(**x, logit_weight=weight, label_weight=1.0, compile=False)
        assert got.loss == 0
        assert all(g.count_nonzero() == 0 for g in torch.autograd.grad(got.loss, leaves))


def test_identical_towers_diverge_by_nothing() -> None:
    x = operands()
    for ours, theirs in (
        ("student_hidden", "teacher_hidden"),
        ("student_weight", "teacher_weight"),
    ):
        x[theirs] = x[ours]
    x["teacher_bias"] = x["student_bias"]
    for name in ("forward_kl", "reverse_kl", "jsd"):
        hidden = x["student_hidden"].detach().requires_grad_()
        got = vocab_loss(**{**x, "student_hidden": hidden}, divergence=name, compile=False)
        assert got.logits.abs() < 1e-6
        assert torch.autograd.grad(got.loss, hidden)[0].abs().max() < 1e-6


def test_bad_input_is_named() -> None:
    x = operands()
    with pytest.raises(errors.ShapeError, match=r"student_hidden is \[37, 12\].*\[101, 20\]"):
        vocab_loss(**{**x, "student_weight": torch.randn(V, D_T)})
    with pytest.raises(errors.ShapeError, match=r"labels has \[3\] tokens"):
        vocab_loss(**{**x, "labels": torch.zeros(3).long()})
    with pytest.raises(errors.OptionError, match="'forward_kl'"):
        vocab_loss(**x, divergence="forward")
    with pytest.raises(errors.OptionError, match="compares with a teacher"):
        vocab_loss(x["student_hidden"], x["student_weight"], None, None)
    with pytest.raises(errors.VocabularyError, match="101 common"):
        vocab_loss(**x, vocab_size=102)
    with pytest.raises(RuntimeError, match="a label is outside of the student's vocabulary of 101"):
        vocab_loss(**{**x, "labels": torch.full((TOKENS,), V)}, label_weight=1.0, compile=False)


def stored(x: dict[str, Any], k: int, temperature: float) -> dict[str, Tensor]:
    t = F.linear(x["teacher_hidden"], x["teacher_weight"], x["teacher_bias"]) / temperature
    top = F.log_softmax(t, -1).topk(k)
    return {"teacher_ids": top.indices, "teacher_logprobs": top.values}


def buckets(x: Tensor, ids: Tensor) -> Tensor:
    """Probabilities of the entries in `ids` and of all the rest together, one token at a time."""
    rows = []
    for p, chosen in zip(x, ids, strict=True):
        rest = [i for i in range(len(p)) if i not in set(chosen.tolist())]
        rows.append(torch.cat([p[chosen], p[rest].sum().reshape(1)]))
    return torch.stack(rows)


@pytest.mark.parametrize("name", STORED)
@pytest.mark.parametrize("k", [1, 5, 40])
def test_a_stored_teacher_is_compared_in_buckets(name: str, k: int) -> None:
    tau, x = 2.0, operands()
    given = stored(x, k, tau)
    d = cast(x, torch.float64)
    leaves = [d[part].detach().requires_grad_() for part in PARTS]
    log_q = F.log_softmax(F.linear(*leaves) / tau, -1)
    q = buckets(log_q.exp(), given["teacher_ids"])
    p = stored(d, k, tau)["teacher_logprobs"].exp()
    p = torch.cat([p, 1 - p.sum(-1, keepdim=True)], -1)
    value = divergence_value(name, q.log(), p.log(), 0.5, tau)
    w = d["weights"]
    logits = tau**2 * (w * value).sum() / w.sum()
    kept = w * (x["labels"] != -100)
    ce = F.cross_entropy(F.linear(*leaves), x["labels"], reduction="none")
    labels = (kept * ce).sum() / kept.sum()
    loss = logits + 0.3 * labels
    wanted = (*(v.detach() for v in (loss, logits, labels)), torch.autograd.grad(loss, leaves))
    theirs = dict.fromkeys(("teacher_hidden", "teacher_weight", "teacher_bias"))

    def call(**o: Any) -> Any:
        return vocab_loss_topk(**{key: v for key, v in o.items() if key not in theirs}, **given)

    # The rest's probability is a difference of float32 numbers near one.
    compare({**x, **theirs}, wanted, call, 1e-4, divergence=name, temperature=tau, label_weight=0.3)


@pytest.mark.parametrize("name", ["forward_kl", "jsd"])
def test_all_entries_stored_are_the_full_divergence(name: str) -> None:
    x = operands()
    full = vocab_loss(**x, divergence=name, compile=False)
    given = {k: x[k] for k in (*PARTS, "weights")}
    stored_all = vocab_loss_topk(**given, **stored(x, V, 1.0), divergence=name, compile=False)
    torch.testing.assert_close(stored_all.logits, full.logits, rtol=1e-4, atol=1e-5)


def test_bad_stored_teachers_are_named() -> None:
    x = operands()
    given = stored(x, 3, 1.0)
    h, w = x["student_hidden"], x["student_weight"]
    with pytest.raises(errors.ShapeError, match=r"both \[\.\.\., k\]"):
        vocab_loss_topk(h, w, given["teacher_ids"], given["teacher_logprobs"][:, :2])
    with pytest.raises(RuntimeError, match="teacher's id is outside"):
        vocab_loss_topk(h, w, given["teacher_ids"] + V, given["teacher_logprobs"], compile=False)


# ---- the operator among torch's


@pytest.mark.parametrize("teachers", [1, 2])
def test_the_operator_is_as_torch_wants_it(teachers: int) -> None:
    """Shapes, strides, aliases and gradients as promised, for tensors of any strides."""
    x = operands()
    w = x["student_weight"].T.contiguous().T.requires_grad_()
    h = x["student_hidden"].T.contiguous().T.requires_grad_()
    shape = ChunkSpec((("jsd", 1.0, 0.5),), V, labelled=True)
    labels, share = x["labels"].clamp_min(0), x["weights"] / x["weights"].sum()
    towers = (h, w, None, x["teacher_hidden"], x["teacher_weight"], None, None)
    others: list[Tensor] = []
    mixture, mixed = None, ""
    if teachers == 2:
        other = HeadSide(x["teacher_hidden"] + 1, x["teacher_weight"] + 1)
        others, mixture = packed([other]), torch.ones(2)
        mixed = MixSpec("probabilities", ((1.0, None), (1.0, None))).text
    rest = (
        labels,
        share,
        share,
        torch.ones(3),
        others,
        mixture,
        mixed,
        shape.text,
        16,
        "hw",
        False,
    )
    rest = (*rest, "", 0, 0)
    torch.library.opcheck(operator.vocab_operator, (*towers, *rest))


def test_backward_twice() -> None:
    x = operands()
    h, w = (x[name].requires_grad_() for name in PARTS[:2])
    loss = vocab_loss(**x, label_weight=1.0, compile=False).loss
    loss.backward(retain_graph=True)
    once = h.grad.clone(), w.grad.clone()
    loss.backward()
    torch.testing.assert_close((h.grad, w.grad), tuple(2 * g for g in once))


def test_a_second_derivative_is_refused() -> None:
    x = operands()
    h = x["student_hidden"].requires_grad_()
    loss = vocab_loss(**x, compile=False).loss
    with pytest.raises(errors.StepError, match="create_graph"):
        torch.autograd.grad(loss, h, create_graph=True)


def test_an_ignored_label_may_stand_for_what_is_ruled_out() -> None:
    x = operands()
    x["student_bias"][0] = -torch.inf
    x["labels"] = torch.where(x["labels"] == 0, 1, x["labels"])
    out = vocab_loss(**x, divergence=None, label_weight=1.0, compile=False)
    logits = x["student_hidden"] @ x["student_weight"].T + x["student_bias"]
    torch.testing.assert_close(
        out.loss, fxdistill.losses.cross_entropy(logits, x["labels"], weights=x["weights"])
    )


def test_what_would_be_ignored_is_an_error() -> None:
    x = operands()
    half = functools.partial(fxdistill.losses.forward_kl, temperature=2.0)
    with pytest.raises(errors.OptionError, match="give it to vocab_loss"):
        vocab_loss(**x, divergence=half)
    with pytest.raises(errors.OptionError, match="compares nothing"):
        vocab_loss(**x, divergence={})
    with pytest.raises(errors.OptionError, match="get no gradient"):
        vocab_loss(**x, temperature=torch.tensor(1.0, requires_grad=True))
    with pytest.raises(errors.OptionError, match="bfloat16"):
        vocab_loss(**operands(torch.float16))
