"""``Preset``: a dict of arguments for ``wrap`` that says where they are from."""

import functools
from collections.abc import Mapping
from typing import Any

from fxdistill.losses.names import loss_name
from fxdistill.mapping.match import Match


class Preset(dict[str, Any]):
    """Arguments for ``fxdistill.wrap(student, teacher, **preset)``: a dict, to be changed like one.

    It prints the paper, and an argument a line.
    """

    def __init__(self, name: str, paper: str, arguments: Mapping[str, Any]) -> None:
        super().__init__(arguments)
        self.name, self.paper = name, paper

    def __reduce__(self) -> tuple[Any, ...]:
        return Preset, (self.name, self.paper, dict(self))

    def __repr__(self) -> str:
        lines = [f"presets.{self.name}: {self.paper}"]
        for name, value in self.items():
            lines += _lines(name, value)
        return "\n".join(lines)

    def __or__(self, other: Any) -> "Preset":  # type: ignore[override]
        """The preset with other arguments in place of, or beside, its own."""
        return Preset(self.name, self.paper, {**self, **other})


def _lines(name: str, value: Any) -> list[str]:
    """An argument, with the entries of a list or dict below it."""
    if isinstance(value, (list, tuple)):
        return [f"  {name} =", *(f"    {_text(entry)}" for entry in value)]
    if isinstance(value, Mapping):
        return [f"  {name} =", *(f"    {key}: {_text(entry)}" for key, entry in value.items())]
    return [f"  {name} = {_text(value)}"]


def _text(value: Any) -> str:
    if isinstance(value, (str, float)):
        return value if isinstance(value, str) else f"{value:g}"
    if isinstance(value, Match):
        ports = value.student_port, value.teacher_port
        ends = zip((value.student, value.teacher), ports, strict=True)
        s, t = (str(p) if port == "output" else f"{p}:{port}" for p, port in ends)
        told = value.options
        if isinstance(value.loss, functools.partial):
            told = told.replace(loss_name(value.loss), _text(value.loss), 1)
        return f"{s} <- {t}" + (f" ({told})" if told else "")
    if isinstance(value, functools.partial):
        given = ", ".join(f"{name}={option!r}" for name, option in value.keywords.items())
        return f"{loss_name(value)}({given})"
    return loss_name(value) if callable(value) else repr(value)
