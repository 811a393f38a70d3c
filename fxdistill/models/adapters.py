"""Models with adapters (PEFT): their base with the adapters off, weights once in memory.

``PeftModel.disable_adapter()`` switches a flag in every layer, and back. In one step student and
teacher would then share their modules, and so train mode and the places of hooks, and a trace would
see the flag change. So the base is a model of its own: its modules are copies, without the adapters
around them, and its tensors are the very same ones.

PEFT is optional, and looked up only where it has been imported: without it no model has adapters.
"""

import copy
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from fxdistill.errors import ModeError, OptionError

_OVER = "_fxdistill_layers_over"  # an attribute of a base: the layers whose adapters are off in it
# What PEFT and transformers write on a model that has adapters.
_MARKS = ("peft_config", "_hf_peft_config_loaded")


def base_of(model: nn.Module) -> nn.Module:
    """The base of a PEFT model with its adapters off: a teacher without weights of its own.

    ``wrap(peft_model, base_of(peft_model), ...)`` teaches a LoRA student to stay near to the model
    that it started from. The base has the paths of the model before ``get_peft_model``
    (``model.layers.0.self_attn.q_proj``) and its very tensors, but for the running statistics of
    norms, which are copied. It is in eval mode, whatever mode the student is in. What is later done
    to the adapters (switched, added, disabled) does not reach it. ``model`` is left as it is.

    Args:
        model: What ``get_peft_model`` returned, or a model of transformers after ``add_adapter``.

    Raises:
        OptionError: The model has no adapters, or of a kind that cannot be taken off.
        ModeError: Adapters are merged into the weights, which are then not the base's.
    """
    inner = _inner(model)
    layers = list(adapters_of(inner).values())
    if inner is model and not layers:
        raise OptionError(
            f"base_of: {type(model).__name__} has no adapters of PEFT. Pass what "
            "get_peft_model(...) returned; a model without adapters is a teacher as it is."
        )
    if any(type(m).__name__.startswith("AdaptedAttention") for m in inner.modules()):
        raise OptionError(
            "base_of: adaption prompts stand in the place of attention, and cannot be taken off. "
            "Give the teacher a model of its own."
        )
    _require_unmerged(layers, "base_of")
    memo: dict[int, Any] = {id(tensor): tensor for tensor in _tensors(inner)}
    for layer in reversed(layers):  # inner ones first: what is below a layer may hold others
        memo[id(layer)] = copy.deepcopy(_below(layer), memo)
    base = copy.deepcopy(inner, memo)
    for mark in _MARKS:
        base.__dict__.pop(mark, None)
    base.__dict__[_OVER] = tuple(layers)
    return base.eval()


def check_base(model: nn.Module, name: str) -> None:
    """Raise ModeError where ``model`` is of ``base_of``, and adapters are merged into its weights.

    Each step asks.
    """
    if (layers := model.__dict__.get(_OVER)) is not None:
        _require_unmerged(layers, f"the {name} is a base with its adapters off, but")


def adapters_of(model: nn.Module) -> dict[str, nn.Module]:
    """The layers of PEFT in ``model`` that have adapters around a layer of the base, by path."""
    if not (kinds := _kinds()):
        return {}
    return {path: m for path, m in model.named_modules() if isinstance(m, kinds)}


def merged_in(model: nn.Module) -> list[str]:
    """The names of the adapters that are merged into the weights of ``model``."""
    return _merged(adapters_of(model).values())


def base_parameters(model: nn.Module) -> set[int]:
    """The ids of the frozen parameters of a model's base; empty for a model without adapters."""
    layers, inner = adapters_of(model).values(), _inner(model)
    if inner is model and not layers:
        return set()
    own = {i for layer in layers for i in _ids(layer) - _ids(_below(layer))}
    return {id(p) for p in inner.parameters() if not p.requires_grad} - own


def plain(module: nn.Module) -> nn.Module:
    """The layer of the base inside ``module``; ``module`` itself if it has no adapters around it.

    Structure is read from it: matrices of adapters are narrow, and no part of the architecture.
    """
    return _below(module) if isinstance(module, _kinds()) else module


def _kinds() -> tuple[Any, ...]:
    """The classes of PEFT's layers around a layer of the base; none where it is not imported."""
    layers: Any = sys.modules.get("peft.tuners.tuners_utils")
    others: Any = sys.modules.get("peft.utils.other")
    if layers is None or others is None:
        return ()
    return layers.BaseTunerLayer, others.AuxiliaryTrainingWrapper


def _inner(model: nn.Module) -> nn.Module:
    """The model into which PEFT has put its adapters; ``model`` itself if it is no PeftModel."""
    peft: Any = sys.modules.get("peft")
    if peft is None or not isinstance(model, (peft.PeftModel, peft.PeftMixedModel)):
        return model
    inside: Any = model.base_model  # a tuner around the model, or a model that gets prompts
    kinds: Any = sys.modules["peft.tuners.tuners_utils"]
    found: nn.Module = inside.model if isinstance(inside, kinds.BaseTuner) else inside
    return found


def _below(layer: Any) -> nn.Module:
    """The layer of the base that ``layer`` has its adapters around."""
    trained_copy = hasattr(layer, "original_module")
    found: nn.Module = layer.original_module if trained_copy else layer.get_base_layer()
    return found


def _merged(layers: Iterable[Any]) -> list[str]:
    return sorted({name for layer in layers for name in layer.merged_adapters})


def _require_unmerged(layers: Iterable[nn.Module], what: str) -> None:
    if merged := _merged(layers):
        raise ModeError(
            f"{what}: the adapters {', '.join(map(repr, merged))} are merged into the weights, "
            "which the base shares. Call unmerge_adapter() on the model with the adapters first."
        )


def _ids(module: nn.Module) -> set[int]:
    return {id(p) for p in module.parameters()}


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    """All tensors of a model but running statistics, which a student in train mode changes."""
    for module in model.modules():
        buffers = {} if isinstance(module, _NormBase) else module._buffers
        for table in (module._parameters, buffers, module.__dict__):
            yield from (value for value in table.values() if isinstance(value, Tensor))
