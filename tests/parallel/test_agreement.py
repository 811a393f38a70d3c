"""Agreement of models on several ranks: that of one device on all samples."""

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import fxdistill
from mesh_steps import batch
from placed_models import LM
from processes import run


def distilled(**options):
    torch.manual_seed(0)
    towers = LM(64, 16, 1), LM(64, 16, 2)
    if options.get("compile") == "regional":
        for model in towers:
            fully_shard(model)
    return fxdistill.wrap(*towers, task="causal_lm", **{"compile": False, **options})


def on_ranks(rank):
    ids, own = batch(7)
    whole = {"ids": ids, **own}
    mine = {name: x[rank : rank + 1] for name, x in whole.items()}
    found = distilled().agreement(whole)
    assert found.divergence > 0
    for axis, given in (("dp", mine), ("tp", whole)):
        mesh = init_device_mesh("cpu", (2,), mesh_dim_names=(axis,))
        placed = distilled(mesh=mesh).agreement(given)
        torch.testing.assert_close(tuple(placed), tuple(found), msg=axis)
    sharded = distilled(compile="regional").agreement(mine)
    torch.testing.assert_close(tuple(sharded), tuple(found), msg="FSDP2")


@pytest.mark.slow  # starts processes
def test_all_samples_of_all_ranks_count():
    run(2, on_ranks)
