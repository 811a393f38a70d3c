"""One step on a mesh or on one device, and whether two of them agree."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

import fxdistill
from placed_models import LM

Samples = list[tuple[dict[str, Tensor], Tensor]]
AOT = {"backend": "aot_eager"}
MODES: dict[str, Any] = {
    "eager": False,
    "one graph": AOT,
    "logits made": {**AOT, "fuse_head": False},
    "regional": "regional",
}


def batch(length: int) -> tuple[Tensor, dict[str, Tensor]]:
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 60, (2, length), generator=g)
    labels = ids.clone()
    labels[0, :3] = -100
    return ids, {"labels": labels, "token_weights": torch.rand(2, length, generator=g)}


def gradients_of(module: nn.Module) -> dict[str, Tensor]:
    return {
        name: p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
        for name, p in module.named_parameters()
    }


def step(student: LM, teacher: LM, length: int, compile: Any, **options: Any) -> Any:
    distiller = fxdistill.wrap(student, teacher, task="causal_lm", compile=compile, **options)
    ids, own = batch(length)
    out = distiller(ids, **own)
    out.loss.backward()
    history = () if distiller.program is None else distiller.program.history
    said = {record.name: " ".join(record.remarks) for record in history}
    return {"loss": out.loss.detach(), **out.losses}, gradients_of(distiller), said


def compare(found: Any, wanted: Any, what: Any) -> None:
    for name, value in wanted[0].items():
        assert abs(float(found[0][name] - value)) <= 1e-5 * abs(float(value)), (what, name)
    for name, gradient in wanted[1].items():
        bound = 1e-5 * gradient.norm() + 1e-6 * gradient.abs().max()
        error = (found[1][name] - gradient).norm()
        assert error <= bound, (what, name, float(error), float(bound))


def split(batch: dict[str, Tensor], labels: Tensor, parts: int) -> Samples:
    rows = zip(*(x.chunk(parts) for x in batch.values()), strict=True)
    batches = [dict(zip(batch, row, strict=True)) for row in rows]
    return list(zip(batches, labels.chunk(parts), strict=True))


def measured(distiller: Any, batch: dict[str, Tensor], labels: Tensor) -> Any:
    out = distiller(**batch, labels=labels)
    out.loss.backward()
    return {"loss": out.loss.detach(), **out.losses}, gradients_of(distiller)


def mine(mesh: DeviceMesh, x: Tensor) -> Tensor:
    """This rank's samples: three on two ranks are two and one."""
    for name in ("replicate", "dp"):
        if name in (mesh.mesh_dim_names or ()):
            x = x.chunk(mesh[name].size())[mesh[name].get_local_rank()]
    return x
