"""Students, teachers and distillers that Accelerate has sharded by FSDP2: one process's numbers.

Accelerate (1.15) looks at its FSDP plugin on accelerators only: on CPUs its state is set by hand
here, as it sets it elsewhere, and all that comes after is its own.
"""

import os
import re
from typing import Any

import pytest
import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils import DistributedType
from accelerate.utils.fsdp_utils import fsdp2_prepare_model

import families
import fxdistill
from heads import remarks
from mesh_steps import compare, gradients_of, split
from processes import run

# Accelerate's activation checkpointing is a module around each layer.
INSIDE = "_checkpoint_wrapped_module."


def accelerator_of(rank: int, **options: Any) -> Accelerator:
    where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1"}
    os.environ.update({name: str(value) for name, value in where.items()}, MASTER_PORT="1")
    accelerator = Accelerator(cpu=True)
    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        **options,
    )
    assert accelerator.is_fsdp2
    return accelerator


def towers(tied: bool) -> families.Family:
    torch.manual_seed(2)
    family = families.FAMILIES["llama"]()
    if tied:
        family.student.lm_head.weight = family.student.model.embed_tokens.weight
    return family


def wrapped(family: families.Family, compile: Any) -> Any:
    mapping = family.mapping
    if hasattr(family.student.model.layers[0], INSIDE[:-1]):
        mapping = {re.sub(r"(layers\.\d+\.)", rf"\1{INSIDE}", s): t for s, t in mapping.items()}
    return fxdistill.wrap(family.student, family.teacher, mapping, compile=compile)


def step(distiller: Any, backward: Any, batch: Any, labels: Any, call: Any = None) -> Any:
    out = (call or distiller)(**batch, labels=labels)
    backward(out.loss)
    found = {"loss": out.loss.detach(), **out.losses}, gradients_of(distiller)
    return [{name.replace(INSIDE, ""): x for name, x in values.items()} for values in found]


def parity(rank: int, cases: list[tuple[str, bool, dict[str, Any]]]) -> list[str]:
    said = []
    for whose, tied, options in cases:
        one = towers(tied)
        alone = wrapped(one, False)
        reference = torch.optim.SGD(alone.parameters(), 0.5)
        accelerator = accelerator_of(rank, **options)
        family = towers(tied)
        distiller = call = wrapped(family, "regional") if whose == "distiller" else None
        trained = distiller or family.student
        optimizer = torch.optim.SGD(trained.parameters(), 0.5, foreach=False)
        prepared, optimizer = accelerator.prepare(trained, optimizer)
        if whose == "distiller":
            call = prepared
        else:
            if whose == "both":
                fsdp2_prepare_model(accelerator, family.teacher)
            distiller = call = wrapped(family, "regional")
            assert prepared is distiller.student
        mine = split(one.batch, one.labels, 2)[rank]
        for i in range(2):
            wanted = step(alone, torch.Tensor.backward, one.batch, one.labels)
            found = step(distiller, accelerator.backward, *mine, call)
            compare(found, wanted, (whose, tied, options, i))
            for each in (reference, optimizer):
                each.step()
                each.zero_grad()
        said.append(str(remarks(distiller)))
        torch._dynamo.reset()
    return said


@pytest.mark.slow
def test_accelerate() -> None:
    cases = [
        ("student", False, {}),
        ("both", False, {}),
        ("student", True, {}),
        ("student", False, {"activation_checkpointing": True}),
        ("distiller", False, {}),
    ]
    said = run(2, parity, cases)[0]
    assert all(remark.startswith("logits fused") for remark in said), said


def mixed(rank: int) -> None:
    """bfloat16 is for FSDP2's policy alone: the head is under no autocast, and is fused."""
    one = towers(False)
    wanted = step(wrapped(one, False), torch.Tensor.backward, one.batch, one.labels)
    accelerator = accelerator_of(rank, mixed_precision_policy="bf16")
    family = towers(False)
    optimizer = torch.optim.SGD(family.student.parameters(), 0.5)
    student, _ = accelerator.prepare(family.student, optimizer)
    fsdp2_prepare_model(accelerator, family.teacher)
    distiller = wrapped(family, "regional")
    mine = split(one.batch, one.labels, 2)[rank]
    found = step(distiller, accelerator.backward, *mine)
    assert str(remarks(distiller)).startswith("logits fused")
    assert student.lm_head.weight.dtype == torch.float32
    torch.testing.assert_close(found[0]["loss"], wanted[0]["loss"], rtol=2e-2, atol=0)
    for name, gradient in wanted[1].items():
        assert (found[1][name] - gradient).norm() <= 0.1 * gradient.norm(), name


@pytest.mark.slow
def test_mixed_precision() -> None:
    run(2, mixed)
