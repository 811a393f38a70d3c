"""What a distiller brings for the trainers of others; each name is imported when it is asked for.

``trl`` is the module for TRL, whose ``DistillationTrainer`` needs it installed. The others are
callbacks for the ``Trainer`` of transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

_HOMES = {"LossCallback": "loss_callback", "SaveStudent": "save_student"}
# Users import it by the public name, and it must not be loaded twice.
_TRL = "fxdistill.trainers.trl"

if TYPE_CHECKING:
    from fxdistill.training.trainers.loss_callback import LossCallback
    from fxdistill.training.trainers.save_student import SaveStudent
else:

    def __getattr__(name: str) -> Any:
        """Import a public name."""
        if name == "trl":
            return import_module(_TRL)
        if name not in _HOMES:
            raise AttributeError(f"module 'fxdistill.trainers' has no attribute {name!r}")
        found = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
        globals()[name] = found
        return found

    def __dir__() -> list[str]:
        """What is there, and what can be asked for."""
        return sorted({*globals(), *_HOMES, "trl"})


__all__ = ["LossCallback", "SaveStudent"]
