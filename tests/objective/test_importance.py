"""Importance against an oracle that makes logits and takes predictions one by one."""

import functools
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributions import Categorical, kl_divergence

import fxdistill
from fxdistill import Importance, errors
from fxdistill.objective.importance import NAMES, factors_of
from heads import Model, batch, remarks
from mesh_steps import AOT
from processes import run

TAU = 2.0
SCORES = (*NAMES, "own")
THRESHOLDS = {  # between the scores of the models below
    "student_entropy": 3.7,
    "teacher_entropy": 3.5,
    "teacher_margin": 0.05,
    "divergence": 3.0,
    "gradient_norm": 0.2,
    "tip": 0.5,
    "own": 6.5,
}
RULES = ("neither", "keep", "threshold", "both")


def rule_of(name: str, rule: str) -> dict[str, float]:
    above = {"threshold": THRESHOLDS[name]}
    both = {**above, "keep": 0.7}
    return {"neither": {}, "keep": {"keep": 0.4}, "threshold": above, "both": both}[rule]


def own(s: Tensor, t: Tensor) -> Tensor:
    return (s - t).abs().amax(-1)


def masked() -> tuple[Tensor, dict[str, Tensor]]:
    """Weights of several sizes and zeros, ignored labels, padding."""
    ids, given = batch()
    mask = torch.ones_like(ids)
    mask[1, -2:] = 0
    given["token_weights"][2, 3:5] = 0
    return ids, {**given, "attention_mask": mask}


class Attending(Model):
    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        return super().forward(input_ids)

    def head(self, x: Tensor) -> Tensor:
        return self.lm_head(x) * 6.0  # some predictions are certain


def pair() -> tuple[Model, Model]:
    return Attending(0), Attending(1)


# ---- the oracle


def raw_score(name: str, s: Tensor, t: Tensor) -> float:
    q, p = Categorical(logits=s / TAU), Categorical(logits=t / TAU)
    if name == "student_entropy":
        return float(q.entropy())
    if name == "teacher_entropy":
        return float(p.entropy())
    if name == "teacher_margin":
        first, second, *_ = sorted(p.probs.tolist(), reverse=True)
        return first - second
    if name == "divergence":
        return TAU**2 * float(kl_divergence(p, q))
    if name == "gradient_norm":
        return math.dist(q.probs.tolist(), p.probs.tolist())
    return float((s - t).abs().max())


def scaled(values: list[float]) -> list[float]:
    least, most = min(values), max(values)
    return [(x - least) / (most - least) for x in values]


def wanted_factors(name: str, rows: list[tuple[Tensor, Tensor]], rule: Any) -> list[float]:
    """The factor of each counted prediction, in their order."""
    if name == "tip":
        h = scaled([raw_score("student_entropy", s, t) for s, t in rows])
        d = scaled([raw_score("divergence", s, t) for s, t in rows])
        scores = [1 - (1 - a) * (1 - b) for a, b in zip(h, d, strict=True)]
    else:
        scores = [raw_score(name, s, t) for s, t in rows]
    if not rule:
        return [score * len(scores) / sum(scores) for score in scores]
    left = [i for i, x in enumerate(scores) if x > rule.get("threshold", -math.inf)]
    left.sort(key=lambda i: -scores[i])  # stable: of equal scores the earlier comes first
    left = left[: math.ceil(rule.get("keep", 1.0) * len(left) - 1e-9)]
    return [float(i in left) for i in range(len(scores))]


def predictions(ids: Tensor, call: dict[str, Tensor]) -> list[tuple[int, int, float]]:
    """(row, position, weight) of every prediction that counts, of a causal model."""
    mask = call.get("attention_mask", torch.ones_like(ids))
    found = []
    for b, j in itertools.product(range(ids.shape[0]), range(1, ids.shape[1])):
        weight = float(call["token_weights"][b, j] * mask[b, j] * mask[b, j - 1])
        if weight and call["labels"][b, j] != -100:
            found.append((b, j - 1, weight))
    return found


