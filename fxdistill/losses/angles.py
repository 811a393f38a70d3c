"""The angles of all triples of samples: B³ numbers, of which one block exists at a time.

At the sample j, with e_i = h_i - h_j and u_i = e_i/‖e_i‖, the cosines are C = u uᵀ. The slopes
G_ik = w_i w_j w_k Huber'(C_ik - C'_ik) are symmetric. So the gradient by u is g = 2 G u, and that
by e_i is (g_i - (g_i·u_i) u_i)/‖e_i‖; h_i gets it, and h_j gets minus the sum of all.
"""

import torch
from torch import Tensor

from fxdistill.losses.gradient_in_forward import Formed, keeps_its_gradients, needed
from fxdistill.losses.reduce import huber, in_full_precision

BLOCK = 2**20  # numbers of a block, for small batches; for large ones, B² of them


def angle_loss(student: Tensor, teacher: Tensor, weights: Tensor) -> Tensor:
    """The mean over triples of Huber(cos_S - cos_T); ``[B, D]``, ``[B, D_T]`` and ``[B]``."""
    needs = needed(student, teacher)
    value: Tensor = _angle_wise(student, teacher, weights, needs)[0]
    return value


@torch.library.custom_op("fxdistill::angle_wise", mutates_args=())
@in_full_precision
def _angle_wise(student: Tensor, teacher: Tensor, weights: Tensor, needs: str) -> Formed:
    """The loss and its gradients."""
    with torch.no_grad():
        count = student.shape[0]
        widest = max(student.shape[1], teacher.shape[1], count)
        size = max(1, BLOCK // max(1, count * widest))
        w = weights.to(student.dtype)
        triples = _triples(w)
        scale = torch.where(triples > 0, 1 / torch.where(triples > 0, triples, 1), 0)
        value = student.new_zeros(())
        gradients = [
            torch.zeros_like(x, memory_format=torch.contiguous_format)
            if letter in needs
            else x.new_zeros(0)
            for letter, x in zip("st", (student, teacher), strict=True)
        ]
        for start in range(0, count, size):
            at = torch.arange(start, min(count, start + size), device=student.device)
            corners = [_Corners(x, at) for x in (student, teacher)]
            weigh = _weights_of(w, at) * scale
            difference = corners[0].cosines - corners[1].cosines
            value += (weigh * huber(difference)).sum()
            slope = weigh * difference.clamp(-1, 1)
            for sign, letter, corner, gradient in zip(
                (1, -1), "st", corners, gradients, strict=True
            ):
                if letter in needs:
                    corner.add_gradient(slope * sign, gradient)
        return value, gradients[0], gradients[1]


keeps_its_gradients(_angle_wise, "angle_wise")


def angle_flops(student: Tensor, teacher: Tensor, weights: Tensor, needs: str) -> int:
    """FLOPs of the operator: the cosines of all triples, and the gradients wanted."""
    sides = (("s", student), ("t", teacher))
    return sum(2 * x.shape[0] ** 2 * int(x.numel()) * (1 + (name in needs)) for name, x in sides)


def _triples(w: Tensor) -> Tensor:
    """Σ w_i w_j w_k over ordered triples of different samples: 6 times a sum of prefix sums.

    Sums of powers would cancel where one weight is much larger than the others.
    """
    pairs = w[1:] * w.cumsum(0)[:-1]
    return 6 * (w[2:] * pairs.cumsum(0)[:-1]).sum()


def _weights_of(w: Tensor, at: Tensor) -> Tensor:
    """w_i w_j w_k for the samples j in ``at``; 0 where two of the three are the same sample."""
    count = w.shape[0]
    each = torch.arange(count, device=w.device)
    other = (each[None, :] != at[:, None]).to(w.dtype) * w
    apart = 1 - torch.eye(count, dtype=w.dtype, device=w.device)
    return w[at, None, None] * other[:, :, None] * other[:, None, :] * apart


class _Corners:
    """The directions from the samples ``at`` to all others, and the cosines between these."""

    def __init__(self, x: Tensor, at: Tensor) -> None:
        edges = x[None, :, :] - x[at][:, None, :]
        length = edges.norm(dim=-1, keepdim=True)
        self.at = at
        self.inverse = torch.where(length == 0, 0, 1 / torch.where(length == 0, 1, length))
        self.units = edges * self.inverse
        self.cosines = self.units @ self.units.transpose(1, 2)

    def add_gradient(self, slope: Tensor, gradient: Tensor) -> None:
        """Add the gradient of Σ slope·cosines to that of the samples."""
        by_unit = 2 * (slope @ self.units)
        along = (by_unit * self.units).sum(-1, keepdim=True)
        by_edge = (by_unit - along * self.units) * self.inverse
        gradient += by_edge.sum(0)
        gradient.index_add_(0, self.at, by_edge.sum(1), alpha=-1)
