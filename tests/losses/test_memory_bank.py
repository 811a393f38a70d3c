"""CRD: its value against a plain list of earlier samples, and what its queue holds."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxdistill
from fxdistill import Match, errors, losses


def embedded(bank, s, t):
    layers = bank.embedding
    return F.normalize(layers.of_student(s), dim=-1), F.normalize(layers.of_teacher(t), dim=-1)


def batches(sizes):
    return [(torch.randn(n, 6), torch.randn(n, 4)) for n in sizes]


@pytest.mark.parametrize("in_batch", [False, True])
@pytest.mark.parametrize("sizes", [(3, 3, 4, 2, 3), (8, 8, 5), (9, 3, 20, 1)], ids=str)
def test_the_loss_is_the_cross_entropy_among_own_and_earlier_samples(sizes, in_batch):
    bank = losses.CRD(width=3, size=8, in_batch=in_batch)
    earlier: list[torch.Tensor] = []  # a plain list, the latest last
    for s, t in batches(sizes):
        s.requires_grad_()
        found = bank(s, t)
        a, b = embedded(bank, s, t)
        want = []
        for i in range(len(s)):
            others = [b[j] for j in range(len(s)) if j != i] if in_batch else []
            logits = torch.stack([a[i] @ x for x in (b[i], *earlier[-8:], *others)]) / 0.07
            want.append(-logits.log_softmax(0)[0])
        torch.testing.assert_close(found, torch.stack(want).mean())
        learnt = [s, *bank.parameters()]
        ours, theirs = (torch.autograd.grad(x, learnt) for x in (found, torch.stack(want).mean()))
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
        earlier += list(b.detach())
        kept, latest = bank.queue[: int(bank.filled)], torch.stack(earlier[-8:])
        order, wanted = (x[:, 0].argsort() for x in (kept, latest))
        torch.testing.assert_close(kept[order], latest[wanted])


def test_samples_that_do_not_count_are_not_written_and_have_no_part():
    bank = losses.CRD(width=3, size=8, in_batch=True)
    s, t = batches([5])[0]
    bank.embedding.build(6, 4, torch.device("cpu"))
    other = copy.deepcopy(bank)
    w = torch.tensor([1.0, 0, 1, 0, 1])
    kept = w != 0
    want = other(s[kept], t[kept])
    s[~kept], t[~kept] = torch.nan, torch.inf
    s.requires_grad_()
    found = bank(s, t, w)
    torch.testing.assert_close(found, want)
    gradients = torch.autograd.grad(found, [s, *bank.parameters()])
    assert all(gradient.isfinite().all() for gradient in gradients)
    torch.testing.assert_close(bank.queue, other.queue)
    assert (int(bank.pointer), int(bank.filled)) == (3, 3)


def test_a_sample_that_is_not_finite_is_not_written():
    """It would be in the loss of all batches until the queue has gone round."""
    bank = losses.CRD(width=3, size=8)
    s, t = batches([5])[0]
    bank.embedding.build(6, 4, torch.device("cpu"))
    good = bank.embedding.of_teacher(t[3:]).detach()
    t[:2], t[2, 1] = torch.inf, torch.nan
    assert not bank(s, t).isfinite()
    assert (int(bank.pointer), int(bank.filled)) == (2, 2)
    torch.testing.assert_close(bank.queue[:2], F.normalize(good, dim=-1))
    assert bank(*batches([5])[0]).isfinite()


def test_only_a_training_step_with_gradients_writes():
    bank = losses.CRD(width=3, size=8)
    s, t = batches([5])[0]
    bank(s, t)
    before = {name: value.clone() for name, value in bank.state_dict().items()}
    bank.eval()
    bank(s, t)
    bank.train()
    with torch.no_grad():
        bank(s, t)
    torch.testing.assert_close(dict(bank.state_dict()), before)


def test_a_saved_queue_goes_on_where_it_stopped():
    bank = losses.CRD(width=3, size=8)
    (s, t), *rest = batches([5, 6, 2])
    bank(s, t)
    file = io.BytesIO()
    torch.save(bank.state_dict(), file)
    file.seek(0)
    again = losses.CRD(width=3, size=8)
    again.load_state_dict(torch.load(file))
    for s, t in rest:
        assert again(s, t).detach() == bank(s, t).detach()
    torch.testing.assert_close(again.state_dict(), bank.state_dict())


@pytest.mark.parametrize("options", [{"width": 0}, {"size": -1}, {"temperature": 0.0}], ids=str)
def test_sizes_that_make_no_sense_are_errors(options):
    with pytest.raises(errors.OptionError, match="greater than 0"):
        losses.CRD(**options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_it_may_be_cast_before_wrap_makes_its_layers(dtype):
    """The lazy layers, which wrap makes, keep the dtype that the module was cast to."""
    torch.manual_seed(0)
    student, teacher = (nn.Sequential(nn.Linear(4, n)).to(dtype) for n in (6, 8))
    loss = losses.CRD(width=5, size=8).to(dtype)
    match = [Match("0", "0", loss=loss)]
    off = {"logit_loss": None, "label_loss": None, "compile": False}
    distiller = fxdistill.wrap(student, teacher, match, **off)
    assert {x.dtype for x in loss.parameters()} == {dtype} == {loss.queue.dtype}
    x = torch.randn(3, 4, dtype=dtype)
    assert distiller(x).loss.item() == 0.0  # no negatives yet
    plain = copy.deepcopy(loss)
    found = distiller(x).loss
    torch.testing.assert_close(found, plain(student(x), teacher(x)))
    assert found > 0
    found.backward()
    assert student[0].weight.grad.dtype == dtype
