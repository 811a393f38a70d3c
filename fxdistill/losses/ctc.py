"""Connectionist temporal classification: labels without places, against logits of frames."""

from typing import Any

import torch
from torch import Tensor

from fxdistill.base.figures import shown
from fxdistill.base.nodes import one_node
from fxdistill.base.tensors import is_placed, wide
from fxdistill.errors import ShapeError
from fxdistill.losses.fused.gradients import require_first_order
from fxdistill.losses.reduce import IGNORE, counted
from fxdistill.losses.shapes import differ, require_grid


@one_node
def ctc(
    student_logits: Tensor,
    labels: Tensor,
    *,
    weights: Tensor | None = None,
    blank: int = 0,
    zero_infinity: bool = False,
) -> Tensor:
    """-log p(labels) over all ways to place them on the frames, for each label.

    Σ over samples of -log p, over the number of labels that are not -100 (Graves et al., 2006);
    samples without labels do not count.
    torch's own loss cannot be captured, because the sizes inside it depend on the labels; this is
    one operator of the graph, which forms the gradient in its forward. It has no second derivative,
    and on a GPU it waits for the lengths.

    Args:
        student_logits: ``[B, F, V]``, for F frames.
        labels: ``[B, T]``, at most F for each sample; -100 is padding.
        weights: ``[B, F]``; frames of weight 0 do not count, and stand behind those that do.
        blank: The entry of the vocabulary that means "no label" (Hugging Face: the pad token).
        zero_infinity: Whether samples with more labels than frames have a loss of 0, not ∞.

    Raises ShapeError for other shapes.
    """
    axes = student_logits.ndim, labels.ndim
    if axes != (3, 2) or differ(labels.shape[:1], student_logits.shape[:1]):
        raise ShapeError(
            f"ctc takes logits [B, F, V] of frames and labels [B, T], not "
            f"{shown(student_logits.shape)} and {shown(labels.shape)}"
        )
    if weights is not None:
        require_grid("weights", weights, student_logits)
    if is_placed(student_logits):
        student_logits = student_logits.full_tensor()
    logits = wide(student_logits)
    heard = torch.ones(logits.shape[:-1], device=logits.device) if weights is None else weights
    logits = counted(logits, heard)
    # A sample without labels says nothing of its frames.
    frames = (heard > 0).sum(-1) * (labels != IGNORE).any(-1)
    value: Tensor = _ctc(logits, labels, frames, blank, zero_infinity)[0]
    count = (labels != IGNORE).sum()
    return value / torch.where(count == 0, torch.ones_like(count), count)


@torch.library.custom_op("fxdistill::ctc", mutates_args=())
def _ctc(
    logits: Tensor, labels: Tensor, frames: Tensor, blank: int, zero_infinity: bool
) -> tuple[Tensor, Tensor]:
    """Σ over samples of -log p, and its gradient by the logits."""
    log_p = logits.log_softmax(-1).transpose(0, 1)
    labelled = labels != IGNORE
    given = (labels[labelled], frames, labelled.sum(-1), blank)
    values, alpha = torch.ops.aten._ctc_loss.Tensor(log_p, *given, zero_infinity)
    ones, targets = torch.ones_like(values), (*given[:3], values, alpha)
    by_log_p = torch.ops.aten._ctc_loss_backward.Tensor(ones, log_p, *targets, blank, zero_infinity)
    gradient = by_log_p - log_p.exp() * by_log_p.sum(-1, keepdim=True)
    if zero_infinity:
        values = torch.where(values.isinf(), torch.zeros_like(values), values)
    return values.sum(), gradient.transpose(0, 1).contiguous()


@_ctc.register_fake
def _(
    logits: Tensor, labels: Tensor, frames: Tensor, blank: int, zero_infinity: bool
) -> tuple[Tensor, Tensor]:
    return logits.new_empty(()), torch.empty_like(logits, memory_format=torch.contiguous_format)


def _keep(ctx: Any, inputs: Any, output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1])


def _scale(ctx: Any, by_value: Tensor, _by_gradient: Any) -> tuple[Tensor, None, None, None, None]:
    require_first_order("ctc", "compile=False with torch's own loss has one.")
    return by_value * ctx.saved_tensors[0], None, None, None, None


_ctc.register_autograd(_scale, setup_context=_keep)