def oracle(name: str, rule: Any, items: float | None = None) -> dict[str, Any]:
    """The losses, the total's gradients and the share that is kept, in float64."""
    student, teacher = (model.double() for model in pair())
    ids, call = masked()
    logits, theirs = student(ids), teacher(ids).detach()
    at = predictions(ids, call)
    rows = [(logits[b, i].detach(), theirs[b, i]) for b, i, _ in at]
    found = wanted_factors(name, rows, rule)
    weights = [w * f for (_, _, w), f in zip(at, found, strict=True)]
    values = [
        TAU**2
        * kl_divergence(
            Categorical(logits=theirs[b, i] / TAU), Categorical(logits=logits[b, i] / TAU)
        )
        for b, i, _ in at
    ]
    labels = [-logits[b, i].log_softmax(-1)[call["labels"][b, i + 1]] for b, i, _ in at]
    of_logits = sum(w * v for w, v in zip(weights, values, strict=True)) / (items or sum(weights))
    of_labels = sum(w * v for (*_, w), v in zip(at, labels, strict=True))
    of_labels = of_labels / (items or sum(w for *_, w in at))
    gradients = {}
    for what, total in (("both", of_logits + of_labels), ("logits", of_logits)):
        named = [(k, p) for k, p in student.named_parameters() if k not in ("other", "low.weight")]
        got = torch.autograd.grad(total, [p for _, p in named], retain_graph=True)
        gradients[what] = dict(zip((k for k, _ in named), got, strict=True))
    return {
        "logits": of_logits.detach(),
        "labels": of_labels.detach(),
        "gradients": gradients,
        "kept": sum(f > 0 for f in found) / len(found) if rule else 1.0,
    }


def stepped(importance: Any, compile: Any, **options: Any) -> tuple[Any, Model, str | None]:
    student, teacher = pair()
    call = options.pop("call", {})
    distiller = fxdistill.wrap(
        *(student, teacher),
        task="causal_lm",
        importance=importance,
        temperature=TAU,
        compile=compile,
        **options,
    )
    ids, given = masked()
    out = distiller(input_ids=ids, **given, **call)
    out.loss.backward()
    return out, student, remarks(distiller)


def agrees(name: str, rule: Any, compile: Any, *, labels: bool, items: Any = None) -> str | None:
    wanted = oracle(name, rule, items)
    importance = Importance(own if name == "own" else name, **rule)
    options = {} if labels else {"label_loss": None}
    call = {} if items is None else {"num_items": items}
    out, student, remark = stepped(importance, compile, call=call, **options)
    torch.testing.assert_close(
        out.losses["logits"].double(), wanted["logits"], rtol=1e-4, atol=1e-6
    )
    assert float(out.metrics["kept"]) == pytest.approx(wanted["kept"])
    assert not out.metrics["kept"].requires_grad
    for key, gradient in wanted["gradients"]["both" if labels else "logits"].items():
        got = student.get_parameter(key).grad
        torch.testing.assert_close(got.double(), gradient, rtol=1e-3, atol=1e-5)
    return remark


# ---- every score, every rule, every mode


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", SCORES)
def test_eager(name: str, rule: str) -> None:
    agrees(name, rule_of(name, rule), False, labels=True)


# A score is formed before a rule reads it: every score meets two rules, and two scores meet all.
BY_ALL = ("divergence", "tip")
MET = [
    *itertools.product(SCORES, [("neither", False), ("both", True)]),
    *itertools.product(BY_ALL, [("keep", False), ("threshold", False), ("both", False)]),
    ("divergence", ("neither", True)),
]


@pytest.mark.parametrize(("name", "rule", "labels"), [(name, *met) for name, met in MET])
def test_one_graph(name: str, rule: str, labels: bool) -> None:
    """Named scores are formed by the fused head; without labels, only what is kept is computed."""
    remark = agrees(name, rule_of(name, rule), AOT, labels=labels)
    assert remark is not None
    if name == "own":
        assert remark.startswith("logits are made")
        return
    assert remark.startswith("logits fused")
    same = name != "tip" and rule == "neither" and not labels
    assert ("scored in the same pass" if same else "tokens are scored first") in remark
    assert ("go through the heads again" in remark) == (not labels and rule in ("keep", "both"))


@pytest.mark.parametrize(
    ("name", "mode"),
    [*((name, "regional") for name in SCORES), ("tip", "logits made"), ("own", "logits made")],
)
def test_other_modes(name: str, mode: str) -> None:
    compile: Any = "regional" if mode == "regional" else {**AOT, "fuse_head": False}
    for labels, rule in ((True, rule_of(name, "neither")), (False, rule_of(name, "keep"))):
        remark = agrees(name, rule, compile, labels=labels)
        fused = mode == "regional" and name != "own"
        assert ("tokens are scored first" in (remark or "")) == fused


@pytest.mark.parametrize("compile", [False, AOT], ids=str)
def test_items_stay_the_denominator(compile: Any) -> None:
    for name, rule in (("divergence", {}), ("student_entropy", {"keep": 0.5})):
        for labels in (True, False):
            agrees(name, rule, compile, labels=labels, items=40.0)


