"""Logit and label losses of DTensors: the placement of the logits tells what ranks exchange.

- Vocabulary sharded: a few numbers for each token (see ``losses.fused.shard``), never a logit.
- Tokens sharded, by batch or by sequence: the total is summed over ranks.
- Replicated: nothing.

The teacher's logits are redistributed to the student's placement. The result is a plain scalar, the
same on every rank, and each rank's backward forms the gradient of its local logits.

The vocabulary-sharded form computes the gradient by the logits in the forward and saves it, instead
of the log-softmaxes of both models that autograd would save.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Placement, Replicate

from fxdistill.base.placement import chunk_of, countable, mesh_of, placed, summed
from fxdistill.base.tensors import wide
from fxdistill.errors import OptionError, ShapeError
from fxdistill.losses.fused.chunk import Chunk, ChunkSpec
from fxdistill.losses.fused.formulas import Divergence
from fxdistill.losses.fused.gradients import require_first_order, require_indices, scaled
from fxdistill.losses.fused.shard import ColumnRange
from fxdistill.losses.fused.sharded_body import ShardedBody
from fxdistill.losses.reduce import IGNORE


@torch.library.custom_op("fxdistill::sharded_logit_loss", mutates_args=())
def logit_operator(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor | None,
    share: Tensor,
    settings: Tensor,
    shape: str,
    wanted: bool,
    group: str,
    offset: int,
    size: int,
) -> tuple[Tensor, Tensor]:
    """Σ share·value, and its gradient by these logits ``[T, V / ranks]`` (empty unless wanted).

    ``share`` ``[T]``; ``settings`` ``[3]``: the weights of the divergence and of the label loss
    (``shape`` has one of the two), and τ.
    """
    require_indices("label", labels, size)
    gradient = student.to(_kept(student), copy=True)
    body = ShardedBody(ChunkSpec.read(shape), ColumnRange(offset, size), group, wanted, False)
    with torch.no_grad():
        total = body(Chunk(gradient, teacher, None, labels, share, share, settings)).sum()
    return total, gradient if wanted else gradient.new_empty(0)


def _kept(logits: Tensor) -> torch.dtype:
    """The dtype of the saved gradient: float32 for float16, which needs the loss scale first."""
    return torch.float32 if logits.dtype == torch.float16 else logits.dtype


@logit_operator.register_fake
def _(student: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    settings, wanted = rest[3], rest[5]
    gradient = torch.empty_like(student, dtype=_kept(student))
    return settings.new_empty(()), gradient if wanted else gradient.new_empty(0)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.dtype = inputs[0].dtype
    ctx.save_for_backward(output[1])
    ctx.set_materialize_grads(False)


def _scale(ctx: Any, of_total: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    require_first_order()
    (saved,) = ctx.saved_tensors
    gradient = None if of_total is None else scaled(saved, of_total).to(ctx.dtype)
    return (gradient, *[None] * 9)


logit_operator.register_autograd(_scale, setup_context=_save)


def divergence(
    kind: Divergence,
    plain: Callable[..., Tensor],
    student: DTensor,
    teacher: Tensor,
    temperature: Tensor | float,
    weights: Tensor | None,
) -> Tensor:
    """``plain(student, teacher, temperature=, weights=)`` of DTensors; ``kind`` describes it."""
    mesh_of(student, teacher)
    where = whole_sums(student)
    z, t = where.to_local(), placed(teacher, where.device_mesh, where.placements)
    share = _share(where, weights)
    if (axis := vocabulary_axis(where)) is None:
        mean = plain(z, t.to_local(), temperature=temperature, weights=share)
        return _summed(where, mean * share.sum())
    shape = ChunkSpec((kind,), student.shape[-1])
    _require_constants(teacher, temperature)
    tau = torch.as_tensor(temperature, dtype=share.dtype, device=share.device)
    one = torch.ones_like(tau)
    settings = torch.stack([one, one, tau.reshape(())])
    return _on_columns(where, axis, z, t.to_local(), None, share, settings, shape)


def label_loss(
    plain: Callable[..., Tensor],
    student: DTensor,
    labels: Tensor,
    weights: Tensor | None,
    label_smoothing: float,
    z_loss: float,
) -> Tensor:
    """``plain(student, labels, weights=, ...)`` of DTensors."""
    where = whole_sums(student)
    counted = (_like(labels, weights) != IGNORE).float()
    share = _share(where, counted if weights is None else counted * weights)
    own = tokens_of(where, labels)
    if (axis := vocabulary_axis(where)) is None:
        options = {"label_smoothing": label_smoothing, "z_loss": z_loss}
        mean = plain(where.to_local(), own, weights=share, **options)
        return _summed(where, mean * share.sum())
    own = torch.where(own == IGNORE, 0, own)
    shape = ChunkSpec(label_smoothing=label_smoothing, z_loss=z_loss, labelled=True)
    settings = share.new_ones(3)
    return _on_columns(where, axis, where.to_local(), None, own, share, settings, shape)


def _on_columns(
    where: DTensor,
    axis: int,
    z: Tensor,
    teacher: Tensor | None,
    labels: Tensor | None,
    share: Tensor,
    settings: Tensor,
    shape: ChunkSpec,
) -> Tensor:
    _require_constants(share)
    mesh, size = where.device_mesh, where.shape[-1]
    offset, _ = chunk_of(mesh, axis, size)
    flat = [None if x is None else x.flatten(0, -2) for x in (z, teacher)]
    if not z.shape[-1]:  # a rank without columns computes one that does not exist
        flat = [None if x is None else x.new_zeros(x.shape[0], 1) + x.sum() for x in flat]
    assert flat[0] is not None
    wanted = torch.is_grad_enabled() and flat[0].requires_grad
    total, _ = logit_operator(
        flat[0],
        flat[1],
        None if labels is None else labels.flatten(),
        share.flatten(),
        settings,
        shape.text,
        wanted,
        mesh.get_group(axis).group_name,
        offset,
        size,
    )
    return _summed(where, total)


def _require_constants(*values: Any) -> None:
    """Raise OptionError if a value requires a gradient: only the student's logits get one."""
    for value in values:
        if torch.is_grad_enabled() and isinstance(value, Tensor) and value.requires_grad:
            raise OptionError(
                "on a sharded vocabulary a teacher, a temperature or weights that learn get no "
                "gradient from losses of logits: detach() them, or replicate the logits"
            )


