"""Which value of a step is the first that is not finite: input, parameter, module, term, gradient.

The models run as they are, in the order in which a step runs them, and each module's output is
looked at. An infinity may be meant (a mask of -∞), so that NaNs and infinities are told apart, and
the first of either kind is named.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten_with_path, tree_leaves

from fxdistill.base.attention import tensors_of
from fxdistill.base.tensors import is_lazy, is_placed
from fxdistill.distiller.modes import Request, Steps, tapping
from fxdistill.distiller.settings import Setting
from fxdistill.distiller.step import step
from fxdistill.distiller.towers import Towers
from fxdistill.distiller.unchanged import unchanged
from fxdistill.models.tap import Tap, Tower
from fxdistill.objective.objective import Losses, Objective


@dataclass(frozen=True)
class Finding:
    """A value that is not finite.

    ``kind`` is what it is: "weight" (a weight or the temperature), "input", "parameter", "module"
    (its output), "value" (of a match), "term", "loss" or "gradient". ``model`` is the name of its
    model, if it has one, and ``name`` its own. ``nan`` and ``infinite`` count its entries, of
    ``size`` in all.
    """

    kind: str
    model: str | None
    name: str
    nan: int
    infinite: int
    size: int

    def __str__(self) -> str:
        whose = "" if self.model is None else f"{self.model} "
        counts = [(self.nan, "NaN"), (self.infinite, "infinite")]
        some = " and ".join(f"{count} {word}" for count, word in counts if count)
        if self.size == 1:
            some = "NaN" if self.nan else "infinite"
            return f"{whose}{self.kind} {self.name!r} is {some}"
        return f"{whose}{self.kind} {self.name!r}: {some} of {self.size} values"


@dataclass(frozen=True)
class Explanation:
    """What ``distiller.explain(batch)`` found; ``print`` shows it.

    ``findings`` are in the order of a step: weights and the temperature, inputs, parameters, of
    each model the first modules with a NaN and with an infinity, values of matches, terms, the
    loss, gradients. ``module`` and ``term`` are the first of these kinds, ``None`` without one.
    """

    findings: tuple[Finding, ...]
    loss: float

    @property
    def finite(self) -> bool:
        """Whether there are no findings."""
        return not self.findings

    @property
    def first(self) -> Finding | None:
        """The first finding; ``None`` where all is finite."""
        return self.findings[0] if self.findings else None

    @property
    def module(self) -> Finding | None:
        """The first module, in the order in which they end, whose output is not finite."""
        return next((f for f in self.findings if f.kind == "module"), None)

    @property
    def term(self) -> Finding | None:
        """The first term that is not finite."""
        return next((f for f in self.findings if f.kind == "term"), None)

    def __str__(self) -> str:
        if self.first is None:
            return f"All values are finite, and so are the gradients; the loss is {self.loss:.6g}."
        lines = [f"The first value that is not finite: {self.first}", *map(str, self.findings[1:])]
        if not any(f.kind in ("term", "loss", "gradient") for f in self.findings):
            lines.append(
                f"Terms and gradients are finite all the same: the loss is {self.loss:.6g}"
            )
        return "\n".join(lines)


def explained(request: Request, settings: dict[str, Setting]) -> Explanation:
    """Run one step eagerly, and look at every value; nothing is left of it."""
    towers, objective = request.towers, request.objective
    found = [f for name, value in settings.items() if (f := _of("weight", None, name, value))]
    found += _inputs(request)
    found += _parameters(towers)
    with unchanged(towers.every), torch.enable_grad():
        modules: dict[Tower, list[Finding]] = {tower: [] for tower in towers.modules}
        with watched(towers, modules), tapping(request, Steps(), capturing=False) as table:
            given = (request.call.inputs, request.call.batch, request.settings)
            losses, _ = step(towers, objective, *given)
            values = dict(table.values)
        for each in modules.values():
            found += each
        found += _values(objective, values)
        found += _losses(losses)
        found += _gradients(towers, losses.total)
    return Explanation(tuple(found), float(losses.total.detach()))


def _of(kind: str, model: str | None, name: str, value: Any) -> Finding | None:
    """A finding of ``value``, on this rank; ``None`` where it is finite."""
    if isinstance(value, (int, float)):
        value = torch.tensor(float(value))
    if is_lazy(value):
        return None  # the run builds its layer
    if not isinstance(value, Tensor) or not (value.is_floating_point() or value.is_complex()):
        return None
    x = value.detach()
    x = x.to_local() if is_placed(x) else x
    if x.is_meta or bool(torch.isfinite(x).all()):
        return None
    nan, infinite = int(x.isnan().sum()), int(x.isinf().sum())
    return Finding(kind, model, name, nan, infinite, x.numel())


def _inputs(request: Request) -> list[Finding]:
    """The tensors that a call brings: each once, whichever models take it."""
    found: dict[int, Finding | None] = {}
    for inputs in request.call.inputs.values():
        for path, value in tree_flatten_with_path((inputs.args, inputs.kwargs))[0]:
            name = "".join(map(str, path[1:])).strip("[]'")
            found.setdefault(id(value), _of("input", None, name, value))
    for name, value in request.call.batch._asdict().items():
        for leaf in tree_leaves(value):
            found.setdefault(id(leaf), _of("input", None, name, leaf))
    return [one for one in found.values() if one is not None]


def _parameters(towers: Towers) -> list[Finding]:
    """Parameters and buffers; a buffer of infinities alone is a mask, and none of them."""
    found = []
    for tower, model in (*towers.modules.items(), *_beside(towers)):
        named = (*model.named_parameters(), *model.named_buffers())
        each = (_of("parameter", tower, name, value) for name, value in named)
        buffers = {name for name, _ in model.named_buffers()}
        found += [one for one in each if one and not (one.name in buffers and not one.nan)]
    return found


def _beside(towers: Towers) -> list[tuple[str, nn.Module]]:
    return list(zip(type(towers.beside)._fields, towers.beside, strict=True))


@contextlib.contextmanager
def watched(towers: Towers, found: dict[Tower, list[Finding]]) -> Iterator[None]:
    """Look at each module's output in the body; ``found`` gains the first NaN and infinity."""
    with contextlib.ExitStack() as hooks:
        for tower, model in towers.modules.items():
            for path, module in model.named_modules():
                hook = _watch(tower, path or type(model).__name__, found[tower])
                hooks.callback(module.register_forward_hook(hook).remove)
        yield


