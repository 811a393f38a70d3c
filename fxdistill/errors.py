"""Every way of asking for something that cannot be, one class each.

A message says what was asked, what exists, and what to do about it.
"""

import difflib
from collections.abc import Iterable


class FxDistillError(Exception):
    """The base of everything that fxdistill raises on purpose."""


class OptionError(FxDistillError, ValueError):
    """An argument of ``wrap`` or ``set`` is not one that exists."""


class PathError(FxDistillError, ValueError):
    """A mapping names a module that the model does not have."""


class CountError(FxDistillError, ValueError):
    """A pattern matches another number of modules in the student than in the teacher."""


class PortError(FxDistillError, ValueError):
    """A port names something that the module does not take or return."""


class ShapeError(FxDistillError, ValueError):
    """A student value and the teacher value it is compared with have different shapes."""


class TapError(FxDistillError, RuntimeError):
    """A matched module was not run, or its value cannot be reached."""


class CheckpointError(TapError):
    """Reentrant activation checkpointing cuts a tap off from the student's parameters."""


class FrozenStudentError(FxDistillError, ValueError):
    """The student has no parameter to train."""


class ModeError(FxDistillError, RuntimeError):
    """A module of both towers would have to be in train and in eval mode at once."""


class DeviceError(FxDistillError, ValueError):
    """The batch, the student and the teacher are not on one device."""


class LogitsError(FxDistillError, ValueError):
    """A term needs logits, and the model returns none."""


class VocabularyError(FxDistillError, ValueError):
    """The two vocabularies differ by more than padding."""


class TaskError(FxDistillError, ValueError):
    """It cannot be told how the labels line up with the logits."""


class BatchError(FxDistillError, ValueError):
    """A call-time tensor (labels, masks, weights) has a shape that fits nothing."""


class CaptureError(FxDistillError, RuntimeError):
    """The models could not be captured as one graph."""


class PassError(FxDistillError, RuntimeError):
    """A pass raised, or left an invalid graph."""


def did_you_mean(asked: str, existing: Iterable[str], limit: int = 3) -> str:
    """Name the entries of ``existing`` that are nearest to ``asked``, for use in a message."""
    names = list(existing)
    close = difflib.get_close_matches(asked, names, n=limit, cutoff=0.4) or names[:limit]
    return ", ".join(repr(name) for name in close) if close else "none"
