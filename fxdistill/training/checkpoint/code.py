"""What tells a function of the user's own from another one of its name: a digest of its code.

It is of the compiled code, so comments and places in files do not count, and of what the function
closes over and defaults to, where that is a number or a word. Another version of Python compiles
other code: what it made is not compared.
"""

import functools
import hashlib
import platform
from collections.abc import Iterator
from types import CodeType
from typing import Any

from torch import nn

from fxdistill.losses.names import is_named
from fxdistill.mapping.matches import Matches
from fxdistill.training.checkpoint.terms import terms_of

PYTHON = ".".join(platform.python_version_tuple()[:2])
PLAIN = (bool, int, float, str, type(None))


def code_of_all(matches: Matches, objective: Any) -> dict[str, str]:
    """A digest of each function of the user's own, by what it is for."""
    found = {f"the loss of {name!r}": term.loss for name, term, _ in terms_of(objective)}
    for match in matches:
        for side in ("student", "teacher"):
            what = f"the {side}_port of {getattr(match, side)!r}"
            found[what] = getattr(match, f"{side}_port")
    if objective.importance is not None:
        found["the score of importance"] = objective.importance.score
    own = {what: digest(each) for what, each in found.items() if not is_named(each)}
    return {what: each for what, each in own.items() if each is not None}


def other_code(saved: Any, here: Any) -> Iterator[str]:
    """A warning where functions of the user's own are others than in the saved run, or may be."""
    if not saved:
        return  # of a version that did not tell
    theirs, ours = saved["of"], here["of"]
    if differing := [what for what in theirs if what in ours and theirs[what] != ours[what]]:
        names = ", ".join(differing)
        yield (
            f"{names}: a function of yours, whose code is another one than in the run that was "
            "saved. The run goes on with the function of this one."
            if saved["python"] == here["python"]
            else f"{names}: a function of yours. Whether it is the one of the run that was saved "
            f"cannot be told: that was Python {saved['python']}, and this is {here['python']}."
        )


def digest(function: Any) -> str | None:
    """A digest of what a callable computes; ``None`` where it has no Python code."""
    while isinstance(function, functools.partial):
        function = function.func
    if isinstance(function, nn.Module):
        function = type(function).forward
    found = getattr(function, "__func__", function)  # of a bound method
    if not isinstance(getattr(found, "__code__", None), CodeType):
        found = getattr(type(found).__call__, "__func__", type(found).__call__)
    code = getattr(found, "__code__", None)
    if not isinstance(code, CodeType):
        return None
    closed = [_inside(cell) for cell in found.__closure__ or ()]
    given = [*(found.__defaults__ or ()), *sorted((found.__kwdefaults__ or {}).items())]
    plain = [repr(value) for value in (*closed, *given) if isinstance(value, (*PLAIN, tuple))]
    text = "\n".join([*_parts(code), *(each for each in plain if " at 0x" not in each)])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _inside(cell: Any) -> Any:
    """What a function closes over; a cell may be empty still."""
    try:
        return cell.cell_contents
    except ValueError:
        return cell


def _parts(code: CodeType) -> Iterator[str]:
    yield code.co_code.hex()
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _parts(constant)
        elif isinstance(constant, frozenset):  # its order is another one in each process
            yield from sorted(map(repr, constant))
        else:
            yield repr(constant)
