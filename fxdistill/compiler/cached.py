"""What AOTAutograd's cache needs to know of our graphs: which to keep, and what changes their code.

The cache finds a compiled step by the text of its graph, the inputs and the configuration of torch.
It declines graphs that call functions which it does not know, as the parts of losses that form
their gradients are. Here these functions are declared, with a key that follows whatever else
decides about the code: the source of fxdistill, of the passes and of operators written in Python,
the labels of nodes that passes of the joint level read, and this rank's place among the others.

Private to torch and used here only: ``unsafe_marked_cacheable_functions`` of Inductor's
configuration, ``enable_autograd_cache`` of functorch's, the counter of hits, and the table of
operators made by ``torch.library.custom_op``. Where one of these names is missing, every process
compiles anew, as it does without a cache.
"""

import contextlib
import hashlib
import inspect
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import einops
import torch
from torch import fx
from torch._dynamo.utils import counters
from torch._functorch import config as functorch_config
from torch._inductor import config as inductor_config
from torch._library import custom_ops
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

import fxdistill
from fxdistill import parallel, passes
from fxdistill.compiler.mesh_keys import meshes_named, on_ranks
from fxdistill.graph.pipeline import pass_name
from fxdistill.graph.program import Pass, all_nodes

_LOG = logging.getLogger("fxdistill.compiler")
_MARKED = "unsafe_marked_cacheable_functions"
_OURS = "fxdistill"
# Functions of these packages do not change while torch and einops keep their versions.
_KNOWN = {"torch", "_operator", "operator", "builtins", "math", "einops", _OURS}
# The namespaces of operators that torch brings along.
_OF_TORCH = {
    *(
        "aten",
        "prim",
        "prims",
        "rngprims",
        "inductor",
        "quantized",
        "_quantized",
        "mkldnn",
        "onednn",
    ),
    *("_c10d_functional", "_c10d_functional_autograd", "c10d_functional", "c10d", "_dtensor"),
    *("fsdp", "symm_mem", "quantized_decomposed", "higher_order", "profiler"),
}


class _Unreadable(Exception):
    """The source of something that decides about the code cannot be read."""


def _digest(parts: Iterable[bytes]) -> str:
    hasher = hashlib.sha256()
    for part in parts:
        hasher.update(hashlib.sha256(part).digest())
    return hasher.hexdigest()


def _package_digest() -> str:
    """A digest of every file of Python of fxdistill and its passes; empty if there are no files."""
    roots = {Path(str(package.__file__)).parent for package in (fxdistill, passes)}
    files = sorted({file for root in roots for file in root.rglob("*.py")})
    return _digest(file.read_bytes() for file in files) if files else ""


# Read when this file is imported, as the code that runs was: an edit must not relabel loaded code.
_PACKAGE = _package_digest()


