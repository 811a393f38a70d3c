"""Losses of attention where ranks hold other samples, with other numbers of tokens that count."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import families
import fxdistill
from fxdistill import Match, errors
from mesh_steps import MODES, compare, gradients_of
from processes import run

HOW = {"ddp": ("eager", "one graph", "regional"), "dp": ("eager", "one graph"), "fsdp": ("eager",)}
ATTENTION = {"student_port": "attention", "teacher_port": "attention"}


class Attending(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.qkv, self.out, self.heads = nn.Linear(width, 3 * width), nn.Linear(width, width), heads

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))


class Net(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.embed, self.attn = nn.Embedding(20, width), Attending(width, heads)
        self.head = nn.Linear(width, 20)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.attn(self.embed(input_ids)))


def made(loss: Any, how: str, mode: str) -> Any:
    """A distiller with one loss, or with several of them at once."""
    torch.manual_seed(0)
    student, teacher = Net(8, 2), Net(12, 3)
    options: dict[str, Any] = {"compile": MODES[mode], "task": "causal_lm"}
    if how == "dp":
        options["mesh"] = init_device_mesh("cpu", (2,), mesh_dim_names=("dp",))
    if how == "fsdp":
        for model in (student, teacher):
            fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    each = loss if isinstance(loss, tuple) else (loss,)
    matches = [Match("attn", "attn", loss=one, **ATTENTION) for one in each]
    return fxdistill.wrap(student, teacher, matches, **options)


IDS = torch.randint(0, 20, (4, 6), generator=torch.Generator().manual_seed(2))
COUNTED = torch.ones(4, 6)
COUNTED[0, 2:], COUNTED[1], COUNTED[3, :3] = 0, 0, 0


def trained(call: Any, distiller: Any, rows: slice, items: float | None) -> Any:
    out = call(IDS[rows], loss_mask=COUNTED[rows], num_feature_items=items)
    out.loss.backward()
    return {"loss": out.loss.detach(), **out.losses}, gradients_of(distiller)


LOSSES = ("attention_kl", "transfer_matrix", "attention_mse", "relation_kl")


def parity(rank: int, how: str) -> None:
    for mode in HOW[how]:
        # Each alone, and in compiled modes all in one graph, which takes less time.
        for loss in LOSSES if mode == "eager" else (LOSSES,):
            for items in (None,) if loss in LOSSES[2:] else (None, 40.0):
                alone, together = made(loss, "", "eager"), made(loss, how, mode)
                wanted = trained(alone, alone, slice(None), items)
                call = DistributedDataParallel(together) if how == "ddp" else together
                found = trained(call, together, slice(2 * rank, 2 * rank + 2), items)
                compare(found, wanted, (how, mode, loss, items))
                torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("how", HOW)
def test_the_mean_is_over_what_counts_on_all_ranks(how: str) -> None:
    run(2, parity, how)


def within_sharded(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    for path in ("model.layers.0.self_attn", "model.layers.0"):
        family = families.FAMILIES["llama"]()
        match = Match(path, path, loss="attention_kl", **ATTENTION)
        with pytest.raises(errors.MeshError, match=r"self_attn', which is sharded"):
            fxdistill.wrap(family.student, family.teacher, [match], mesh=mesh)


@pytest.mark.slow
def test_attention_of_sharded_heads_is_refused() -> None:
    run(2, within_sharded)
