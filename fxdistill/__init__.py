"""fxdistill: student, teacher and every loss as one graph for ``torch.compile``.

``fxdistill.wrap(student, teacher, mapping)`` -> call it like a model -> ``out.loss.backward()``.
"""

import sys as _sys
from importlib import import_module as _import_module
from pathlib import Path as _Path
from typing import TYPE_CHECKING, Any

# In a checkout `passes/` lies beside this package; in the wheel, inside it.
_root = _Path(__file__).resolve().parents[1]
if (_root / "pyproject.toml").is_file():
    __path__.append(str(_root))

__version__ = "0.1.0"

# The public names and their homes. Each is imported when it is first asked for: the command line
# answers --help without torch. Readers of types are told below; a test compares the lists.
_HOMES = {
    "Checkpoint": "training.checkpoint.load",
    "DistillOutput": "distiller.output",
    "Distiller": "distiller.distiller",
    "FxDistillError": "errors",
    "Head": "objective.head",
    "Importance": "objective.importance",
    "JointProgram": "graph.joint",
    "LossLog": "training.loss_log",
    "LossRow": "training.loss_log",
    "Match": "mapping.match",
    "Matches": "mapping.matches",
    "PassRecord": "graph.program",
    "Program": "graph.program",
    "balance": "training.balance",
    "Schedule": "training.schedule",
    "base_of": "models.adapters",
    "gradient_norms": "training.balance",
    "load_checkpoint": "training.checkpoint.load",
    "match": "mapping.propose",
    "module_names": "models.tap",
    "mutual": "recipes.mutual",
    "resolve": "mapping.resolve",
    "rollout": "recipes.on_policy",
    "run": "graph.pipeline",
    "save_checkpoint": "training.checkpoint.save",
    "trace": "compiler.capture",
    "wrap": "distiller.wrap",
}
_MODULES = {
    "errors": "errors",
    "live": "training.loss_log",
    "losses": "losses",
    "passes": "passes",
    "presets": "recipes.presets",
    "schedules": "training.schedules",
    "trainers": "training.trainers",
}

if TYPE_CHECKING:
    from fxdistill import errors, losses
    from fxdistill.compiler.capture import trace
    from fxdistill.distiller.distiller import Distiller
    from fxdistill.distiller.output import DistillOutput
    from fxdistill.distiller.wrap import wrap
    from fxdistill.errors import FxDistillError
    from fxdistill.graph.joint import JointProgram
    from fxdistill.graph.pipeline import run
    from fxdistill.graph.program import PassRecord, Program
    from fxdistill.mapping.match import Match
    from fxdistill.mapping.matches import Matches
    from fxdistill.mapping.propose import match
    from fxdistill.mapping.resolve import resolve
    from fxdistill.models.adapters import base_of
    from fxdistill.models.tap import module_names
    from fxdistill.objective.head import Head
    from fxdistill.objective.importance import Importance
    from fxdistill.recipes import presets
    from fxdistill.recipes.mutual import mutual
    from fxdistill.recipes.on_policy import rollout
    from fxdistill.training import loss_log as live
    from fxdistill.training import schedules, trainers
    from fxdistill.training.balance import balance, gradient_norms
    from fxdistill.training.checkpoint.load import Checkpoint, load_checkpoint
    from fxdistill.training.checkpoint.save import save_checkpoint
    from fxdistill.training.loss_log import LossLog, LossRow
    from fxdistill.training.schedule import Schedule
else:

    def __getattr__(name: str) -> Any:
        """Import a public name."""
        if name in _MODULES:
            found = _import_module(f"{__name__}.{_MODULES[name]}")
        elif name in _HOMES:
            found = getattr(_import_module(f"{__name__}.{_HOMES[name]}"), name)
        else:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = found
        return found

    def __dir__() -> list[str]:
        """What is there, and what can be asked for."""
        return sorted({*globals(), *_HOMES, *_MODULES})


# `from fxdistill.trainers.trl import DistillationTrainer` finds them by their public name: the
# folder's __init__ imports nothing by itself.
_sys.modules[f"{__name__}.trainers"] = _import_module(f"{__name__}.training.trainers")

__all__ = [
    "Checkpoint",
    "DistillOutput",
    "Distiller",
    "FxDistillError",
    "Head",
    "Importance",
    "JointProgram",
    "LossLog",
    "LossRow",
    "Match",
    "Matches",
    "PassRecord",
    "Program",
    "Schedule",
    "balance",
    "base_of",
    "errors",
    "gradient_norms",
    "live",
    "load_checkpoint",
    "losses",
    "match",
    "module_names",
    "mutual",
    "presets",
    "resolve",
    "rollout",
    "run",
    "save_checkpoint",
    "schedules",
    "trace",
    "trainers",
    "wrap",
]
