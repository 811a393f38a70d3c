"""What the fused head is called with, by name: the operator itself takes a row of positions."""

from typing import Any, NamedTuple

from torch import Tensor, fx

from fxdistill.losses.fused.chunk import ChunkSpec
from fxdistill.losses.fused.gradients import gradients_wanted


class HeadSide(NamedTuple):
    """One model's part: hidden state ``[..., D]``, weight ``[V, D]`` and bias ``[V]``."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None


class Stored(NamedTuple):
    """What a teacher elsewhere has left: log-probabilities ``[tokens, k]``, and whose."""

    logprobs: Tensor
    ids: Tensor


class Shard(NamedTuple):
    """Where weights are one rank's rows: the ranks' group, from which row on, of how many."""

    group: str = ""
    offset: int = 0
    size: int = 0


class HeadTerms(NamedTuple):
    """What is asked of the heads.

    ``labels`` and both ``shares`` (of the divergence, of the label loss) are ``[tokens]``;
    ``settings`` ``[3]`` are the weights of the two terms and τ; ``chunk`` is how many tokens are
    taken at a time, ``None`` for what suits the device.
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
    spec: str
    chunk: int
    needs: str
    compiled: bool
    group: str = ""
    offset: int = 0
    size: int = 0

    @classmethod
    def make(
        cls,
        student: HeadSide,
        teacher: HeadSide | Stored | None,
        terms: HeadTerms,
        chunk: int,
        shard: Shard | None = None,
    ) -> "HeadCall":
        """From both sides, flattened to ``[tokens, ...]``, and the terms."""
        left: tuple[Tensor | None, ...] = (None,) * 4  # hidden, weight, bias, ids
        if isinstance(teacher, Stored):
            left = (teacher.logprobs, None, None, teacher.ids)
        elif teacher is not None:
            left = (*teacher, None)
        shard = Shard() if shard is None else shard
        given = (terms.labels, *terms.shares, terms.settings, terms.spec.text, chunk)
        wanted = gradients_wanted(student.hidden, student.weight, student.bias)
        return cls._make((*student, *left, *given, wanted, terms.compiled, *shard))

    @classmethod
    def of(cls, node: fx.Node) -> "HeadCall":
        """Of a node of the operator, with the stand-ins (``meta["val"]``) of its tensors."""
        given: Any = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta.get("val"))
        return cls(*given[0], **given[1])
