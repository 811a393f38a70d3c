"""Autocast, asked in a way that dynamo can trace."""

import torch


# torch 2.11 cannot trace the question, whose answer is a constant of the device.
@torch._dynamo.assume_constant_result  # type: ignore[untyped-decorator]
def has_autocast(kind: str) -> bool:
    """Whether devices of this kind have autocast; of others ("meta"), torch answers no more."""
    return torch.amp.is_autocast_available(kind)


def autocast_dtype(kind: str) -> torch.dtype | None:
    """The dtype that autocast casts to on devices of this kind; ``None`` where it is off."""
    if has_autocast(kind) and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return None
