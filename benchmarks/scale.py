"""Plan at scale: what a step costs one rank, read from its graph. No devices, no weights.

    python benchmarks/scale.py                  # an 8B Llama from a 70B one, on 8x8 and 32x8 ranks
    python benchmarks/scale.py --proof 32 80    # all layers captured, beside the prediction: long

Ranks are fake (torch's "fake" process group), and so are tensors: `wrap(mesh=)` shards models of
true width and few layers, and a step is traced down to AOTAutograd's graph of forward and backward,
where it stops. Every layer adds the same: the difference of two captures, times the layers. A
fourth capture, of other depths, is compared with what the first three predict of it, exactly.
"""

import argparse
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import CheckpointPolicy
from torch.utils.flop_counter import (
    flop_registry,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)
from transformers import AutoModelForCausalLM, LlamaConfig

import fxdistill
from fxdistill import Match
from fxdistill.compiler import lower
from fxdistill.graph.collectives import collectives
from fxdistill.graph.program import copy_graph
from fxdistill.graph.sections import section_of

TERA = 10**12
SCALARS = 64  # what has fewer elements than this is a pack of numbers


class Size(NamedTuple):
    """One Llama."""

    width: int
    inner: int
    layers: int
    heads: int
    key_value_heads: int


class Depth(NamedTuple):
    """Layers of the student and of the teacher."""

    student: int
    teacher: int


class Setup(NamedTuple):
    """What is planned. ``tokens``: of one sample on each rank of "dp"."""

    student: Size = Size(4096, 14336, 32, 32, 8)
    teacher: Size = Size(8192, 28672, 80, 64, 8)
    vocabulary: int = 128256
    tokens: int = 4096
    dtype: torch.dtype = torch.bfloat16

    @property
    def depth(self) -> Depth:
        return Depth(self.student.layers, self.teacher.layers)


# What was captured: the smallest that have a layer of each, one more of the student's, one more of
# the teacher's; and the one that is predicted.
FIRST, MORE_STUDENT, MORE_TEACHER, PROOF = Depth(1, 2), Depth(2, 2), Depth(1, 3), Depth(3, 4)


@dataclass
class Cost:
    """Numbers of one step on one rank, by what they count, and the largest tensor."""

    counts: Counter[tuple[str, ...]] = field(default_factory=Counter)
    largest: tuple[int, str] = (0, "")

    def of(self, *key: str | None) -> int:
        """The sum of what begins so; ``None`` stands for anything."""
        return sum(
            n
            for found, n in self.counts.items()
            if all(k is None or k == f for k, f in zip(key, found, strict=False))
        )


class _Stop(fxdistill.FxDistillError):
    """Ends a capture: of this kind ``wrap`` lets errors through as they are."""


@contextmanager
def ranks(dp: int, tp: int) -> Iterator[DeviceMesh]:
    """A mesh of which this process is rank 0 and the others do not exist."""
    dist.init_process_group("fake", rank=0, world_size=dp * tp, store=FakeStore())
    try:
        yield init_device_mesh("cpu", (dp, tp), mesh_dim_names=("dp", "tp"))
    finally:
        dist.destroy_process_group()


def llama(size: Size, layers: int, setup: Setup) -> nn.Module:
    config = LlamaConfig(
        vocab_size=setup.vocabulary,
        hidden_size=size.width,
        intermediate_size=size.inner,
        num_hidden_layers=layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.key_value_heads,
        max_position_embeddings=max(setup.tokens, 8192),
        use_cache=False,
    )
    return AutoModelForCausalLM.from_config(config, dtype=setup.dtype)


def matches(setup: Setup, depth: Depth) -> list[Match]:
    """Every MLP of the student, with one of the teacher's at the same relative depth."""
    widths = setup.student.width, setup.teacher.width
    return [
        Match(
            f"model.layers.{i}.mlp",
            f"model.layers.{(i + 1) * depth.teacher // depth.student - 1}.mlp",
            # Not "linear": fake parameters cannot be moved to the student's type.
            project=nn.Linear(*widths, dtype=setup.dtype),
        )
        for i in range(depth.student)
    ]


