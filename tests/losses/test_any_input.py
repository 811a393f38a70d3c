"""Every loss on drawn input: any shape, any mask, extreme and degenerate values.

Whatever is drawn, value and gradients are finite. What a place holds that does not count, even NaN
or infinity, changes neither.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxdistill import losses
from fxdistill.losses import Attention
from fxdistill.losses.names import FEATURE_LOSSES, LABEL_LOSSES, LOGIT_LOSSES, OF_SAMPLES

# The same examples in every run: a test that fails by chance tells nothing about a change.
DRAWN = settings(max_examples=40, deadline=None, derandomize=True, database=None)
KINDS = ("normal", "large", "tiny", "zeros", "some zeros", "alike", "mixed scales")
GARBAGE = (torch.nan, torch.inf, -torch.inf, 1e30)


class Drawn(NamedTuple):
    """What hypothesis has drawn; tensors are then made from the seed, which is quicker."""

    seed: int
    batch: int
    places: int
    width: int
    other: int
    kinds: tuple[str, str]
    weighs: str
    counts: str
    flag: bool
    garbage: float


DRAWS = st.builds(
    Drawn,
    seed=st.integers(0, 2**16),
    batch=st.integers(1, 4),
    places=st.integers(1, 4),
    width=st.integers(1, 5),
    other=st.integers(1, 5),
    kinds=st.tuples(st.sampled_from(KINDS), st.sampled_from(KINDS)),
    weighs=st.sampled_from(("nothing", "samples", "places")),
    counts=st.sampled_from(("some", "all", "none", "numbers")),
    flag=st.booleans(),
    garbage=st.sampled_from(GARBAGE),
)


def filled(kind: str, shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    x = torch.randn(shape, generator=g)
    if kind == "large":
        return torch.where(x > 0, 1e4, -1e4)
    if kind == "tiny":
        return x * 1e-20
    if kind == "zeros":
        return torch.zeros(shape)
    if kind == "some zeros":
        return x * (torch.rand((*shape[:-1], 1), generator=g) < 0.5)
    if kind == "alike":
        return x[:1].expand(shape).clone()
    if kind == "mixed scales":
        return x * 10 ** torch.randint(-4, 5, shape, generator=g)
    return x


def weights_of(d: Drawn, shape: tuple[int, ...], g: torch.Generator) -> Tensor | None:
    if d.weighs == "nothing":
        return None
    shape = shape[:1] if d.weighs == "samples" else shape
    if d.counts in ("all", "none"):
        return torch.full(shape, float(d.counts == "all"))
    some = (torch.rand(shape, generator=g) < 0.6).float()
    return some if d.counts == "some" else some * torch.rand(shape, generator=g) * 100


class Case(NamedTuple):
    """A call of a loss, the tensors whose gradients are asked for, and the same call spoilt."""

    call: Callable[..., Tensor]
    values: tuple[Tensor, ...]
    spoilt: tuple[Tensor, ...]


def spoil(x: Tensor, counted: Tensor | None, d: Drawn) -> Tensor:
    """``x`` with garbage where the weight is 0; the weights lead."""
    if counted is None:
        return x
    away = (counted == 0).reshape(*counted.shape, *(1,) * (x.ndim - counted.ndim))
    return torch.where(away, d.garbage, x)


def evaluated(call: Callable[..., Tensor], values: tuple[Tensor, ...]) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in values]
    value = call(*leaves)
    gradients = torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)
    return [value.detach(), *gradients]


def check(case: Case) -> None:
    found = evaluated(case.call, case.values)
    assert all(x.isfinite().all() for x in found), found
    for again, first in zip(evaluated(case.call, case.spoilt), found, strict=True):
        torch.testing.assert_close(again, first)


# ---- features


PLACEWISE = ("mse", "l2", "smooth_l1", "l1", "cosine", "fitnet", "fpn")
OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "smooth_l1": ({}, {"beta": 0.1}),
    "distance_wise": ({}, {"normalize": "max"}),
    "similarity_preserving": ({}, {"form": "cosine"}),
    "info_nce": ({}, {"symmetric": True}),
    "detection_classification": ({}, {"temperature": 0.5}),
    "detection_box": ({}, {"beta": 0.1}),
}
OWN_WIDTHS = ("attention_transfer", *(f.__name__ for f in OF_SAMPLES if f is not losses.info_nce))
FEATURES = sorted({*PLACEWISE, *OWN_WIDTHS, "info_nce", *OPTIONS})


def layout(name: str, d: Drawn) -> str:
    """Tokens ``[B, L, D]``, maps ``[B, C, H, W]`` or samples ``[B, D]``, as the loss allows."""
    if name.startswith("detection"):
        return "tokens"
    with_places = ("tokens", "maps")
    allowed = with_places if name in ("attention_transfer", "fpn") else (*with_places, "samples")
    return allowed[d.seed % len(allowed)]


def feature_case(name: str, d: Drawn) -> Case:
    g = torch.Generator().manual_seed(d.seed)
    kind = layout(name, d)
    widths = d.width, d.other if name in OWN_WIDTHS else d.width
    if name == "detection_box":
        widths = 4, 4
    places = {"tokens": (d.places,), "maps": (d.places, 2), "samples": ()}[kind]
    s, t = (filled(k, (d.batch, *places, w), g) for k, w in zip(d.kinds, widths, strict=True))
    if d.flag and s.shape == t.shape:
        t = s.clone()  # nothing is left to learn
    w = weights_of(d, (d.batch, *places), g)
    spoilt = [spoil(x, w, d) for x in (s, t)]
    both = [(s, t), tuple(spoilt)]
    if kind == "maps":
        both = [tuple(x.movedim(-1, 1).contiguous() for x in pair) for pair in both]
    options = OPTIONS.get(name, ({}, {}))[d.places % 2]
    loss = functools.partial(getattr(losses, name), **options) if name != "CRD" else crd(d, widths)
    return Case(lambda a, b: loss(a, b, w), both[0], both[1])


def crd(d: Drawn, widths: tuple[int, int]) -> Callable[..., Tensor]:
    """A queue that is empty, or in part full, and the same before every call."""
    torch.manual_seed(d.seed)
    bank = losses.CRD(width=d.other, size=3, in_batch=d.flag)
    bank.embedding.build(*widths, torch.device("cpu"))
    if d.places % 2:
        bank(torch.randn(2, widths[0]), torch.randn(2, widths[1]))
    state = {name: value.clone() for name, value in bank.state_dict().items()}

    def loss(s: Tensor, t: Tensor, w: Tensor | None) -> Tensor:
        bank.load_state_dict(state)
        value = bank(s, t, w)
        assert all(x.isfinite().all() for x in bank.buffers())
        parts = torch.autograd.grad(value, list(bank.parameters()), retain_graph=True)
        assert all(x.isfinite().all() for x in parts)
        return value

    return loss


@pytest.mark.parametrize("name", FEATURES)
@DRAWN
@given(d=DRAWS)
def test_features(name: str, d: Drawn) -> None:
    check(feature_case(name, d))


# ---- attention


def attention(d: Drawn, kind: str, keep: Tensor, g: torch.Generator) -> Attention:
    heads = 2 if d.other % 2 else 1
    queries = filled(kind, (d.batch, 2, d.places, d.width), g)
    keys = filled(kind, (d.batch, heads, d.places, d.width), g)
    mask: Tensor | None = keep[:, None, None]
    if d.other > 3:
        mask = torch.where(keep[:, None, None], 0.0, -torch.inf)
    elif d.other > 2:
        mask = None
    return Attention(queries, keys, keys, mask, d.flag)


def attention_case(name: str, d: Drawn) -> Case:
    g = torch.Generator().manual_seed(d.seed)
    keep = torch.rand(d.batch, d.places, generator=g) < 0.7
    s, t = (attention(d, kind, keep, g) for kind in d.kinds)
    w = weights_of(d, (d.batch, d.places), g)
    plain, options = name.partition("/")[::2]
    loss = functools.partial(getattr(losses, plain), **{"scores": True} if options else {})

    def call(q: Tensor, k: Tensor, tq: Tensor, tk: Tensor) -> Tensor:
        sides = s._replace(query=q, key=k, value=k), t._replace(query=tq, key=tk, value=tk)
        return loss(*sides, w)

    def without(x: Attention) -> tuple[Tensor, Tensor]:
        query = x.query
        if w is not None and plain != "relation_kl":  # of which keys are made of queries
            query = spoil(query.transpose(1, 2), w, d).transpose(1, 2)
        if x.mask is None:
            return query, x.key
        return query, spoil(x.key.transpose(1, 2), keep.float(), d).transpose(1, 2)

    return Case(call, (*s[:2], *t[:2]), (*without(s), *without(t)))


ATTENTION = ("attention_kl", "attention_mse", "attention_mse/scores", "transfer_matrix")


@pytest.mark.parametrize("name", [*ATTENTION, "relation_kl"])
@DRAWN
@given(d=DRAWS)
def test_attention(name: str, d: Drawn) -> None:
    check(attention_case(name, d))


@pytest.mark.parametrize("name", ATTENTION)
@DRAWN
@given(d=DRAWS)
def test_maps_of_attention(name: str, d: Drawn) -> None:
    """Maps that exist, of which a row may be all masked."""
    g = torch.Generator().manual_seed(d.seed)
    kept = torch.rand(d.batch, 1, d.places, d.places, generator=g) < 0.7
    sides = []
    for kind in d.kinds:
        scores = filled(kind, (d.batch, 2, d.places, d.places), g)
        scores = scores.masked_fill(~kept, -torch.inf)
        sides.append(scores if "scores" in name else scores.softmax(-1).nan_to_num(0))
    w = weights_of(d, (d.batch, d.places), g)
    options = {"scores": True} if "scores" in name else {}
    loss = functools.partial(getattr(losses, name.partition("/")[0]), **options)
    spoilt = sides
    if w is not None:
        spoilt = [spoil(x.transpose(1, 2), w, d).transpose(1, 2) for x in sides]
    check(Case(lambda s, t: loss(s, t, w), tuple(sides), tuple(spoilt)))


# ---- logits and labels


def logits_of(d: Drawn, g: torch.Generator, exact: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of both models, of which columns are ruled out, and which columns these are."""
    shape = (d.batch, d.places, d.width)
    s, t = (filled(kind, shape, g) for kind in d.kinds)
    if d.flag and exact:
        t = s.clone()
    out = torch.rand(d.width, generator=g) < 0.3
    out[int(torch.randint(d.width, (1,), generator=g))] = False  # softmax of nothing is NaN
    return s, t, out


