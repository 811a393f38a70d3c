"""Whether a module can have the port ``"attention"``, as far as its structure and name tell."""

import re
from collections.abc import Sequence

from torch import nn

from fxdistill.errors import PortError, did_you_mean
from fxdistill.models.structure import stacks_of
from fxdistill.models.tap import ATTENTION, Tap

_OF_TORCH = "torch.nn.modules."
_ATTENTION = re.compile(r"attention|attn", re.I)


def attention_problems(model: nn.Module, tower: str, taps: Sequence[Tap]) -> list[PortError]:
    """The errors for modules that surely attend nothing: MLPs, and layers of torch's own."""
    inside = [tap for tap in taps if tap.port.partition(".")[0] == ATTENTION]
    if not inside:
        return []
    parts = [part for stack in stacks_of(model) for block in stack.blocks for part in block.parts]
    attending = [path for path, module in model.named_modules() if is_named_attention(module)]
    mlps = {part.path for part in parts if part.role == "mlp"}
    problems = []
    for path in dict.fromkeys(tap.path for tap in inside):
        module = model.get_submodule(path)
        if path in mlps or _is_of_torch(module):
            near = did_you_mean(path, attending) if attending else "none that is recognised"
            problems.append(
                PortError(
                    f"{tower} module {path!r} ({type(module).__name__}) has no attention, which "
                    f"the port 'attention' is of. Modules that attend, nearest first: {near}."
                )
            )
    return problems


def is_named_attention(module: nn.Module) -> bool:
    """Whether a class says by its name that it attends, and is none of torch's own."""
    name = type(module).__name__
    return _ATTENTION.search(name) is not None and not _is_of_torch(module)


def _is_of_torch(module: nn.Module) -> bool:
    """Whether all code in a module is torch's own, without attention."""
    return all(
        type(m).__module__.startswith(_OF_TORCH)
        and not isinstance(m, (nn.MultiheadAttention, nn.TransformerEncoderLayer))
        for m in module.modules()
    )