def captured(setup: Setup, depth: Depth, mesh: DeviceMesh) -> Cost:
    """The cost of a step of models of this depth."""
    found: list[tuple[fx.Graph, int]] = []
    partitioner = lower.min_cut_rematerialization_partition

    def partition(gm: fx.GraphModule, joint_inputs: Any, **kwargs: Any) -> Any:
        graph = copy_graph(gm.graph)
        forward, _ = partitioner(gm, joint_inputs, **kwargs)
        found.append((graph, saved(forward.graph, kwargs["num_fwd_outputs"])))
        raise _Stop("captured")

    torch._dynamo.reset()
    # Index tensors that transformers makes are real.
    with FakeTensorMode(allow_non_fake_inputs=True):
        student = llama(setup.student, depth.student, setup)
        teacher = llama(setup.teacher, depth.teacher, setup)
        distiller = fxdistill.wrap(
            student,
            teacher,
            matches(setup, depth),
            mesh=mesh,
            compile={"backend": "aot_eager"},
        )
        ids = torch.zeros(1, setup.tokens, dtype=torch.long)
        with mock.patch.object(lower, "min_cut_rematerialization_partition", partition):
            try:
                distiller(input_ids=ids, labels=ids)
            except _Stop:
                graph, size = found[0]
                cost = cost_of(graph, distiller, mesh)
                cost.counts["saved",] = size
                return cost
    raise AssertionError("a capture ends behind the partitioner")


def predicted(setup: Setup, mesh: DeviceMesh) -> "Model":
    """A cost for every depth, of three captures."""
    base, student, teacher = (
        captured(setup, depth, mesh) for depth in (FIRST, MORE_STUDENT, MORE_TEACHER)
    )
    return Model(base, student, teacher)


class Model(NamedTuple):
    """Captures at FIRST, MORE_STUDENT and MORE_TEACHER."""

    base: Cost
    student: Cost
    teacher: Cost

    def at(self, depth: Depth) -> Cost:
        keys = {key for cost in self for key in cost.counts}
        more_s, more_t = depth.student - FIRST.student, depth.teacher - FIRST.teacher
        counts = {}
        for key in keys:
            base, s, t = (cost.counts[key] for cost in self)
            counts[key] = base + more_s * (s - base) + more_t * (t - base)
        return Cost(Counter(counts), max(cost.largest for cost in self))


# ---------------------------------------------------------------------- reading a graph


def cost_of(graph: fx.Graph, distiller: fxdistill.Distiller, mesh: DeviceMesh) -> Cost:
    cost = Cost()
    names = {mesh[name].get_group().group_name: name for name in ("dp", "tp")}
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        part = owner(node)
        size = bytes_of(node.meta.get("val"))
        for x in tensors_of(node.meta.get("val")):
            shown = f"{list(x.shape)} {str(x.dtype).removeprefix('torch.')}, {part}"
            cost.largest = max(cost.largest, (bytes_of(x), shown))
        if (kind := collective(node)) is not None:
            whose = "terms" if part == "objective" else part
            group = names[str(node.args[-1])]
            again = node.meta.get("recompute") == CheckpointPolicy.MUST_RECOMPUTE
            scalars = kind == "all_reduce" and node.meta["val"].numel() < SCALARS
            rest = (whose, group, f"{kind} of numbers" if scalars else kind)
            cost.counts[("times", *rest)] += 1
            cost.counts[("bytes", *rest)] += size
            if again:
                cost.counts[("again", *rest)] += size
        elif (flops := flops_of(node)) is not None:
            head = node.target is torch.ops.fxdistill.vocab_loss.default
            cost.counts["flops", "heads" if head else part] += flops
    _agrees(cost, graph)
    _add_memory(cost, distiller)
    return cost