@dataclass(frozen=True)
class Caching:
    """Whether AOTAutograd's cache may hold a graph, and the key of all that is not in its text."""

    key: str
    why_not: str = ""
    functions: tuple[str, ...] = ()  # of ours, which the graph calls

    def options(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The options of Inductor in ``given``, with our functions declared."""
        if self.why_not or not hasattr(inductor_config, _MARKED):
            return dict(given)
        known = given.get(_MARKED, getattr(inductor_config, _MARKED))
        return {**given, _MARKED: {**known, **dict.fromkeys(self.functions, self.key)}}

    @contextlib.contextmanager
    def used(self) -> Iterator["Found"]:
        """The settings in which to lower the graph; yields what tells whether it was found."""
        found, before = Found(), counters["aot_autograd"]["autograd_cache_hit"]
        patches = {"enable_autograd_cache": False} if self.why_not else {}
        with functorch_config.patch(patches), meshes_named():
            yield found
        found.hit = counters["aot_autograd"]["autograd_cache_hit"] > before


@dataclass
class Found:
    """Whether the compiled graph came from the cache."""

    hit: bool = field(default=False)


def caching_of(gm: fx.GraphModule, every: Sequence[Pass], *, wanted: bool = True) -> Caching:
    """How to cache ``gm``, which ``every`` pass has gone over or will go over.

    What cannot be told apart by its source is not cached: the logger says why, at level INFO.
    ``wanted=False`` compiles anew, so that all passes run.
    """
    nodes = all_nodes(gm)
    try:
        if not _PACKAGE:
            raise _Unreadable("the source of fxdistill cannot be read")
        parts = [*map(_pass_key, every), *_operator_keys(nodes), *_subclass_keys(nodes), _place()]
        why_not = "" if wanted else "every pass is to run"
    except _Unreadable as error:
        parts, why_not = [*map(repr, every)], str(error)
        _LOG.info("the compiled step is not kept for later processes: %s", why_not)
    versions = (_PACKAGE, torch.__version__, einops.__version__, repr(_autocast()))
    key = _digest(part.encode() for part in (*versions, *parts, _labels(nodes)))
    functions = sorted({name for node in nodes if (name := _own_function(node))})
    return Caching(key, why_not, tuple(functions))


def _autocast() -> list[tuple[str, bool, torch.dtype]]:
    """The state of autocast around the step, which not every version of torch has in its key."""
    kinds = ("cpu", "cuda")
    return [(k, torch.is_autocast_enabled(k), torch.get_autocast_dtype(k)) for k in kinds]


def _place() -> str:
    """This rank's place, which tracing writes into code; empty for a process that is alone."""
    try:
        return parallel.named.place_of_rank() if on_ranks() else ""
    except AttributeError as error:
        raise _Unreadable("this torch does not tell the process groups of a rank") from error


def _labels(nodes: Sequence[fx.Node]) -> str:
    """What passes of the joint level read of nodes, and the text of a graph does not show."""
    custom = [(node.meta.get("custom") or {}) for node in nodes]
    return repr([sorted((k, str(c[k])) for k in c if str(k).startswith(_OURS)) for c in custom])


def _own_function(node: fx.Node) -> str:
    """The name of a function of ours that ``node`` calls, as the cache spells it; else empty."""
    target = node.target
    module = getattr(target, "__module__", None) or ""
    if node.op != "call_function" or isinstance(target, (OpOverload, OpOverloadPacket)):
        return ""
    return f"{module}.{target.__name__}" if module.split(".")[0] == _OURS else ""  # type: ignore[union-attr]


def _pass_key(p: Pass) -> str:
    """The name, the options and the source of a pass."""
    if type(p).__module__.split(".")[0] == _OURS:
        return f"{type(p).__qualname__} {p!r}"
    # What a pass of the user's has made of the graph stands in the graph's text.
    return f"{pass_name(p)} {_source(p if inspect.isroutine(p) else type(p))}"


def _operator_keys(nodes: Sequence[fx.Node]) -> list[str]:
    """The sources of all operators that neither torch nor fxdistill brings along."""
    keys = dict[str, str]()
    for node in nodes:
        target = node.target
        if node.op != "call_function" or isinstance(target, HigherOrderOperator):
            continue
        if isinstance(target, (OpOverload, OpOverloadPacket)):
            packet = target.overloadpacket if isinstance(target, OpOverload) else target
            name = str(packet._qualified_op_name)
            if name.split("::")[0] not in {*_OF_TORCH, _OURS} and name not in keys:
                keys[name] = f"{name} {_operator_source(name)}"
        elif (getattr(target, "__module__", None) or "builtins").split(".")[0] not in _KNOWN:
            raise _Unreadable(f"the graph calls {target}, through which nothing looks")
    return list(keys.values())


def _subclass_keys(nodes: Sequence[fx.Node]) -> list[str]:
    """The classes of tensors that bring operators of their own, which tracing looks into.

    Those of quantized weights, say. The key of torch has what such a tensor holds, not its class.
    """
    leaves = (leaf for node in nodes for leaf in tree_leaves(node.meta.get("example_value")))
    kinds = {type(leaf) for leaf in leaves if is_traceable_wrapper_subclass(leaf)}
    return [
        f"{kind.__module__}.{kind.__qualname__} {_source(kind)} {_version(kind)}"
        for kind in sorted(kinds, key=lambda kind: (kind.__module__, kind.__qualname__))
        if kind.__module__.split(".")[0] != "torch"
    ]


def _version(kind: type) -> str:
    """The version of the package that a class is from, whose other files it may use."""
    package = kind.__module__.split(".")[0]
    return str(getattr(sys.modules.get(package), "__version__", ""))


def _operator_source(name: str) -> str:
    """The source of an operator of ``torch.library.custom_op``, and of what is registered to it."""
    table = getattr(custom_ops, "OPDEFS", {})
    made = table.get(name)
    if made is None:
        raise _Unreadable(f"the operator {name} has no source in Python")
    parts = [fn for fn in vars(made).values() if inspect.isfunction(fn)]
    files = sorted({_source(fn) for fn in parts})
    return "".join(files)


def _source(of: type | Callable[..., Any]) -> str:
    """A digest of the file that something is defined in, or of its own source if there is none."""
    try:
        file = inspect.getsourcefile(of)
        if file is not None and Path(file).is_file():
            return _digest([Path(file).read_bytes()])
        return _digest([inspect.getsource(of).encode()])
    except (OSError, TypeError) as error:
        raise _Unreadable(f"the source of {of} cannot be read") from error
