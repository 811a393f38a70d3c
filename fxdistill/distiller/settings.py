"""Weights and temperature: a tensor that enters the graph, so a change recompiles nothing."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fxdistill.base.tensors import scalar
from fxdistill.base.warn import warn
from fxdistill.errors import MatchWarning, OptionError, did_you_mean
from fxdistill.mapping.teachers import tower_at
from fxdistill.objective.step_weights import Names
from fxdistill.objective.term import GLOBAL_SETTINGS, THRESHOLD, Term

Setting = float | Tensor
TeacherWeights = Sequence[Setting] | Mapping[str, Setting] | Mapping[int, Setting] | Tensor


class Settings:
    """One vector of the global settings, followed by the weight of each match.

    ``set`` makes a new vector rather than writing to the old one, which a pending backward may
    still need.
    """

    def __init__(self, values: Mapping[str, Setting], names: Names) -> None:
        self.values = dict(values)
        self.terms = (*names.matches, *names.heads)
        self.teachers = names.teachers
        self.importance = names.importance
        last = () if names.importance is None else (THRESHOLD,)
        self.names = (*GLOBAL_SETTINGS, *self.terms, *map(of_teacher, names.teachers), *last)
        self._vector: Tensor | None = None

    def set(
        self,
        weights: Mapping[str, Setting] | None,
        teachers: TeacherWeights | None,
        values: Mapping[str, Setting],
    ) -> None:
        """Change global settings by ``values``, weights of terms by ``weights``, and of teachers.

        Raises OptionError, and changes nothing, where a name is unknown or a value is not a finite
        number.
        """
        self.values = {**self.values, **self.checked(weights, teachers, values)}
        self.forget()

    def checked(
        self,
        weights: Mapping[str, Setting] | None,
        teachers: TeacherWeights | None,
        values: Mapping[str, Setting],
    ) -> dict[str, Setting]:
        """What ``set`` would change, by the names of the settings; raises what it raises."""
        for name in values:
            if name == THRESHOLD:
                self._require_threshold(values[name])
            elif name not in GLOBAL_SETTINGS:
                near = did_you_mean(name, GLOBAL_SETTINGS)
                raise OptionError(f"set() knows no {name!r}. Nearest: {near}.")
        for name in weights or {}:
            if name not in self.terms:
                near = did_you_mean(name, self.terms)
                raise OptionError(f"no term {name!r}. Nearest: {near}.")
        new = {**values, **(weights or {})}
        if teachers is not None:
            new |= teacher_settings(teachers, self.teachers)
        check_settings(new)
        return new

    def _require_threshold(self, value: Setting) -> None:
        if self.importance is None:
            raise OptionError(
                f"set(threshold={value!r}): there is no importance= with a threshold, such as "
                'Importance("divergence", threshold=0.1)'
            )
        if isinstance(value, Tensor) and value.numel() != 1:
            raise OptionError(f"threshold={value!r}: one number")
        self.importance.at(value)

    def saved(self) -> dict[str, float]:
        """The values by name, as numbers, for a state dict."""
        return {name: float(self.values[name]) for name in self.names}

    def restore(self, saved: Mapping[str, float]) -> None:
        """Take the values of a state dict; those of matches that are not here are left out."""
        known = {name: value for name, value in saved.items() if name in self.values}
        self.values = {**self.values, **known}
        self.forget()

    def on(self, device: torch.device) -> Tensor:
        """The vector on ``device``; it is kept for later steps."""
        if self._vector is None or self._vector.device != device:
            # The vector outlives an evaluation in inference mode: later steps may train with it.
            with torch.inference_mode(False):
                self._vector = self.made(device)
        return self._vector

    def made(self, device: torch.device) -> Tensor:
        """A new vector, which is not kept: a capture on fake tensors must not leave one behind."""
        return torch.stack([scalar(self.values[name], device) for name in self.names])

    def forget(self) -> None:
        """Drop the vector, so that the next step makes a new one."""
        self._vector = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_vector": None}


def of_teacher(name: str) -> str:
    """The name of the setting that is a teacher's weight."""
    return f"teacher_weights.{name}"


def teacher_settings(given: Any, teachers: Sequence[str]) -> dict[str, Setting]:
    """The weights of teachers as settings; they are divided by their sum in each step.

    ``given`` has one weight for each teacher, in order or by name (of teachers in a list, by
    number). Raises OptionError for other numbers, a weight below 0, or a sum of 0.
    """
    asked = given
    if isinstance(given, Mapping):
        given = {tower_at(k) if type(k) is int else k: value for k, value in given.items()}
    elif isinstance(given, Tensor) and given.ndim == 1:
        given = list(given.unbind())
    known = ", ".join(teachers) or "one teacher at most, which needs none"
    if isinstance(given, Mapping) and set(given) <= set(teachers) and len(given) == len(teachers):
        found = [given[name] for name in teachers]
    elif isinstance(given, Sequence) and not isinstance(given, str) and len(given) == len(teachers):
        found = list(given)
    else:
        raise OptionError(
            f"teacher_weights={asked!r}: one number for each teacher whose logits are averaged, in "
            f"order or by name; there are: {known}"
        )
    made = {of_teacher(name): value for name, value in zip(teachers, found, strict=True)}
    check_settings(made)
    numbers = [float(value) for value in found]
    if made and not (min(numbers) >= 0 and 0 < sum(numbers) < math.inf):
        raise OptionError(f"teacher_weights={asked!r}: finite, at least 0, and not all of them 0")
    return made


def check_settings(settings: Mapping[str, Any]) -> None:
    """Raise OptionError where a setting is not one finite number, or the temperature not > 0."""
    for name, value in settings.items():
        single = isinstance(value, Tensor) and value.numel() == 1
        number = isinstance(value, (int, float)) and math.isfinite(value)
        if not single and not number:
            raise OptionError(f"{name}={value!r}: a finite number, or a tensor of one element")
        if name == "temperature" and number and value <= 0:
            raise OptionError(f"temperature={value!r}: it divides the logits and must be positive")


def warn_of_zero_weights(terms: Iterable[Term]) -> None:
    """Warn about matches of weight 0: they are computed and train nothing."""
    for term in terms:
        if not isinstance(term.weight, Tensor) and term.weight == 0:
            warn(
                f"the match of student {term.name!r} has weight 0: it is computed and teaches "
                "nothing until distiller.set(weights={...}) raises it. Drop it if that is not "
                "meant.",
                MatchWarning,
            )
