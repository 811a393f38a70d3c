"""Hand a joint program to AOTAutograd and Inductor.

This file runs the passes of the joint level, on AOTAutograd's functional graph of forward and
backward, just before it is partitioned. Private to torch and used here only: ``compile_fx``, the
partitioner hook of Inductor's configuration, and ``aot_autograd`` of ``torch._dynamo.backends``. If
the hook moves, joint passes stop running, and ``test_lower.py`` fails.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from functorch.compile import min_cut_rematerialization_partition
from torch import fx
from torch._dynamo import list_backends, lookup_backend
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.backends.debugging import boxed_nop
from torch._functorch import config as functorch_config
from torch._inductor.compile_fx import compile_fx
from torch._inductor.custom_graph_pass import CustomPartitionerFn
from torch.utils._pytree import tree_leaves

from fxdistill.base.ranks import ACROSS
from fxdistill.base.tensors import is_placed
from fxdistill.compiler.cached import Caching, caching_of
from fxdistill.errors import OptionError, did_you_mean
from fxdistill.graph import pipeline
from fxdistill.graph.halves import Halves
from fxdistill.graph.pipeline import Observer, pass_name
from fxdistill.graph.program import Pass, PassRecord, Program, output_values

Compiled = Callable[..., Any]
SMALLEST_BUDGET = 1e-6
FROM_CACHE = "AOTAutogradCache"  # the record of a step that was found compiled


@dataclass(frozen=True)
class Lowering:
    """How to compile the joint program: a backend of torch.compile, and its options."""

    backend: str | Callable[..., Any] = "inductor"
    options: Mapping[str, Any] = field(default_factory=dict)


def lower(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    lowering: Lowering,
    joint_passes: Sequence[Pass] = (),
    observers: Sequence[Observer] = (),
    watch: Callable[[Halves], None] | None = None,
    caching: Caching | None = None,
) -> Compiled:
    """Compile ``gm``; ``joint_passes`` are the passes of the joint level.

    ``"inductor"`` and ``"aot_eager"`` run them; any other backend is called without them. ``watch``
    gets the forward and the backward into which AOTAutograd's graph is partitioned. ``caching``
    says what Inductor's caches need to know; it is found out if it is not given. Passes that had
    run when the cache was filled do not run again.
    """
    inputs = () if watch is None else tuple(example_inputs)
    fuses = lowering.backend == "inductor"
    caching = caching or caching_of(gm, joint_passes)
    partition = _Partition(
        tuple(joint_passes), tuple(observers), watch, inputs, fuses, key=caching.key
    )
    if lowering.backend == "inductor":
        careful = _UNFUSED if _crosses_cpu_ranks(gm, example_inputs) else {}
        options = caching.options({**careful, **lowering.options})
        patches = {"custom_partitioner_fn": partition, **options}
        with caching.used() as found:
            compiled = compile_fx(gm, list(example_inputs), config_patches=patches)
        if found.hit and joint_passes:
            _say_found(gm, joint_passes, observers)
        return cast(Compiled, compiled)
    if lowering.backend == "aot_eager":
        aot = aot_autograd(
            fw_compiler=boxed_nop, partition_fn=partition, keep_inference_input_mutations=True
        )
        return aot(gm, list(example_inputs))
    backend = lowering.backend
    compiler = lookup_backend(backend) if isinstance(backend, str) else backend
    options = {"options": dict(lowering.options)} if lowering.options else {}
    return cast(Compiled, compiler(gm, list(example_inputs), **options))


def _say_found(
    gm: fx.GraphModule, joint_passes: Sequence[Pass], observers: Sequence[Observer]
) -> None:
    """Tell observers why no pass of the joint level has run."""
    names, count = ", ".join(map(pass_name, joint_passes)), len(gm.graph.nodes)
    said = f"had the compiled step, so these did not run again: {names}"
    record = PassRecord(FROM_CACHE, count, count, (), 0.0, False, (said,), "joint")
    program = Program(gm, tuple(f"output_{i}" for i in range(len(output_values(gm.graph)))))
    for observer in observers:
        observer(record, program)


# On CPUs, Inductor (torch 2.13) loses track of in-place collectives once it fuses kernels: its C++
# code reads results before they have arrived (pytorch issue 185509, fixed after 2.13).
_UNFUSED = {"max_fusion_size": 1}


def _crosses_cpu_ranks(gm: fx.GraphModule, inputs: Sequence[Any]) -> bool:
    """Whether the graph has collectives between processes on CPUs."""
    tensors = [x for x in inputs if isinstance(x, torch.Tensor)]
    on_cpu = all(x.device.type == "cpu" for x in tensors)
    summing = any(node.target in ACROSS for node in gm.graph.nodes)
    return on_cpu and (summing or any(is_placed(x) for x in tensors))


def check_lowering(lowering: Lowering) -> None:
    """Raise OptionError where the backend, or an option of Inductor, does not exist."""
    backend = lowering.backend
    if not isinstance(backend, str):
        return
    known = sorted({*list_backends(exclude_tags=()), "aot_eager"})
    if backend not in known:
        near = did_you_mean(backend, known)
        raise OptionError(f"compile's backend {backend!r} does not exist. Nearest: {near}.")
    if backend == "inductor":
        options = torch._inductor.list_options()
        for name in lowering.options:
            if name.replace("-", "_") not in options:
                near = did_you_mean(name, options)
                raise OptionError(f"Inductor has no option {name!r}. Nearest: {near}.")


def mode_options(mode: str, dynamic: bool | None) -> dict[str, Any]:
    """The options of Inductor that ``mode`` stands for; raises OptionError for an unknown mode."""
    modes = torch._inductor.list_mode_options()
    if mode not in modes:
        near = did_you_mean(mode, modes)
        raise OptionError(f"compile's mode {mode!r} does not exist. Nearest: {near}.")
    named: dict[str, Any] = torch._inductor.list_mode_options(mode, dynamic)
    return named


@dataclass
class _Partition(CustomPartitionerFn):
    """Run the joint passes, then torch's own partitioner."""

    passes: tuple[Pass, ...]
    observers: tuple[Observer, ...]
    watch: Callable[[Halves], None] | None
    inputs: tuple[Any, ...]
    fuses: bool
    key: str = ""

    def __call__(self, gm: fx.GraphModule, joint_inputs: Sequence[object], **kwargs: Any) -> Any:
        count = len(tree_leaves(gm.graph.output_node().args))
        outputs = tuple(f"output_{i}" for i in range(count))
        program = Program(gm, outputs, level="joint", title="backward")
        program = pipeline.run(program, self.passes, self.observers)
        # At a budget of exactly 0 torch saves the inputs only, whatever a pass has marked.
        budget = max(functorch_config.activation_memory_budget, SMALLEST_BUDGET)
        with functorch_config.patch(activation_memory_budget=budget):
            parts = min_cut_rematerialization_partition(program.gm, joint_inputs, **kwargs)
        outputs = kwargs["num_fwd_outputs"]
        forward, backward = _meshes_last(parts[0], parts[1], outputs)
        if self.watch is not None:
            self.watch(Halves(forward, backward, outputs, self.fuses, self.inputs))
        return forward, backward

    def __getstate__(self) -> dict[str, Any]:
        """The state without observers: Inductor pickles it into cache keys; they change no code."""
        return {**self.__dict__, "observers": (), "watch": None, "inputs": ()}

    def uuid(self) -> str:
        """Part of the keys of the caches: a changed pass must not get old code."""
        return self.key


def _meshes_last(
    forward: fx.GraphModule, backward: fx.GraphModule, outputs: int
) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Move saved values that are neither tensor nor number (device meshes) behind saved tensors.

    AOTAutograd expects them there. torch's partitioner (2.13) takes meshes for tensors, and puts
    behind them the states of random operators that a checkpoint runs again.
    """
    last = forward.graph.output_node()
    values = list(last.args[0])  # type: ignore[arg-type]
    saved = sorted(values[outputs:], key=_order)
    if saved == values[outputs:]:
        return forward, backward
    last.args = ([*values[:outputs], *saved],)
    inputs = backward.graph.find_nodes(op="placeholder")
    names = {node.name for node in saved if _order(node) == 1}
    tangent = next(node for node in inputs if node.name.startswith("tangents"))
    for node in [node for node in inputs if node.name in names]:
        tangent.prepend(node)
    for part in (forward, backward):
        part.recompile()
    return forward, backward


def _order(saved: fx.Node) -> int:
    """The sort key of a saved value: tensors first, then other objects, then numbers."""
    value = saved.meta.get("val")
    if value is None or isinstance(value, torch.Tensor):
        return 0
    return 2 if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool, int, float)) else 1
