"""The forms in which a divergence, or a mix of them, can be given."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from fxdistill.errors import OptionError, did_you_mean
from fxdistill.losses.fused.formulas import DIVERGENCES, Divergence

DivergenceLike = str | Mapping[str, float] | Callable[..., Tensor] | tuple[Divergence, ...] | None


def divergences(divergence: Any) -> tuple[Divergence, ...]:
    """Name, weight and β of each; OptionError if one is unknown, or has an unknown option."""
    if divergence is None:
        return ()
    if isinstance(divergence, tuple):  # as a graph holds it: name, weight and β of each
        return tuple((_named(name)[0], float(w), float(beta)) for name, w, beta in divergence)
    mix = divergence if isinstance(divergence, Mapping) else {divergence: 1.0}
    if not mix:
        raise OptionError("divergence={} compares nothing: None, or name some")
    named = [(*_named(each), float(weight)) for each, weight in mix.items()]
    return tuple((name, weight, beta) for name, beta, weight in named)


def _named(divergence: Any) -> tuple[str, float]:
    plain = getattr(divergence, "func", divergence)
    name = plain if isinstance(plain, str) else getattr(plain, "__name__", "")
    if name not in DIVERGENCES:
        near = did_you_mean(str(name or divergence), DIVERGENCES)
        raise OptionError(f"divergence={divergence!r} is not fused. Nearest: {near}.")
    options = dict(getattr(divergence, "keywords", {}))
    beta = float(options.pop("beta", 0.5))
    if options:
        raise OptionError(f"{', '.join(options)} of a divergence: give it to vocab_loss itself")
    return name, beta


def require_no_logits(chosen: tuple[Divergence, ...]) -> None:
    """Raise OptionError where a divergence reads logits, which a stored teacher does not have."""
    reading = [name for name, _, _ in chosen if DIVERGENCES[name].of_logits]
    if reading:
        others = ", ".join(name for name, formula in DIVERGENCES.items() if not formula.of_logits)
        raise OptionError(
            f"{' and '.join(reading)} compares logits, and a stored teacher has the probabilities "
            f"of its k best entries. These compare probabilities: {others}."
        )
