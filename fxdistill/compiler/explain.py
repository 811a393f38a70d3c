"""Explain dynamo's exceptions: a line that cannot be traced, a wrong call, a failed lowering."""

import os
import re
from typing import Any

import torch
from torch._dynamo import exc
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

import fxdistill
from fxdistill import passes
from fxdistill.errors import CaptureError, FxDistillError, LoweringError, RecompileError, StepError
from fxdistill.models.tap import Section


def explained(error: Exception, section: Section = "") -> FxDistillError:
    """The error to raise in place of dynamo's: what failed, where, and what to do about it.

    ``section`` is the part of the step that was being traced: a model by its name, as a rule.
    """
    reason = str(error).strip().split("\n\n")[0]
    if isinstance(error, exc.FailOnRecompileLimitHit):
        return RecompileError(
            f"the step has been compiled for as many kinds of calls as dynamo allows.\n  {reason}\n"
            "What to do: see with TORCH_LOGS=recompiles what varies from call to call (sizes, "
            "keywords given and left out, modes, dtypes), and keep it fixed; or raise "
            "torch._dynamo.config.recompile_limit."
        )
    if isinstance(error, exc.BackendCompilerFailed):
        return _not_lowered(error)
    where = _where(error, section)
    if "no fake impl" in reason or "register_fake" in str(error):
        return CaptureError(
            f"the step cannot be captured as one graph.{where}\n  {_short(error)}\n"
            "What to do: register_fake says what shapes the operator returns; or wrap(..., "
            'compile="regional"), compile=False: models run as they are.'
        )
    failed = isinstance(error, exc.TorchRuntimeError) or "Observed exception" in reason
    if failed and "INTERNAL ASSERT" not in str(error):  # a failed assertion is torch's own fault
        return StepError(
            f"the step fails on these inputs.{where}\n"
            f"  {_short(error)}\n"
            "What to do: check the inputs; compile=False shows the exception where it is raised. "
            'If the step runs then (a model may catch it), it is no graph: compile="regional", or '
            'compile={"fallback": "regional"}.'
        )
    return _not_captured(reason, where)


def _not_captured(reason: str, where: str) -> CaptureError:
    line = "that line"
    if "data-dependent" in reason:
        line = "the line that depends on the values of an input, which a graph does not have"
    return CaptureError(
        f"the step cannot be captured as one graph.{where}\n"
        f"  torch.compile says: {reason}\n"
        f'What to do: change {line}; or wrap(..., compile="regional") (the models run as they '
        'are, the losses are compiled), compile=False (everything eager), or compile={"fallback": '
        '"regional"} to fall back by itself, with a warning.'
    )


def _not_lowered(error: exc.BackendCompilerFailed) -> FxDistillError:
    """The error for a step that was captured, and then not compiled."""
    inner: Any = getattr(error, "inner_exception", error)
    said, _, graph = str(inner).partition("\n\nWhile executing")
    if isinstance(inner, GuardOnDataDependentSymNode):  # a capture comes as far where data decides
        return _not_captured(str(inner).strip().split("\n\n")[0], _in_trace(str(inner)))
    return LoweringError(
        "the step was captured, and the backend failed to compile it: "
        f"{type(inner).__name__}: {said}{_in_trace(graph)}\n"
        "What to do: compile={'backend': 'aot_eager'} "
        "tells whether it is the code generation; compile=False needs no compiler."
    )


def own_cause(error: BaseException | None) -> FxDistillError | None:
    """The error of ours that made dynamo raise ``error``: a loss may refuse the values it gets."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        error = getattr(error, "inner_exception", None) or error.__cause__ or error.__context__
        if isinstance(error, FxDistillError):
            return error
    return None


def is_of_compiling(error: BaseException) -> bool:
    """Whether dynamo was compiling when ``error`` was raised, and not running what it had made."""
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename.endswith(_COMPILING):
            return True
        trace = trace.tb_next
    return False


_COMPILING = os.path.join("_dynamo", "convert_frame.py")


def _where(error: Exception, section: Section) -> str:
    """The innermost line of the user's code in the stack of the failure, and whose it is."""
    stack = list(getattr(error, "real_stack", None) or ())
    frames = [f for f in stack if not f.filename.startswith((_OURS, _OUR_PASSES))]
    # A line inside torch says less than the line that called it.
    outside = [f for f in frames if not f.filename.startswith(_TORCH)]
    if not frames:
        return _in_trace(str(error))  # errors of symbolic sizes hold the stack as text
    last = (outside or frames)[-1]
    whose = "" if section in ("", "module", "objective") else f"in the {section}, "
    return f"\n  {whose}at {last.filename}:{last.lineno} in {last.name}\n    {last.line or ''}"


# The folders of this package (wherever this file lies in it), of its passes, and of torch.
_FILES = (fxdistill.__file__, passes.__file__, torch.__file__)
_OURS, _OUR_PASSES, _TORCH = (os.path.dirname(str(file)) + os.sep for file in _FILES)


def _in_trace(text: str) -> str:
    """The innermost line of the user's code in a traceback given as text."""
    frames = re.findall(r'File "(.+)", line (\d+), in (.+)\n +(.+)', text)
    outside = [f for f in frames if not f[0].startswith((_OURS, _OUR_PASSES, _TORCH))]
    return "\n  at {}:{} in {}\n    {}".format(*outside[-1]) if outside else ""


def _short(error: Exception) -> str:
    """The message of the failing operation, without dynamo's description of its arguments."""
    text = str(error).strip()
    if (told := re.search(r"got (\w+\(.*\))$", text, re.M)) is not None:
        return told[1]
    raised = re.search(r"raised exception (.+)", text)
    return raised[1] if raised is not None else text.splitlines()[0]
