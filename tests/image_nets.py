"""Small networks of images for losses that compare samples, and how their losses are checked."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from mesh_steps import AOT

MODES = pytest.mark.parametrize("compile", [False, AOT, "regional"], ids=["eager", "one", "terms"])


class Net(nn.Module):
    """A convolutional network of any width; ``remat`` runs its first half again in the backward."""

    def __init__(self, width: int, remat: bool = False) -> None:
        super().__init__()
        self.stem, self.deep = nn.Conv2d(1, width, 3), nn.Conv2d(width, width, 3)
        self.head, self.remat = nn.Linear(width, 10), remat

    def forward(self, x):
        x = checkpoint(self.stem, x, use_reentrant=False) if self.remat else self.stem(x)
        x = self.deep(x.tanh()).tanh()
        return self.head(x.mean((2, 3)))


def nets(width=4, teacher=6, **options):
    torch.manual_seed(0)
    return Net(width, **options), Net(teacher)


IMAGES = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def values(model, path, *inputs):
    """What a module returns, once more, with gradients."""
    seen = []
    handle = model.get_submodule(path).register_forward_hook(lambda m, i, out: seen.append(out))
    model(*inputs)
    handle.remove()
    return seen[0]


def check(distiller, loss, want, student):
    torch.testing.assert_close(loss.detach(), want.detach())
    learnt = [p for p in student.parameters() if p.requires_grad]
    options = {"allow_unused": True, "retain_graph": True, "materialize_grads": True}
    found, wanted = (torch.autograd.grad(x, learnt, **options) for x in (loss, want))
    # The gradient of a bias that all samples share is 0 in exact arithmetic.
    largest = max(float(gradient.norm()) for gradient in wanted)
    for ours, theirs in zip(found, wanted, strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm() + 1e-6 * largest
