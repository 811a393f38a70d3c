"""Values and weights of other shapes are errors of the loss itself: torch would broadcast them."""

import functools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from fxdistill import errors, losses
from fxdistill.losses import Attention
from fxdistill.losses.names import (
    FEATURE_LOSSES,
    LABEL_LOSSES,
    LOGIT_LOSSES,
    OF_ATTENTION,
    OF_MAPS,
    OF_PLACES,
    OF_SAMPLES,
)

B, L, H = 2, 3, 4  # the width is also that of boxes
F64 = torch.float64
TOKENS, PICTURE = (B, L, H), (B, H, 3, 5)
CRD = functools.partial(losses.CRD, width=3, size=4)

# Shapes that broadcast to tokens [B, L, H], and a map [B, H, 3, 5].
TEACHERS = [(B, L, 1), (1, L, H), (B, 1, H), (L, H), (H,), (), (1, B, L, H)]
OF_TOKENS = [(L,), (B, 1), (1, L), (1,), (), (B, L, 1), (1, L, H), (B, L, H, 1)]
OF_PICTURE = [(5,), (3, 5), (B, 1), (B, 3, 1), (1, 3, 5), (B, 1, 3, 5), ()]


def names(of: Any) -> list[str]:
    return [loss.__name__ for loss in of]


def loss_of(name: str) -> Any:
    return CRD() if name == "CRD" else getattr(losses, name)


def test_every_loss_is_here() -> None:
    of_features = names((*OF_PLACES, *OF_MAPS, *OF_SAMPLES, *OF_ATTENTION))
    assert {*of_features, *LOGIT_LOSSES, *LABEL_LOSSES, "mean_of_teachers"} == {
        n for n in losses.__all__ if n not in ("Attention", "VocabLoss", "Peer", "PeerLosses")
    } - {"vocab_loss", "vocab_loss_topk", "vocab_loss_of_peers"}
    assert set(of_features) == set(FEATURE_LOSSES)


# ---- features


@pytest.mark.parametrize("shape", TEACHERS, ids=str)
@pytest.mark.parametrize("name", names((*OF_PLACES, losses.fpn)))
def test_values_of_two_shapes(name: str, shape: tuple[int, ...]) -> None:
    loss, x, y = loss_of(name), torch.randn(TOKENS), torch.randn(shape)
    for student, teacher in ((x, y), (y, x)):
        with pytest.raises(errors.ShapeError):
            loss(student, teacher)
    assert loss(x, x).shape == ()


@pytest.mark.parametrize("shape", [(B, 1, H), (1, L, H), (L, H), (B, 1, 6)], ids=str)
def test_maps_of_other_places(shape: tuple[int, ...]) -> None:
    x = torch.randn(TOKENS)
    for student, teacher in ((x, torch.randn(shape)), (torch.randn(shape), x)):
        with pytest.raises(errors.ShapeError):
            losses.attention_transfer(student, teacher)
    assert losses.attention_transfer(x, torch.randn(B, L, 6)).shape == ()


@pytest.mark.parametrize("name", names(OF_SAMPLES))
def test_other_samples(name: str) -> None:
    loss = loss_of(name)
    for shape in ((1, H), (1, L, H), (B + 1, H)):
        with pytest.raises(errors.ShapeError, match="samples"):
            loss(torch.randn(B, H), torch.randn(shape))
    with pytest.raises(errors.ShapeError, match="has no samples"):
        loss(torch.randn(B), torch.randn(B))
    assert loss(torch.randn(B, H), torch.randn(B, L, H)).shape == ()


OF_VALUES = names((*OF_PLACES, *OF_MAPS, *OF_SAMPLES))


@pytest.mark.parametrize("name", OF_VALUES)
def test_weights_that_are_not_those_of_the_value(name: str) -> None:
    loss = loss_of(name)
    x, w = torch.randn(TOKENS), torch.ones(B, L)
    for shape in OF_TOKENS:
        with pytest.raises(errors.ShapeError, match="weights"):
            loss(x, x, torch.ones(shape))
    torch.testing.assert_close(loss_of(name)(x, x, w).isfinite(), torch.tensor(True))
    if name in ("detection_box", "detection_classification"):
        return
    picture = torch.randn(PICTURE)
    for shape in OF_PICTURE:
        with pytest.raises(errors.ShapeError, match="weights"):
            loss(picture, picture, torch.ones(shape))
    for given in (torch.ones(B), torch.ones(B, 3, 5)):
        assert loss(picture, picture, given).shape == ()