def whole_sums(x: DTensor) -> DTensor:
    """``x`` with plain shards and replicas only: pending sums are reduced."""
    return x.redistribute(x.device_mesh, [countable(p) for p in x.placements])


def vocabulary_axis(x: DTensor) -> int | None:
    """The mesh dimension that shards the vocabulary; ``None`` if none does."""
    axes = [i for i, p in enumerate(x.placements) if p.is_shard(x.ndim - 1)]
    if len(axes) > 1:
        raise ShapeError(f"logits {x.placements}: the vocabulary is sharded more than once")
    return axes[0] if axes else None


def _of_tokens(x: DTensor) -> list[Placement]:
    """The placements of the tokens of logits ``x``."""
    return [Replicate() if p.is_shard(x.ndim - 1) else p for p in x.placements]


def tokens_of(where: DTensor, x: Tensor) -> Tensor:
    """The entries of ``x``, indexed by token, that belong to the local logits."""
    return placed(x, where.device_mesh, _of_tokens(where)).to_local()


def _like(x: Tensor, other: Tensor | None) -> Tensor:
    """``x`` as a DTensor where ``other`` is one, so that they can be multiplied."""
    if isinstance(other, DTensor) and not isinstance(x, DTensor):
        return placed(x, other.device_mesh, [Replicate()] * other.device_mesh.ndim)
    return x


def _share(where: DTensor, weights: Tensor | None) -> Tensor:
    """The shares w / Σw of the local tokens, with Σw over all tokens."""
    if weights is None:
        count = where.shape[:-1].numel()
        local = where.to_local()
        return torch.full(local.shape[:-1], 1.0 / count, device=local.device)
    weights = weights.to(wide(where).dtype)
    total = weights.sum()
    if isinstance(total, DTensor):
        total = total.full_tensor()
    return tokens_of(where, weights) / torch.where(total == 0, torch.ones_like(total), total)


def _summed(where: DTensor, local: Tensor) -> Tensor:
    """The sum of ``local`` over ranks with different tokens, on every rank."""
    dims = {i for i, p in enumerate(_of_tokens(where)) if p.is_shard()}
    return summed(local, where.device_mesh, dims)
