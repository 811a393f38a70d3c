"""Small inputs that a model takes, made from what it says about itself.

They are for runs on fake tensors, which compute nothing and tell shapes.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fxdistill.models.conventions import forward_parameters
from fxdistill.models.devices import device_of

BATCH, LENGTH, SAMPLES = 2, 8, 8000


def dummy_inputs(model: nn.Module) -> dict[str, Tensor] | None:
    """Keyword arguments for ``model``; ``None`` where nothing tells what it takes.

    Known names of its ``forward`` that have no default, or that are its main input, get zeros in
    the sizes of its config; a model with other names may have ``dummy_inputs``, as Hugging Face's
    do.
    """
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    named = [p for p in forward_parameters(model) if p.kind not in variable]
    given = {p.name: p.default is p.empty for p in named}
    main = getattr(model, "main_input_name", None)
    main = main if main in given else next((name for name in _MAKERS if name in given), None)
    needed = [name for name, required in given.items() if required or name == main]
    if needed and all(name in _MAKERS for name in needed):
        return {**_made(model, needed), **_decoder(model, given)}
    own = getattr(model, "dummy_inputs", None)
    if isinstance(own, Mapping) and all(name in given for name in own):
        device = device_of(model)
        return {name: value.to(device) for name, value in own.items() if isinstance(value, Tensor)}
    return None


def _made(model: nn.Module, names: list[str]) -> dict[str, Tensor]:
    config, device = getattr(model, "config", None), device_of(model)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    made = {}
    for name in names:
        size, whole = _MAKERS[name](config)
        kind = torch.long if whole else dtype
        made[name] = torch.zeros(BATCH, *size, dtype=kind, device=device)
    return made


def _decoder(model: nn.Module, given: Mapping[str, bool]) -> dict[str, Tensor]:
    """The tokens of the decoder, if the model has one."""
    config = getattr(model, "config", None)
    if "decoder_input_ids" not in given or not getattr(config, "is_encoder_decoder", False):
        return {}
    return _made(model, ["decoder_input_ids"])


def _text(_config: Any) -> tuple[tuple[int, ...], bool]:
    return (LENGTH,), True


def _image(config: Any) -> tuple[tuple[int, ...], bool]:
    vision = getattr(config, "vision_config", config)
    size = getattr(vision, "image_size", 224)
    height, width = (size, size) if isinstance(size, int) else size
    return (getattr(vision, "num_channels", 3), height, width), False


def _spectrum(config: Any) -> tuple[tuple[int, ...], bool]:
    frames = 2 * getattr(config, "max_source_positions", 1500)
    return (getattr(config, "num_mel_bins", 80), frames), False


def _sound(_config: Any) -> tuple[tuple[int, ...], bool]:
    return (SAMPLES,), False


_MAKERS: dict[str, Callable[[Any], tuple[tuple[int, ...], bool]]] = {
    "input_ids": _text,
    "pixel_values": _image,
    "input_features": _spectrum,
    "input_values": _sound,
    "decoder_input_ids": _text,
}
