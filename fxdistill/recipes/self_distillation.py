"""``be_your_own_teacher``: the deepest classifier of a model teaches its earlier exits."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fxdistill.distiller.alone import axes_of
from fxdistill.distiller.assemble import as_inputs
from fxdistill.distiller.channels import Axes
from fxdistill.errors import OptionError, PathError, did_you_mean
from fxdistill.mapping.match import Match, Reduction
from fxdistill.models.axes import places_of_convolutions
from fxdistill.models.dummy_inputs import dummy_inputs
from fxdistill.objective.call import Inputs
from fxdistill.objective.head import Head
from fxdistill.recipes.numbers import require
from fxdistill.recipes.preset import Preset

_NAME = "be_your_own_teacher"
_PLACES = {3: "l", 4: "h w", 5: "t h w"}  # by the number of axes
Pooling = Reduction | str | None


def be_your_own_teacher(
    student: nn.Module,
    blocks: Iterable[str],
    *,
    deepest: str | None = None,
    alpha: float = 0.3,
    feature: float = 0.03,
    temperature: float = 3.0,
    module: Any = "auto",
    reduce: Pooling = "auto",
    example_inputs: Mapping[str, Any] | tuple[Any, ...] | None = None,
) -> Preset:
    """Self-distillation with early exits: ``wrap(student, None, **preset)``.

    CE_C + Σ over exits i of (1 - α)·CE_i + α·τ²·KL(p_C ‖ p_i) + λ·‖F_i - F_C‖².

    Zhang et al. (2019), "Be Your Own Teacher: Improve the Performance of Convolutional Neural
    Networks via Self Distillation", section 3: p_C are the predictions of the student's own,
    deepest classifier, F features at the end of a block; the deepest ones teach without gradient.
    The default weights and τ are those of the authors' code.

    Args:
        student: The model, which gives logits ``[B, classes]``.
        blocks: The paths of its sections in the order in which they run, the deepest last: each
            but the last gets an exit. With ``deepest`` each of them gets one.
        deepest: The path of the section whose output teaches features; ``None``: the last block.
        alpha: α, from 0 to 1.
        feature: λ, the weight of the features; 0 leaves them out.
        temperature: τ.
        module: What makes an exit's logits: ``"auto"``, the mean over places or tokens and a linear
            layer, or a callable ``(path) -> nn.Module``.
        reduce: What makes features ``[B, D]`` of a block's output, as in ``Match``: ``"auto"``
            takes the mean over the places of maps, as the paper's bottlenecks end, and over tokens;
            ``None`` if a block gives ``[B, D]``. Other widths are mapped by a linear layer.
        example_inputs: Inputs of a call, as in ``wrap``. Where blocks are more than convolutions,
            the student is run on these, without computing anything, to see which axes are places.

    Returns:
        Arguments for ``wrap``: ``heads`` named ``exit0``, ``exit1``, ..., and ``mapping``.

    Raises:
        OptionError: There are fewer than two blocks, one is listed twice, a number is out of range,
            or it cannot be told which axes of a block's output are places.
        PathError: The student has no such block.
    """
    paths = _checked(student, blocks, deepest)
    require(_NAME, "alpha", alpha, most=1)
    require(_NAME, "feature", feature)
    require(_NAME, "temperature", temperature, above=0)
    if module != "auto" and (not callable(module) or isinstance(module, nn.Module)):
        raise OptionError(f"{_NAME}: module={module!r}: 'auto', or a callable path -> nn.Module")
    *exits, last = paths
    heads = {
        f"exit{i}": Head(
            path,
            module=module if module == "auto" else module(path),
            teacher="self",
            logit_weight=alpha,
            label_weight=1 - alpha,
        )
        for i, path in enumerate(exits)
    }
    arguments: dict[str, Any] = {
        "heads": heads,
        "logit_loss": "forward_kl",
        "temperature": temperature,
        "label_loss": "cross_entropy",
    }
    if feature > 0:
        pooled = _poolings(student, paths, reduce, example_inputs)
        arguments["mapping"] = [
            _match_of_itself(path, last, (own, pooled[-1]))
            for path, own in zip(exits, pooled, strict=False)
        ]
        # wrap takes the mean over the exits; the paper adds them up.
        arguments["feature_weight"] = feature * len(exits)
    told = f"alpha={alpha}, feature={feature}, temperature={temperature}"
    return Preset(
        f"{_NAME}(student, {paths}, {told})",
        "Zhang et al. (2019), Be Your Own Teacher: Improve the Performance of Convolutional Neural "
        "Networks via Self Distillation",
        arguments,
    )


def squared_distance(student: Tensor, teacher: Tensor, weights: Tensor | None = None) -> Tensor:
    """Σ w·‖s - t‖² / Σ w over samples ``[B, D]``: a sum over the width; 0 where nothing counts."""
    values = (student.float() - teacher.float()).square().sum(-1)
    if weights is None:
        return values.mean()
    total = weights.sum()
    found = torch.where(weights != 0, weights * values, 0).sum()
    return torch.where(total == 0, found, found / torch.where(total == 0, 1, total))


def _match_of_itself(
    path: str, last: str, pooled: tuple[Reduction | None, Reduction | None]
) -> Match:
    options: dict[str, Any] = {"of": "self", "loss": squared_distance, "project": "auto"}
    if any(side is not None for side in pooled):
        options["reduce"] = pooled
    return Match(path, last, **options)


def _poolings(
    student: nn.Module, paths: list[str], said: Pooling, examples: Any
) -> list[Reduction | None]:
    """How each block's output becomes ``[B, D]``: by its axes, unless that is said."""
    if said is None or isinstance(said, tuple):
        return [said] * len(paths)
    if said != "auto":
        raise OptionError(f"{_NAME}: reduce={said!r}: 'auto', None, or (pattern, 'mean')")
    shown = as_inputs(examples)
    found = {path: axes for path in paths if (axes := _by_convolutions(student, path))}
    if shown is not None or len(found) < len(paths):
        if shown is None and (made := dummy_inputs(student)) is not None:
            shown = Inputs((), made)
        if shown is not None:
            seen = axes_of(student, paths, shown)
            found |= {p: axes for p, axes in seen.items() if p not in found or axes.channels}
    return [_reduction(path, found.get(path)) for path in paths]


