"""A tensor parallel plan for a plain model: which of its modules are sharded, and how.

Tensor and sequence parallel are as in Megatron (Shoeybi et al., 2019; Korthikanti et al., 2022).
The tokens of the residual stream are sharded, ``Shard(1)``, and norms work on these shards. A mixer
or an MLP takes all tokens; its first weights are sharded by columns and its last by rows, and its
output is scattered over the tokens again.

Modules that the plan cannot shard (state-space mixers, experts, attention that counts its heads)
take all tokens on every rank, with whole weights: this is correct, but saves no memory. ``notes``
name them.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import Placement, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
)
from torch.func import functional_call

from fxdistill.errors import MeshError
from fxdistill.models.landmarks import embedding_of, head_path, norms_of
from fxdistill.models.modes import drops
from fxdistill.models.structure import Block, Part, stacks_of
from fxdistill.models.weights import norm_width, under
from fxdistill.parallel.styles import GatherTokens, ScatterTokens

STREAM = Shard(1)
_COUNTS_HEADS = ("num_heads", "num_attention_heads", "n_head", "num_key_value_heads")


@dataclass(frozen=True)
class TensorPlan:
    """Styles by module, placements by parameter, and facts about what they shard.

    ``parts`` are plain parameters between sharded weights: each rank has a part of their gradient.
    ``sharded`` are the mixers and MLPs inside which each rank has values of its own. ``notes`` say
    what stays whole.
    """

    styles: Mapping[str, ParallelStyle] = field(default_factory=dict)
    placements: Mapping[str, Placement] = field(default_factory=dict)
    parts: frozenset[str] = frozenset()
    sharded: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def ready_made(model: nn.Module, ranks: int, tower: str, *, learns: bool) -> TensorPlan:
    """Make the plan for the structure of ``model``; MeshError if it has no single stack of blocks.

    A model that ``learns`` runs in training mode, and must not drop values outside of sharded parts
    (MeshError).
    """
    stacks = stacks_of(model)
    if len(stacks) != 1 or not all(block.called for block in stacks[0].blocks):
        what = f"{len(stacks)} stacks of blocks" if len(stacks) != 1 else "blocks that do not run"
        raise MeshError(
            f"there is no ready-made tensor parallel plan for a {tower} ({type(model).__name__}) "
            f"with {what}. Say {tower}_plan={{module pattern: ParallelStyle}}, or leave 'tp' out "
            "of the mesh."
        )
    (stack,) = stacks
    styles: dict[str, ParallelStyle] = {}
    parts: set[str] = set()
    sharded: list[str] = []
    whole: dict[str, list[str]] = {}  # by reason
    for block in stack.blocks:
        sharded += _plan_block(model, block, ranks, styles, parts, whole)
    first, last = stack.blocks[0].path, stack.blocks[-1].path
    _add(styles, first, ScatterTokens("inputs"))
    embedding = embedding_of(model, stacks)
    if embedding is not None and isinstance(model.get_submodule(embedding), nn.Embedding):
        styles[embedding] = RowwiseParallel(input_layouts=Replicate(), output_layouts=Replicate())
    head, norm = head_path(model), norms_of(model, stacks)[0]
    sequence = norm is not None and head is not None
    if norm is not None and sequence:
        styles[norm] = SequenceParallel()
    else:
        _add(styles, last, GatherTokens("output"))
    if head is not None:
        styles[head] = ColwiseParallel(
            input_layouts=STREAM if sequence else Replicate(),
            output_layouts=Shard(-1),
            use_local_output=False,
        )
    if learns:
        _refuse_dropout(model, sharded, tower)
    notes = tuple(f"{tower}: {why}: {_shown(paths)}" for why, paths in whole.items())
    return TensorPlan(styles, {}, frozenset(parts), tuple(sharded), notes)


def _refuse_dropout(model: nn.Module, sharded: list[str], tower: str) -> None:
    """Raise MeshError for dropout outside of sharded parts: each rank would drop other values."""
    within = tuple(f"{path}." for path in sharded)
    random = [
        path
        for path, module in model.named_modules()
        if path not in ("", *sharded) and not path.startswith(within) and drops(module)
    ]
    if random:
        raise MeshError(
            f"the {tower} drops values at random in {_shown(random)}, outside of what 'tp' shards: "
            "its ranks would drop different ones, and their weights drift apart. Set those "
            f"probabilities to 0, or say {tower}_plan={{...}}."
        )


def _add(styles: dict[str, ParallelStyle], path: str, style: ScatterTokens | GatherTokens) -> None:
    """Add a style to a module, after the one that it may have: both are applied."""
    there = styles.get(path)
    styles[path] = style if there is None else style.after(there)


def _shown(paths: list[str]) -> str:
    return ", ".join(paths) if len(paths) <= 2 else f"{paths[0]}, ..., {paths[-1]}"


def _plan_block(
    model: nn.Module,
    block: Block,
    ranks: int,
    styles: dict[str, ParallelStyle],
    parts: set[str],
    whole: dict[str, list[str]],
) -> list[str]:
    """Add the styles of one block; return its sharded parts.

    A block with parameters outside of its parts and norms takes all tokens, with whole weights.
    """
    module = model.get_submodule(block.path)
    inside = [f"{part.path}." for part in block.parts]
    norms = [
        path
        for path, child in under(module, block.path)
        if norm_width(child) is not None and not path.startswith(tuple(inside))
    ]
    covered = (*inside, *(f"{path}." for path in norms))
    names = [f"{block.path}.{name}" for name, _ in module.named_parameters()]
    if any(not name.startswith(covered) for name in names) or _nested(block):
        whole.setdefault("whole blocks on every rank", []).append(block.path)
        styles[block.path] = GatherTokens("inputs", local=True).then_scatter()
        return []
    sharded = []
    for path in norms:
        styles[path] = SequenceParallel()
    for part in block.parts:
        found = _attention(model, part, ranks) if part.role == "mixer" else None
        found = _mlp(model, part, block.width, ranks) if part.role == "mlp" else found
        if found is None:
            whole.setdefault(f"whole {part.kind} on every rank", []).append(part.path)
            styles[part.path] = GatherTokens("inputs", local=True).then_scatter()
            continue
        styles[part.path] = GatherTokens("inputs")
        sharded.append(part.path)
        first, last, between = found
        for path in first:
            styles[path] = ColwiseParallel()
        styles[last] = RowwiseParallel(output_layouts=STREAM, use_local_output=False)
        parts.update(between)
    return sharded


def _nested(block: Block) -> bool:
    paths = [f"{part.path}." for part in block.parts]
    return any(a != b and a.startswith(b) for a in paths for b in paths) or not paths


# The first weights, the last weight, and the parameters between them.
NamesOfWeights = tuple[list[str], str, list[str]]


def _attention(model: nn.Module, part: Part, ranks: int) -> NamesOfWeights | None:
    """Name q, k, v, the output weight and norms between; ``None`` if ranks cannot split heads."""
    module = model.get_submodule(part.path)
    size = getattr(module, "head_dim", None)
    linear = _linear(module, part.path)
    if part.kind != "attention" or not isinstance(size, int) or len(linear) != 4:
        return None
    *first, last = linear.items()
    heads = [layer.out_features for _, layer in first]
    fits = all(width % (size * ranks) == 0 for width in heads)
    if not fits or last[1].in_features != heads[0] or _counts_heads(type(module)):
        return None
    between = []
    for path, child in under(module, part.path):
        if path in linear or not list(child.parameters(recurse=False)):
            continue
        if norm_width(child) != size:  # a module over all heads
            return None
        between += [f"{path}.{name}" for name, _ in child.named_parameters()]
    return [path for path, _ in first], last[0], between


def _mlp(model: nn.Module, part: Part, width: int | None, ranks: int) -> NamesOfWeights | None:
    """Name the up (and gate) and down weights; ``None`` for anything but such an MLP."""
    module = model.get_submodule(part.path)
    linear = _linear(module, part.path)
    if part.kind != "MLP" or len(linear) not in (2, 3):
        return None
    own = {id(p) for layer in linear.values() for p in layer.parameters()}
    if any(id(p) not in own for p in module.parameters()):
        return None
    for last in reversed(linear):
        inner = linear[last].in_features
        first = [path for path in linear if path != last]
        sizes = {(linear[path].in_features, linear[path].out_features) for path in first}
        fits = linear[last].out_features == width and sizes == {(width, inner)}
        if fits and not inner % ranks and _adds_up(module, part.path, first, last):
            return first, last, []
    return None


def _adds_up(module: nn.Module, path: str, first: list[str], last: str) -> bool:
    """Whether an MLP is the sum of its two halves, as shards need: nothing mixes its inner width.

    The test runs on one token, in float64. It assumes yes for an MLP without values (meta, fake),
    and no for one that cannot be called with one tensor.
    """
    given = {name: p.detach() for name, p in module.named_parameters()}
    like = next(iter(given.values()))
    if like.is_meta or isinstance(like, FakeTensor):
        return True
    weights = {name: weight.double() for name, weight in given.items()}
    up = tuple(f"{name.removeprefix(path)}.".lstrip(".") for name in first)
    down = f"{last.removeprefix(path)}.".lstrip(".")
    width, inner = weights[f"{down}weight"].shape
    x = torch.linspace(-2, 2, width, device=like.device, dtype=torch.float64).sin()

    def part(begin: int, end: int) -> Tensor:
        own = dict(weights)
        for name, weight in weights.items():
            if name.startswith(up):
                own[name] = weight[begin:end]
            elif name == f"{down}weight":
                own[name] = weight[:, begin:end]
            elif begin:  # a bias counts once
                own[name] = torch.zeros_like(weight)
        return functional_call(module, own, (x.reshape(1, 1, width),)).double()  # type: ignore[no-any-return]

    modes = [(m, m.training) for m in module.modules()]
    try:
        module.eval()
        with torch.no_grad():
            whole, a, b = part(0, inner), part(0, inner // 2), part(inner // 2, inner)
    except (TypeError, RuntimeError):
        return False
    finally:
        for m, training in modes:
            m.training = training
    return bool((whole - a - b).norm() <= 1e-5 * (a.norm() + b.norm()))


def _linear(module: nn.Module, path: str) -> dict[str, nn.Linear]:
    return {name: m for name, m in under(module, path) if type(m) is nn.Linear}


def _counts_heads(cls: type[nn.Module]) -> bool:
    """Whether ``forward`` uses a number of heads, which would be that of all ranks together."""
    try:
        source = inspect.getsource(cls.forward)
    except (OSError, TypeError):
        return True
    return any(name in source for name in _COUNTS_HEADS)