def test_no_logits_are_made() -> None:
    student, teacher = pair()
    distiller = fxdistill.wrap(
        student, teacher, task="causal_lm", importance=Importance("tip", keep=0.5), compile=AOT
    )
    ids, given = masked()
    distiller(input_ids=ids, **given)
    assert distiller.program is not None
    values = [node.meta.get("example_value") for node in distiller.program.gm.graph.nodes]
    shapes = {tuple(x.shape) for x in values if isinstance(x, Tensor)}
    logits = (*ids.shape, student.lm_head.weight.shape[0])
    assert logits not in shapes
    assert (logits[0] * logits[1], logits[2]) not in shapes


def test_another_divergence_is_its_own_score() -> None:
    """By its name, and by a partial with options: keep=1 of it is the plain loss."""
    for loss in ("mse_logits", functools.partial(fxdistill.losses.jsd, beta=0.2)):
        everything = stepped(Importance("divergence", keep=1.0), AOT, logit_loss=loss)[0]
        plain = stepped(None, AOT, logit_loss=loss)[0]
        torch.testing.assert_close(everything.losses, plain.losses)
        made = stepped(Importance("divergence", keep=0.3), False, logit_loss=loss)[0]
        fused = stepped(Importance("divergence", keep=0.3), AOT, logit_loss=loss)[0]
        torch.testing.assert_close(fused.losses, made.losses, rtol=1e-4, atol=1e-6)
        assert made.losses["logits"] > plain.losses["logits"]  # the highest of them


def test_kept_is_always_there() -> None:
    for importance in (None, Importance("tip"), Importance("tip", keep=1.0)):
        for compile in (False, AOT):
            assert stepped(importance, compile)[0].metrics["kept"] == 1


@pytest.mark.parametrize(
    ("compile", "names"),
    [(False, SCORES), (AOT, ("divergence", "tip"))],  # a graph of one score, and of two
    ids=["eager", "graph"],
)
@pytest.mark.parametrize("rule", RULES)
def test_nothing_counted_gives_zero(rule: str, compile: Any, names: tuple[str, ...]) -> None:
    ids = batch()[0]
    for name in names:
        call = {"loss_mask": torch.zeros_like(ids)}
        importance = Importance(own if name == "own" else name, **rule_of(name, rule))
        out, student, _ = stepped(importance, compile, call=call, label_loss=None)
        assert out.loss == 0
        assert out.metrics["kept"] == 1
        assert not any(p.grad is not None and p.grad.any() for p in student.parameters())


def test_a_student_equal_to_its_teacher() -> None:
    """Every divergence is 0: no weight is NaN."""
    teacher, student = Attending(0), Attending(0)
    ids, given = masked()
    for name in NAMES:
        distiller = fxdistill.wrap(
            *(student, teacher), task="causal_lm", importance=Importance(name), compile=False
        )
        out = distiller(input_ids=ids, **given)
        out.loss.backward()
        assert out.losses["logits"].abs() < 1e-6
        assert all(p.grad is None or p.grad.isfinite().all() for p in student.parameters())


def test_classes() -> None:
    class Classifier(Model):
        def head(self, x: Tensor) -> Tensor:
            return self.lm_head(x[:, 0])

    student, teacher = Classifier(0), Classifier(1)
    distiller = fxdistill.wrap(
        *(student, teacher),
        task="classification",
        importance=Importance("teacher_entropy", keep=0.5),
        compile=False,
    )
    ids = batch()[0]
    out = distiller(ids)
    entropy = Categorical(logits=teacher(ids)).entropy()
    best = entropy.topk(2).indices  # ⌈1.5⌉ of three samples
    wanted = fxdistill.losses.forward_kl(student(ids)[best], teacher(ids)[best])
    torch.testing.assert_close(out.losses["logits"], wanted.detach())
    assert float(out.metrics["kept"]) == pytest.approx(2 / 3)


# ---- features at the same positions