def _by_convolutions(student: nn.Module, path: str) -> Axes | None:
    """The axes of a block all of whose weights are convolutions of maps, and their norms."""
    places = places_of_convolutions(student.get_submodule(path))
    return None if places is None else Axes(2 + places, 1)


def _reduction(path: str, axes: Axes | None) -> Reduction | None:
    """The mean over all axes but the channels; none of ``[B, D]``."""
    if axes is not None and axes.number == 2:
        return None
    if axes is None or axes.channels is None or axes.number not in _PLACES:
        raise OptionError(
            f"{_NAME}: which axes of what {path!r} returns are places cannot be told from the "
            "student's structure. Give example_inputs=, the inputs of a call, or say it: "
            "reduce=('b h w c -> b c', 'mean'), or None for features [B, D]"
        )
    places = _PLACES[axes.number]
    return f"b c {places} -> b c" if axes.channels == 1 else f"b {places} c -> b c", "mean"


def _checked(student: nn.Module, blocks: Iterable[str], deepest: str | None) -> list[str]:
    """The paths of the exits, and of the deepest section behind them."""
    if not isinstance(student, nn.Module):
        raise OptionError(f"{_NAME}(student, blocks): student={student!r} is no model")
    if isinstance(blocks, str) or not isinstance(blocks, Iterable):
        raise OptionError(f"{_NAME}: blocks={blocks!r}: paths of modules, the deepest last")
    paths = [*blocks, *([] if deepest is None else [deepest])]
    names = [name for name, _ in student.named_modules() if name]
    for path in paths:
        if path not in names:
            near = did_you_mean(str(path), names)
            raise PathError(f"{_NAME}: the student has no block {path!r}. Nearest: {near}.")
    if len(paths) < 2:
        raise OptionError(f"{_NAME}: blocks={paths}: an exit and a deeper block to learn from")
    if len(set(paths)) < len(paths):
        raise OptionError(f"{_NAME}: blocks={paths}: one is listed twice")
    return paths
