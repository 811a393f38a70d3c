"""Sort the arguments of a call: inputs of the models, and arguments of the objective."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fxdistill.base.figures import shown
from fxdistill.base.tensors import scalar
from fxdistill.base.warn import warn
from fxdistill.errors import BatchError, MatchWarning, OptionError, did_you_mean, is_slip
from fxdistill.models.binding import may_read, positional_limit
from fxdistill.models.conventions import (
    accepted_keywords,
    decoder_inputs,
    input_names,
    named_keywords,
)
from fxdistill.models.devices import device_of
from fxdistill.models.frames import frame_masks
from fxdistill.models.tap import Tower
from fxdistill.objective.own_dtypes import Casts, cast, clashing_dtypes
from fxdistill.objective.tokens import TOKEN_FIELDS, Batch, Grid

CALL_KEYWORDS = (
    "labels",
    "loss_mask",
    "token_weights",
    "num_items",
    "num_items_in_batch",
    "num_feature_items",
    "num_head_items",
    "weights",
)


SMOOTHING = (
    "Trainer computes label smoothing itself, from logits that a distiller does not give it. "
    "Smooth the distiller's own labels instead: wrap(..., "
    "label_loss=functools.partial(fxdistill.losses.cross_entropy, label_smoothing=...))"
)


class Inputs(NamedTuple):
    """The arguments of one model."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class Call:
    """One sorted call: the inputs of each model, and the batch that the objective reads.

    ``casts`` are the dtypes, before and after, of what was cast for a model.
    """

    inputs: Mapping[Tower, Inputs]
    batch: Batch
    casts: Mapping[Tower, Casts] = field(default_factory=dict)