# Which side may rule out a column that the other allows, and the divergence is finite.
ALONE = {
    "forward_kl": "t", "soft_cross_entropy": "t", "sigmoid_kl": "t", "reverse_kl": "s",
    "jsd": "st", "total_variation": "st", "mse_logits": "st",
}  # fmt: skip


@pytest.mark.parametrize("name", LOGIT_LOSSES)
@DRAWN
@given(d=DRAWS, tau=st.sampled_from((0.1, 1.0, 4.0)), side=st.sampled_from(("s", "t", "st")))
def test_logits(name: str, d: Drawn, tau: float, side: str) -> None:
    g = torch.Generator().manual_seed(d.seed)
    s, t, out = logits_of(d, g, exact=True)
    sides = side if side == "st" or side in ALONE[name] else "st"
    s, t = (x.masked_fill(out & (of in sides), -torch.inf) for of, x in (("s", s), ("t", t)))
    w = weights_of(d, (d.batch, d.places), g)
    w = None if w is None or w.ndim == 1 else w
    loss = functools.partial(LOGIT_LOSSES[name], temperature=tau, weights=w)
    check(Case(loss, (s, t), tuple(spoil(x, w, d) for x in (s, t))))


def labels_of(d: Drawn, out: Tensor, g: torch.Generator) -> Tensor:
    """Labels among the allowed columns, of which some are none."""
    allowed = (~out).nonzero().flatten()
    at = torch.randint(len(allowed), (d.batch, d.places), generator=g)
    return torch.where(torch.rand(at.shape, generator=g) < 0.3, -100, allowed[at])


