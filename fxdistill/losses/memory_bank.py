"""CRD: contrast of the student's samples with the teacher's own and a queue of earlier ones."""

import torch
from torch import Tensor, nn

from fxdistill.base.nodes import one_node
from fxdistill.base.tensors import is_lazy, wide
from fxdistill.errors import OptionError, ShapeError
from fxdistill.losses.reduce import normalized, weighted_mean
from fxdistill.losses.samples import both


class Embedding(nn.Module):
    """A linear layer for each model, which maps its samples to vectors of length 1."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.of_student, self.of_teacher = nn.LazyLinear(width), nn.LazyLinear(width)

    def forward(
        self, student: Tensor, teacher: Tensor, weights: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The vectors ``[B, width]`` of both models, and the weights of the samples."""
        s, t, w = both(student, teacher, weights)
        layers = ((self.of_student, s, "student"), (self.of_teacher, t, "teacher"))
        a, b = (normalized(layer(_fitting(x, layer, name)), (-1,)) for layer, x, name in layers)
        return a, b, w

    def build(self, student: int, teacher: int, device: torch.device) -> None:
        """Make the layers for these widths of samples, on ``device``."""
        self.to(device)
        for layer, width in ((self.of_student, student), (self.of_teacher, teacher)):
            with torch.no_grad():
                # The first call makes its parameters, in the dtype that the module has by now.
                layer(torch.zeros(1, width, device=device, dtype=layer.weight.dtype))


def _fitting(samples: Tensor, layer: nn.Linear, name: str) -> Tensor:
    """``samples`` in the layer's dtype."""
    if not isinstance(layer, nn.LazyLinear):
        samples = _of_width(samples, layer.in_features, name)
    return samples.to(layer.weight.dtype)


@one_node
def _of_width(samples: Tensor, width: int, name: str) -> Tensor:
    """``samples``; raises ShapeError where they are of another width."""
    if samples.shape[1] != width:
        raise ShapeError(
            f"CRD has a layer for the {name}'s samples of width {width}, and they have "
            f"{samples.shape[1]}. A value of 4 axes is a map [B, C, H, W] unless Match(tokens=...) "
            "says that its first axes are tokens; wrap(..., example_inputs={...}) reads the widths"
        )
    return samples


class CRD(nn.Module):
    """-log of softmax_k(ŝ_i·n̂_k/τ) at the teacher's t̂_i, against the queue; a mean over samples.

    A queue of the teacher's earlier samples gives the negatives n̂, as in MoCo (He et al., 2020),
    for the contrast of Tian et al. (CRD, 2020). A linear layer for each model maps samples to one
    width; the results are of length 1. Values are reduced to samples as in ``losses.relational``.

    The queue, its pointer and the number of written entries are buffers: they are saved with the
    module, and only entries that have been written count. The batch is written after its loss was
    formed, while the module trains and gradients are on; in evaluation nothing is written. Samples
    of weight 0 are not written, and of a batch longer than the queue its latest samples stay.

    Args:
        width: The width of the space in which samples are compared.
        size: The number of entries of the queue.
        temperature: τ.
        in_batch: Whether the other samples of the batch are negatives too.
        across_ranks: As in ``losses.relational``: whether the samples of all ranks are compared and
            written, or each rank keeps a queue of its own. A state dict has the queue of its rank.

    Raises OptionError for a width, a size or a temperature that is not positive. The layers get
    their input widths from ``wrap``, or at the first call (``nn.LazyLinear``).
    """

    queue: Tensor
    pointer: Tensor
    filled: Tensor

    def __init__(
        self,
        width: int = 128,
        size: int = 16384,
        temperature: float = 0.07,
        *,
        in_batch: bool = False,
        across_ranks: bool = True,
    ) -> None:
        super().__init__()
        for name, value in (("width", width), ("size", size), ("temperature", temperature)):
            if value <= 0:
                raise OptionError(f"CRD({name}={value!r}): greater than 0")
        self.temperature, self.in_batch, self.across_ranks = temperature, in_batch, across_ranks
        self.embedding = Embedding(width)
        self.register_buffer("queue", torch.zeros(size, width))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.long))
        self.register_buffer("filled", torch.zeros((), dtype=torch.long))

    @property
    def is_built(self) -> bool:
        """Whether the layers know their input widths."""
        layers = (self.embedding.of_student, self.embedding.of_teacher)
        return not any(is_lazy(layer.weight) for layer in layers)

    def forward(self, student: Tensor, teacher: Tensor, weights: Tensor | None = None) -> Tensor:
        """The loss of a batch; the batch is then written to the queue, while training."""
        return self.compare(*self.embedding(student, teacher, weights))

    def compare(self, student: Tensor, teacher: Tensor, weights: Tensor | None) -> Tensor:
        """The loss of embedded samples, which are then written to the queue, while training."""
        with torch.autocast(student.device.type, enabled=False):
            return self._compared(wide(student), wide(teacher), weights)

    def _compared(self, student: Tensor, teacher: Tensor, weights: Tensor | None) -> Tensor:
        own = (student * teacher).sum(-1, keepdim=True) / self.temperature
        written = torch.arange(len(self.queue), device=self.queue.device) < self.filled
        earlier = (student @ wide(self.queue).clone().T) / self.temperature
        candidates = [own, torch.where(written, earlier, -torch.inf)]
        if self.in_batch:
            others = (student @ teacher.T) / self.temperature
            candidates.append(torch.where(_others(teacher, weights), others, -torch.inf))
        surprise = torch.cat(candidates, -1).logsumexp(-1) - own.squeeze(-1)
        if self.training and torch.is_grad_enabled():
            self._write(teacher.detach(), weights)
        return weighted_mean(surprise, weights)

    def _write(self, rows: Tensor, weights: Tensor | None) -> None:
        """Write the samples that count and are finite behind the pointer, and go round at the end.

        Every entry asks for the latest sample that falls on it: sizes depend on no values.
        """
        size = len(self.queue)
        if len(rows) == 0:
            return
        counts = rows.new_ones(len(rows)) if weights is None else weights
        counts = (counts != 0) & rows.isfinite().all(-1)  # a NaN would stay for a whole round
        count = counts.sum()
        behind = (torch.arange(size, device=rows.device) - self.pointer) % size
        latest = behind + size * ((count - 1 - behind).clamp_min(0) // size)
        in_order = torch.argsort(~counts, stable=True)
        taken = rows[in_order[latest.clamp_max(len(rows) - 1)]].to(self.queue.dtype)
        self.queue.copy_(torch.where((behind < count)[:, None], taken, self.queue))
        self.pointer.copy_((self.pointer + count) % size)
        self.filled.copy_((self.filled + count).clamp_max(size))


def _others(teacher: Tensor, weights: Tensor | None) -> Tensor:
    """``[B, B]``: the other samples of the batch, if they count."""
    apart = ~torch.eye(len(teacher), dtype=torch.bool, device=teacher.device)
    return apart if weights is None else apart & (weights != 0)[None, :]
