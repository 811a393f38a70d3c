"""The exceptions of fxdistill, one class for each kind of problem.

A message says what was asked for, what exists, and what to do about it.
"""

import difflib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

T = TypeVar("T")


class FxDistillError(Exception):
    """The base of everything that fxdistill raises on purpose.

    If several things are wrong, ``problems`` holds an error for each.
    """

    problems: tuple["FxDistillError", ...] = ()


class OptionError(FxDistillError, ValueError):
    """An argument is unknown, or has a value that is not allowed."""


class PathError(FxDistillError, ValueError):
    """A mapping names a module that the model does not have."""


class PatternError(PathError):
    """A path or pattern cannot be read."""


class DuplicateError(FxDistillError, ValueError):
    """Two entries of a mapping use the same student value, or one pair is listed twice."""


class CountError(FxDistillError, ValueError):
    """A pattern matches different numbers of modules in the student and in the teacher."""


class PortError(FxDistillError, ValueError):
    """A port names something that the module does not take or return."""


class ShapeError(FxDistillError, ValueError):
    """A student value and the teacher value it is compared with have different shapes."""


class LayoutError(ShapeError):
    """A rearrange or reduce pattern does not fit its value."""


class ProjectionError(FxDistillError, ValueError):
    """The widths of a projection are unknown or do not fit."""


class DtypeError(FxDistillError, ValueError):
    """A matched value has a dtype that no loss can compare."""


class StructureError(FxDistillError, ValueError):
    """``fxdistill.match`` cannot recognise or pair the layers of the models."""


class MappingFileError(FxDistillError, ValueError):
    """A mapping cannot be read from a file, or written to one."""


class LogError(FxDistillError, ValueError):
    """Losses cannot be appended to a log file."""


class SaveError(FxDistillError, OSError):
    """A checkpoint or a model cannot be written; what was there before is whole."""


class ResumeError(FxDistillError, ValueError):
    """A checkpoint is missing or damaged, or of another run; nothing of this run is changed."""


class CommandError(FxDistillError, ValueError):
    """An argument of the command line, or the object that it names, cannot be used."""


class TapError(FxDistillError, RuntimeError):
    """A matched module did not run, or its value cannot be read."""


class CheckpointError(TapError):
    """Reentrant activation checkpointing cuts a tap off from the student's parameters."""


class FrozenStudentError(FxDistillError, ValueError):
    """The student has no parameter to train."""


class ModeError(FxDistillError, RuntimeError):
    """A module that two models share would have to be in train and in eval mode at once."""


class DeviceError(FxDistillError, ValueError):
    """The batch, the models and the mesh are not on the same device."""


class MeshError(FxDistillError, ValueError):
    """Models and plan do not fit one device mesh, or its ranks disagree."""


class LogitsError(FxDistillError, ValueError):
    """A term needs logits, and the model returns none that it can use."""


class VocabularyError(FxDistillError, ValueError):
    """The two vocabularies differ by more than padding."""


class TaskError(FxDistillError, ValueError):
    """The student's task is unknown, so labels cannot be aligned with its logits."""


class BatchError(FxDistillError, ValueError):
    """An argument of a call (labels, masks, weights) is no tensor, or its shape does not fit."""


class CaptureError(FxDistillError, RuntimeError):
    """The models could not be captured as one graph."""


class StepError(FxDistillError, RuntimeError):
    """A step cannot run: a model or a loss raises for this call, compiled or not."""


class LoweringError(FxDistillError, RuntimeError):
    """The captured step could not be compiled by its backend."""


class RecompileError(FxDistillError, RuntimeError):
    """The calls differ in more ways than dynamo keeps compiled versions for."""


class PassError(FxDistillError, RuntimeError):
    """A pass raised, or left an invalid graph."""


class Problems(FxDistillError, ValueError):
    """Several things of different kinds are wrong; ``problems`` holds them."""


class MatchWarning(UserWarning):
    """A mapping or a call is valid, but a part of it has no effect."""


def raise_together(problems: Sequence[FxDistillError]) -> None:
    """Raise all ``problems`` as one error; do nothing if there are none.

    A single problem is raised as it is, several of one class as one error of that class, and
    others as ``Problems``.
    """
    each = [one for problem in problems for one in (problem.problems or (problem,))]
    if not each:
        return
    if len(each) == 1:
        raise each[0]
    kinds = {type(problem) for problem in each}
    text = "\n".join(f"  {i}. {problem}" for i, problem in enumerate(each, start=1))
    kind = kinds.pop() if len(kinds) == 1 else Problems
    error = kind(f"{len(each)} things are wrong:\n{text}")
    error.problems = tuple(each)
    raise error


def gather(problems: list[FxDistillError], fn: Callable[..., T], *args: Any) -> T | None:
    """Call ``fn``; append an FxDistillError that it raises to ``problems``, and return ``None``."""
    try:
        return fn(*args)
    except FxDistillError as error:
        problems.append(error)
        return None


def did_you_mean(asked: str, existing: Iterable[str], limit: int = 3) -> str:
    """Name the entries of ``existing`` that are most similar to ``asked``, for a message."""
    names = list(existing)
    close = difflib.get_close_matches(asked, names, n=limit, cutoff=0.4) or names[:limit]
    return ", ".join(repr(name) for name in close) if close else "none"


def is_slip(asked: str, name: str) -> bool:
    """Whether ``asked`` is ``name`` with one letter more, one fewer, or another one."""
    short, long = sorted((asked, name), key=len)
    if asked == name or len(long) - len(short) > 1:
        return False
    at = next((i for i, (a, b) in enumerate(zip(short, long, strict=False)) if a != b), len(short))
    return short[at + (len(short) == len(long)) :] == long[at + 1 :]
