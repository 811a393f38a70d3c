"""DDP around a distiller, and FSDP2 inside of one: loss and gradients of one process."""

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import families
import fxdistill
from fxdistill import Match
from mesh_steps import MODES, Samples, aot, compare, gradients_of, split
from processes import run


def accumulated(call: Any, samples: Samples, module: nn.Module, **items: Tensor) -> Any:
    """Micro-batches; gradients cross ranks with the last."""
    losses: dict[str, Tensor] = {}
    for i, (batch, labels) in enumerate(samples):
        quiet = getattr(call, "no_sync", contextlib.nullcontext)
        last = i == len(samples) - 1
        with contextlib.nullcontext() if last else quiet():
            out = call(**batch, labels=labels, **items)
            out.loss.backward()
        for name, value in {"loss": out.loss.detach(), **out.losses}.items():
            losses[name] = losses.get(name, 0) + value
    return losses, gradients_of(module)


def wrapped(compile: Any, how: str) -> tuple[Any, families.Family]:
    torch.manual_seed(2)
    family = families.FAMILIES["llama"]()
    matches = [Match(s, t) for s, t in family.mapping.items()]
    first = matches.pop(0)
    matches.append(Match(first.student, first.teacher, loss="l2", project="linear"))
    if how == "fsdp":
        mesh = init_device_mesh("cpu", (2,))
        for model in (family.student, family.teacher):
            for layer in model.model.layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh)
    distiller = fxdistill.wrap(family.student, family.teacher, matches, compile=compile)
    return aot(distiller), family


def parity(rank: int, modes: list[str], how: str) -> None:
    for mode in modes:
        alone, one = wrapped(False, "")
        wanted = accumulated(alone, [(one.batch, one.labels)], alone)
        distiller, _ = wrapped(MODES[mode], how)
        call = DistributedDataParallel(distiller) if how == "ddp" else distiller
        samples = split(one.batch, one.labels, 2)
        compare(accumulated(call, [samples[rank]], distiller), wanted, (mode, how))
        if how == "ddp":  # three micro-batches, two on one rank: the number of items is global
            for module in (alone, distiller):
                module.zero_grad()
            tokens = one.batch["attention_mask"].sum()
            items = {"num_items": (one.labels != -100).sum(), "num_feature_items": tokens}
            wanted = accumulated(alone, [(one.batch, one.labels)], alone, **items)
            each = split(one.batch, one.labels, 3)
            mine = [each[2], _nothing(each[2])] if rank else each[:2]
            found = accumulated(call, mine, distiller, **items)
            compare(found, wanted, (mode, how, "accumulated"))
        torch._dynamo.reset()


def _nothing(sample: tuple[dict[str, Tensor], Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """Padding only: every rank has as many micro-batches."""
    batch, labels = sample
    mask = torch.zeros_like(batch["attention_mask"])
    mask[:, 0] = 0
    return {**batch, "attention_mask": mask}, torch.full_like(labels, -100)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_wrappers(how: str) -> None:
    modes = ["eager", "one graph", "regional"] if how == "ddp" else ["eager", "regional"]
    run(2, parity, modes, how)