@pytest.mark.parametrize("name", ["mse", "l1", "l2", "smooth_l1"])
@pytest.mark.parametrize("shape", [(5,), (2, 5), (2, 2, 2, 2)], ids=str)
def test_numbers_with_a_weight_each_are_tokens_of_width_1(
    name: str, shape: tuple[int, ...]
) -> None:
    s, t, w = (torch.randn(shape, dtype=F64) for _ in range(3))
    w = w.abs() * (w > -0.5)
    s.requires_grad_()
    d = s - t
    each = {
        "mse": d.square(),
        "smooth_l1": torch.where(d.abs() < 1, d.square() / 2, d.abs() - 0.5),
    }.get(name, d.abs())
    found, want = getattr(losses, name)(s, t, w), (w * each).sum() / w.sum()
    torch.testing.assert_close(found, want)
    torch.testing.assert_close(*(torch.autograd.grad(x, s)[0] for x in (found, want)))


# ---- attention


def attention(**parts: tuple[int, ...]) -> Attention:
    sizes = {"query": (B, 4, L, 8), "key": (B, 2, L, 8), "value": (B, 2, L, 8), **parts}
    mask = sizes.pop("mask", None)
    made = {name: torch.randn(size) for name, size in sizes.items()}
    return Attention(**made, mask=None if mask is None else torch.ones(mask, dtype=torch.bool))


@pytest.mark.parametrize("shape", [(L,), (B, 1), (1, L), (), (B, L, 1), (B, L + 1)], ids=str)
@pytest.mark.parametrize("name", names(OF_ATTENTION))
def test_weights_that_are_not_those_of_queries(name: str, shape: tuple[int, ...]) -> None:
    loss, w = getattr(losses, name), torch.ones(shape)
    with pytest.raises(errors.ShapeError, match="weights"):
        loss(attention(), attention(), w)
    if name == "relation_kl":
        hidden = torch.randn(TOKENS)
        with pytest.raises(errors.ShapeError, match="weights"):
            loss(hidden, hidden, w, heads=2)
        return
    maps = torch.rand(B, 4, L, L)
    with pytest.raises(errors.ShapeError, match="weights"):
        loss(maps, maps, w)
    if name == "attention_mse":
        for given in (maps, attention()):
            with pytest.raises(errors.ShapeError, match="weights"):
                loss(given, given, w, scores=True)


@pytest.mark.parametrize("shape", [(1, 4, L, L), (B, 4, 1, L), (B, 4, L, 1), (4, L, L)], ids=str)
@pytest.mark.parametrize("name", ["attention_kl", "attention_mse", "transfer_matrix"])
def test_maps_of_other_samples_queries_or_keys(name: str, shape: tuple[int, ...]) -> None:
    loss, maps, other = getattr(losses, name), torch.rand(B, 4, L, L), torch.rand(shape)
    for student, teacher in ((maps, other), (other, maps), (attention(), other)):
        with pytest.raises(errors.ShapeError):
            loss(student, teacher)
    assert loss(maps, attention()).shape == ()


PARTS = [
    {"key": (1, 2, L, 8), "value": (1, 2, L, 8)},
    {"key": (B, 2, L, 1)},
    {"key": (B, 3, L, 8), "value": (B, 3, L, 8)},
    {"value": (B, 3, L, 8)},
    {"value": (B, 2, L + 1, 8)},
    {"query": (4, L, 8)},
]
MASKS = [(L + 1,), (B, L), (B, 2, L, L), (3, 1, 1, L), (1, B, 1, L, L)]


@pytest.mark.parametrize("parts", [*PARTS, *({"mask": m} for m in MASKS)], ids=str)
@pytest.mark.parametrize("name", names(OF_ATTENTION))
def test_parts_of_attention_that_do_not_fit(name: str, parts: Any) -> None:
    wrong, loss = attention(**parts), getattr(losses, name)
    for student, teacher in ((wrong, attention()), (attention(), wrong)):
        with pytest.raises(errors.ShapeError, match=r"attention of queries|does not broadcast"):
            loss(student, teacher)
    for mask in ((), (L,), (L, L), (1, 1, L), (B, 1, 1, L), (B, 4, L, 1)):
        assert loss(attention(mask=mask), attention()).shape == ()


# ---- logits and labels


@pytest.mark.parametrize("name", LOGIT_LOSSES)
def test_logits_of_two_shapes(name: str) -> None:
    loss, x = getattr(losses, name), torch.randn(TOKENS)
    for shape in TEACHERS:
        one = shape == (B, L, 1)
        error, says = (errors.VocabularyError, "entries") if one else (errors.ShapeError, "same")
        for student, teacher in ((x, torch.randn(shape)), (torch.randn(shape), x)):
            with pytest.raises(error, match=says):
                loss(student, teacher)
    for shape in ((L,), (B,), (B, 1), (1, L), (), (B, L, 1), TOKENS):
        with pytest.raises(errors.ShapeError, match="weights"):
            loss(x, x, weights=torch.ones(shape))
    assert loss(student_logits=x, teacher_logits=x, weights=torch.ones(B, L)).shape == ()


