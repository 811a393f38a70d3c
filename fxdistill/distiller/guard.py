"""The checks before every step, which only look at flags and devices."""

from fxdistill.distiller.towers import Towers
from fxdistill.models.devices import check_devices, check_same_device
from fxdistill.models.modes import settle_modes
from fxdistill.objective.call import Call
from fxdistill.objective.objective import Objective
from fxdistill.objective.tokens import TOKEN_FIELDS


def check_call(towers: Towers, objective: Objective, call: Call) -> None:
    """Put frozen models in eval mode; raise DeviceError or ModeError where a step would fail."""
    tokens = {name: getattr(call.batch, name) for name in TOKEN_FIELDS}
    main = towers.main_module
    for tower, model in towers.modules.items():
        if tower == towers.main or tower in objective.towers:
            if tower != towers.main:
                check_same_device(main, model, tower)
            check_devices(model, tower, call.inputs[tower].args, call.inputs[tower].kwargs)
    check_devices(main, towers.main, (), tokens)
    for i, projection in enumerate(towers.projections):
        check_same_device(main, projection, f"projection {i}")
    settle(towers, objective)


def settle(towers: Towers, objective: Objective) -> None:
    """Put the frozen models that a term reads in eval mode; raises ModeError if it cannot."""
    for tower in towers.frozen & objective.towers:
        settle_modes(towers.trained(), towers.modules[tower], tower)
