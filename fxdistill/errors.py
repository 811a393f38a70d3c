"""Every way of asking for something that cannot be, one class each.

A message says what was asked, what exists, and what to do about it.
"""

import difflib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

T = TypeVar("T")


class FxDistillError(Exception):
    """The base of everything that fxdistill raises on purpose.

    Where several things are wrong, ``problems`` holds an error for each.
    """

    problems: tuple["FxDistillError", ...] = ()


class OptionError(FxDistillError, ValueError):
    """An argument of ``wrap`` or ``set`` is not one that exists."""


class PathError(FxDistillError, ValueError):
    """A mapping names a module that the model does not have."""


class PatternError(PathError):
    """A path or pattern cannot be read."""


class DuplicateError(FxDistillError, ValueError):
    """Two entries of a mapping claim one student value, or one pair stands there twice."""


class CountError(FxDistillError, ValueError):
    """A pattern matches another number of modules in the student than in the teacher."""


class PortError(FxDistillError, ValueError):
    """A port names something that the module does not take or return."""


class ShapeError(FxDistillError, ValueError):
    """A student value and the teacher value it is compared with have different shapes."""


class LayoutError(ShapeError):
    """A rearrange or reduce pattern does not fit the value that it is for."""


class ProjectionError(FxDistillError, ValueError):
    """A projection was asked for, and its widths cannot be known or do not fit."""


class DtypeError(FxDistillError, ValueError):
    """A matched value is not of a kind that a loss can compare."""


class StructureError(FxDistillError, ValueError):
    """``fxdistill.match`` cannot see the layers of a model."""


class MappingFileError(FxDistillError, ValueError):
    """A file with a mapping cannot be read, or a mapping cannot be written to one."""


class LogError(FxDistillError, ValueError):
    """Losses cannot be added to a file."""


class CommandError(FxDistillError, ValueError):
    """An argument of the command line, or what it names, is not what is needed."""


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


class MeshError(FxDistillError, ValueError):
    """Student, teacher and plan do not lie on one device mesh, or do not fit it."""


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


class StepError(FxDistillError, RuntimeError):
    """A model or a loss raises for this call, compiled or not."""


class LoweringError(FxDistillError, RuntimeError):
    """The captured step could not be compiled by its backend."""


class RecompileError(FxDistillError, RuntimeError):
    """The calls vary in more ways than dynamo keeps compiled versions."""


class PassError(FxDistillError, RuntimeError):
    """A pass raised, or left an invalid graph."""


class Problems(FxDistillError, ValueError):
    """Several things of different kinds are wrong; ``problems`` holds them."""


class MatchWarning(UserWarning):
    """A match that works and teaches nothing."""


def raise_together(problems: Sequence[FxDistillError]) -> None:
    """Raise what was found, all at once; nothing if nothing was.

    One problem is raised as it is; several of one class as one error of that class; else
    ``Problems``.
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
    """Call ``fn``; what it raises joins ``problems``, and ``None`` is returned."""
    try:
        return fn(*args)
    except FxDistillError as error:
        problems.append(error)
        return None


def did_you_mean(asked: str, existing: Iterable[str], limit: int = 3) -> str:
    """Name the entries of ``existing`` that are nearest to ``asked``, for use in a message."""
    names = list(existing)
    close = difflib.get_close_matches(asked, names, n=limit, cutoff=0.4) or names[:limit]
    return ", ".join(repr(name) for name in close) if close else "none"
