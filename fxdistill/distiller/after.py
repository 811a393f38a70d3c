"""What a step that failed in torch failed of, where its inputs tell."""

from dataclasses import replace

import torch
from torch import Tensor

from fxdistill.distiller import dry
from fxdistill.distiller.modes import Request, Steps
from fxdistill.errors import BatchError, FxDistillError
from fxdistill.losses.names import aligns_labels, is_named
from fxdistill.losses.reduce import IGNORE
from fxdistill.objective.term import LOGITS


def raise_label_error(error: Exception, request: Request, steps: Steps) -> None:
    """Raise the error that ``label_error`` finds, if it finds one."""
    if (ours := label_error(error, request, steps)) is not None:
        raise ours from error


def label_error(error: Exception, request: Request, steps: Steps) -> BatchError | None:
    """The error that says which label is of no class, if that is what torch failed of.

    Torch says that an index is out of bounds. Labels are looked at after a failure only: each look
    waits for the device.
    """
    labels = request.call.batch.labels
    indexes = [
        t for t in request.objective.labels if is_named(t.loss) and not aligns_labels(t.loss)
    ]
    if isinstance(error, FxDistillError) or labels is None or not indexes:
        return None
    classes = _classes(request, steps)
    if classes is None:
        return None
    try:
        wrong = _wrong(labels, classes)
    except RuntimeError:  # the device has failed, and answers nothing more
        return None
    if not wrong:
        return None
    shown = ", ".join(map(str, wrong[:5])) + (", ..." if len(wrong) > 5 else "")
    return BatchError(
        f"labels hold {shown}, and the student's logits have {classes} classes: 0 to "
        f"{classes - 1}. {IGNORE} marks what has no label."
    )


def _wrong(labels: Tensor, classes: int) -> list[int]:
    """The labels that are of no class."""
    outside = (labels != IGNORE) & ((labels < 0) | (labels >= classes))
    return [int(label) for label in torch.unique(labels[outside]).tolist()]


def _classes(request: Request, steps: Steps) -> int | None:
    """How many columns the main model's logits have, from a run on fake tensors."""
    main = request.towers.main
    of_logits = replace(
        request.objective, features=(), logits=(), labels=(), heads=(), returns=main
    )
    try:
        values = dry.fake_values(replace(request, objective=of_logits), steps)
    except Exception:  # of the models' own code: then torch's error stands
        return None
    return int(values[main, LOGITS].shape[-1]) if (main, LOGITS) in values else None