@pytest.mark.parametrize("compile", [False, AOT], ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_features_of_the_positions_that_predict(rule: str, compile: Any) -> None:
    importance = Importance("gradient_norm", features=True, **rule_of("gradient_norm", rule))
    out, *_ = stepped(importance, compile, mapping={"body": "body"})
    student, teacher = (model.double() for model in pair())
    ids, call = masked()
    at = predictions(ids, call)
    logits, theirs = student(ids).detach(), teacher(ids).detach()
    rows = [(logits[b, i], theirs[b, i]) for b, i, _ in at]
    found = wanted_factors("gradient_norm", rows, rule_of("gradient_norm", rule))
    s, t = (model.body(model.embed(ids)).detach() for model in (student, teacher))
    # A feature weighs what its own token weighs, times the importance of what it predicts.
    mask = call["attention_mask"]
    own_weight = [float(call["token_weights"][b, i] * mask[b, i]) for b, i, _ in at]
    weights = [w * f for w, f in zip(own_weight, found, strict=True)]
    values = [float((s[b, i] - t[b, i]).square().mean()) for b, i, _ in at]
    wanted = sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)
    assert float(out.losses["body"]) == pytest.approx(wanted, rel=1e-4)
    importance = Importance("gradient_norm", **rule_of("gradient_norm", rule))
    plain, *_ = stepped(importance, compile, mapping={"body": "body"})
    assert float(plain.losses["body"]) != pytest.approx(wanted, rel=1e-4)
    torch.testing.assert_close(plain.losses["logits"], out.losses["logits"])


# ---- from scores to factors


def of(scores: Any, weights: Any = None, name: str = "student_entropy", **rule: Any) -> list[float]:
    scores = torch.tensor(scores)
    scores = scores if name == "tip" else scores[..., None]
    weights = torch.ones(scores.shape[:-1]) if weights is None else torch.tensor(weights)
    importance, limit = Importance(name, **rule), rule.get("threshold")
    limit = None if limit is None else torch.tensor(limit)
    return factors_of(importance, scores, weights, None, limit).flatten().tolist()


def test_of_equal_scores_the_earlier_is_kept() -> None:
    assert of([1.0, 2.0, 1.0, 1.0], keep=0.5) == [1, 1, 0, 0]
    assert of([[1.0, 1.0], [1.0, 1.0]], keep=0.75) == [1, 1, 1, 0]
    assert of([0.0, 0.0, 0.0], [0.0, 1.0, 1.0], keep=0.5) == [0, 1, 0]


@pytest.mark.parametrize(("keep", "count", "kept"), [
    (0.07, 100, 7), (0.1, 30, 3), (1 / 3, 9, 3), (0.5, 5, 3), (1e-9, 5, 1), (1.0, 5, 5),
    (0.29, 100, 29),
])  # fmt: skip
def test_the_count_is_rounded_up_from_the_exact_product(keep: float, count: int, kept: int) -> None:
    assert sum(of(torch.rand(count).tolist(), keep=keep)) == kept


def test_only_what_counts_is_counted() -> None:
    scores, weights = [9.0, math.nan, 3.0, 2.0, math.inf], [1.0, 0.0, 0.5, 2.0, 0.0]
    assert of(scores, weights, keep=0.5) == [1, 0, 1, 0, 0]  # ⌈1.5⌉ of three
    assert of(scores, weights, threshold=2.5) == [1, 0, 1, 0, 0]
    assert of(scores, weights) == pytest.approx([9 * 3 / 14, 0, 9 / 14, 6 / 14, 0])


def test_the_threshold_comes_first() -> None:
    scores = [5.0, 1.0, 4.0, 3.0, 2.0, 2.5]
    assert of(scores, threshold=2.0) == [1, 0, 1, 1, 0, 1]
    assert of(scores, threshold=2.0, keep=0.5) == [1, 0, 1, 0, 0, 0]  # half of those four
    assert of(scores, threshold=7.0, keep=0.5) == [0] * 6


def test_proportional_weights_have_mean_one() -> None:
    found = of([1.0, 2.0, 5.0])
    assert found == pytest.approx([3 / 8, 6 / 8, 15 / 8])
    assert of([0.0, 0.0]) == [0, 0]
    assert of([-1.0, 1.0]) == [0, 2]


def test_tip_is_high_for_uncertain_and_for_certain_and_wrong() -> None:
    both = [[1.0, 0.0], [0.0, 6.0], [0.0, 0.0], [0.5, 3.0]]  # entropy, divergence
    score = torch.tensor([1.0, 1.0, 0.0, 0.75])
    assert of(both, name="tip") == pytest.approx((score / score.mean()).tolist())
    assert of(both, name="tip", threshold=0.9) == [1, 1, 0, 0]
    assert of([[2.0, 3.0], [2.0, 3.0]], name="tip", keep=0.5) == [1, 0]


# ---- what is wrong is said


