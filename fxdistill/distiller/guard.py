"""The checks before every step, which only look at flags, devices and identities."""

import weakref
from collections.abc import Iterable

from torch import nn

from fxdistill.distiller.towers import Towers
from fxdistill.errors import BatchError, ModeError, OptionError
from fxdistill.models.adapters import check_base
from fxdistill.models.binding import misfit
from fxdistill.models.devices import check_devices, check_same_device
from fxdistill.models.modes import settle_modes
from fxdistill.models.tap import Tower
from fxdistill.objective.call import Call
from fxdistill.objective.denominators import check_counted_heads
from fxdistill.objective.named_weights import check_names
from fxdistill.objective.objective import Objective
from fxdistill.objective.tokens import TOKEN_FIELDS

# The distillers that run a model frozen, and so put it in eval mode, as long as they live.
_FREEZING: "weakref.WeakKeyDictionary[nn.Module, weakref.WeakSet[nn.Module]]" = (
    weakref.WeakKeyDictionary()
)


def freezes(distiller: nn.Module, models: Iterable[nn.Module]) -> None:
    """Remember that ``distiller`` runs ``models`` frozen."""
    for model in models:
        _FREEZING.setdefault(model, weakref.WeakSet()).add(distiller)


def check_not_crossed(distiller: nn.Module, towers: Towers) -> None:
    """Raise ModeError where a model that should train is in eval mode as another's teacher.

    Its dropout and its batch statistics would be off without a word.
    """
    for tower, model in towers.modules.items():
        others = [d for d in _FREEZING.get(model, ()) if d is not distiller]
        if distiller.training and not model.training and tower not in towers.frozen and others:
            raise ModeError(
                f"the {tower} is in eval mode, because another distiller has it as its frozen "
                "teacher: here it would train without dropout and batch statistics. Train both "
                "in one distiller (freeze_teacher=False), give the other one a copy, or call "
                f"{tower}.train() before each step that trains it."
            )


def check_holds_no_frozen(towers: Towers) -> None:
    """Raise OptionError where a module that is trained beside the models holds a frozen model's.

    Its parameters would be trained and saved with the distiller.
    """
    learnt = {id(p) for model in towers.trained() for p in model.parameters()}
    owners = {
        id(p): f"{name!r} of the {tower}"
        for tower in sorted(towers.frozen)
        for name, p in towers.modules[tower].named_parameters()
        if id(p) not in learnt
    }
    beside = towers.beside
    every = [(f"loss module {i} ({type(m).__name__})", m) for i, m in enumerate(beside.losses)]
    every += [(f"projection {i}", module) for i, module in enumerate(beside.projections)]
    every += [(f"head {name!r}", module) for name, module in beside.heads.items()]
    for what, module in every:
        for name, parameter in module.named_parameters():
            if (owner := owners.get(id(parameter))) is not None:
                raise OptionError(
                    f"the {what} has {name!r}, which is {owner}: the distiller would train and "
                    "save what is frozen. Give it a copy of that module, or keep it where torch "
                    "does not register it, as in self.held = [module]; a teacher that is to learn "
                    "is freeze_teacher=False."
                )


def check_call(towers: Towers, objective: Objective, call: Call) -> None:
    """Put frozen models in eval mode; raise an error where a step would fail or teach nothing."""
    tokens = {name: getattr(call.batch, name) for name in TOKEN_FIELDS}
    main = towers.main_module
    for tower, model in towers.modules.items():
        if tower == towers.main or tower in objective.towers:
            if tower != towers.main:
                check_same_device(main, model, tower)
                _check_apart(towers, objective, tower, call)
            check_base(model, tower)
            args, kwargs = call.inputs[tower]
            if why := misfit(model, args, kwargs):
                raise BatchError(f"the {tower} ({type(model).__name__}) {why}")
            check_devices(model, tower, args, kwargs)
    check_devices(main, towers.main, (), tokens)
    for i, projection in enumerate(towers.beside.projections):
        check_same_device(main, projection, f"projection {i}")
    for i, loss in enumerate(towers.beside.losses):
        check_same_device(main, loss, f"loss module {i} ({type(loss).__name__})")
    for name, head in towers.beside.heads.items():
        check_same_device(main, head, f"head {name!r}")
    check_names(objective.features, call.batch)
    check_counted_heads(objective.heads, call.batch)
    settle(towers, objective)


def _check_apart(towers: Towers, objective: Objective, tower: Tower, call: Call) -> None:
    """A model teaches itself nothing, unless its two sides see or give different things."""
    if towers.modules[tower] is not towers.main_module:
        return
    if any(term.student != term.teacher for term in objective.features):
        return
    ours, theirs = call.inputs[towers.main], call.inputs[tower]
    same = len(ours.args) == len(theirs.args) and ours.kwargs.keys() == theirs.kwargs.keys()
    values = [*zip(ours.args, theirs.args, strict=False)]
    values += [(value, theirs.kwargs.get(name)) for name, value in ours.kwargs.items()]
    if same and all(a is b for a, b in values):
        raise OptionError(
            f"{towers.main} and {tower} are one model and see the same inputs: it would learn to "
            f"be what it is. Give the {tower} a copy, or other inputs ({tower}_inputs={{...}})."
        )


def settle(towers: Towers, objective: Objective) -> None:
    """Put the frozen models that a term reads in eval mode; raises ModeError if it cannot."""
    for tower in towers.frozen & objective.towers:
        settle_modes(towers.trained(), towers.modules[tower], tower)
