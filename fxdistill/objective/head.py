"""``Head``: further logits of a student, beside its own, and what they learn from."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import nn

from fxdistill.errors import (
    FxDistillError,
    OptionError,
    PathError,
    PortError,
    did_you_mean,
    gather,
    raise_together,
)
from fxdistill.losses.names import Loss
from fxdistill.mapping.teachers import Teachers
from fxdistill.models.axes import channel_axis
from fxdistill.models.conventions import Task
from fxdistill.models.tap import Tap, Tower, module_names
from fxdistill.objective.term import LOGITS, HeadTerm, LabelTerm, LogitTerm

_PORT = re.compile(r"\w*(\.\w+|\[\d+\])*")
_NAME = re.compile(r"\w+")


@dataclass(frozen=True)
class Head:
    """Further logits of the student: an auxiliary classifier, or a head that predicts further.

    Its terms are ``name:logits`` (where ``logit_weight`` is not 0) and ``name:labels``; the total
    gains logit_weight · L + label_weight · L under ``wrap``'s weights of the same names, with its
    losses and τ. Of a student that predicts several tokens (MTP; Gloeckle et al., 2024) every head
    learns from labels, and by default only its first, the student's own logits, from the teacher.

    A term is the mean over the predictions of the head that count. Where gradients are accumulated,
    a call's ``num_items`` counts those of the next token, of which a head that looks further ahead
    makes fewer. Its term is then its mean over the micro-batch times the micro-batch's share of
    ``num_items``: these add up to one mean where all micro-batches have as many predictions of the
    head for each of the next token (rows of one length), and nearly so elsewhere. They do so
    always with ``num_head_items={name: the head's own number}``.

    Args:
        logits: The value, as a path of the student with a port: ``"blocks.3"`` is the output of
            that module, ``"blocks.3:output[1]"`` a part of it, ``":mtp_logits[0]"`` a part of the
            model's own output.
        module: What makes logits of that value: a module, or ``"auto"``, the mean over places or
            tokens where the student's logits have none, and a linear layer to as many classes. Of a
            map the channels may be on axis 1 or last: the student is asked which. It lives in
            ``distiller.heads``, is trained and saved there, and is no part of the student.
        teacher: What the logit loss compares with: ``"logits"``, the teacher's logits; ``"self"``,
            the student's own logits, without gradient; or a path of the teacher with a port (of
            several teachers, of the first).
        shift: How many places ahead a causal head predicts: the labels are shifted by that, and it
            is compared with what the teacher's own logits predict for the same token; a value of
            the teacher's at another path is taken place by place. Default 1.
        logit_weight: The weight of its logit loss; 0: there is none.
        label_weight: The weight of its label loss; 0: there is none.
    """

    logits: str
    module: nn.Module | Literal["auto"] | None = field(default=None, kw_only=True)
    teacher: str = field(default="logits", kw_only=True)
    shift: int | None = field(default=None, kw_only=True)
    logit_weight: float = field(default=0.0, kw_only=True)
    label_weight: float = field(default=1.0, kw_only=True)


def tap_of_text(text: Any, model: nn.Module, what: str) -> Tap:
    """The value that a path with a port names; PathError or PortError where there is none."""
    if not isinstance(text, str) or not text:
        raise PathError(f"{what}={text!r}: the path of a module, with ':' and a port behind it")
    path, _, port = text.partition(":")
    path, _, call = path.partition("@")
    if path and path not in (names := module_names(model)):
        near = did_you_mean(path, names)
        raise PathError(f"{what}={text!r}: no module {path!r}. Nearest: {near}.")
    if not _PORT.fullmatch(port) or (call and not call.isdecimal()):
        raise PortError(
            f"{what}={text!r}: behind ':' stands a port, such as 'output[1]', 'mtp_logits[0]' or "
            "'output.logits'"
        )
    if port and not re.match(r"(output|input)\b", port):
        port = f"output{port}" if port.startswith(("[", ".")) else f"output.{port}"
    return Tap(path, port or "output", int(call or 0))


_OWN_LOGITS = Tap("", "output.logits")  # ":logits", the logits of the model itself


def head_terms_of(
    heads: Mapping[str, Head] | None,
    student: nn.Module,
    teachers: Teachers,
    losses: tuple[Sequence[Loss], Sequence[Loss]],
    task: Task | None,
) -> tuple[HeadTerm, ...]:
    """The heads as terms; ``losses`` are the logit loss and the label loss, if they are on.

    Raises all errors of all heads together.
    """
    problems: list[FxDistillError] = []
    if heads is not None and not isinstance(heads, Mapping):
        raise OptionError(f"heads={heads!r}: a dict of fxdistill.Head by name")
    made = [
        gather(problems, _term, name, head, student, teachers, losses, task)
        for name, head in (heads or {}).items()
    ]
    raise_together(problems)
    return tuple(head for head in made if head is not None)


def _term(
    name: Any,
    head: Any,
    student: nn.Module,
    teachers: Teachers,
    losses: tuple[Sequence[Loss], Sequence[Loss]],
    task: Task | None,
) -> HeadTerm:
    _check(name, head, student, task)
    tap = tap_of_text(head.logits, student, f"heads[{name!r}].logits")
    compared, target = _targets(name, head, teachers)
    of_logits, of_labels = losses
    logits = labels = None
    if head.logit_weight != 0:
        if not of_logits:
            raise OptionError(
                f"heads[{name!r}] has logit_weight={head.logit_weight}, and logit_loss=None: name "
                "a logit_loss, which is that of the student's own logits too. Of a student that "
                "has none of its own, wrap a module around it that returns these as its logits."
            )
        constant = compared == ("student",)
        logits = LogitTerm(of_logits[0], f"{name}:logits", teachers=compared, constant=constant)
    if head.label_weight != 0 and of_labels:
        labels = LabelTerm(of_labels[0], f"{name}:labels")
    if logits is None and labels is None:
        raise OptionError(
            f"heads[{name!r}] learns from nothing: label_weight= (with a label_loss) and "
            "logit_weight= (with a logit_loss) say from what"
        )
    shift, has_module = head.shift or 1, head.module is not None
    term = HeadTerm(name, tap, shift, has_module, logits, labels, target)
    if not isinstance(head.module, str):
        return term
    return replace(term, pools=True, channels=channel_axis(student, tap))


def _targets(name: str, head: Head, teachers: Teachers) -> tuple[tuple[Tower, ...], Tap]:
    """The models that a head is compared with, and which value of theirs."""
    if head.logit_weight == 0:
        return (), LOGITS
    if head.teacher == "self":
        return ("student",), LOGITS
    if not teachers.models:
        raise OptionError(
            f"heads[{name!r}] is compared with the teacher ({head.teacher!r}), and there is none: "
            "teacher='self' takes the student's own logits; or logit_weight=0"
        )
    if head.teacher == "logits":
        return tuple(teachers.models), LOGITS
    first, model = next(iter(teachers.models.items()))
    tap = tap_of_text(head.teacher, model, f"heads[{name!r}].teacher")
    return (first,), LOGITS if tap == _OWN_LOGITS else tap


def _check(name: Any, head: Any, student: nn.Module, task: Task | None) -> None:
    """Raise OptionError for what is no head, and for options that cannot be."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise OptionError(f"the head's name {name!r}: letters, digits and _; it names its losses")
    if not isinstance(head, Head):
        raise OptionError(f"heads[{name!r}] is {head!r}: fxdistill.Head('path of its logits', ...)")
    if head.module is not None and hasattr(nn.ModuleDict(), name):
        raise OptionError(f"the head's name {name!r}: distiller.heads has an attribute called so")
    for option in ("logit_weight", "label_weight"):
        value = getattr(head, option)
        if (
            isinstance(value, bool)
            or not isinstance(value, (int, float))
            or not math.isfinite(value)
        ):
            raise OptionError(f"heads[{name!r}].{option}={value!r}: a finite number")
    shift = head.shift
    if shift is not None and (isinstance(shift, bool) or not isinstance(shift, int) or shift < 1):
        raise OptionError(f"heads[{name!r}].shift={shift!r}: a number of places, 1 or more")
    if shift is not None and shift > 1 and task not in (None, "causal_lm"):
        raise OptionError(
            f"heads[{name!r}].shift={shift}: only a causal model predicts tokens ahead, and the "
            f"task is {task!r}"
        )
    if not (head.module is None or head.module == "auto" or isinstance(head.module, nn.Module)):
        raise OptionError(f"heads[{name!r}].module={head.module!r}: 'auto', an nn.Module, or None")
    if isinstance(head.module, nn.Module):
        own = {id(p) for p in student.parameters()}
        if any(id(p) in own for p in head.module.parameters()):
            raise OptionError(
                f"heads[{name!r}].module is a part of the student: name its path as logits, "
                "without a module"
            )