@pytest.mark.parametrize(("given", "said"), [
    ({"score": "student_entrop"}, "'student_entropy'"),
    ({"score": 3}, "neither the name"),
    ({"score": "tip", "keep": 0.0}, "above 0"),
    ({"score": "tip", "keep": 1.1}, "up to 1"),
    ({"score": "tip", "keep": True}, "keep=True"),
    ({"score": "tip", "keep": math.nan}, "keep=nan"),
    ({"score": "divergence", "threshold": -1.0}, "never negative"),
    ({"score": "tip", "threshold": 1.0}, "below 1"),
    ({"score": "teacher_margin", "threshold": 2}, "below 1"),
    ({"score": "gradient_norm", "threshold": 1.5}, "below 1.414"),
    ({"score": own, "threshold": math.inf}, "finite"),
])  # fmt: skip
def test_mistakes_are_named(given: dict[str, Any], said: str) -> None:
    with pytest.raises(errors.OptionError, match=said):
        Importance(given.pop("score"), **given)


def test_another_threshold_is_checked_like_the_first() -> None:
    student, teacher = pair()
    importance = Importance("teacher_margin", threshold=0.5)
    distiller = fxdistill.wrap(student, teacher, task="causal_lm", importance=importance)
    for limit, said in ((1.0, "at most 1"), (torch.zeros(2), "one number"), ("high", "finite")):
        with pytest.raises(errors.OptionError, match=said):
            distiller.set(threshold=limit)
    assert distiller.settings["threshold"] == 0.5
    distiller.set(threshold=torch.tensor(0.25))
    assert distiller.state_dict()  # it is saved as a number
    assert float(distiller.settings["threshold"]) == 0.25


def test_a_callable_may_have_any_threshold() -> None:
    assert Importance(own, threshold=-3.0).drops


def test_mistakes_in_wrap_are_named() -> None:
    student, teacher = pair()
    wrap = functools.partial(fxdistill.wrap, student, teacher, task="causal_lm", compile=False)
    with pytest.raises(errors.OptionError, match="there is none"):
        wrap(logit_loss=None, importance=Importance("tip"))
    with pytest.raises(errors.OptionError, match=r"fxdistill\.Importance"):
        wrap(importance="tip")
    for name in ("tip", "divergence"):
        with pytest.raises(errors.OptionError, match="returns their mean"):
            wrap(logit_loss=lambda s, t, **o: s.sum(), importance=Importance(name))
    distiller = wrap(importance=Importance(lambda s, t: s.sum()))
    ids, given = masked()
    with pytest.raises(errors.ShapeError, match=r"returned \[\].*\[3, 7\]"):
        distiller(input_ids=ids, **given)


# ---- ranks that hold different samples


def on_ranks(rank: int, name: str, rule: dict[str, float]) -> tuple[float, float, Any]:
    """Two rows on the first rank and one on the second."""
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("replicate",))
    student, teacher = pair()
    distiller = fxdistill.wrap(
        *(student, teacher),
        task="causal_lm",
        importance=Importance(name, **rule),
        temperature=TAU,
        mesh=mesh,
        compile=False,
    )
    ids, given = masked()
    mine = slice(0, 2) if rank == 0 else slice(2, 3)
    out = distiller(input_ids=ids[mine], **{k: v[mine] for k, v in given.items()})
    out.loss.backward()
    gradient = distiller.student.body.weight.grad
    whole = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
    return float(out.losses["logits"]), float(out.metrics["kept"]), whole.tolist()


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["neither", "threshold"])
def test_ranks_make_one_batch(rule: str) -> None:
    name = "gradient_norm"
    wanted = oracle(name, rule_of(name, rule))
    for loss, kept, gradient in run(2, on_ranks, name, rule_of(name, rule)):
        assert loss == pytest.approx(float(wanted["logits"]), rel=1e-4)
        assert kept == pytest.approx(wanted["kept"])
        right = wanted["gradients"]["both"]["body.weight"]
        found = torch.tensor(gradient).double()
        torch.testing.assert_close(found, right, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_every_rank_keeps_of_its_own_samples() -> None:
    student, teacher = pair()
    ids, given = masked()
    at = predictions(ids, given)
    s, t = student(ids).detach(), teacher(ids).detach()
    kept = 0.0
    for rows in ((0, 1), (2,)):
        mine = [(b, i) for b, i, _ in at if b in rows]
        found = wanted_factors("tip", [(s[b, i], t[b, i]) for b, i in mine], {"keep": 0.4})
        kept += sum(found)
    for _, share, _ in run(2, on_ranks, "tip", {"keep": 0.4}):
        assert share == pytest.approx(kept / len(at))
