"""Graphs of the joint level with sums over ranks, written by hand, and run beside another rank."""

import torch
from torch import fx

from fxdistill.graph.program import Program

aten, comm = torch.ops.aten, torch.ops._c10d_functional
REDUCE, WAIT = comm.all_reduce.default, comm.wait_tensor.default


class Writer:
    """Writes a graph of the joint level, with values on the meta device."""

    def __init__(self):
        self.graph = fx.Graph()

    def input(self, name, shape=(), dtype=torch.float32):
        node = self.graph.placeholder(name)
        node.meta["val"] = torch.empty(shape, dtype=dtype, device="meta")
        return node

    def call(self, target, *args, **meta):
        node = self.graph.call_function(target, args)
        node.meta = {"val": target(*fx.node.map_arg(args, lambda n: n.meta["val"])), **meta}
        return node

    def summed(self, x, op="sum", group="0", **meta):
        reduced = self.call(REDUCE, x, op, group, **meta)
        return self.call(WAIT, reduced, **meta)

    def program(self, *outputs):
        self.graph.output(outputs)
        gm = fx.GraphModule(torch.nn.Module(), self.graph)
        return Program(gm, tuple(f"output_{i}" for i in range(len(outputs))), level="joint")


class Ranks(fx.Interpreter):
    """Runs a graph beside a rank whose every value is half of this one's, plus one."""

    OPS = {"sum": torch.add, "max": torch.maximum}

    def call_function(self, target, args, kwargs):
        if target is REDUCE:
            return self.OPS[args[1]](args[0], args[0] / 2 + 1)
        return args[0] if target is WAIT else super().call_function(target, args, kwargs)


def values(program):
    inputs = [n.meta["val"] for n in program.gm.graph.find_nodes(op="placeholder")]
    g = torch.Generator().manual_seed(0)
    made = [torch.rand(v.shape, generator=g).to(v.dtype) + 1 for v in inputs]
    torch.manual_seed(0)
    return Ranks(program.gm).run(*made)


def reductions(program):
    return [n for n in program.gm.graph.nodes if n.target is REDUCE]


def sizes(program):
    """How many numbers each all-reduce sums."""
    return [n.meta["val"].numel() for n in reductions(program)]
