"""Masks that transformers makes for ``flex_attention``, in a form that can be captured.

transformers leaves a mask of padding out where all of it is ones, which is a branch on data, and
compiles the making of a block mask by itself. Neither can be in one graph. While a step is captured
the mask stays and its making is traced with all else: the masks are the same. What runs eagerly
meanwhile, in another thread say, gets what transformers does.

Private to transformers and used here only: ``masking_utils.fast_all`` and its name
``create_block_mask``. If they move, a model with ``attn_implementation="flex_attention"`` cannot be
captured, and the error says where.
"""

import contextlib
import sys
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn.attention.flex_attention import create_block_mask

_MODULE = "transformers.masking_utils"
_lock = threading.Lock()
_steps = [0]  # how many steps have others stand in, in all threads
_before: dict[str, Any] = {}


@contextlib.contextmanager
def traceable_masks() -> Iterator[None]:
    """Let the masks be traced for as long as the context lasts."""
    library = sys.modules.get(_MODULE)
    if library is None:
        yield
        return
    with _lock:
        _steps[0] += 1
        if _steps[0] == 1:
            _before.update({name: vars(library)[name] for name in _OTHERS if name in vars(library)})
            vars(library).update({name: _OTHERS[name] for name in _before})
    try:
        yield
    finally:
        with _lock:
            _steps[0] -= 1
            if _steps[0] == 0:
                vars(library).update(_before)


def _never(mask: Any) -> Any:
    return False if torch.compiler.is_compiling() else _before["fast_all"](mask)


def _uncompiled(*args: Any, _compile: bool = False, **kwargs: Any) -> Any:
    kwargs["_compile"] = _compile and not torch.compiler.is_compiling()
    return create_block_mask(*args, **kwargs)


_OTHERS = {"fast_all": _never, "create_block_mask": _uncompiled}