def _watch(tower: Tower, path: str, found: list[Finding]) -> Any:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        if {(True, False), (False, True)} <= {(f.nan > 0, f.nan == 0) for f in found}:
            return
        for leaf in tree_leaves(output):
            one = _of("module", tower, f"{path} ({type(module).__name__})", leaf)
            if one and not any((f.nan > 0) == (one.nan > 0) for f in found):
                found.append(one)

    return hook


def _values(objective: Objective, values: dict[tuple[Tower, Tap], Any]) -> list[Finding]:
    """The values that matches compare, each once."""
    found: dict[tuple[Tower, Tap], Finding | None] = {}
    for term in objective.features:
        for end in term.taps:
            for part in tensors_of(values.get(end)):
                found.setdefault(end, _of("value", end[0], str(end[1]), part))
    return [one for one in found.values() if one is not None]


def _losses(losses: Losses) -> list[Finding]:
    # "features" is the mean of the matches: these come first.
    terms = sorted(losses.terms.items(), key=lambda item: item[0] == "features")
    found = [_of("term", None, name, value) for name, value in terms]
    return _all(*found, _of("loss", None, "loss", losses.total))


def _gradients(towers: Towers, total: Tensor) -> list[Finding]:
    """The parameters whose gradients of a finite loss are not finite."""
    if not total.requires_grad or not bool(torch.isfinite(total)):
        return []
    learning: dict[Tensor, tuple[str, str]] = {}
    trained = {tower: m for tower, m in towers.modules.items() if tower not in towers.frozen}
    for tower, model in (*trained.items(), *_beside(towers)):
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                learning.setdefault(parameter, (tower, name))
    gradients = torch.autograd.grad(total, list(learning), allow_unused=True)
    pairs = zip(learning.values(), gradients, strict=True)
    return _all(*(_of("gradient", tower, name, value) for (tower, name), value in pairs))


def _all(*found: Finding | None) -> list[Finding]:
    return [one for one in found if one is not None]
