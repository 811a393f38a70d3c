"""The teachers of a student, by name, and which of them a match means."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn

from fxdistill.errors import OptionError, did_you_mean
from fxdistill.mapping.match import Match
from fxdistill.models.tap import Tower

SELF = "self"
_TAKEN = frozenset((SELF, "student", "objective", "joint", "loss_modules", "projections", "heads"))


class Teachers(NamedTuple):
    """Teachers by tower, in order; ``keys`` are what a match calls them, ``of="big"`` or ``of=0``.

    Without teachers a student learns from labels and from itself.
    """

    models: Mapping[Tower, nn.Module]
    keys: Mapping[str | int, Tower]

    def tower_of(self, match: Match) -> Tower | None:
        """The teacher that a match means; ``None`` for the student itself.

        Raises OptionError where there is no such teacher.
        """
        if match.of == SELF:
            return None
        if match.of is None and self.models:
            return next(iter(self.models))
        if match.of is not None and match.of in self.keys and not isinstance(match.of, bool):
            return self.keys[match.of]
        raise OptionError(f"of={match.of!r} for {match.student!r}: {self._known(match.of)}")

    def _known(self, asked: Any) -> str:
        if not self.models:
            return (
                "there is no teacher. of='self' compares two values of the student; or give wrap a "
                "teacher"
            )
        near = did_you_mean(str(asked), map(str, self.keys))
        return f"no such teacher. Nearest: {near}; or 'self', the student's own value"

    def of_each(self, given: Any, what: str) -> dict[Tower, Any]:
        """An option of ``wrap`` for each teacher: one for all, or one for each as teachers are."""
        if len(self.models) < 2 or given is None:
            return dict.fromkeys(self.models, given)
        if isinstance(given, Mapping) and set(given) == set(self.keys):
            return {self.keys[key]: value for key, value in given.items()}
        if isinstance(given, Sequence):
            if len(given) != len(self.models):
                raise OptionError(
                    f"{what} has {len(given)} entries, and there are {len(self.models)} models"
                )
            return dict(zip(self.models, given, strict=True))
        return dict.fromkeys(self.models, given)


def read_teachers(given: Any) -> Teachers:
    """Read what ``wrap`` takes as teacher: a model, several in order or by name, or ``None``.

    Raises OptionError for anything else, and for names that cannot be.
    """
    if given is None:
        return Teachers({}, {})
    if isinstance(given, nn.Module):
        return Teachers({"teacher": given}, {0: "teacher", "teacher": "teacher"})
    if isinstance(given, Mapping):
        named = dict(given.items())
        for name in named:
            _require_name(name)
        return _found(named, {name: name for name in named})
    if isinstance(given, Sequence) and not isinstance(given, str):
        towers = list(map(tower_at, range(len(given))))
        return _found(dict(zip(towers, given, strict=True)), dict(enumerate(towers)))
    raise OptionError(
        f"teacher is a {type(given).__name__} {given!r}, and an nn.Module is needed: a model that "
        "from_pretrained(...) or a constructor of yours has made; or several, in a list or a dict "
        "by name; or None"
    )


def tower_at(index: int) -> Tower:
    """The name of a teacher in a list."""
    return f"teacher{index}"


def _found(models: Mapping[Tower, Any], keys: Mapping[Any, Tower]) -> Teachers:
    if not models:
        raise OptionError("teacher holds no model: give one, or None for a student without teacher")
    for tower, model in models.items():
        if not isinstance(model, nn.Module):
            raise OptionError(
                f"the teacher {tower!r} is a {type(model).__name__}, not an nn.Module"
            )
    return Teachers(models, keys)


def _require_name(name: Any) -> None:
    """Raise OptionError for a name that paths and keywords could not hold."""
    if not isinstance(name, str) or not name.isidentifier() or name in _TAKEN:
        raise OptionError(
            f"the teacher's name {name!r}: a word (its inputs are the keyword NAME_inputs), and "
            f"none of {', '.join(sorted(_TAKEN))}"
        )
