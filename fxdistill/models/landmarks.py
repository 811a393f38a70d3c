"""The modules around the stacks of blocks: embedding, final norm, and the head."""

import itertools

from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from fxdistill.models.adapters import plain
from fxdistill.models.structure import Stack, stacks_of
from fxdistill.models.weights import norm_width, under, weights_in


def head_path(model: nn.Module) -> str | None:
    """The path of the linear layer that makes the logits, by ``get_output_embeddings``.

    If the model has none: the last linear layer outside of lists whose output is as wide as an
    embedding has entries.
    """
    own = asked(model, "get_output_embeddings")
    linear = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    if own is not None:
        return next((name for name, module in linear if module is own), None)
    entries = {m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)}
    outside = [(n, m) for n, m in linear if not any(part.isdigit() for part in n.split("."))]
    return next((n for n, m in reversed(outside) if m.out_features in entries), None)


def roles_in(model: nn.Module) -> dict[str, tuple[str, str]]:
    """By path, the role of each recognised module, and what it was recognised as."""
    stacks = stacks_of(model)
    ends = {"embedding": embedding_of(model, stacks), "logits": logits_module_of(model, stacks)}
    roles = {path: (role, "") for role, path in ends.items() if path is not None}
    roles |= {path: ("norm", "") for path in norms_of(model, stacks) if path is not None}
    for block in (block for stack in stacks for block in stack.blocks):
        roles[block.path] = ("block", "")
        roles |= {part.path: (part.role, f"{part.kind} ({part.why})") for part in block.parts}
    return roles


def embedding_of(model: nn.Module, stacks: list[Stack]) -> str | None:
    """The token embedding; without one, the module before the first block."""
    named = [(name, plain(module)) for name, module in under(model, "")]
    own = asked(model, "get_input_embeddings")
    if own is not None and isinstance(own := plain(own), nn.Embedding):
        # T5 names an embedding that never runs: of those that share its weight, take the one whose
        # path is nearest to the blocks.
        shared: list[str] = [
            name
            for name, module in named
            if isinstance(module, nn.Embedding) and module.weight is own.weight
        ]
        beside = stacks[0].path if stacks else ""
        return max(shared, key=lambda name: _common(name, beside))
    outside = [
        (name, module)
        for name, module in named
        if isinstance(module, nn.Embedding) and not any(_inside(name, stack) for stack in stacks)
    ]
    if outside:
        sizes: dict[str, int] = {name: module.num_embeddings for name, module in outside}
        return max(sizes, key=sizes.__getitem__)
    return _sibling(model, stacks[0].path, behind=False) if stacks else None


def norms_of(model: nn.Module, stacks: list[Stack]) -> list[str | None]:
    """For each stack the norm after its last block; ``None`` if another stack comes before it."""
    found = [_sibling(model, stack.path, behind=True) for stack in stacks]
    return [None if name in found[i + 1 :] else name for i, name in enumerate(found)]


def logits_module_of(model: nn.Module, stacks: list[Stack]) -> str | None:
    """The module that makes logits: as the model says, else the last weight after the stacks."""
    own = asked(model, "get_output_embeddings")
    if own is not None:
        return _path_of(model, own)
    weights = [w.path for w in weights_in(model, "") if w.kind == "linear"]
    outside = [path for path in weights if not any(_inside(path, stack) for stack in stacks)]
    if not outside or not stacks:
        return None
    names = [name for name, _ in model.named_modules()]
    last = outside[-1]
    return last if names.index(last) > names.index(stacks[-1].path) else None


def vocabulary_of(model: nn.Module) -> int | None:
    """The number of logits per token, if the model names a linear head; else ``None``."""
    head = asked(model, "get_output_embeddings")
    return head.out_features if isinstance(head, nn.Linear) else None


def asked(model: nn.Module, method: str) -> nn.Module | None:
    """The module that a Hugging Face accessor returns; not every model implements them."""
    get = getattr(model, method, None)
    try:
        found = get() if callable(get) else None
    except NotImplementedError:
        return None
    return found if isinstance(found, nn.Module) else None


def _path_of(model: nn.Module, wanted: nn.Module) -> str | None:
    return next((name for name, module in model.named_modules() if module is wanted), None)


def _common(a: str, b: str) -> int:
    """How many leading segments two paths share."""
    pairs = zip(a.split("."), b.split("."), strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def _inside(path: str, stack: Stack) -> bool:
    return path == stack.path or path.startswith(f"{stack.path}.")


def _sibling(model: nn.Module, path: str, *, behind: bool) -> str | None:
    """Search outwards from a stack for the nearest norm after it, or the nearest module before."""
    while path:
        parent, _, name = path.rpartition(".")
        children = list(model.get_submodule(parent).named_children())
        index = [n for n, _ in children].index(name)
        around = children[index + 1 :] if behind else children[:index][::-1]
        for sibling, module in around:
            # A norm of the embedding may be defined after the blocks: only its name tells it apart.
            final = norm_width(module) is not None and "emb" not in sibling
            if final if behind else _carries(module):
                return f"{parent}.{sibling}" if parent else sibling
        path = parent
    return None


def _carries(module: nn.Module) -> bool:
    """Whether a module before the blocks may make the value that enters them."""
    passive = isinstance(module, (nn.ModuleList, nn.ModuleDict, nn.Identity, _DropoutNd))
    return not passive and (bool(list(module.parameters())) or not list(module.children()))