def _agrees(cost: Cost, graph: fx.Graph) -> None:
    """Our count by mesh dimension is that of the report."""
    found = collectives(graph).values()
    assert cost.of("times") == sum(traffic.times for traffic in found)
    assert cost.of("bytes") == sum(traffic.bytes for traffic in found)


def _add_memory(cost: Cost, distiller: fxdistill.Distiller) -> None:
    """Parameters as they lie on this rank, their gradients, and AdamW's two states in fp32."""
    owners = {
        "student": distiller.student,
        "teacher": distiller.teacher,
        "projections": distiller.projections,
    }
    for owner, module in owners.items():
        for p in module.parameters():
            local = p.to_local() if isinstance(p, DTensor) else p
            cost.counts["parameters", owner] += p.numel()
            cost.counts["weights", owner] += bytes_of(local)
            if owner != "teacher":
                cost.counts["gradients", owner] += bytes_of(local)
                cost.counts["optimizer", owner] += 2 * 4 * local.numel()


def collective(node: fx.Node) -> str | None:
    name = str(node.target)
    if not name.startswith("_c10d_functional.") or "wait_tensor" in name:
        return None
    kind = name.split(".")[1]
    return kind.removesuffix("_into_tensor").removesuffix("_tensor")


def owner(node: fx.Node) -> str:
    """The part of the step that a node belongs to; where that was lost, its first input's."""
    part = section_of(node)
    while part is None and node.all_input_nodes:
        node = node.all_input_nodes[0]
        part = section_of(node)
    return part or "input"


def saved(forward: fx.Graph, outputs: int) -> int:
    """Bytes that the forward leaves for the backward, without parameters and inputs."""
    (values,) = forward.output_node().args
    kept = {storage_of(v) for v in values[outputs:] if isinstance(v, fx.Node)}
    return sum(bytes_of(v.meta["val"]) for v in kept if v.op != "placeholder")


def storage_of(node: fx.Node) -> fx.Node:
    """What ``node`` is a view of."""
    while getattr(node.target, "is_view", False):
        node = node.all_input_nodes[0]
    return node


def tensors_of(value: Any) -> list[Tensor]:
    return [x for x in tree_leaves(value) if isinstance(x, Tensor)]


def bytes_of(value: Any) -> int:
    return sum(int(x.numel()) * x.element_size() for x in tensors_of(value))


def flops_of(node: fx.Node) -> int | None:
    """Of products of matrices, attention and the fused head; ``None`` for all else."""
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    if node.target is torch.ops.fxdistill.vocab_loss.default:
        return _of_heads(*args)
    shapes = [x.shape if isinstance(x, Tensor) else x for x in args]
    packet = getattr(node.target, "overloadpacket", None)
    if packet is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
        return int(sdpa_flop_count(*shapes[:3]))
    if packet is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward:
        return int(sdpa_backward_flop_count(*shapes[:4]))
    if packet not in flop_registry:
        return None
    return int(flop_registry[packet](*args, **kwargs, out_val=node.meta["val"]))


def _of_heads(h: Tensor, w: Tensor, _: Any, t: Tensor | None, t_weight: Tensor | None, *rest: Any):
    """The operator hides its products: the student's logits and two gradients, the teacher's."""
    flops = 3 * 2 * h.numel() * w.shape[0]
    if t is not None and t_weight is not None:
        flops += 2 * t.numel() * t_weight.shape[0]
    return flops


# ---------------------------------------------------------------------- what is printed


