"""Rollouts of a student on several ranks are those of one device, whenever texts end."""

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

import fxdistill
from processes import run

OPTIONS = {"max_new_tokens": 8, "do_sample": False, "pad_to": 13}


def llama(layers):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": layers}
    config = LlamaConfig(vocab_size=32, num_attention_heads=2, pad_token_id=0, **sizes)
    return LlamaForCausalLM(config)


def distilled(placed=None):
    torch.manual_seed(0)
    towers = llama(1), llama(2)
    if placed == "fsdp2":
        for model in towers:
            for layer in model.model.layers:  # gathered anew in each forward
                fully_shard(layer)
            fully_shard(model)
        return fxdistill.wrap(*towers, compile="regional")
    mesh = placed and init_device_mesh("cpu", (2,), mesh_dim_names=(placed,))
    return fxdistill.wrap(*towers, compile=False, mesh=mesh)


def on_ranks(rank):
    prompts = torch.randint(3, 32, (2, 5), generator=torch.Generator().manual_seed(1))
    free = fxdistill.rollout(distilled(), prompts, **OPTIONS)["input_ids"]
    # One rank's text ends at once: it must go on with the other in gathering weights.
    options = {**OPTIONS, "eos_token_id": int(free[0, 5])}
    assert options["eos_token_id"] not in free[1, 5:]
    whole = fxdistill.rollout(distilled(), prompts, **options)
    mine = prompts[rank : rank + 1]
    for placed in ("fsdp2", "dp"):
        distiller = distilled(placed)
        batch = fxdistill.rollout(distiller, mine, **options)
        for name, value in batch.items():
            assert torch.equal(value, whole[name][rank : rank + 1]), (placed, name)
    distiller(**batch).loss.backward()  # its parameters are where they were
    with pytest.raises(fxdistill.errors.MeshError, match="tensor parallel"):
        fxdistill.rollout(distilled("tp"), prompts, **options)


@pytest.mark.slow  # starts processes
def test_ranks_write_what_one_device_writes():
    run(2, on_ranks)
