"""Example inputs for the command line: zeros of the shapes that two models take."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from fxdistill.errors import CommandError
from fxdistill.models.conventions import find_task, input_names
from fxdistill.models.devices import device_of

BATCH, LENGTH = 4, 2048
MOST = 2**31  # numbers in one input: outside the meta device, an input takes memory
_LIMITS = ("max_position_embeddings", "n_positions", "max_seq_len")


def example_inputs(
    student: nn.Module, teacher: nn.Module, batch: int | None, length: int | None, task: str
) -> dict[str, Tensor]:
    """Keyword arguments of a call, with labels if the student's task is known.

    Tokens, images and labels are zeros: nothing is computed from them.
    """
    device, names, batch = device_of(student), input_names(student), batch or BATCH
    kind = find_task(student, task)
    inputs: dict[str, Tensor] = {}

    def tokens(fill: int) -> Tensor:
        size = _allowed(batch, _length(student, teacher, length))
        return torch.full(size, fill, dtype=torch.long, device=device)

    if "input_ids" in names:
        inputs["input_ids"] = tokens(0)
        if all("attention_mask" in input_names(model) for model in (student, teacher)):
            inputs["attention_mask"] = tokens(1)
    elif "pixel_values" in names:
        if length is not None:
            raise CommandError(f"--length {length}: {type(student).__name__} takes images")
        dtype = next((p.dtype for p in student.parameters()), None)
        size = _allowed(batch, *_image(student))
        inputs["pixel_values"] = torch.zeros(size, dtype=dtype, device=device)
    else:
        raise CommandError(
            f"{type(student).__name__}.forward takes {', '.join(names) or 'nothing by name'}, and "
            "inputs are made for input_ids and pixel_values only: --inputs file.py:factory, which "
            "returns a dict or a tuple of them"
        )
    if kind == "classification":
        inputs["labels"] = torch.zeros(batch, dtype=torch.long, device=device)
    elif kind is not None and "input_ids" in inputs:
        inputs["labels"] = tokens(0)
    return inputs


def on_device_of(model: nn.Module, inputs: Any) -> Any:
    """Check the user's inputs, and move them to the meta device if the model is there."""
    if not isinstance(inputs, (dict, tuple)):
        raise CommandError(
            f"--inputs made a {type(inputs).__name__}: a dict of the keywords of a call, or a "
            "tuple of its positional arguments"
        )
    if not inputs:
        raise CommandError(
            f"--inputs made an empty {type(inputs).__name__}: the factory returns no inputs, where "
            "a dict of the keywords of a call, or a tuple of its positional arguments is needed"
        )
    odd = [key for key in inputs if not isinstance(key, str)] if isinstance(inputs, dict) else []
    if odd:
        raise CommandError(
            f"--inputs made a dict with the key {odd[0]!r}: keys are the keywords of a call, which "
            "are strings; a tuple holds positional arguments"
        )
    if device_of(model).type != "meta":
        return inputs
    moved = torch.utils._pytree.tree_map_only(Tensor, lambda x: x.to("meta"), inputs)
    return moved


def _allowed(batch: int, *each: int) -> tuple[int, ...]:
    """The size of an input; raises CommandError if it has more than ``MOST`` numbers."""
    if (count := batch * math.prod(each)) > MOST:
        sizes = " × ".join(map(str, (batch, *each)))
        smaller = "--batch or --length" if len(each) == 1 else "--batch"
        raise CommandError(
            f"an input of {sizes} has {count} numbers, and one with {MOST} at most is made: choose "
            f"a smaller {smaller}"
        )
    return batch, *each


def _length(student: nn.Module, teacher: nn.Module, asked: int | None) -> int:
    limits = {
        tower: limit
        for tower, model in (("student", student), ("teacher", teacher))
        if (limit := _limit(model)) is not None
    }
    if asked is None:
        return min(LENGTH, *limits.values()) if limits else LENGTH
    for tower, limit in limits.items():
        if asked > limit:
            raise CommandError(
                f"--length {asked}: the {tower}'s configuration says {limit} positions at most"
            )
    return asked


def _limit(model: nn.Module) -> int | None:
    """The number of positions in the model's configuration; ``None`` if it gives none."""
    config = getattr(model, "config", None)
    if callable(of_text := getattr(config, "get_text_config", None)):
        config = of_text()
    # Relative positions have no limit; T5's configuration has n_positions all the same.
    relative = hasattr(config, "relative_attention_num_buckets")
    names = [name for name in _LIMITS if not (relative and name == "n_positions")]
    found = (getattr(config, name, None) for name in names)
    return next((limit for limit in found if isinstance(limit, int) and limit > 0), None)


def _image(model: nn.Module) -> tuple[int, ...]:
    config = getattr(model, "config", None)
    size = getattr(config, "image_size", 224)
    height, width = (size, size) if isinstance(size, int) else size
    return getattr(config, "num_channels", 3), height, width
