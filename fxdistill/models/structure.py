"""The structure of a model: stacks of blocks, and in each block its mixers and its MLPs.

Structure decides first: heads, state-space parameters, convolutions, and how widths go up and down
tell what a module does, whatever its name. Names decide only where structure does not. The model is
not run, so it may be on the meta device.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Literal

from torch import nn

from fxdistill.models.weights import Weight, norm_width, under, weight_of, weights_in

Role = Literal["mixer", "mlp"]
Accept = Callable[[tuple["Block", ...], set[type]], bool]  # whether these blocks are a stack

_MIXER_NAMES = re.compile(r"attn|attention|mixer|mamba|ssm|retention|rwkv|delta|recurrent", re.I)
TOKEN_MLP = "token MLP"
_BRANCHES = ("convolution", "convolved MLP")  # the part is the whole branch, norms included
_MLP_NAMES = re.compile(r"mlp|ffn|feed_?forward|(^|[._])ff|moe|expert", re.I)


@dataclass(frozen=True)
class Part:
    """A mixer or an MLP: the module whose output is added to the residual stream."""

    path: str
    role: Role
    kind: str
    why: str


@dataclass(frozen=True)
class Block:
    """One repeated block.

    ``width`` is that of the residual stream that the block writes to, ``width_in`` that of its
    input. With ``is_map``, both are feature maps ``[B, C, H, W]``. A block that is not ``called``
    (a ModuleList or ModuleDict) returns nothing.
    """

    path: str
    width: int | None
    parts: tuple[Part, ...]
    is_map: bool = False
    width_in: int | None = None
    called: bool = True

    def of(self, role: str) -> list[Part]:
        """The parts with ``role``, in the order of the model."""
        return [part for part in self.parts if part.role == role]


@dataclass(frozen=True)
class Stack:
    """Consecutive blocks: the children of one container."""

    path: str
    blocks: tuple[Block, ...]


def stacks_of(model: nn.Module) -> list[Stack]:
    """The stacks of ``model``, in order; none if it has no repeated blocks."""
    found = _search(model, "", _is_strict_stack)
    return found or _search(model, "", lambda blocks, kinds: bool(blocks))


def _search(module: nn.Module, path: str, accept: Accept) -> list[Stack]:
    inner = [
        stack
        for name, child in module.named_children()
        for stack in _search(child, _join(path, name), accept)
    ]
    if not _is_numbered(module) or any(_is_uniform(stack) for stack in inner):
        return inner
    children = [
        (_join(path, n), child)
        for n, child in module.named_children()
        if len(weights_in(child, "")) >= 2 or _has_attention(child)
    ]
    blocks = tuple(block_of(child, name) for name, child in children)
    complete = len(blocks) == len([c for c in module.children() if weights_in(c, "")])
    if complete and accept(blocks, {type(child) for _, child in children}):
        return [Stack(path, blocks)]
    return inner


def _is_strict_stack(blocks: tuple[Block, ...], kinds: set[type]) -> bool:
    """Whether there are mixers, and the blocks are of one class or each has a mixer."""
    mixed = [bool(block.of("mixer")) for block in blocks]
    return any(mixed) and (len(kinds) == 1 or all(mixed))


def _is_uniform(stack: Stack) -> bool:
    """Whether every block has a mixer: then a list around the stack is a list of stages.

    Otherwise the stack may be a list inside one block (a T5 block lists its attention and its MLP).
    """
    return all(block.of("mixer") for block in stack.blocks)


def _is_numbered(module: nn.Module) -> bool:
    names = [name for name, _ in module.named_children()]
    return bool(names) and all(name.isdigit() for name in names)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


# ---- one block


def block_of(block: nn.Module, path: str) -> Block:
    """Find the parts of one block."""
    width = _stream_width(block, path)
    parts, loose = _parts(block, path, width)
    parts += _loose_parts(block, path, loose, width, {part.role for part in parts})
    alone = not any(part.role == "mixer" for part in parts)
    for i, part in enumerate(parts):
        # A branch with a convolution inside its expansion is an MLP only beside a mixer.
        if alone and part.kind == "convolved MLP":
            parts[i] = replace(part, role="mixer", kind="convolution")
    order = {name: i for i, (name, _) in enumerate(under(block, path))}
    parts.sort(key=lambda part: order[part.path])
    of_maps = any(isinstance(m, nn.Conv2d) for m in block.modules())
    is_map = of_maps and not any("attention" in part.kind for part in parts)
    width_in = weights_in(block, path)[0].fan_in if is_map else width
    called = not isinstance(block, (nn.ModuleList, nn.ModuleDict))
    return Block(path, width, tuple(parts), is_map, width_in, called)


def _stream_width(block: nn.Module, path: str) -> int | None:
    """The width of the block's outermost norms; else the width that most weights share."""
    weights = weights_in(block, path)
    convolved = [w for w in weights if w.kind == "convolution"]
    if convolved:  # the last weight of the main branch writes the stream
        return weights[-1].fan_out
    depths: dict[int, list[int]] = {}
    for name, module in under(block, path):
        if (width := norm_width(module)) is not None:
            depths.setdefault(name.count("."), []).append(width)
    if depths:
        return Counter(depths[min(depths)]).most_common(1)[0][0]
    counts = Counter(width for w in weights for width in (w.fan_in, w.fan_out))
    return counts.most_common(1)[0][0] if counts else None


