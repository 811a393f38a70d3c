"""``Schedule``: what ``distiller.set`` takes, as functions of the step."""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from fxdistill.base.warn import warn
from fxdistill.distiller.distiller import Distiller
from fxdistill.distiller.settings import check_settings
from fxdistill.errors import MatchWarning, OptionError
from fxdistill.training.schedules import Curve, described, from_description

OWN = "your own"  # what a state dict has in place of a callable that is not of this package


class Schedule:
    """Change the settings of a distiller from step to step; nothing recompiles.

    It is used like a scheduler of ``torch.optim``: the settings of step 0 are applied when it is
    made, and each ``step()``, called after the optimizer's, applies those of the next step.

    Args:
        distiller: What ``fxdistill.wrap`` has returned.
        weights: ``{term name: schedule}``, the weights of single matches.
        settings: A schedule for any other keyword of ``distiller.set``: ``temperature``,
            ``logit_weight``, ``feature_weight``, ``label_weight``, ``threshold``. A schedule is one
            of ``fxdistill.schedules``, a callable step → value of your own, a number that stays,
            or a tuple or dict of these where ``set`` takes a tuple or dict.

    Raises:
        OptionError: A name is unknown, a weight names no term, there is nothing to change, or a
            value is one that ``set`` refuses, now or at a later step (of callables of your own
            only now: a later step calls them). Nothing is changed.
    """

    def __init__(
        self, distiller: Distiller, *, weights: Mapping[str, Any] | None = None, **settings: Any
    ) -> None:
        _require_distiller(distiller)
        asked = {**settings, **({} if weights is None else {"weights": _named(weights)})}
        if not asked:
            raise OptionError(
                "Schedule(distiller) changes nothing: give a schedule, such as "
                "temperature=fxdistill.schedules.linear(4, 1, steps=1000)"
            )
        for name, curve in _flat(asked).items():
            _check(name, curve)
        _check_later(distiller, asked)
        self.distiller = distiller
        self.schedules = asked
        self.last_step = 0
        self._apply()

    @property
    def values(self) -> dict[str, Any]:
        """The keywords that ``distiller.set`` got for the last step."""
        return {name: _at(curve, self.last_step) for name, curve in self.schedules.items()}

    def step(self) -> None:
        """Go on to the next step, and apply its settings."""
        self.last_step += 1
        try:
            self._apply()
        except Exception:  # a value of a callable of the user's own, which set refuses
            self.last_step -= 1
            raise

    def state_dict(self) -> dict[str, Any]:
        """The step, and the schedules as numbers, lists and text: JSON can store it.

        A callable of your own is not saved: whoever loads the state has made it again.
        """
        told = {name: _told(curve) for name, curve in _flat(self.schedules).items()}
        return {"last_step": self.last_step, "schedules": told}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state: its step, and its schedules, which are then applied.

        As with torch's schedulers, the saved schedules take the place of those that were given
        here; a warning names each that differs.

        Raises:
            OptionError: The state is of other settings than these, or none. Nothing is changed.
        """
        saved, own = _read(state), _flat(self.schedules)
        _require_alike(saved.keys(), own.keys())
        _require_alike(
            {name for name, told in saved.items() if told == OWN},
            {name for name, curve in own.items() if _told(curve) == OWN},
            "callables of your own for ",
        )
        loaded = {n: c if saved[n] == OWN else _restored(n, saved[n]) for n, c in own.items()}
        before = self.schedules, self.last_step
        replaced = _replaced(self.schedules, loaded)
        _check_later(self.distiller, replaced)
        self.schedules = replaced
        self.last_step = state["last_step"]
        try:
            self._apply()
        except Exception:
            self.schedules, self.last_step = before
            raise
        for name, curve in own.items():
            if _told(curve) != saved[name]:
                warn(
                    f"the saved schedule of {name} is used, {loaded[name]!r}, and not {curve!r}",
                    MatchWarning,
                )

    def _apply(self) -> None:
        self.distiller.set(**self.values)

    def __repr__(self) -> str:
        each = "".join(f", {name}={curve!r}" for name, curve in self.schedules.items())
        return f"Schedule(step {self.last_step}{each})"


# ------------------------------------------------------------------ trees of schedules


def _at(curve: Any, step: int) -> Any:
    """The value of a schedule, or of a tuple or dict of them, at a step."""
    if isinstance(curve, Mapping):
        return {name: _at(part, step) for name, part in curve.items()}
    if isinstance(curve, (tuple, list)):
        return tuple(_at(part, step) for part in curve)
    return curve(step) if callable(curve) else curve


def _flat(curve: Any, name: str = "") -> dict[str, Any]:
    """Each single schedule, by a name such as ``weights[layers.0]``."""
    if isinstance(curve, Mapping):
        parts = {f"{name}[{key}]" if name else str(key): part for key, part in curve.items()}
    elif isinstance(curve, (tuple, list)):
        parts = {f"{name}[{i}]": part for i, part in enumerate(curve)}
    else:
        return {name: curve}
    return {inner: c for key, part in parts.items() for inner, c in _flat(part, key).items()}


def _replaced(curve: Any, by: Mapping[str, Any], name: str = "") -> Any:
    """The same tree with other schedules, by the names of ``_flat``."""
    if isinstance(curve, Mapping):
        return {
            key: _replaced(part, by, f"{name}[{key}]" if name else str(key))
            for key, part in curve.items()
        }
    if isinstance(curve, (tuple, list)):
        return tuple(_replaced(part, by, f"{name}[{i}]") for i, part in enumerate(curve))
    return by[name]


def _told(curve: Any) -> Any:
    """A schedule as JSON has it."""
    if isinstance(curve, Curve):
        return described(curve)
    if isinstance(curve, Tensor):
        return float(curve)
    return OWN if callable(curve) else curve


def _restored(name: str, told: Any) -> Any:
    if isinstance(told, Mapping):
        curve = from_description(told)
        _check(name, curve)
        return curve
    _check(name, told)
    return told


# ------------------------------------------------------------------ checks


def _require_distiller(distiller: Any) -> None:
    if isinstance(distiller, Distiller):
        return
    inner = getattr(distiller, "module", getattr(distiller, "_orig_mod", None))
    advice = " Pass the distiller inside of it." if isinstance(inner, nn.Module) else ""
    raise OptionError(
        f"Schedule takes what fxdistill.wrap returns, and this is a {type(distiller).__name__}."
        f"{advice}"
    )


def _named(weights: Any) -> dict[str, Any]:
    if not isinstance(weights, Mapping) or not weights:
        raise OptionError(f"weights={weights!r}: {{term name: schedule}}")
    return dict(weights)


def _check(name: str, curve: Any) -> None:
    """Raise OptionError for what is no schedule, and for values that no setting can have."""
    if isinstance(curve, Curve):
        single = [value for value in curve.extremes if not isinstance(value, tuple)]
        for value in single:
            check_settings({name: value})
    elif not callable(curve):
        number = isinstance(curve, (int, float)) and not isinstance(curve, bool)
        if not isinstance(curve, Tensor) and not (number and math.isfinite(curve)):
            raise OptionError(
                f"{name}={curve!r}: a schedule of fxdistill.schedules, a callable step -> value, "
                "or a number"
            )


def _check_later(distiller: Distiller, asked: Mapping[str, Any]) -> None:
    """Raise OptionError for what ``set`` would refuse at a step that is still to come.

    What it takes are ranges of numbers, and weights of teachers that are not all 0. So all
    schedules are looked at wherever one of them turns. A callable of the user's own is not called
    before its step: 1, which any setting can be, stands in for it.
    """
    for step in sorted({n for curve in _flat(asked).values() for n in _turns(curve)}):
        values = {name: _at(_known(c), step) for name, c in asked.items() if _turns_within(c)}
        weights, teachers = values.pop("weights", None), values.pop("teacher_weights", None)
        try:
            distiller._settings.checked(weights, teachers, values)
        except OptionError as error:
            raise OptionError(f"at step {step}: {error}" if step else str(error)) from None


def _turns(curve: Any) -> tuple[int, ...]:
    return curve.turns if isinstance(curve, Curve) else ()


def _turns_within(curve: Any) -> bool:
    """Whether a schedule, or one in a tuple or dict, is of this package."""
    return any(isinstance(part, Curve) for part in _flat(curve).values())


def _known(curve: Any) -> Any:
    """The same tree, with 1 for each callable of the user's own."""
    if isinstance(curve, Mapping):
        return {name: _known(part) for name, part in curve.items()}
    if isinstance(curve, (tuple, list)):
        return tuple(map(_known, curve))
    return 1.0 if callable(curve) and not isinstance(curve, Curve) else curve


def _read(state: Any) -> dict[str, Any]:
    """The saved schedules of a state dict; OptionError if it is none."""
    step = state.get("last_step") if isinstance(state, Mapping) else None
    if isinstance(step, bool) or not isinstance(step, int) or step < 0:
        raise OptionError("load_state_dict takes what Schedule.state_dict() has returned")
    return dict(state.get("schedules", {}))


def _require_alike(saved: Any, own: Any, kind: str = "") -> None:
    """Raise OptionError where the saved schedules, of this ``kind``, are of other settings."""
    missing, new = sorted(set(own) - set(saved)), sorted(set(saved) - set(own))
    if missing or new:
        parts = [f"lacks {kind}{', '.join(missing)}"] if missing else []
        parts += [f"has {kind}{', '.join(new)}, which this one lacks"] if new else []
        raise OptionError(f"the saved schedule {' and '.join(parts)}")
