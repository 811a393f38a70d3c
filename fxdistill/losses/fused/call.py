"""The arguments of the fused head by name; the operator takes them by position."""

from typing import Any, NamedTuple

from torch import Tensor, fx

from fxdistill.losses.fused.chunk import ChunkSpec
from fxdistill.losses.fused.gradients import gradients_wanted


class HeadSide(NamedTuple):
    """One model's head: hidden state ``[..., D]``, weight ``[V, D]`` and bias ``[V]``."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None


class Stored(NamedTuple):
    """A teacher's stored output: log-probabilities ``[tokens, k]`` of the entries ``ids``."""

    logprobs: Tensor
    ids: Tensor


class Shard(NamedTuple):
    """This rank's rows of a sharded weight: process group, first row, vocabulary size."""

    group: str = ""
    offset: int = 0
    size: int = 0


class Others(NamedTuple):
    """Teachers behind the first: operands of their heads (``teachers.packed``), ``[K]`` weights.

    ``mixed`` is the text of a ``MixSpec``.
    """

    heads: "list[Tensor] | tuple[Tensor, ...]" = ()
    weights: Tensor | None = None
    mixed: str = ""


class HeadTerms(NamedTuple):
    """The loss terms to compute from the heads.

    ``labels`` and both ``shares`` (w / Σw in the divergence and in the label loss) are
    ``[tokens]``; ``settings`` ``[3]`` are the weights of the two terms and τ; ``chunk`` is the
    number of tokens in a chunk, ``None`` for one that suits the device.
    """

    labels: Tensor | None
    shares: tuple[Tensor, Tensor]
    settings: Tensor
    spec: ChunkSpec
    chunk: int | None
    compiled: bool


class HeadCall(NamedTuple):
    """The arguments of ``fxdistill::vocab_loss``, in its order; see there for shapes."""

    h: Any
    w: Any
    bias: Any
    t: Any
    t_weight: Any
    t_bias: Any
    ids: Any
    labels: Any
    logit_share: Any
    label_share: Any
    settings: Any
    others: Any
    mixture: Any
    mixed: str
    spec: str
    chunk: int
    needs: str
    compiled: bool
    # No defaults: torch leaves out arguments that are those, and then the gradients of a list of
    # tensors would not have the structure of the arguments.
    group: str
    offset: int
    size: int

    @classmethod
    def make(
        cls,
        student: HeadSide,
        teacher: HeadSide | Stored | None,
        terms: HeadTerms,
        chunk: int,
        shard: Shard | None = None,
        more: "Others | None" = None,
    ) -> "HeadCall":
        """Make the call from both sides, flattened to ``[tokens, ...]``, and the terms."""
        left: tuple[Tensor | None, ...] = (None,) * 4  # hidden, weight, bias, ids
        if isinstance(teacher, Stored):
            left = (teacher.logprobs, None, None, teacher.ids)
        elif teacher is not None:
            left = (*teacher, None)
        shard = Shard() if shard is None else shard
        mix = Others() if more is None else more
        given = (terms.labels, *terms.shares, terms.settings, *mix, terms.spec.text, chunk)
        wanted = gradients_wanted(student.hidden, student.weight, student.bias)
        return cls._make((*student, *left, *given, wanted, terms.compiled, *shard))

    @classmethod
    def of(cls, node: fx.Node) -> "HeadCall":
        """Read the call from a node of the operator, with fake tensors (``meta["val"]``)."""
        given: Any = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta.get("val"))
        return cls(*given[0], **given[1])
