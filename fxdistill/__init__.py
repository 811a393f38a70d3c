"""fxdistill: student, teacher and every loss as one graph for ``torch.compile``.

``fxdistill.wrap(student, teacher, mapping)`` -> call it like a model -> ``out.loss.backward()``.
"""

from pathlib import Path as _Path

# In a checkout `passes/` lies beside this package; in the wheel, inside it.
_root = _Path(__file__).resolve().parents[1]
if (_root / "pyproject.toml").is_file():
    __path__.append(str(_root))

from fxdistill import errors, losses  # noqa: E402 - the path above comes first
from fxdistill.api import wrap  # noqa: E402
from fxdistill.capture import trace  # noqa: E402
from fxdistill.distiller import Distiller  # noqa: E402
from fxdistill.errors import FxDistillError  # noqa: E402
from fxdistill.matching import Match, Matches, module_names  # noqa: E402
from fxdistill.output import DistillOutput  # noqa: E402
from fxdistill.pipeline import run  # noqa: E402
from fxdistill.program import JointProgram, PassRecord, Program  # noqa: E402
from fxdistill.proposal import match  # noqa: E402
from fxdistill.resolve import resolve  # noqa: E402

__version__ = "0.1.0"

__all__ = [
    "DistillOutput",
    "Distiller",
    "FxDistillError",
    "JointProgram",
    "Match",
    "Matches",
    "PassRecord",
    "Program",
    "errors",
    "losses",
    "match",
    "module_names",
    "resolve",
    "run",
    "trace",
    "wrap",
]
