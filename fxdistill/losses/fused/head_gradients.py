"""The gradients of one head, to which the chunks add theirs."""

import torch
from torch import Tensor

from fxdistill.losses.fused.call import HeadSide

ADDEND = 64 * 2**20  # bytes of a low-precision product that is added to the weight's gradient


class HeadGradients:
    """Gradients by hidden state ``[T, D]``, weight ``[V, D]`` and bias ``[V]``; else empty.

    ``needs`` names those that are wanted by their letters h, w and b.
    """

    def __init__(self, side: HeadSide, needs: str) -> None:
        h, w = side.hidden, side.weight
        self.weight, self.needs = w, needs
        # Sums over many chunks are kept in float32 at least.
        kind = torch.float64 if h.dtype == torch.float64 else torch.float32
        self.dh = h.new_empty(h.shape) if "h" in needs else h.new_empty(0)
        self.dw = w.new_zeros(w.shape, dtype=kind) if "w" in needs else h.new_empty(0)
        self.db = w.new_zeros(w.shape[0], dtype=kind) if "b" in needs else h.new_empty(0)

    def add(self, z: Tensor, hidden: Tensor, live: Tensor, start: int, count: int) -> None:
        """Add a chunk of ``count`` tokens from ``start`` on, whose gradient by logits is ``z``.

        ``z`` ``[c, V]`` and ``hidden`` ``[c, D]`` may be padded. A token that is not ``live``
        ``[c, 1]`` adds no gradient, even if its hidden state is NaN.
        """
        if "h" in self.needs:
            torch.mm(z[:count], self.weight, out=self.dh[start : start + count])
        if "w" in self.needs:
            self._add_weight(z, torch.where(live, hidden, 0))
        if "b" in self.needs:
            self.db += z.sum(0, dtype=self.db.dtype)

    def _add_weight(self, z: Tensor, hidden: Tensor) -> None:
        if z.dtype == self.dw.dtype:
            self.dw.addmm_(z.T, hidden)
            return
        # The product in lower precision is a tensor of its own: add some columns at a time.
        count = max(1, ADDEND // (hidden.shape[1] * z.element_size()))
        for some in range(0, z.shape[1], count):
            self.dw[some : some + count] += z[:, some : some + count].T @ hidden

    def scale(self, by: Tensor) -> None:
        """Multiply all gradients by a scalar."""
        for gradient in (self.dh, self.dw, self.db):
            gradient *= by

    def all(self) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients by hidden state, weight and bias, in their dtypes."""
        return self.dh, self.dw.to(self.weight.dtype), self.db.to(self.weight.dtype)
