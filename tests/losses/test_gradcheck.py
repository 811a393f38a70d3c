"""Gradients in double precision against finite differences, where no other file has them.

Those of places, divergences, relations, maps and attention from queries stand with their formulas.
"""

import functools

import pytest
import torch

from fxdistill import losses

F64 = torch.float64
W = torch.tensor([[1.0, 0.0, 2.0], [0.5, 1.0, 0.0]], dtype=F64)
LABELS = torch.tensor([[1, 0, -100], [3, 2, 1]])


def draw(*shape):
    return torch.randn(shape, dtype=F64, requires_grad=True)


def check(function, *inputs):
    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("tau", [0.5, 2.0])
def test_detection_classification(tau):
    loss = functools.partial(losses.detection_classification, weights=W, temperature=tau)
    check(loss, draw(2, 3, 4), draw(2, 3, 4))


def test_detection_box():
    check(lambda s, t: losses.detection_box(s, t, W, beta=0.5), draw(2, 3, 4), draw(2, 3, 4))


@pytest.mark.parametrize("symmetric", [False, True])
def test_info_nce(symmetric):
    w = torch.tensor([1.0, 0.5, 0.0, 2.0], dtype=F64)
    check(lambda s, t: losses.info_nce(s, t, w, symmetric=symmetric), draw(4, 3), draw(4, 3))


@pytest.mark.parametrize("in_batch", [False, True])
def test_crd(in_batch):
    bank = losses.CRD(width=3, size=4, in_batch=in_batch).double()
    bank(draw(3, 5), draw(3, 2))
    state = {name: x.clone() for name, x in bank.state_dict().items()}
    names = [name for name, _ in bank.named_parameters()]
    learnt = [p.detach().clone().requires_grad_() for p in bank.parameters()]

    def loss(s, t, *weights):
        bank.load_state_dict(state)  # the call before has written the queue
        return torch.func.functional_call(bank, dict(zip(names, weights, strict=True)), (s, t))

    check(loss, draw(3, 5), draw(3, 2), *learnt)


@pytest.mark.parametrize("name", ["attention_kl", "attention_mse", "transfer_matrix"])
@pytest.mark.parametrize("heads", [None, "mean"])
def test_maps_of_attention(name, heads):
    def loss(s, t):
        return getattr(losses, name)(s.softmax(-1), t.softmax(-1), W, heads=heads)

    check(loss, draw(2, 2, 3, 3), draw(2, 2, 3, 3))


def test_relation_kl():
    check(lambda s, t: losses.relation_kl(s, t, W, heads=2), draw(2, 3, 4), draw(2, 3, 6))


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"z_loss": 0.1}], ids=str)
def test_cross_entropy(options):
    check(lambda z: losses.cross_entropy(z, LABELS, weights=W, **options), draw(2, 3, 4))


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd", "total_variation", "sigmoid_kl"])
def test_fused_head(divergence):
    teacher, head = draw(2, 3, 5).detach(), draw(4, 5).detach()
    options = {"divergence": divergence, "label_weight": 0.5, "weights": W, "compile": False}

    def loss(hidden, weight, bias):
        given = (hidden, weight, teacher, head, LABELS)
        return losses.vocab_loss(*given, student_bias=bias, temperature=2.0, **options).loss

    check(loss, draw(2, 3, 3), draw(4, 3), draw(4))


@pytest.mark.parametrize("pooled", ["probabilities", "classes", "logits"])
def test_mean_of_teachers(pooled):
    shares = torch.tensor([1.0, 0.5], dtype=F64)
    check(
        lambda a, b: losses.mean_of_teachers([a, b], shares, temperature=2.0, pooled=pooled),
        *(draw(2, 4), draw(2, 4)),
    )