def test_labels_of_another_shape() -> None:
    x, labels = torch.randn(TOKENS), torch.zeros(B, L, dtype=torch.long)
    for shape in ((L,), (B, 1), (1, L), (), (B, L, 1), (B, L + 1)):
        with pytest.raises(errors.ShapeError, match="labels"):
            losses.cross_entropy(x, labels.new_zeros(shape))
        with pytest.raises(errors.ShapeError, match="weights"):
            losses.cross_entropy(x, labels, weights=torch.ones(shape))
        with pytest.raises(errors.ShapeError, match="weights"):
            losses.ctc(x, labels[:, :1], weights=torch.ones(shape))
    for logits, targets in ((x, labels[:1]), (x, labels[0]), (x[0], labels), (x[..., 0], labels)):
        with pytest.raises(errors.ShapeError, match="ctc takes"):
            losses.ctc(logits, targets)


@pytest.mark.parametrize("pooled", ["probabilities", "classes", "logits"])
def test_teachers_of_other_shapes(pooled: Any) -> None:
    mean = functools.partial(losses.mean_of_teachers, pooled=pooled)
    x, w = torch.randn(TOKENS), torch.ones(2)
    for shape, error in (((1, L, H), errors.ShapeError), ((B, L, 1), errors.VocabularyError)):
        with pytest.raises(error):
            mean([x, torch.randn(shape)], w)
    for shape in ((), (1,), (3,), (2, 1)):
        with pytest.raises(errors.ShapeError, match="one for each"):
            mean([x, x], torch.ones(shape))


HIDDEN, HEAD, BIAS = torch.randn(B, L, H), torch.randn(7, H), torch.zeros(7)
WRONG: dict[str, Any] = {
    "teacher_hidden": HIDDEN[:1],
    "labels": torch.zeros(L, dtype=torch.long),
    "weights": torch.ones(L),
    "logit_weights": torch.ones(B, 1),
    "student_bias": torch.zeros(1),
    "teacher_bias": torch.zeros(7, 1),
    "teacher_shares": torch.ones(3),
    "other_teachers": [(HIDDEN[:1], HEAD, None, 1.0, None)],
}


@pytest.mark.parametrize("name", WRONG)
def test_the_fused_head_of_other_shapes(name: str) -> None:
    given: dict[str, Any] = {
        "teacher_hidden": HIDDEN,
        "teacher_weight": HEAD,
        "other_teachers": [(HIDDEN, HEAD, BIAS, 1.0, None)],
        "compile": False,
    }
    assert losses.vocab_loss(HIDDEN, HEAD, **given).loss.shape == ()
    with pytest.raises(errors.ShapeError):
        losses.vocab_loss(HIDDEN, HEAD, **{**given, name: WRONG[name]})
    ids = torch.arange(2).expand(B, L, 2)
    if name in ("labels", "weights", "student_bias"):
        with pytest.raises(errors.ShapeError):
            losses.vocab_loss_topk(
                HIDDEN, HEAD, ids, torch.zeros(B, L, 2) - 1, compile=False, **{name: WRONG[name]}
            )


# ---- while a graph is traced


def both(s: Tensor, t: Tensor, w: Tensor) -> Tensor:
    return losses.l2(s, t, w) + losses.forward_kl(s, t, weights=w) + losses.fpn(s, t, w)


def test_sizes_that_change_compile_nothing_again() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(both, backend=counter, fullgraph=True, dynamic=True)
    for batch, length in ((3, 5), (2, 7), (6, 4), (9, 2)):
        s, t = torch.randn(2, batch, length, 8)
        w = torch.rand(batch, length)
        torch.testing.assert_close(compiled(s, t, w), both(s, t, w))
    assert counter.frame_count == 1
    with pytest.raises(Exception, match="of one shape"):
        compiled(s, t[:, :1], w)


@pytest.mark.parametrize("name", ["mse", "l2", "total_variation"])
def test_sizes_that_depend_on_data_are_compared_as_the_step_runs(name: str) -> None:
    def some(s: Tensor, t: Tensor, kept: Tensor) -> Tensor:
        loss: Tensor = getattr(losses, name)(s[kept], t[kept])
        return loss

    s, t = torch.randn(2, 6, 8)
    kept = torch.tensor([True, False, True, True, False, False])
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(some, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(s, t, kept), some(s, t, kept))
