"""The losses by name."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from fxdistill.errors import OptionError, did_you_mean
from fxdistill.losses.ctc import ctc
from fxdistill.losses.hidden import cosine, l1, l2, mse, smooth_l1
from fxdistill.losses.labels import cross_entropy
from fxdistill.losses.logits import (
    forward_kl,
    jsd,
    mse_logits,
    reverse_kl,
    sigmoid_kl,
    soft_cross_entropy,
    total_variation,
)

Loss = Callable[..., Tensor]

FEATURE_LOSSES: dict[str, Loss] = {f.__name__: f for f in (mse, l2, smooth_l1, l1, cosine)}
LOGIT_LOSSES: dict[str, Loss] = {
    f.__name__: f
    for f in (
        *(forward_kl, reverse_kl, jsd, soft_cross_entropy),
        *(total_variation, mse_logits, sigmoid_kl),
    )
}
LABEL_LOSSES: dict[str, Loss] = {f.__name__: f for f in (cross_entropy, ctc)}
_NAMED = (*FEATURE_LOSSES.values(), *LOGIT_LOSSES.values(), *LABEL_LOSSES.values())


def is_named(loss: Any) -> bool:
    """Whether ``loss`` is ``None``, a name, or a loss of this package, also as a partial."""
    plain = getattr(loss, "func", loss)
    return plain is None or isinstance(plain, str) or any(plain is f for f in _NAMED)


def aligns_labels(loss: Any) -> bool:
    """Whether a label loss takes labels of any grid, as they are; a callable may say that it does.

    It says so by an attribute, ``loss.aligns_labels = True``.
    """
    plain = getattr(loss, "func", loss)
    return plain is ctc or getattr(plain, "aligns_labels", False) is True


def loss_of(loss: Any, table: dict[str, Loss], what: str) -> Loss:
    """Turn a name or a callable into a loss; ``what`` names the argument in the error."""
    if isinstance(loss, str) and loss in table:
        return table[loss]
    if callable(loss):
        return loss  # type: ignore[no-any-return]
    raise OptionError(
        f"{what}={loss!r} is no loss. Nearest: {did_you_mean(str(loss), table)}; all of them: "
        f"{', '.join(table)}; or pass a callable (functools.partial for options)."
    )


def loss_name(loss: Any) -> str:
    """The name of a loss, also inside ``functools.partial``."""
    if isinstance(loss, str):
        return loss
    return getattr(getattr(loss, "func", loss), "__name__", type(loss).__name__)