@DRAWN
@given(d=DRAWS, smoothing=st.sampled_from((0.0, 0.1)), z_loss=st.sampled_from((0.0, 1e-3)))
def test_labels(d: Drawn, smoothing: float, z_loss: float) -> None:
    g = torch.Generator().manual_seed(d.seed)
    s, _, out = logits_of(d, g, exact=False)
    labels = labels_of(d, out, g)
    if not smoothing:  # the mean of -log p over all columns is infinite where one is ruled out
        s = s.masked_fill(out, -torch.inf)
    w = weights_of(d, (d.batch, d.places), g)
    w = torch.ones(labels.shape) if w is None or w.ndim == 1 else w
    options = {"weights": w, "label_smoothing": smoothing, "z_loss": z_loss}
    loss = functools.partial(losses.cross_entropy, labels=labels, **options)
    check(Case(loss, (s,), (spoil(s, w * (labels != -100), d),)))


@DRAWN
@given(d=DRAWS)
def test_labels_without_places(d: Drawn) -> None:
    g = torch.Generator().manual_seed(d.seed)
    s = filled(d.kinds[0], (d.batch, d.places + 2, d.width + 1), g)
    heard = torch.arange(d.places + 2) < torch.randint(d.places + 3, (d.batch, 1), generator=g)
    labels = torch.randint(1, d.width + 1, (d.batch, 2), generator=g)
    labels[torch.rand(labels.shape, generator=g) < 0.4] = -100
    loss = functools.partial(losses.ctc, labels=labels, weights=heard.float(), zero_infinity=True)
    check(Case(loss, (s,), (spoil(s, heard, d),)))


