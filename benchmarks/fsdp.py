"""Data parallel on two ranks: FSDP2 and regional mode, beside one graph of a mesh.

    torchrun --nproc-per-node 2 benchmarks/fsdp.py          # V=64000, 2 x 256 tokens a rank, CPU

One training step (forward and backward) of a small Llama with tied embeddings, from forward KL and
labels; the teacher is sharded too, and so that none of its weights stay gathered after a step.
Peak memory is what the allocator of rank 0 hands out beyond what is there before the step: gathered
weights are in it, and the gradients of the shards.
"""

import argparse
import dataclasses
import os
import warnings

import torch
import torch.distributed as dist
from llama import llama
from measure import Step, comparison, interleaved, peak
from rich.console import Console
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import LlamaForCausalLM

import fxdistill


def sharded(model: LlamaForCausalLM, mesh: DeviceMesh, frozen: bool) -> LlamaForCausalLM:
    """Layers, and the rest; what has no backward to free the weights does so after its forward."""
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh, reshard_after_forward=True if frozen else None)


def version(o: argparse.Namespace, mesh: DeviceMesh, how: str) -> Step:
    torch.manual_seed(0)
    student, teacher = llama(o, o.width, 2), llama(o, o.teacher_width, 4)
    ids = torch.randint(o.vocabulary, (2 * o.batch, o.length)).chunk(2)[dist.get_rank()]
    options: dict = {"compile": True, "mesh": mesh}
    if how.startswith("FSDP2"):
        student, teacher = sharded(student, mesh, False), sharded(teacher, mesh, True)
        options = {"compile": "regional"}
    distiller = fxdistill.wrap(student, teacher, **options)
    if how.endswith("logits made"):
        distiller.options = dataclasses.replace(distiller.options, fuse_head=False)

    def step() -> None:
        distiller(input_ids=ids, labels=ids).loss.backward()
        student.zero_grad(set_to_none=True)

    return step


VERSIONS = ("one graph, mesh=", "FSDP2, regional", "FSDP2, regional, logits made")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--vocabulary", type=int, default=64000)
    parser.add_argument("--batch", type=int, default=2, help="of a rank")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--teacher-width", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    o = parser.parse_args()
    warnings.filterwarnings("ignore", message="Dynamo detected a call to a `functools.lru_cache`")
    torch.set_num_threads(max(1, (os.cpu_count() or 2) // 2))
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("dp",))
    steps = {name: version(o, mesh, name) for name in VERSIONS}
    rounds = interleaved(steps, o.rounds)
    memory = {name: peak(step) for name, step in steps.items()}
    if dist.get_rank() == 0:
        said = vars(o) | {"torch": torch.__version__, "threads": torch.get_num_threads()}
        Console(width=100).print(said, comparison(rounds, memory))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
