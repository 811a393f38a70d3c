"""Every difference between a checkpoint and the run that is to go on from it."""

from collections.abc import Iterator, Mapping
from typing import Any

from fxdistill.errors import ResumeError
from fxdistill.training.checkpoint.code import other_code
from fxdistill.training.checkpoint.contents import FORMAT, MODEL
from fxdistill.training.checkpoint.described import MODULES
from fxdistill.training.checkpoint.targets import other_targets

NAMED = ("model", "match", "term")  # what is described by name, and must have the same names
ORDER = ": states are saved by these numbers. List the matches in the order that they had"
LAZY = (
    " (here its layer is lazy, and has no shape before it has run: call distiller(**batch) once, "
    "under torch.no_grad(), before load_checkpoint)"
)


def require_format(document: Any, place: str) -> None:
    """Raise ResumeError where the document is of a version that this one cannot read."""
    version = document.get("format") if isinstance(document, dict) else None
    if version != FORMAT:
        made = document.get("made_by", {}) if isinstance(document, dict) else {}
        raise ResumeError(
            f"{place} is of version {version!r} of the format (written by fxdistill "
            f"{made.get('fxdistill', 'unknown')}), and this fxdistill reads version {FORMAT}: load "
            "it with the version that wrote it"
        )


def differences(saved: Mapping[str, Any], here: Mapping[str, Any]) -> list[ResumeError]:
    """An error for each difference between two documents; what either lacks altogether is none."""
    texts = [*_described(saved["described"], here["described"]), *_tensors(saved, here)]
    texts += _keys("entry", saved["others"], here["others"])
    texts += _optimizer(saved["optimizer"], here["optimizer"])
    texts += _schedulers(saved["schedulers"], here["schedulers"])
    return [ResumeError(text) for text in texts]


def left_out(saved: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """What the checkpoint has and the caller has not asked for."""
    missing = [f"its optimizer ({saved['optimizer']['class']})"] if _only(saved, here) else []
    if saved["schedulers"] and not here["schedulers"]:
        names = ", ".join(scheduler["class"] for scheduler in saved["schedulers"])
        missing.append(f"its schedulers ({names})")
    return missing


def doubts(saved: Mapping[str, Any], here: Mapping[str, Any]) -> Iterator[str]:
    """A warning for what is another than in the saved run, or may be, and is in no checkpoint."""
    yield from other_targets(saved, here)
    yield from other_code(saved.get("code"), here["code"])
    theirs, ours = saved.get("kept_by_modules", {}), here["kept_by_modules"]
    for name in [name for name in theirs if name in ours and theirs[name] != ours[name]]:
        yield (
            f"{name!r} had {theirs[name]} when the checkpoint was saved, and has {ours[name]}: no "
            "state dict holds these, so the run goes on with those of this run. What a module "
            "counts is a buffer, or goes into its get_extra_state."
        )


def _only(saved: Mapping[str, Any], here: Mapping[str, Any]) -> bool:
    return saved["optimizer"] is not None and here["optimizer"] is None


def _described(saved: Mapping[str, Any], here: Mapping[str, Any]) -> Iterator[str]:
    whole = all(saved[what].keys() == here[what].keys() for what in NAMED)
    for what in [what for what in here if what in saved]:  # older ones tell less
        ours, theirs = here[what], saved[what]
        if what in NAMED:
            yield from _keys(what, theirs, ours)
        elif what == MODULES and not whole:
            continue  # other matches have other numbers: they are listed
        advice = ORDER if what == MODULES else ""
        for name in [name for name in theirs if name in ours and theirs[name] != ours[name]]:
            said = f"the checkpoint has {theirs[name]!r}, this run {ours[name]!r}"
            yield f"{what} {name!r}: {said}{advice}"


def _keys(what: str, saved: Mapping[str, Any], here: Mapping[str, Any]) -> Iterator[str]:
    for name in [name for name in saved if name not in here]:
        yield f"{what} {name!r} is in the checkpoint, and not in this run"
    for name in [name for name in here if name not in saved]:
        yield f"{what} {name!r} is in this run, and not in the checkpoint"


def _tensors(saved: Mapping[str, Any], here: Mapping[str, Any]) -> Iterator[str]:
    """Names, shapes and dtypes of the distiller's own tensors, and which of them are tied."""
    theirs, ours = _own(saved["tensors"]), _own(here["tensors"])
    tied, now, lazy = saved["tied"], here["tied"], here["lazy"]
    for name in [name for name in theirs if name not in ours]:
        also = f" (here it is {now[name]!r})" if name in now else LAZY if name in lazy else ""
        yield f"{name!r} is in the checkpoint, and not in this run{also}"
    for name in [name for name in ours if name not in theirs]:
        also = f" (there it is {tied[name]!r})" if name in tied else ""
        yield f"{name!r} is in this run, and not in the checkpoint{also}"
    for name in [name for name in theirs if name in ours]:
        for what in ("shape", "dtype"):
            a, b = theirs[name][what], ours[name][what]
            if a != b:
                yield f"{name!r}: the checkpoint has {what} {a}, this run {b}"


def _own(tensors: Mapping[str, Any]) -> dict[str, Any]:
    return {k.removeprefix(MODEL): v for k, v in tensors.items() if k.startswith(MODEL)}


def _optimizer(saved: Any, here: Any) -> Iterator[str]:
    if here is None:
        return
    if saved is None:
        yield f"optimizer={here['class']} was given, and the checkpoint has none: leave it out"
        return
    if saved["class"] != here["class"]:
        yield f"the optimizer: the checkpoint has {saved['class']}, this run {here['class']}"
    a, b = saved["groups"], here["groups"]
    if len(a) != len(b):
        yield f"the optimizer: the checkpoint has {len(a)} groups of parameters, this run {len(b)}"
        return
    for i, (theirs, ours) in enumerate(zip(a, b, strict=True)):
        what = f"group {i} of the optimizer: parameter"
        yield from _keys(what, dict.fromkeys(theirs), dict.fromkeys(ours))


def _schedulers(saved: Any, here: Any) -> Iterator[str]:
    a, b = ([each["class"] for each in schedulers] for schedulers in (saved, here))
    if b and a != b:
        names = ", ".join(a) or "none"
        yield f"schedulers: the checkpoint has {names}, this run {', '.join(b)}"
