"""Hooks that transformers 5 puts into a model when it first records hidden states or attentions.

It does so within the forward of the model's first run, which dynamo cannot trace: a model that has
not run yet ("cold") cannot be captured then. The same hooks may be installed before.

Private to transformers and used here only: ``output_capturing.maybe_install_capturing_hooks``. If
it moves, a cold model that records cannot be captured, and the error says where.
"""

import sys
from collections.abc import Iterable
from typing import Any

from torch import nn

_MODULE = "transformers.utils.output_capturing"
_INSTALL = "maybe_install_capturing_hooks"


def is_of_cold_model(error: Exception) -> bool:
    """Whether ``error`` says that a capture stopped where transformers installs its hooks."""
    return _INSTALL in str(error)


def install_recorders(models: Iterable[nn.Module]) -> bool:
    """Install the hooks as the first run would; return whether any model was without them."""
    library: Any = sys.modules.get(_MODULE)
    if library is None:
        return False
    cold = [
        module
        for model in models
        for module in model.modules()
        if _records(module, library) and not hasattr(module, "_output_capturing_hooks_installed")
    ]
    for module in cold:
        getattr(library, _INSTALL)(module)
    return bool(cold)


def _records(module: nn.Module, library: Any) -> bool:
    """Whether transformers has wrapped the forward of ``module`` to record outputs."""
    function: Any = type(module).forward
    while function is not None:  # other decorators may stand around it
        code = getattr(function, "__code__", None)
        if code is not None and code.co_filename == library.__file__:
            return True
        function = getattr(function, "__wrapped__", None)
    return False
