"""A loss of the user's own may change between steps: the graph follows."""

import pytest
import torch
from torch import nn

import fxdistill


class Scaled:
    """A callable with a number that its user changes, as a schedule does."""

    by = 0.5

    def __call__(self, student, teacher, weights):
        return self.by * (student - teacher).square().mean()


def closed():
    held = [0.5]

    def loss(student, teacher, weights):
        return held[0] * (student - teacher).square().mean()

    return loss, lambda by: held.__setitem__(0, by)


def attribute():
    loss = Scaled()
    return loss, lambda by: setattr(loss, "by", by)


@pytest.mark.parametrize("kind", [closed, attribute])
def test_a_number_inside_of_a_loss_may_change(kind):
    torch.manual_seed(0)
    loss, change = kind()
    student, teacher = nn.Sequential(nn.Linear(3, 2)), nn.Sequential(nn.Linear(3, 2))
    options = {"logit_loss": None, "label_loss": None, "compile": {"backend": "aot_eager"}}
    distiller = fxdistill.wrap(student, teacher, {"0": "0"}, feature_loss=loss, **options)
    x = torch.ones(4, 3)
    before = distiller(x).loss.detach()
    change(0.1)
    torch.testing.assert_close(distiller(x).loss.detach(), before / 5)