def sort_call(
    models: Mapping[Tower, nn.Module],
    main: Tower,
    task: str | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Call:
    """Sort the arguments of a call into the inputs of each model and those of the objective.

    The entries of ``NAME_inputs`` replace or extend the inputs of the model called NAME. Positional
    arguments stay positional; the objective reads them by their names in ``main``'s ``forward``. An
    encoder-decoder without decoder inputs gets the shifted labels as its decoder's tokens. Where
    models have different dtypes, each gets what was made for another one in its own. Raises
    BatchError for a field of the wrong type or shape.
    """
    of_one = {f"{tower}_inputs": tower for tower in models}
    kept = {*CALL_KEYWORDS, *of_one}
    own = {key: value for key, value in kwargs.items() if key in kept and value is not None}
    _require_tensors(own)
    _require_dicts({name: own[name] for name in of_one if name in own})
    _require_labels_of_items(own)
    shared = Inputs(args, {key: value for key, value in kwargs.items() if key not in kept})
    inputs = {
        tower: _laid_over(models[tower], taken, own.get(f"{tower}_inputs", {}))
        for tower, taken in _by_signature(models, shared).items()
    }
    labels = own.get("labels")
    if task == "seq2seq" and labels is not None:
        for tower, model in models.items():
            _give_decoder(model, inputs[tower], labels)
    batch = _batch(models, inputs, main, own, task)
    return _in_own_dtypes(models, Call(inputs, batch), own)


def _in_own_dtypes(models: Mapping[Tower, nn.Module], call: Call, own: Mapping[str, Any]) -> Call:
    """The call, with what was made for a model of another dtype cast; ``own`` inputs stay."""
    inputs, casts = dict(call.inputs), dict[Tower, Casts]()
    dtypes = clashing_dtypes(models)
    for tower, dtype in dtypes.items():
        others, as_it_is = {*dtypes.values()} - {dtype}, own.get(f"{tower}_inputs", {})
        casts[tower] = []
        args, named = inputs[tower]
        named = {
            name: value if name in as_it_is else cast(value, dtype, others, casts[tower])
            for name, value in named.items()
        }
        inputs[tower] = Inputs(cast(args, dtype, others, casts[tower]), named)
    return Call(inputs, call.batch, {tower: made for tower, made in casts.items() if made})


def _by_signature(models: Mapping[Tower, nn.Module], shared: Inputs) -> dict[Tower, Inputs]:
    """Give each model the inputs that its ``forward`` takes; BatchError for one of no model."""
    count = len(shared.args)
    limits = {tower: positional_limit(model) if count else None for tower, model in models.items()}
    if count and all(limit is not None and limit < count for limit in limits.values()):
        most = max(limit for limit in limits.values() if limit is not None)
        raise BatchError(
            f"{count} inputs are given by position, and no model takes more than {most}. What the "
            "distiller takes itself (labels and weights) is given by name."
        )
    takes = {tower: accepted_keywords(model) for tower, model in models.items()}
    named = [named_keywords(model) for model in models.values()]
    known = {*CALL_KEYWORDS, *(f"{tower}_inputs" for tower in models)}.union(*named)
    for name in (name for name in shared.kwargs if name not in known):
        # A model of **kwargs may read any name; one letter from a known name, it is a slip.
        anything = [models[tower] for tower, names in takes.items() if names is None]
        if not any(may_read(m, name) for m in anything) or any(is_slip(name, k) for k in known):
            raise BatchError(
                f"no model takes {name!r}, and it is no keyword of the distiller's own. "
                f"Nearest: {did_you_mean(name, sorted(known))}."
            )
    return {
        tower: Inputs(
            shared.args[: limits[tower]],
            {k: v for k, v in shared.kwargs.items() if names is None or k in names},
        )
        for tower, names in takes.items()
    }


def _batch(
    models: Mapping[Tower, nn.Module],
    inputs: Mapping[Tower, Inputs],
    main: Tower,
    own: Mapping[str, Any],
    task: str | None,
) -> Batch:
    """The batch, from the objective's own keywords and from the inputs of ``main``."""
    model = models[main]
    device = device_of(model)
    counts = {name: scalar(own[name], device) for name in _NUMBERS if name in own}
    head_items = own.get("num_head_items", {})
    seen = _by_name(model, inputs[main])
    labels = own.get("labels")
    grid = _grid(model, inputs[main].args, seen, own, task)
    others = _others(models, inputs, main, own, task, grid)
    return Batch(
        labels=labels,
        loss_mask=own.get("loss_mask"),
        token_weights=own.get("token_weights"),
        attention_mask=grid.attention_mask,
        **counts,
        tokens=grid.tokens,
        decoder_tokens=_tensor(labels) if grid.decoder_tokens is None else grid.decoder_tokens,
        decoder_mask=grid.decoder_mask,
        frames=grid.frames,
        named=own.get("weights"),
        head_items={name: scalar(n, device) for name, n in head_items.items()} or None,
        others=others or None,
    )


def _others(
    models: Mapping[Tower, nn.Module],
    inputs: Mapping[Tower, Inputs],
    main: Tower,
    own: Mapping[str, Any],
    task: str | None,
    grid: Grid,
) -> dict[Tower, Grid]:
    """The grids of models that see other tokens than ``main``, whose own is ``grid``.

    They have inputs of their own, or make other frames of the same sound.
    """
    hears = _hears(_by_name(models[main], inputs[main]))
    found = {}
    for tower in (t for t in models if t != main):
        given = own.get(f"{tower}_inputs") or own.get(f"{main}_inputs")
        if given or hears:
            other = grid_of(models[tower], inputs[tower], task)
            if _differs(other, grid) if given else not _is_of_frames_as(other, grid):
                found[tower] = other
    return found


def _is_of_frames_as(grid: Grid, other: Grid) -> bool:
    """Whether two models make as many frames of one sound."""
    ours, theirs = (
        [mask.shape[:2] for mask in (one.tokens, *one.frames) if mask is not None]
        for one in (grid, other)
    )
    return ours == theirs


def grid_of(model: nn.Module, inputs: Inputs, task: str | None) -> Grid:
    """The tokens of a model's own inputs."""
    return _grid(model, inputs.args, _by_name(model, inputs), {}, task)


def _grid(
    model: nn.Module,
    args: tuple[Any, ...],
    seen: Mapping[str, Any],
    own: Mapping[str, Any],
    task: str | None,
) -> Grid:
    """The tokens of a model's inputs and their mask; the frames of a speech model that tells.

    Texts of several choices for each sample, ``[B, C, L]``, are ``[B·C, L]`` to the model.
    """
    mask = _tensor(seen.get("attention_mask"))
    decoder = _tensor(seen.get("decoder_input_ids", seen.get("decoder_inputs_embeds")))
    after = _tensor(seen.get("decoder_attention_mask"))
    if mask is not None and _hears(seen):
        frames, *inside = frame_masks(model, mask) or (None,)
        if frames is not None:
            return Grid(frames, frames, decoder, after, tuple(inside))
    tokens = _token_grid(args, seen, own, task)
    if tokens is not None and _has_choices(tokens, mask, task):
        tokens = tokens.flatten(0, 1)
        mask = None if mask is None else mask.flatten(0, 1)
    return Grid(tokens, mask, decoder, after)


def _hears(seen: Mapping[str, Any]) -> bool:
    """Whether a call's mask is of sound: there are numbers as long, and no text."""
    mask = _tensor(seen.get("attention_mask"))
    if mask is None or any(
        _tensor(seen.get(n)) is not None for n in ("input_ids", "inputs_embeds")
    ):
        return False
    given = [x for x in seen.values() if isinstance(x, Tensor) and x is not mask]
    alike = [x for x in given if x.shape[:2] == mask.shape]
    return bool(alike) and all(x.is_floating_point() for x in alike)


def _has_choices(tokens: Tensor, mask: Tensor | None, task: str | None) -> bool:
    """Whether the inputs of a classifier are texts ``[B, C, L]``, or embeddings of such."""
    axes = 4 if tokens.is_floating_point() else 3
    if task != "classification" or tokens.ndim != axes:
        return False
    return mask is None or tuple(mask.shape) == tuple(tokens.shape[:3])


def _differs(grid: Grid, other: Grid) -> bool:
    """Whether two models see other tokens, or other padding."""
    sides = (
        (grid.tokens, other.tokens, grid.attention_mask, other.attention_mask),
        (grid.decoder_tokens, other.decoder_tokens, grid.decoder_mask, other.decoder_mask),
    )
    return any(
        ours is not None and (mask is not masked or not _alike(ours, theirs))
        for ours, theirs, mask, masked in sides
    )


def _alike(ours: Tensor, theirs: Tensor | None) -> bool:
    return theirs is not None and ours.shape[:2] == theirs.shape[:2]


def _require_tensors(own: Mapping[str, Any]) -> None:
    for name in TOKEN_FIELDS:
        if not isinstance(own.get(name, _NOTHING), Tensor):
            raise BatchError(f"{name} is a {type(own[name]).__name__}, not a tensor")
    _require_named_weights(own.get("weights"))
    of_heads = own.get("num_head_items", {})
    if not isinstance(of_heads, Mapping):
        raise BatchError(
            "num_head_items is a dict of numbers by the names of heads=, not "
            f"{type(of_heads).__name__}"
        )
    numbers = {f"num_head_items[{name!r}]": value for name, value in of_heads.items()}
    numbers |= {name: own.get(name) for name in _NUMBERS}
    for name, value in numbers.items():
        if isinstance(value, Tensor) and value.numel() != 1:
            raise BatchError(
                f"{name} has shape {shown(value.shape)}: one number, the count of all items "
                "that one optimizer step is averaged over"
            )


def _require_dicts(given: Mapping[str, Any]) -> None:
    for name, value in given.items():
        if not isinstance(value, Mapping):
            raise BatchError(
                f"{name} is a {type(value).__name__}: a dict of that model's own inputs by name"
            )


def _require_labels_of_items(own: Mapping[str, Any]) -> None:
    """Raise BatchError where a trainer has counted the labels, and then taken them away."""
    if "num_items_in_batch" in own and "labels" not in own:
        raise BatchError(
            "num_items_in_batch counts labels, and there are none: the trainer has taken them out "
            f"of the batch, for a loss of its own (label_smoothing_factor, compute_loss_func). "
            f"{SMOOTHING}; and drop label_smoothing_factor. Without labels, num_items is the "
            "denominator."
        )


def _require_named_weights(given: Any) -> None:
    if given is not None and not (
        isinstance(given, Mapping) and all(isinstance(x, Tensor) for x in given.values())
    ):
        raise BatchError(
            "weights is a dict of tensors, by the names in Match(weights=...), not "
            f"{type(given).__name__}"
        )


_NOTHING = torch.empty(0)
_NUMBERS = ("num_items", "num_items_in_batch", "num_feature_items")


def _by_name(model: nn.Module, inputs: Inputs) -> dict[str, Any]:
    """All inputs by name; a positional input that ``forward`` does not name is left out."""
    names = input_names(model) if inputs.args else ()
    if sum(isinstance(arg, Tensor) for arg in inputs.args[len(names) :]) > 1:
        warn(
            f"{type(model).__name__}.forward names no positional inputs, so that an attention mask "
            "among them cannot be seen: pass inputs by keyword",
            MatchWarning,
        )
    # A user's model may take the whole batch as one mapping.
    whole = {k: v for arg in inputs.args if isinstance(arg, Mapping) for k, v in arg.items()}
    return {**whole, **dict(zip(names, inputs.args, strict=False)), **inputs.kwargs}


def _laid_over(model: nn.Module, shared: Inputs, own: Mapping[str, Any]) -> Inputs:
    """``shared``, with the model's ``own`` inputs in place of those of the same name."""
    names = input_names(model)[: len(shared.args)] if own else ()
    if not any(name in own for name in names):
        return Inputs(shared.args, {**shared.kwargs, **own})
    # One of its own inputs replaces a positional one: pass positional inputs by name, if named.
    named = {**dict(zip(names, shared.args, strict=False)), **shared.kwargs, **own}
    return Inputs(shared.args[len(names) :], named)


def _give_decoder(model: nn.Module, inputs: Inputs, labels: Tensor) -> None:
    given = _by_name(model, inputs)
    names = ("decoder_input_ids", "decoder_inputs_embeds")
    if all(given.get(name) is None for name in names):
        inputs.kwargs["decoder_input_ids"] = decoder_inputs(model, labels)


def _tensor(value: Any) -> Tensor | None:
    return value if isinstance(value, Tensor) else None


def _token_grid(
    args: tuple[Any, ...], seen: Mapping[str, Any], own: Mapping[str, Any], task: str | None
) -> Tensor | None:
    """A tensor whose first two sizes are those of the tokens (the encoder's, if there is one)."""
    for name in ("input_ids", "inputs_embeds"):
        if isinstance(found := seen.get(name), Tensor) and found.ndim >= 2:
            return found
    mask = seen.get("attention_mask")
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return mask
    first = args[0] if args else None
    if isinstance(first, Tensor) and first.ndim == 2 and not first.is_floating_point():
        return first
    if task in ("causal_lm", "masked_lm"):
        # Labels come last: those of a transcript are fewer than the frames that the others weigh.
        candidates = (own.get(name) for name in ("loss_mask", "token_weights", "labels"))
        return next((t for t in candidates if isinstance(t, Tensor)), None)
    return None


def inputs_of(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A batch as the arguments of a call: keywords of a dict, or a tuple of positional ones."""
    if isinstance(batch, Mapping):
        return (), dict(batch)
    if isinstance(batch, tuple):
        return batch, {}
    raise OptionError(
        f"batch is a {type(batch).__name__}: a dict of the keywords of a call, or a tuple of its "
        "positional arguments"
    )
