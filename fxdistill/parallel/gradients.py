"""Clip gradients that are sharded over ranks by the norm of all of them.

Private to torch and used here: ``_foreach_norm`` and ``_foreach_mul_``, which launch once for all
gradients, as ``torch.nn.utils.clip_grad_norm_`` does.
"""

import math
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate

from fxdistill.base.placement import local_part
from fxdistill.base.tensors import is_placed
from fxdistill.errors import OptionError

Groups = frozenset[str]  # the names of the process groups over which a value is still to be summed
ALONE = 2**16  # elements from which a gradient is reduced alone, without a copy


@torch.no_grad()
def clip_grad_norm_(
    parameters: Iterable[Tensor], max_norm: float, norm_type: float = 2.0
) -> Tensor:
    """Scale all gradients by min(1, max_norm / (norm + 1e-6)), in place; return the norm.

    norm = (Σ |g|^p)^(1/p) over every element g of all gradients, each counted once, with p =
    ``norm_type`` > 0, or max |g| for ``math.inf``. The result is a plain 0-d tensor, float32 at
    least where a gradient is a DTensor, and the same on every rank; the host does not wait for it.

    Gradients are DTensors of any placements, on one mesh or several, or plain tensors that are the
    same on every rank and count once. A pending sum (Partial, as the gradient of a norm's weight is
    when tokens are sharded) is reduced first and replaces ``.grad``, so that the optimizer need not
    reduce it. All ranks call this, with their parameters in the same order; parameters without a
    gradient are skipped. Without DTensors this is ``torch.nn.utils.clip_grad_norm_``.

    Raises:
        OptionError: ``norm_type`` is not above 0.
    """
    if not norm_type > 0:
        raise OptionError(f"norm_type is {norm_type}: give a number above 0, or math.inf")
    learnt = [p for p in parameters if p.grad is not None]
    if not any(is_placed(p.grad) for p in learnt):
        return nn.utils.clip_grad_norm_(learnt, max_norm, norm_type)
    _form_sums(learnt)
    gradients = [p.grad for p in learnt if p.grad is not None]
    norm = _norm(gradients, norm_type)
    # Multiply even by 1: a test for 1 would make the host wait.
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_([local_part(g) for g in gradients], scale)
    return norm


def total_norm(gradients: Iterable[Tensor]) -> Tensor:
    """The 2-norm of gradients of any placements, the same on every rank; they stay as they are."""
    return _norm([_summed(g) for g in gradients], 2.0)


def _summed(gradient: Tensor) -> Tensor:
    """A gradient without pending sums."""
    if not isinstance(gradient, DTensor) or not any(k.is_partial() for k in gradient.placements):
        return gradient
    kinds = [Replicate() if kind.is_partial() else kind for kind in gradient.placements]
    return gradient.redistribute(gradient.device_mesh, kinds)


def _norm(gradients: list[Tensor], order: float) -> Tensor:
    """The norm, by one all-reduce per process group, of one number per way of sharding."""
    parts: dict[Groups, list[Tensor]] = {}
    groups: dict[str, dist.ProcessGroup] = {}  # in the order of first use, the same on all ranks
    dtype = torch.float32
    for g in gradients:
        of_shards = _groups_of_shards(g)
        groups.update(of_shards)
        parts.setdefault(frozenset(of_shards), []).append(local_part(g))
        dtype = torch.promote_types(dtype, g.dtype)
    sums = {over: _power_sum(some, order, dtype) for over, some in parts.items()}
    for name, group in groups.items():
        waiting = [over for over in sums if name in over]
        reduced = _reduced(torch.stack([sums.pop(over) for over in waiting]), order, group)
        for over, value in zip(waiting, reduced.unbind(), strict=True):
            rest = over - {name}
            sums[rest] = _joined(sums[rest], value, order) if rest in sums else value
    (total,) = sums.values()
    return total if math.isinf(order) else total ** (1 / order)


def _groups_of_shards(gradient: Tensor) -> dict[str, dist.ProcessGroup]:
    """By name, the process groups whose ranks hold different elements."""
    if not isinstance(gradient, DTensor):
        return {}
    mesh = gradient.device_mesh
    dims = [i for i, p in enumerate(gradient.placements) if not p.is_replicate()]
    return {group.group_name: group for group in map(mesh.get_group, dims)}


def _power_sum(parts: list[Tensor], order: float, dtype: torch.dtype) -> Tensor:
    """Σ |g|^p, or max |g|, of the local tensors."""
    held = [part for part in parts if part.numel()]  # an uneven shard may be empty
    if not held:
        return torch.zeros((), dtype=dtype, device=parts[0].device)
    norms = torch.stack(torch._foreach_norm(held, order, dtype=dtype))
    return norms.amax() if math.isinf(order) else (norms**order).sum()


def _joined(a: Tensor, b: Tensor, order: float) -> Tensor:
    return torch.maximum(a, b) if math.isinf(order) else a + b


def _reduced(values: Tensor, order: float, group: dist.ProcessGroup) -> Tensor:
    """The sum of ``values`` over the ranks of ``group``, or their maximum for p = ∞."""
    if not math.isinf(order):
        dist.all_reduce(values, group=group)
        return values
    # A backend may drop a NaN from a maximum, and not on every rank: reduce a flag for it as well.
    lost = values.isnan()
    both = torch.stack([torch.where(lost, 0, values), lost.to(values.dtype)])
    dist.all_reduce(both, dist.ReduceOp.MAX, group=group)
    return torch.where(both[1] > 0, torch.nan, both[0])


def _form_sums(parameters: list[Tensor]) -> None:
    """Reduce the pending sums of gradients; small ones share a collective."""
    packs: dict[tuple[object, ...], list[Tensor]] = {}
    for i, p in enumerate(parameters):
        g = p.grad
        if isinstance(g, DTensor) and any(kind.is_partial() for kind in g.placements):
            alone = i if g.to_local().numel() >= ALONE else None
            packs.setdefault((g.device_mesh, g.placements, g.dtype, alone), []).append(p)
    for pack in packs.values():
        _form_together(pack)


def _form_together(parameters: list[Tensor]) -> None:
    """Reduce gradients of equal placements in one collective, and replace ``.grad``."""
    gradients = [p.grad for p in parameters if isinstance(p.grad, DTensor)]
    mesh, placements = gradients[0].device_mesh, gradients[0].placements
    locals_ = [g.to_local() for g in gradients]
    flat = [x.flatten() for x in locals_]
    summed = _formed(torch.cat(flat) if len(flat) > 1 else flat[0], mesh, placements)
    kinds = [Replicate() if kind.is_partial() else kind for kind in placements]
    pieces = summed.split([x.numel() for x in flat])
    for p, g, x, piece in zip(parameters, gradients, locals_, pieces, strict=True):
        part = piece.view(x.shape)
        stride = torch.empty(g.shape, device="meta").stride()
        p.grad = DTensor.from_local(
            part, mesh, kinds, run_check=False, shape=g.shape, stride=stride
        )


def _formed(flat: Tensor, mesh: DeviceMesh, placements: tuple[Placement, ...]) -> Tensor:
    """Reduce the pending sums of local values; sharded mesh dimensions stay as they are."""
    pending = [kind if kind.is_partial() else Replicate() for kind in placements]
    whole = DTensor.from_local(flat, mesh, pending, run_check=False)
    return whole.redistribute(mesh, [Replicate()] * mesh.ndim).to_local()
