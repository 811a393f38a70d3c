"""Which model, which module of it and which block a node of a graph belongs to."""

from collections.abc import Collection, Mapping

from torch import fx

from fxdistill.graph.flops import WITH_RANDOM_STATE, first_argument
from fxdistill.models.tap import Tower

SECTION = "fxdistill"
OBJECTIVE = "objective"  # the section that is no model
PROJECTIONS = "projections"
ITSELF = "(itself)"  # the label of what a model does outside of its modules
Paths = Mapping[Tower, Collection[str]]  # of blocks


def section_of(node: fx.Node) -> str | None:
    """Which part of a joint program ``node`` comes from: a model, by its name, or the objective.

    Stored in ``meta["custom"]``, which AOTAutograd hands on to the operators it traces.
    """
    custom = node.meta.get("custom") or {}
    value = custom.get(SECTION)
    return value if isinstance(value, str) else None


def module_of(node: fx.Node) -> tuple[str, str]:
    """The model and the module path that ``node`` was called in; ``("", "")`` outside of modules.

    The objective calls no modules but projections: those are ``("projections", index)``. Of the
    modules that were being called, the first is the model itself, whatever it is called from.
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
        index = root.rpartition(f".{PROJECTIONS}.")[2].rpartition(f"['{PROJECTIONS}'].")[2]
        inside = path[len(root) + 1 :] if path.startswith(f"{root}.") else ""
        return PROJECTIONS, f"{index}.{inside}" if inside else index
    return section, path[len(root) + 1 :] if path.startswith(f"{root}.") else ""


def part_of(node: fx.Node, default: Tower = "student") -> str:
    """A model or the objective; what autograd adds between is its first input's.

    ``default`` is whose that is which has no such input.
    """
    if node.target in WITH_RANDOM_STATE:
        node = first_argument(node)
    section = section_of(node)
    while section is None and node.all_input_nodes:
        node = node.all_input_nodes[0]
        section = section_of(node)
    return section or default


def holding(path: str, blocks: Collection[str]) -> str | None:
    """The block that the module at ``path`` is in."""
    while path:
        if path in blocks:
            return path
        path = path.rpartition(".")[0]
    return "" if "" in blocks else None  # a model without repeated blocks is one
