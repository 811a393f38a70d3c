"""The losses by name."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from fxdistill.errors import OptionError, did_you_mean
from fxdistill.losses.attention import (
    attention_kl,
    attention_mse,
    relation_kl,
    transfer_matrix,
)
from fxdistill.losses.contrastive import info_nce
from fxdistill.losses.ctc import ctc
from fxdistill.losses.detection import detection_box, detection_classification
from fxdistill.losses.hidden import cosine, fitnet, l1, l2, mse, smooth_l1
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
from fxdistill.losses.maps import attention_transfer, fpn
from fxdistill.losses.memory_bank import CRD
from fxdistill.losses.relational import (
    angle_wise,
    distance_wise,
    gram,
    similarity_preserving,
)

Loss = Callable[..., Tensor]
# What a loss compares: values of one shape, place by place; the places of a sample, whose widths
# may differ; the samples of the batch, whose widths may differ, too, but for info_nce; or how
# tokens attend each other, in any number of heads.
OF_PLACES = (mse, l2, smooth_l1, l1, cosine, fitnet, detection_classification, detection_box)
OF_MAPS = (attention_transfer, fpn)
OF_SAMPLES = (gram, distance_wise, angle_wise, similarity_preserving, info_nce, CRD)
OF_ATTENTION = (attention_kl, attention_mse, relation_kl, transfer_matrix)

_OF_FEATURES = (*OF_PLACES, *OF_MAPS, *OF_SAMPLES, *OF_ATTENTION)
FEATURE_LOSSES: dict[str, Any] = {f.__name__: f for f in _OF_FEATURES}
LOGIT_LOSSES: dict[str, Loss] = {
    f.__name__: f
    for f in (
        *(forward_kl, reverse_kl, jsd, soft_cross_entropy),
        *(total_variation, mse_logits, sigmoid_kl),
    )
}
LABEL_LOSSES: dict[str, Loss] = {f.__name__: f for f in (cross_entropy, ctc)}
_NAMED = (*FEATURE_LOSSES.values(), *LOGIT_LOSSES.values(), *LABEL_LOSSES.values())


def plain_loss(loss: Any) -> Any:
    """What a partial is made of; a module may have an attribute of that name, and is none."""
    return loss.func if isinstance(loss, functools.partial) else loss


def is_named(loss: Any) -> bool:
    """Whether ``loss`` is ``None``, a name, or a loss of this package, also as a partial."""
    plain = plain_loss(loss)
    if plain is None or isinstance(plain, (str, CRD)):
        return True
    return any(plain is f for f in _NAMED)


Compared = Literal["shapes", "places", "samples", "attention", "anything"]
Sees = Literal["places", "whole samples", "samples together", "attention", "whole maps"]


class Kind(NamedTuple):
    """What a term has to know of its loss, read once.

    ``sees`` are places one by one, samples whole, or the samples of the batch together; or how
    tokens attend, a query at a time or all of a sample. ``named`` losses are the library's own;
    ``across`` says that samples of all ranks are compared.
    """

    name: str
    named: bool
    sees: Sees
    across: bool


def kind_of(loss: Any) -> Kind:
    """The kind of a loss of features."""
    sees: Sees = "places"
    if of_attention(loss):
        sees = "whole maps" if plain_loss(loss) is transfer_matrix else "attention"
    elif between_samples(loss):
        sees = "samples together"
    elif any(plain_loss(loss) is f for f in OF_MAPS):
        sees = "whole samples"
    options = getattr(loss, "keywords", None) or {}
    across = bool(options.get("across_ranks", getattr(loss, "across_ranks", True)))
    return Kind(loss_name(loss), is_named(loss), sees, across)


def compares(loss: Any) -> Compared:
    """What must agree in the two values that a loss of features compares.

    Their shapes; the places of maps and tokens, with any width; the samples, with any width; how
    tokens attend each other; or nothing, which a callable says by an attribute,
    ``loss.compares_shapes = "any"``.
    """
    plain = plain_loss(loss)
    if plain is attention_transfer:
        return "places"
    if of_attention(loss):
        return "attention"
    if between_samples(loss) and plain is not info_nce:
        return "samples"
    return "anything" if getattr(plain, "compares_shapes", "equal") == "any" else "shapes"


def of_attention(loss: Any) -> bool:
    """Whether a loss compares how tokens attend each other."""
    return any(plain_loss(loss) is f for f in OF_ATTENTION)


def needs_queries(loss: Any) -> bool:
    """Whether a loss of attention needs queries and keys, so that a map alone will not do."""
    options = getattr(loss, "keywords", None) or {}
    return plain_loss(loss) is relation_kl or bool(options.get("scores"))


def between_samples(loss: Any) -> bool:
    """Whether a loss compares the samples of a batch with each other."""
    plain = plain_loss(loss)
    return isinstance(plain, CRD) or any(plain is f for f in OF_SAMPLES)


def aligns_labels(loss: Any) -> bool:
    """Whether a label loss takes labels of any grid, as they are; a callable may say that it does.

    It says so by an attribute, ``loss.aligns_labels = True``.
    """
    plain = plain_loss(loss)
    return plain is ctc or getattr(plain, "aligns_labels", False) is True


def loss_of(loss: Any, table: dict[str, Loss], what: str) -> Loss:
    """Turn a name or a callable into a loss; ``what`` names the argument in the error.

    Raises OptionError for what is no loss, and for a partial of a loss with an option it lacks.
    """
    if isinstance(loss, str) and loss in table:
        return _ready(table[loss])
    if callable(loss):
        _check_options(loss, what)
        return _ready(loss)
    raise OptionError(
        f"{what}={loss!r} is no loss. Nearest: {did_you_mean(str(loss), table)}; all of them: "
        f"{', '.join(table)}; or pass a callable (functools.partial for options)."
    )


# What a step gives a loss, and no user: the values, their weights, the temperature of logits.
_GIVEN = ("student", "teacher", "student_logits", "teacher_logits", "labels", "weights")


def options_of(loss: Any) -> dict[str, inspect.Parameter]:
    """The options of a loss of this package, by name."""
    known = dict(inspect.signature(loss).parameters)
    given = (*_GIVEN, "temperature") if "student_logits" in known else _GIVEN
    return {name: parameter for name, parameter in known.items() if name not in given}


def _check_options(loss: Any, what: str) -> None:
    """Raise OptionError for a partial of a loss of this package with an option that it lacks."""
    plain = plain_loss(loss)
    if not isinstance(loss, functools.partial) or not any(plain is f for f in _NAMED):
        return
    known, name = options_of(plain), loss_name(loss)
    wrong = next((option for option in loss.keywords if option not in known), None)
    if wrong is None:
        return
    asked = f"{what}=functools.partial({name}, {wrong}={loss.keywords[wrong]!r})"
    if wrong == "temperature" and wrong in inspect.signature(plain).parameters:
        raise OptionError(f"{asked}: the temperature of logits is an option of wrap, temperature=")
    if wrong in inspect.signature(plain).parameters:
        raise OptionError(f"{asked}: the step gives a loss its {wrong}. Leave it out.")
    if not known:
        raise OptionError(f"{asked}: {name} has no options")
    raise OptionError(
        f"{asked}: {name} has no such option. Nearest: {did_you_mean(wrong, known)}; all of them: "
        f"{', '.join(known)}"
    )


def _ready(loss: Any) -> Loss:
    """``loss``; a class of modules, or a partial of one, becomes a module."""
    plain = plain_loss(loss)
    if isinstance(plain, type) and issubclass(plain, nn.Module):
        return loss()  # type: ignore[no-any-return]
    return loss  # type: ignore[no-any-return]


def loss_name(loss: Any) -> str:
    """The name of a loss, also inside ``functools.partial``."""
    if isinstance(loss, str):
        return loss
    return getattr(plain_loss(loss), "__name__", type(loss).__name__)
