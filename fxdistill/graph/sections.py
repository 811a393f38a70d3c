"""Which model, which part of it and which block a node of a graph belongs to."""

from collections.abc import Collection, Mapping

from torch import fx

from fxdistill.graph.flops import WITH_RANDOM_STATE, first_argument

SECTION = "fxdistill"


def section_of(node: fx.Node) -> str | None:
    """Which part of a joint program ``node`` comes from: a tower or the objective.

    Stored in ``meta["custom"]``, which AOTAutograd hands on to the operators it traces.
    """
    custom = node.meta.get("custom") or {}
    value = custom.get(SECTION)
    return value if isinstance(value, str) else None


Paths = Mapping[str, Collection[str]]  # of blocks, by tower
_TOWERS = (
    ("teacher", "L['distiller']._towers.teacher"),
    ("teacher", "L['distiller'].teacher"),
    ("student", "L['distiller'].student"),
    ("projections", "L['distiller'].projections"),
)


def place_of(node: fx.Node) -> tuple[str, str]:
    """The tower and the module path that ``node`` was called in; ``("", "")`` outside of models."""
    if node.target in WITH_RANDOM_STATE:  # made by the partitioner, around an operator of a model
        node = first_argument(node)
    stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack")
    if stack:
        path = str(next(reversed(stack.values()))[0])
        for tower, prefix in _TOWERS:
            if path == prefix or path.startswith(f"{prefix}."):
                return tower, path[len(prefix) + 1 :]
    return "", ""


def part_of(node: fx.Node) -> str:
    """Teacher, student or objective; what autograd adds between is its first input's."""
    if node.target in WITH_RANDOM_STATE:
        node = first_argument(node)
    section = section_of(node)
    while section is None and node.all_input_nodes:
        node = node.all_input_nodes[0]
        section = section_of(node)
    return section or "student"


def holding(path: str, blocks: Collection[str]) -> str | None:
    """The block that the module at ``path`` is in."""
    while path:
        if path in blocks:
            return path
        path = path.rpartition(".")[0]
    return "" if "" in blocks else None  # a model without repeated blocks is one


ITSELF = "(itself)"  # the label of what a model does outside of its modules