def _parts(module: nn.Module, path: str, width: int | None) -> tuple[list[Part], list[Weight]]:
    """The parts inside ``module``, and the weights that belong to none of them."""
    parts: list[Part] = []
    loose: list[Weight] = []
    for name, child in module.named_children():
        where = _join(path, name)
        if (weight := weight_of(child, where)) is not None:
            loose.append(weight)
            continue
        inner, stray = _parts(child, where, width)
        own = _classify(child, where, width)
        listed = _is_numbered(child) and len(inner) > 1 and own is None
        if len({part.role for part in inner}) == 2 or listed:
            parts += inner
            loose += stray
        elif own is not None:
            at = where if own.kind in _BRANCHES else _output_of(child, where)
            parts.append(replace(own, path=at))
        elif inner:
            parts += inner
            loose += stray
        else:
            loose += stray
    return parts, loose


def _output_of(part: nn.Module, path: str) -> str:
    """The module inside ``part`` that returns the part's value before norm and residual.

    1. If ``part`` wraps one module with all the weights, and a norm: that module.
    2. If its last child holds one weight and a norm (BERT's output, which adds the residual): that
       weight.
    3. Otherwise ``part`` itself.
    """
    holders = [(n, c) for n, c in part.named_children() if weights_in(c, "") or _has_attention(c)]
    norms = any(norm_width(c) is not None for c in part.children())
    if len(holders) == 1 and norms:
        name, child = holders[0]
        return _output_of(child, _join(path, name))
    if holders and weight_of(holders[-1][1], "") is None:
        name, child = holders[-1]
        inside = weights_in(child, _join(path, name))
        if len(inside) == 1 and any(norm_width(c) is not None for c in child.children()):
            return inside[0].path
    return path


# ---- one part


def _has_attention(module: nn.Module) -> bool:
    return any(isinstance(m, nn.MultiheadAttention) for m in module.modules())


def _classify(module: nn.Module, path: str, width: int | None) -> Part | None:
    """The part that ``module`` is as a whole; ``None`` if it is none, or holds several."""
    weights = weights_in(module, path)
    if _has_attention(module):
        return Part(path, "mixer", _attention(path, module), "nn.MultiheadAttention")
    vectors = {name.rsplit(".", 1)[-1] for name, _ in module.named_parameters()}
    if "A_log" in vectors:
        if "D" in vectors:
            return Part(path, "mixer", "state space", "A_log, D and dt")
        return Part(path, "mixer", "linear attention", "A_log and dt, no D")
    if (experts := _experts(module, width)) is not None:
        return Part(path, "mlp", "mixture of experts", experts)
    if len(weights) < 2:
        return None
    chain = _chain(weights, width)
    if heads := _head_attribute(module):
        return Part(path, "mixer", _attention(path, module), heads)
    if any(w.kind != "linear" for w in weights):
        spatial = [w for w in weights if w.kind != "linear"]
        if chain and all(w.fan_in == chain[1] for w in spatial):
            return Part(path, "mlp", "convolved MLP", f"inner width {chain[1]}")
        return Part(path, "mixer", "convolution", _count(spatial))
    return _by_widths(path, module, weights, width, chain) or _by_name(path, module)


def _by_widths(
    path: str,
    module: nn.Module,
    weights: list[Weight],
    width: int | None,
    chain: tuple[str, int] | None,
) -> Part | None:
    """Tell attention from an MLP by how many weights read the stream, and by their widths."""
    readers = [w for w in weights if w.fan_in == width]
    writers = [w for w in weights if w.fan_out == width]
    square = [w for w in readers if w.fan_out == width]
    first, last = weights[0], weights[-1]
    if len(weights) == 2 and first.fan_in == last.fan_out != width and first.fan_out == last.fan_in:
        why = f"{first.fan_in} positions, not {width} features"
        return Part(path, "mixer", TOKEN_MLP, why)
    if not readers or not writers:
        return None
    separate = [w for w in readers if w is not writers[-1]]
    if chain is not None and len(weights) <= 3 and not (len(square) == len(weights) == 3):
        return Part(path, "mlp", "MLP", f"inner width {chain[1]}")
    if len(separate) >= 3:
        return Part(
            path, "mixer", _attention(path, module), f"{len(separate)} projections of the stream"
        )
    fused = [w for w in readers if w.fan_out == 3 * writers[-1].fan_in]
    if fused:
        return Part(path, "mixer", _attention(path, module), "one projection to q, k and v")
    if chain is not None:
        return Part(path, "mlp", "MLP", f"inner width {chain[1]}")
    return None


