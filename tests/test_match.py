"""``match`` against an oracle that others wrote from the models' sources."""

import pytest
import torch

from architectures import ARCHITECTURES
from fxdistill.landmarks import embedding_of, logits_of, norms_of
from fxdistill.structure import stacks_of


@pytest.mark.parametrize("layers", [1, 2, 5])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_block_mixer_and_mlp_is_found(name: str, layers: int) -> None:
    architecture = ARCHITECTURES[name]
    with torch.device("meta"):
        model = architecture.build(layers)
    found, expected = stacks_of(model), architecture.expected(layers)
    assert [[b.path for b in s.blocks] for s in found] == [s.blocks for s in expected]
    assert [[sorted(p.path for p in b.of("mixer")) for b in s.blocks] for s in found] == [
        [sorted(m) for m in s.mixers] for s in expected
    ]
    assert [[[p.path for p in b.of("mlp")] for b in s.blocks] for s in found] == [
        s.mlps for s in expected
    ]
    assert norms_of(model, found) == [s.norm for s in expected]
    assert logits_of(model, found) == architecture.logits


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_embedding_is_found(name: str) -> None:
    # Not on meta: tied weights are told by their identity.
    model = ARCHITECTURES[name].build(2)
    assert embedding_of(model, stacks_of(model)) == ARCHITECTURES[name].embedding