@pytest.mark.parametrize("name", [*LOGIT_LOSSES, None])
@DRAWN
@given(d=DRAWS, tau=st.sampled_from((0.5, 1.0, 4.0)))
def test_heads(name: str | None, d: Drawn, tau: float) -> None:
    """The fused head, of hidden states that lead to logits of any size."""
    g = torch.Generator().manual_seed(d.seed)
    hidden = [filled(kind, (d.batch, d.places, d.other), g) for kind in d.kinds]
    heads = [torch.randn(d.width, d.other, generator=g) for _ in range(2)]
    labels = labels_of(d, torch.zeros(d.width, dtype=torch.bool), g)
    w = weights_of(d, (d.batch, d.places), g)
    w = None if w is None or w.ndim == 1 else w
    options = {"temperature": tau, "weights": w, "compile": False}

    def spoilt(x: Tensor) -> Tensor:
        return spoil(x, w, d)

    def loss(h: Tensor, weight: Tensor, teacher: Tensor) -> Tensor:
        given = (teacher, heads[1]) if name else (None, None)
        both = {"labels": labels, "label_weight": 0.5, "divergence": name}
        return losses.vocab_loss(h, weight, *given, **both, **options).loss

    teacher = hidden[1]
    for t in (teacher, spoilt(teacher)):
        call = functools.partial(loss, teacher=t)
        check(Case(call, (hidden[0], heads[0]), (spoilt(hidden[0]), heads[0])))


@pytest.mark.parametrize("pooled", ["probabilities", "classes", "logits"])
@DRAWN
@given(d=DRAWS)
def test_several_teachers(pooled: str, d: Drawn) -> None:
    """The mean of two teachers, one of which may have the weight 0, as a target."""
    g = torch.Generator().manual_seed(d.seed)
    s, t, out = logits_of(d, g, exact=False)
    other = filled("normal", t.shape, g)
    s, t, other = (x.masked_fill(out, -torch.inf) for x in (s, t, other))
    shares = torch.tensor([1.0, 0.0 if d.flag else 0.3])

    def loss(x: Tensor) -> Tensor:
        target = losses.mean_of_teachers([t, other], shares, pooled=pooled, temperature=2.0)
        match = {"classes": "sigmoid_kl", "logits": "mse_logits"}.get(pooled, "forward_kl")
        return LOGIT_LOSSES[match](x, target, temperature=2.0)

    check(Case(loss, (s,), (s,)))


def test_every_loss_is_here() -> None:
    here = {*FEATURES, *(name.partition("/")[0] for name in ATTENTION), "relation_kl"}
    assert here == set(FEATURE_LOSSES)
    assert set(LABEL_LOSSES) == {"cross_entropy", "ctc"}
    assert set(ALONE) == set(LOGIT_LOSSES)