def _chain(weights: Iterable[Weight], width: int | None) -> tuple[str, int] | None:
    """Find an expansion: a weight from the stream to F (or 2F: gate and value), one from F back.

    Returns the path of the weight back, and F; ``None`` if there is none.
    """
    linear = [w for w in weights if w.kind == "linear"]
    found = None
    for back in (w for w in linear if w.fan_out == width):
        inner = back.fan_in
        into = [
            w
            for w in linear
            if w is not back and w.fan_in == width and w.fan_out in (inner, 2 * inner)
        ]
        if into and (found is None or inner != width):
            found = back.path, inner
    return found


def _experts(module: nn.Module, width: int | None) -> str | None:
    """Count the experts: three-dimensional parameters, or a list of equal MLPs."""
    for m in module.modules():
        cubes = [p for p in m.parameters(recurse=False) if p.ndim == 3]
        alike = len(cubes) >= 2 and len({p.shape[0] for p in cubes}) == 1
        if alike and cubes[0].shape[0] > 1 and all(width in p.shape[1:] for p in cubes):
            return f"{cubes[0].shape[0]} experts"
    lists = [m for m in module.children() if _is_numbered(m) and not isinstance(m, nn.Sequential)]
    for experts in lists:
        each = [[(w.fan_in, w.fan_out) for w in weights_in(e, "")] for e in experts.children()]
        if len(each) > 1 and len(each[0]) >= 2 and all(shapes == each[0] for shapes in each):
            return f"{len(each)} experts"
    return None


def _head_attribute(module: nn.Module) -> str | None:
    for m in module.modules():
        for name, value in vars(m).items():
            if "head" in name.lower() and type(value) is int and value > 0:
                return f"{name} = {value}"
    return None


def _attention(path: str, module: nn.Module) -> str:
    text = f"{path.rsplit('.', 1)[-1]} {type(module).__name__}"
    crosses = re.search(r"cross|encoder_attn|enc_?dec", text, re.I)
    return "cross-attention" if crosses else "attention"


def _by_name(path: str, module: nn.Module) -> Part | None:
    """Classify by name where structure tells nothing: by the module's name, then its class's."""
    for text in (path.rsplit(".", 1)[-1], type(module).__name__):
        if _MLP_NAMES.search(text):
            return Part(path, "mlp", "MLP", f"named {text}")
        if _MIXER_NAMES.search(text):
            return Part(path, "mixer", _attention(path, module), f"named {text}")
    return None


# ---- weights of the block itself


def _loose_parts(
    block: nn.Module, path: str, loose: list[Weight], width: int | None, roles: set[Role]
) -> list[Part]:
    """Find parts whose weights are children of the block (``fc1``, ``fc2``), not of one module."""
    parts = []
    spatial = [w for w in loose if w.kind != "linear"]
    has_mixer = "mixer" in roles
    if len(spatial) == len(loose) == 1 and roles == {"mlp"}:
        return [Part(spatial[0].path, "mixer", "convolution", _count(spatial))]
    if spatial and len(loose) > 1:
        inside = _chain(loose, width)
        if inside is None or spatial[-1].fan_in != width or inside[1] == width:
            # One branch: its last module, which may be a norm, returns its value.
            return [
                Part(_last_of_branch(block, path, loose), "mixer", "convolution", _count(spatial))
            ]
        parts.append(Part(spatial[-1].path, "mixer", "convolution", _count(spatial)))
    chain = _chain(loose, width)
    rest = [w for w in loose if w.kind == "linear"]
    if chain is not None and not (has_mixer is False and chain[1] == width):
        inner = chain[1]
        rest = [w for w in rest if inner not in (w.fan_in, w.fan_out) and w.fan_out != 2 * inner]
        parts.append(Part(_holder(block, path, chain[0]), "mlp", "MLP", f"inner width {inner}"))
    writers = [w for w in rest if w.fan_out == width]
    if len(rest) >= 2 and writers and not has_mixer and not spatial:
        why = f"{len(rest)} weights of the block"
        parts.append(Part(_holder(block, path, writers[-1].path), "mixer", "attention", why))
    return parts


def _count(weights: list[Weight]) -> str:
    return f"{len(weights)} convolution{'s' if len(weights) > 1 else ''}"


def _holder(block: nn.Module, path: str, weight: str) -> str:
    """The child that holds only ``weight``, and no norm; else the weight itself."""
    name = weight.removeprefix(f"{path}.").split(".")[0]
    child = block.get_submodule(name)
    normed = any(norm_width(m) is not None for m in child.modules())
    alone = len(weights_in(child, "")) == 1 and not _is_numbered(child)
    return _join(path, name) if alone and not normed else weight


def _last_of_branch(block: nn.Module, path: str, loose: list[Weight]) -> str:
    """The norm after the last of the block's own weights, or that weight."""
    direct = [w for w in loose if w.path.count(".") == path.count(".") + 1] or loose
    last = max((w for w in direct), key=lambda w: [n for n, _ in under(block, path)].index(w.path))
    names = list(under(block, path))
    following = names[[n for n, _ in names].index(last.path) + 1 :]
    for name, module in following:
        if norm_width(module) is not None:
            return name
        if weight_of(module, name) is not None:
            break
    return last.path
