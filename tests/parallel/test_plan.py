"""The ready-made plan: what is sharded, and what is not. No processes: a plan is read, not run."""

import copy

import pytest
import torch
from torch import Tensor

import families
from fxdistill import errors
from fxdistill.parallel.plan import ready_made

LAYER = "model.layers.0"


def plan(model: torch.nn.Module, ranks: int = 2, *, learns: bool = True) -> object:
    return ready_made(model, ranks, "student", learns=learns)


def test_attention_and_mlp_of_a_llama() -> None:
    found = plan(families.FAMILIES["llama"]().student)
    assert {f"{LAYER}.self_attn", f"{LAYER}.mlp"} < set(found.sharded)
    assert not found.notes
    assert not found.parts
    kinds = {name: type(style).__name__ for name, style in found.styles.items()}
    assert kinds[f"{LAYER}.self_attn.q_proj"] == kinds[f"{LAYER}.mlp.up_proj"] == "ColwiseParallel"
    assert (
        kinds[f"{LAYER}.self_attn.o_proj"] == kinds[f"{LAYER}.mlp.down_proj"] == "RowwiseParallel"
    )
    assert kinds[f"{LAYER}.input_layernorm"] == kinds["model.norm"] == "SequenceParallel"
    assert kinds["lm_head"] == "ColwiseParallel"


def test_norms_of_heads_have_a_part_of_their_gradient_on_each_rank() -> None:
    found = plan(families.FAMILIES["qwen3"]().student)
    assert f"{LAYER}.self_attn.q_norm.weight" in found.parts


def test_heads_that_do_not_divide_stay_whole() -> None:
    found = plan(families.FAMILIES["llama"]().student, 4)  # two heads of keys
    assert f"{LAYER}.self_attn" not in found.sharded
    assert f"{LAYER}.mlp" in found.sharded
    assert "whole attention on every rank" in found.notes[0]


@pytest.mark.parametrize("family", ["bamba", "falcon_h1", "mixtral"])
def test_what_is_not_understood_stays_whole(family: str) -> None:
    found = plan(families.FAMILIES[family]().student)
    assert "on every rank" in found.notes[0]


def test_an_mlp_that_mixes_its_inner_width_stays_whole() -> None:
    model = families.FAMILIES["llama"]().student
    mlp = model.get_submodule(f"{LAYER}.mlp")

    class Centred(type(mlp)):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            inner = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
            return self.down_proj(inner - inner.mean(-1, keepdim=True))

    mlp.__class__ = Centred
    before = copy.deepcopy(model.state_dict())
    found = plan(model)
    assert f"{LAYER}.mlp" not in found.sharded
    assert "model.layers.1.mlp" in found.sharded
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_dropout_where_ranks_hold_the_same() -> None:
    model = families.FAMILIES["gpt2"]().student
    model.transformer.drop.p = 0.1
    with pytest.raises(errors.MeshError, match=r"transformer\.drop"):
        plan(model)
    plan(model, learns=False)  # a frozen teacher is in eval mode


def test_two_stacks() -> None:
    with pytest.raises(errors.MeshError, match="2 stacks"):
        plan(families.FAMILIES["t5"]().student)