def rows(cost: Cost, shape: tuple[int, int]) -> dict[str, str]:
    """The lines of the table, for one mesh."""
    lines = {
        f"FLOP, {name}": f"{cost.of('flops', key) / TERA:.4g} T"
        for name, key in (
            ("teacher forward", "teacher"),
            ("student forward and backward", "student"),
            ("heads, both models, with gradients", "heads"),
            ("projections and matches", "objective"),
            ("all", None),
        )
    }
    for whose, axis, kind in sorted({key[1:] for key in cost.counts if key[0] == "times"}):
        times, size = cost.of("times", whose, axis, kind), cost.of("bytes", whose, axis, kind)
        again = cost.of("again", whose, axis, kind)
        more = f", and {_size(again)} again in the backward" if again else ""
        lines[f"{whose}, {axis}: {kind}"] = f"{times} × = {_size(size)}{more}"
    for whose in ("teacher", "student", "terms"):
        for axis in ("dp", "tp"):
            lines[f"received by {axis}, {whose}"] = _size(received(cost, whose, axis, shape))
    for what in ("weights", "gradients", "optimizer"):
        for key in ("teacher", "student", "projections"):
            if size := cost.of(what, key):
                lines[f"{what}, {key}"] = _size(size)
    lines["saved for the backward"] = _size(cost.of("saved"))
    held = sum(map(cost.of, ("weights", "gradients", "optimizer", "saved")))
    lines["these together"] = _size(held)
    size, shown = cost.largest
    lines["largest tensor"] = f"{_size(size)}: {shown}"
    return lines


def received(cost: Cost, whose: str, axis: str, shape: tuple[int, int]) -> float:
    """Bytes that reach a rank from others, as rings move them; gathers that are done again too."""
    n = shape[("dp", "tp").index(axis)]
    total = 0.0
    for kind, share in (
        ("all_gather", (n - 1) / n),
        ("reduce_scatter", n - 1),
        ("all_reduce", 2 * (n - 1) / n),
        ("all_reduce of numbers", 2 * (n - 1) / n),
    ):
        size = cost.of("bytes", whose, axis, kind) + cost.of("again", whose, axis, kind)
        total += share * size
    return total


def _size(count: float) -> str:
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= scale:
            return f"{count / scale:.4g} {unit}"
    return f"{count:.0f} B"


def differences(found: Cost, wanted: Cost) -> list[str]:
    """What two costs do not agree on."""
    keys = sorted({*found.counts, *wanted.counts})
    texts = [
        f"{' '.join(key)}: {found.counts[key]}, not {wanted.counts[key]}"
        for key in keys
        if found.counts[key] != wanted.counts[key]
    ]
    if found.largest != wanted.largest:
        texts.append(f"largest: {found.largest}, not {wanted.largest}")
    return texts


def compared(model: Model, setup: Setup, depth: Depth, mesh: DeviceMesh) -> str:
    """Prediction beside capture, for one depth."""
    wanted = captured(setup, depth, mesh)
    wrong = differences(model.at(depth), wanted)
    what = f"{depth.student} student and {depth.teacher} teacher layers"
    if not wrong:
        return f"{what}: all {len(wanted.counts)} numbers as predicted"
    return "\n".join([f"{what}: predicted and captured differ", *wrong])


def mesh_shape(text: str) -> tuple[int, int]:
    dp, tp = map(int, text.split("x"))
    return dp, tp


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mesh", type=mesh_shape, nargs="*", default=[(8, 8), (32, 8)])
    parser.add_argument("--proof", type=int, nargs=2, default=PROOF, help="layers to capture")
    parser.add_argument("--tokens", type=int, default=Setup().tokens)
    o = parser.parse_args()
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    setup = Setup(tokens=o.tokens)
    shown: list[dict[str, str]] = []
    for shape in o.mesh:
        with ranks(*shape) as mesh:
            model = predicted(setup, mesh)
            print(f"{shape}: {compared(model, setup, Depth(*o.proof), mesh)}", flush=True)
            shown.append(rows(model.at(setup.depth), shape))
    names = list(dict.fromkeys(name for lines in shown for name in lines))
    print("| |", " | ".join(f"dp × tp = {dp} × {tp}" for dp, tp in o.mesh), "|")
    print("| --- " * (len(o.mesh) + 1) + "|")
    for name in names:
        print(f"| {name} |", " | ".join(lines.get(name, "") for lines in shown), "|")


if __name__ == "__main__":
    main()
