"""fxdistill: student, teacher and every loss as one graph for ``torch.compile``.

``fxdistill.wrap(student, teacher, mapping)`` -> call it like a model -> ``out.loss.backward()``.
"""

from importlib import import_module as _import_module
from pathlib import Path as _Path
from typing import TYPE_CHECKING, Any

# In a checkout `passes/` lies beside this package; in the wheel, inside it.
_root = _Path(__file__).resolve().parents[1]
if (_root / "pyproject.toml").is_file():
    __path__.append(str(_root))

__version__ = "0.1.0"

# The public names and their homes. Each is imported when it is first asked for: the command line
# answers --help without torch. Two lists, one for readers of types; a test compares them.
_HOMES = {
    "DistillOutput": "output",
    "Distiller": "distiller",
    "FxDistillError": "errors",
    "JointProgram": "program",
    "LossLog": "live",
    "LossRow": "live",
    "Match": "matching",
    "Matches": "matching",
    "PassRecord": "program",
    "Program": "program",
    "match": "proposal",
    "module_names": "matching",
    "resolve": "resolution",
    "run": "pipeline",
    "trace": "capture",
    "wrap": "api",
}
_MODULES = ("errors", "live", "losses", "passes")

if TYPE_CHECKING:
    from fxdistill import errors, live, losses
    from fxdistill.api import wrap
    from fxdistill.capture import trace
    from fxdistill.distiller import Distiller
    from fxdistill.errors import FxDistillError
    from fxdistill.live import LossLog, LossRow
    from fxdistill.matching import Match, Matches, module_names
    from fxdistill.output import DistillOutput
    from fxdistill.pipeline import run
    from fxdistill.program import JointProgram, PassRecord, Program
    from fxdistill.proposal import match
    from fxdistill.resolution import resolve
else:

    def __getattr__(name: str) -> Any:
        """Import a public name."""
        if name in _MODULES:
            return _import_module(f"{__name__}.{name}")
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        found = getattr(_import_module(f"{__name__}.{_HOMES[name]}"), name)
        globals()[name] = found
        return found

    def __dir__() -> list[str]:
        """What is there, and what can be asked for."""
        return sorted({*globals(), *_HOMES, *_MODULES})


__all__ = [
    "DistillOutput",
    "Distiller",
    "FxDistillError",
    "JointProgram",
    "LossLog",
    "LossRow",
    "Match",
    "Matches",
    "PassRecord",
    "Program",
    "errors",
    "live",
    "losses",
    "match",
    "module_names",
    "resolve",
    "run",
    "trace",
    "wrap",
]
