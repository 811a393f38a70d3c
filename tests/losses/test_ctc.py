"""CTC against torch's own loss and against a count of all paths."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from fxdistill import errors, losses
from fxdistill.losses.names import LABEL_LOSSES

GENERATOR = torch.Generator().manual_seed(0)
LABELS = torch.tensor([[1, 2, 2], [3, -100, -100], [-100, -100, -100]])
KEPT = (torch.arange(6) < torch.tensor([[6], [4], [5]])).float()


def logits(dtype=torch.float64):
    return torch.randn(3, 6, 4, generator=GENERATOR, dtype=dtype).requires_grad_()


def by_paths(z, labels, frames):
    """-log of the summed probability of all paths that collapse to the labels."""
    p, total = z.softmax(-1), 0.0
    for path in itertools.product(range(z.shape[-1]), repeat=frames):
        merged = [k for k, _ in itertools.groupby(path)]
        if [k for k in merged if k != 0] == labels:
            total = total + torch.stack([p[i, k] for i, k in enumerate(path)]).prod()
    return -torch.log(total)


def test_value_and_gradient_are_those_of_all_paths():
    z = logits()
    wanted = (
        sum(
            by_paths(z[b], [k for k in LABELS[b].tolist() if k != -100], int(KEPT[b].sum()))
            for b in range(2)  # the third has no labels
        )
        / 4
    )
    (slope,) = torch.autograd.grad(wanted, z)
    value = losses.ctc(z, LABELS, weights=KEPT)
    (got,) = torch.autograd.grad(value, z)
    torch.testing.assert_close(value, wanted)
    torch.testing.assert_close(got, slope)


def test_gradcheck():
    assert torch.autograd.gradcheck(lambda z: 3.0 * losses.ctc(z, LABELS, weights=KEPT), logits())


def test_another_blank_and_no_weights():
    z = logits()
    kept = LABELS != -100
    labels = torch.where(kept, LABELS - 1, LABELS)
    log_p = z[:2].log_softmax(-1).transpose(0, 1)
    lengths = torch.full((2,), 6), kept[:2].sum(-1)
    nll = F.ctc_loss(log_p, labels[kept], *lengths, blank=3, reduction="sum")
    torch.testing.assert_close(losses.ctc(z, labels, blank=3), nll / 4)


def test_impossible_labels_are_infinite_or_zero():
    z, labels = logits(), torch.tensor([[1, 1, 1, 1], [1, -100, -100, -100], [2, 3, -100, -100]])
    assert losses.ctc(z, labels).isinf()
    z = z.detach().requires_grad_()
    value = losses.ctc(z, labels, zero_infinity=True)
    value.backward()
    assert value.isfinite()
    assert z.grad[0].abs().max() == 0
    assert z.grad[1].abs().max() > 0
    assert z.grad.isfinite().all()


def test_frames_that_do_not_count_may_be_anything():
    z = logits()
    with torch.no_grad():
        z[1, 4:] = torch.nan
    value = losses.ctc(z, LABELS, weights=KEPT)
    value.backward()
    assert value.isfinite()
    assert z.grad.isfinite().all()


def test_no_labels_at_all_are_zero():
    z = logits()
    value = losses.ctc(z, torch.full((3, 2), -100), weights=torch.zeros(3, 6))
    value.backward()
    assert value == 0
    assert z.grad.abs().max() == 0


def test_samples_without_labels_do_not_count():
    z = logits()
    both = torch.tensor([[1, 2], [-100, -100], [-100, -100]])
    torch.testing.assert_close(losses.ctc(z, both), losses.ctc(z[:1], both[:1]))
    assert losses.ctc(z[1:], both[1:]) == 0


def test_half_precision_is_computed_in_single():
    z = logits().detach()
    low = losses.ctc(z.bfloat16(), LABELS)
    torch.testing.assert_close(low, losses.ctc(z.bfloat16().float(), LABELS))


def test_there_is_no_second_derivative():
    z = logits()
    with pytest.raises(errors.StepError, match="ctc forms its gradients in the forward"):
        torch.autograd.grad(losses.ctc(z, LABELS), z, create_graph=True)


def test_the_operator_keeps_the_rules_of_torch():
    from fxdistill.losses.ctc import _ctc

    frames = torch.tensor([6, 4, 5])
    torch.library.opcheck(_ctc, (logits(torch.float32), LABELS, frames, 0, False))


def test_it_is_known_by_name():
    assert LABEL_LOSSES["ctc"] is losses.ctc
