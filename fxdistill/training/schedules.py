"""Schedules: functions of the step, for temperatures and weights that change during training.

Each is a frozen value that is called with a step (0, 1, ...) and returns a number, or a tuple of
numbers where it was made from tuples. It pickles, and prints as the call that made it;
``described`` turns it into JSON, and ``from_description`` back.
"""

import math
import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

from fxdistill.errors import OptionError, did_you_mean

__all__ = ["cosine", "linear", "piecewise", "stages"]

Value = float | tuple[float, ...]


class Curve(ABC):
    """A function step → value that is made of plain numbers."""

    @property
    @abstractmethod
    def arguments(self) -> dict[str, Any]:
        """The arguments of the function that made it, as JSON has them."""

    @property
    @abstractmethod
    def extremes(self) -> tuple[Value, ...]:
        """Values between which, or which alone, all others lie."""

    @property
    @abstractmethod
    def turns(self) -> tuple[int, ...]:
        """The steps at which it has its extremes; between two of them it is monotone."""

    @abstractmethod
    def __call__(self, step: int) -> Value:
        """The value at ``step``, counted from 0."""


@dataclass(frozen=True, repr=False)
class Ramp(Curve):
    """From ``start`` at step ``after`` to ``end`` at ``after + steps``, in a ``shape``."""

    shape: str
    start: Value
    end: Value
    steps: int
    after: int = 0

    def __call__(self, step: int) -> Value:
        """The value at ``step``; constant before ``after`` and behind ``after + steps``."""
        part = (_step(step) - self.after) / self.steps
        if part <= 0:
            return self.start
        if part >= 1:
            return self.end
        share = part if self.shape == "linear" else (1 - math.cos(math.pi * part)) / 2
        if isinstance(self.start, tuple) and isinstance(self.end, tuple):
            ends = zip(self.start, self.end, strict=True)
            return tuple(_between(a, b, share) for a, b in ends)
        assert not isinstance(self.start, tuple)
        assert not isinstance(self.end, tuple)
        return _between(self.start, self.end, share)

    def __repr__(self) -> str:
        after = f", after={self.after}" if self.after else ""
        return f"{self.shape}({self.start!r}, {self.end!r}, {self.steps}{after})"

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments, as JSON has them."""
        ends = {"start": _plain(self.start), "end": _plain(self.end)}
        return {**ends, "steps": self.steps, "after": self.after}

    @property
    def extremes(self) -> tuple[Value, ...]:
        """Both ends."""
        return self.start, self.end

    @property
    def turns(self) -> tuple[int, ...]:
        """The steps of both ends."""
        return self.after, self.after + self.steps


@dataclass(frozen=True, repr=False)
class Steps(Curve):
    """The value of the last entry whose step has come."""

    entries: tuple[tuple[int, Value], ...]

    def __call__(self, step: int) -> Value:
        """The value at ``step``."""
        step = _step(step)
        return [value for at, value in self.entries if at <= step][-1]

    def __repr__(self) -> str:
        return f"piecewise({dict(self.entries)!r})"

    @property
    def arguments(self) -> dict[str, Any]:
        """The argument, as pairs: the keys of JSON's objects are text."""
        return {"values": [[at, _plain(value)] for at, value in self.entries]}

    @property
    def extremes(self) -> tuple[Value, ...]:
        """All values."""
        return tuple(value for _, value in self.entries)

    @property
    def turns(self) -> tuple[int, ...]:
        """The steps at which a value begins."""
        return tuple(at for at, _ in self.entries)


