"""Samples of which nothing counts have no part in a term, and masks of samples hold on their own.

The oracle is the same batch without these samples.
"""

import pytest
import torch
from torch import nn

import fxdistill
from fxdistill import Match, errors
from mesh_steps import AOT

MEAN = ("b l d -> b d", "mean")
LOSSES = ("mse", "cosine", "info_nce", "gram")


class Encoder(nn.Module):
    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.embed, self.deep = nn.Embedding(50, 8), nn.Linear(8, 8)

    def forward(self, input_ids, attention_mask=None):
        return {"hidden": self.deep(self.embed(input_ids))}


def pooled(ids, mask, compile, **call):
    """The terms of pooled tokens, and the gradients by the student and by a projection."""
    student, teacher = Encoder(0).double(), Encoder(1).double()
    torch.manual_seed(2)
    project = nn.Linear(8, 8).double()
    mapping = [Match("deep", "deep", loss=loss, reduce=MEAN) for loss in LOSSES]
    mapping.append(Match("deep", "deep", reduce=MEAN, project=project))
    distiller = fxdistill.wrap(student, teacher, mapping, logit_loss=None, compile=compile)
    out = distiller(input_ids=ids, attention_mask=mask, **call)
    out.loss.backward()
    gradients = [p.grad for p in distiller.parameters() if p.grad is not None]
    return {**out.losses, **dict(enumerate(gradients))}


@pytest.mark.parametrize("compile", [False, AOT], ids=["eager", "one"])
def test_samples_that_are_all_padding_are_in_no_mean(compile):
    ids = torch.randint(0, 50, (4, 5))
    mask = torch.tensor([[1, 1, 1, 0, 0], [0] * 5, [1] * 5, [1, 0, 0, 0, 0]])
    there = mask.any(1)
    wanted = pooled(ids[there], mask[there], compile)
    for name, value in pooled(ids, mask, compile).items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-9, atol=1e-12)
    for value in pooled(ids, mask * 0, compile).values():
        assert not value.any()


def test_in_classification_too():
    ids, weights = torch.randint(0, 50, (3, 5)), torch.tensor([1.0, 5.0, 2.0])
    mask = torch.ones_like(ids)
    mask[1] = 0
    there = mask.any(1)
    labels = torch.tensor([0, 1, 0])

    def found(ids, mask, weights, labels):
        student, teacher = Encoder(0).double(), Encoder(1).double()
        mapping = [Match("deep", "deep", loss=loss, reduce=MEAN) for loss in LOSSES]
        options = {"logit_loss": None, "label_loss": None, "compile": False}
        distiller = fxdistill.wrap(student, teacher, mapping, task="classification", **options)
        call = {"input_ids": ids, "attention_mask": mask, "token_weights": weights}
        return distiller(**call, labels=labels).losses

    wanted = found(ids[there], mask[there], weights[there], labels[there])
    for name, value in found(ids, mask, weights, labels).items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-9, atol=1e-12)


class Rows(nn.Module):
    """Vectors in, and no word of a task."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.deep, self.last = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.last(self.deep(x).tanh())


@pytest.mark.parametrize("places", [(), (4,)], ids=["rows", "rows of places"])
@pytest.mark.parametrize("loss", ["mse", "gram"])
def test_a_mask_of_samples_holds_for_features_alone(loss, places):
    x, mask = torch.randn(4, *places, 6).double(), torch.tensor([1.0, 0, 1, 3])

    def found(**call):
        student, teacher = Rows(0).double(), Rows(1).double()
        options = {"logit_loss": None, "compile": False}
        mapping = [Match("deep", "deep", loss=loss)]
        distiller = fxdistill.wrap(student, teacher, mapping, **options, task=call.pop("task"))
        out = distiller(x, **call)
        out.loss.backward()
        return out.losses["deep"], student.deep.weight.grad

    wanted = found(task="classification", loss_mask=mask)
    for got, want in zip(found(task="auto", loss_mask=mask), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    plain, _ = found(task="auto")
    assert not torch.isclose(wanted[0], plain)
    nothing, gradient = found(task="auto", token_weights=torch.zeros(4))
    assert nothing == 0
    assert not gradient.any()
    with pytest.raises(errors.BatchError, match=r"shape \[7\].*per sample"):
        found(task="auto", loss_mask=torch.zeros(7))
