"""The model, the module and the block that a node of a graph belongs to."""

from collections.abc import Collection, Mapping

from torch import fx

from fxdistill.graph.flops import WITH_RANDOM_STATE, first_argument
from fxdistill.models.tap import Tower

SECTION = "fxdistill"
OBJECTIVE = "objective"  # the section that is no model
PROJECTIONS = "projections"
LOSS_MODULES = "loss_modules"
HEADS = "heads"
BESIDE = (PROJECTIONS, LOSS_MODULES, HEADS)  # the modules that are trained beside the models
ITSELF = "(itself)"  # the label for operators of a model outside of its modules
Paths = Mapping[Tower, Collection[str]]  # of blocks


def section_of(node: fx.Node) -> str | None:
    """The section that ``node`` comes from: a model, by its name, or the objective; else ``None``.

    It is stored in ``meta["custom"]``, which AOTAutograd copies to the operators that it traces.
    """
    custom = node.meta.get("custom") or {}
    value = custom.get(SECTION)
    return value if isinstance(value, str) else None


def module_of(node: fx.Node) -> tuple[str, str]:
    """The model and the module path that ``node`` was called in; ``("", "")`` outside of modules.

    The objective calls no modules but projections, ``("projections", index)``, losses that are
    modules, ``("loss_modules", path)``, and those of heads, ``("heads", path)``. The first module
    on the stack of calls is the model itself, wherever it is called from.
    """
    if node.target in WITH_RANDOM_STATE:  # made by the partitioner, around an operator of a model
        node = first_argument(node)
    stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack")
    section = section_of(node)
    if not stack or section is None:
        return "", ""
    paths = [str(path) for path, _ in stack.values()]
    root, path = paths[0], paths[-1]
    if section == OBJECTIVE:
        if PROJECTIONS not in root:
            return HEADS if HEADS in root else LOSS_MODULES, path
        index = root.rpartition(f".{PROJECTIONS}.")[2].rpartition(f"['{PROJECTIONS}'].")[2]
        inside = path[len(root) + 1 :] if path.startswith(f"{root}.") else ""
        return PROJECTIONS, f"{index}.{inside}" if inside else index
    return section, path[len(root) + 1 :] if path.startswith(f"{root}.") else ""


def part_of(node: fx.Node, default: Tower = "student") -> str:
    """The section of ``node``; one that autograd added gets the section of its first input.

    ``default`` is the section of a node without such an input.
    """
    if node.target in WITH_RANDOM_STATE:
        node = first_argument(node)
    section = section_of(node)
    while section is None and node.all_input_nodes:
        node = node.all_input_nodes[0]
        section = section_of(node)
    return section or default


def holding(path: str, blocks: Collection[str]) -> str | None:
    """The block that holds the module at ``path``; ``None`` if none does."""
    while path:
        if path in blocks:
            return path
        path = path.rpartition(".")[0]
    return "" if "" in blocks else None  # a model without repeated blocks is one block