@dataclass(frozen=True, repr=False)
class Stages(Curve):
    """One value after the other, each for ``every`` steps, and the last one for good."""

    values: tuple[Value, ...]
    every: int

    def __call__(self, step: int) -> Value:
        """The value at ``step``."""
        return self.values[min(_step(step) // self.every, len(self.values) - 1)]

    def __repr__(self) -> str:
        return f"stages({list(self.values)!r}, every={self.every})"

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments, as JSON has them."""
        return {"values": [_plain(value) for value in self.values], "every": self.every}

    @property
    def extremes(self) -> tuple[Value, ...]:
        """All values."""
        return self.values

    @property
    def turns(self) -> tuple[int, ...]:
        """The steps at which a value begins."""
        return tuple(i * self.every for i in range(len(self.values)))


def linear(start: Any, end: Any, steps: int, after: int = 0) -> Ramp:
    """A straight line from ``start`` to ``end``.

    It is ``start`` up to step ``after``, start + (end - start)·(step - after)/steps from there on,
    and ``end`` from step ``after + steps`` on.

    Args:
        start: The first value: a number, or a tuple of numbers that change together.
        end: The last value, of the same kind.
        steps: The number of steps from one to the other, 1 or more.
        after: The step at which the value begins to change.

    Returns:
        A function step → value, which pickles.

    Raises:
        OptionError: A value is not finite, a number of steps is none, or the two ends are tuples of
            different lengths.
    """
    return _ramp("linear", start, end, steps, after)


def cosine(start: Any, end: Any, steps: int, after: int = 0) -> Ramp:
    """Half a period of a cosine from ``start`` to ``end``, flat at both ends.

    It is end + (start - end)·(1 + cos π·(step - after)/steps)/2 between step ``after`` and
    ``after + steps``, and constant outside (Loshchilov & Hutter, 2017, without restarts).

    Args:
        start: The first value: a number, or a tuple of numbers that change together.
        end: The last value, of the same kind.
        steps: The number of steps from one to the other, 1 or more.
        after: The step at which the value begins to change.

    Returns:
        A function step → value, which pickles.

    Raises:
        OptionError: As for ``linear``.
    """
    return _ramp("cosine", start, end, steps, after)


def piecewise(values: Mapping[int, Any]) -> Steps:
    """Each value from its step on, until the next one: ``piecewise({0: 4.0, 100: 1.0})``.

    Args:
        values: A number, or a tuple of numbers, by the step from which it holds. Step 0 is one of
            them. Nothing is interpolated.

    Returns:
        A function step → value, which pickles.

    Raises:
        OptionError: A step is no whole number from 0 on, 0 is missing, or a value is not finite.
    """
    if not isinstance(values, Mapping) or not values:
        raise OptionError(f"piecewise({values!r}): a dict of values by step, {{0: 4.0, 100: 1.0}}")
    for at in values:
        _whole("piecewise", "step", at, least=0)
    if 0 not in values:
        raise OptionError(
            f"piecewise({dict(values)!r}) begins at step {min(values)}: say what holds from step 0"
        )
    entries = [(int(at), _value("piecewise", "value", values[at])) for at in sorted(values)]
    _alike("piecewise", [value for _, value in entries])
    return Steps(tuple(entries))


def stages(values: Sequence[Any], every: int) -> Stages:
    """One value after the other: the first for ``every`` steps, ..., the last one for good.

    This is progressive distillation, a stage at a time: ``stages([10, 5, 1], every=1000)`` for the
    temperature, ``stages([0.5, 0.75, 1.0], every=1000)`` for a weight.

    Args:
        values: The value of each stage: a number, or a tuple of numbers.
        every: The number of steps of a stage.

    Returns:
        A function step → value, which pickles.

    Raises:
        OptionError: There is no value, one is not finite, or ``every`` is no whole number from 1
            on.
    """
    if isinstance(values, (str, Mapping)) or not isinstance(values, Sequence) or not values:
        raise OptionError(f"stages({values!r}): a list of values, one a stage, such as [10, 5, 1]")
    found = [_value("stages", "value", value) for value in values]
    _alike("stages", found)
    return Stages(tuple(found), _whole("stages", "every", every, least=1))


# ------------------------------------------------------------------ as JSON


def described(curve: Curve) -> dict[str, Any]:
    """A schedule of this file as numbers, lists and text, for JSON."""
    if isinstance(curve, Ramp):
        kind = curve.shape
    else:
        kind = "piecewise" if isinstance(curve, Steps) else "stages"
    return {"schedule": kind, **curve.arguments}


def from_description(told: Mapping[str, Any]) -> Curve:
    """The schedule that ``described`` told of.

    Raises:
        OptionError: It tells of no schedule that this version knows.
    """
    rest = dict(told)
    kind = rest.pop("schedule", None)
    ramps: dict[Any, Callable[..., Curve]] = {"linear": linear, "cosine": cosine}
    makers = {**ramps, "piecewise": piecewise, "stages": stages}
    if kind not in makers:
        near = did_you_mean(str(kind), makers)
        raise OptionError(f"no schedule {kind!r}. Nearest: {near}; all: {', '.join(makers)}.")
    if kind == "piecewise":
        rest["values"] = {at: _listed(value) for at, value in rest.get("values", ())}
    return makers[kind](**{name: _listed(value) for name, value in rest.items()})


def _plain(value: Value) -> float | list[float]:
    return list(value) if isinstance(value, tuple) else value


def _listed(value: Any) -> Any:
    """Tuples again, where JSON has lists in a list of values."""
    if isinstance(value, list):
        return tuple(tuple(v) if isinstance(v, list) else v for v in value)
    return value


# ------------------------------------------------------------------ checks


def _ramp(shape: str, start: Any, end: Any, steps: int, after: int) -> Ramp:
    ends = _value(shape, "start", start), _value(shape, "end", end)
    _alike(shape, ends)
    of_steps = _whole(shape, "steps", steps, least=1)
    return Ramp(shape, *ends, of_steps, _whole(shape, "after", after, least=0))


def _between(start: float, end: float, share: float) -> float:
    return start + (end - start) * share


def _step(step: Any) -> int:
    if not _is_whole(step) or step < 0:
        raise OptionError(f"step {step!r}: a whole number, counted from 0")
    return operator.index(step)


def _is_whole(value: Any) -> bool:
    """Whether it is a whole number, of numpy or torch too."""
    try:
        operator.index(value)
    except TypeError:
        return False
    return not isinstance(value, bool)


def _whole(function: str, name: str, value: Any, *, least: int) -> int:
    if not _is_whole(value) or value < least:
        raise OptionError(f"{function}: {name}={value!r} is no whole number from {least} on")
    return operator.index(value)


def _value(function: str, name: str, value: Any) -> Value:
    """A finite number, or a tuple of them."""
    parts = value if isinstance(value, (tuple, list)) and value else (value,)
    for part in parts:
        if isinstance(part, bool) or not isinstance(part, Real) or not math.isfinite(part):
            raise OptionError(
                f"{function}: {name} {value!r} is no finite number, and no tuple of finite numbers"
            )
    numbers = tuple(part if isinstance(part, int) else float(part) for part in parts)
    return numbers if isinstance(value, (tuple, list)) else numbers[0]


def _alike(function: str, values: Sequence[Value]) -> None:
    """Raise OptionError where some values are tuples and others not, or of other lengths."""
    sizes = {len(value) if isinstance(value, tuple) else 0 for value in values}
    if len(sizes) > 1:
        raise OptionError(
            f"{function}: {', '.join(map(str, values))} are not all numbers, nor tuples of one size"
        )
