"""The port "attention" of each family: the maps that models return, and outputs as they were."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

import fxdistill
from attention_cases import (
    CASES,
    IDS,
    LAYERS,
    MODES,
    PIECES,
    attention_match,
    close,
    distilled,
    divergence,
    gradients,
    made,
    map_of,
)
from mesh_steps import AOT

RUNS = [
    *((name, compile) for name in CASES for compile in (False, AOT)),
    *((name, "regional") for name in ("llama", "t5 cross")),
]


@pytest.mark.parametrize(("name", "compile"), RUNS)
def test_the_loss_is_that_of_the_maps_that_models_return(name, compile):
    case = CASES[name]
    student, teacher = (made(case, side, "eager" if case.explicit else "sdpa") for side in LAYERS)
    distiller = distilled(case, student, teacher, "attention_kl", compile)
    out = distiller(**case.batch)
    out.loss.backward()
    own = made(case, "student", "eager")
    with torch.no_grad():
        t = map_of(case, "teacher", made(case, "teacher", "eager"))
    want = divergence(map_of(case, "student", own), t, case.weights)
    want.backward()
    assert float(want.detach()) > 1e-3
    torch.testing.assert_close(out.loss.detach(), want.detach(), rtol=2e-5, atol=1e-7)
    close(gradients(student), gradients(own))


PACKED = ["llama of packed sequences", "llama of packed sequences by a mask"]


@pytest.mark.parametrize("name", PACKED)
def test_packed_sequences_attend_themselves_alone(name):
    """The loss is the mean over the tokens of all sequences, each of which runs by itself."""
    case = CASES[name]
    student, teacher = (made(case, side, "sdpa") for side in LAYERS)
    out = distilled(case, student, teacher, "attention_kl", AOT)(**case.batch)
    out.loss.backward()
    own, total = made(case, "student", "eager"), torch.zeros(())
    other = made(case, "teacher", "eager").requires_grad_(False)
    for row, at in PIECES:
        alone = dataclasses.replace(case, batch={"input_ids": IDS[row : row + 1, at]})
        maps = (map_of(alone, side, m) for side, m in (("student", own), ("teacher", other)))
        total = total + divergence(*maps, None) * (at.stop - at.start)
    want = total / IDS.numel()
    want.backward()
    torch.testing.assert_close(out.loss.detach(), want.detach(), rtol=2e-5, atol=1e-7)
    close(gradients(student), gradients(own))


@MODES
@pytest.mark.parametrize("name", ["llama", "distilbert", *PACKED, "t5 decoder", "gemma2"])
def test_the_models_own_output_is_what_it_was(name, compile):
    case = CASES[name]
    attention = "eager" if case.explicit else "sdpa"
    student, teacher = (made(case, side, attention) for side in LAYERS)
    want = student(**case.batch).logits.detach()  # with gradients: torch's kernels depend on that
    given = {"compile": compile, "outputs": ("logits",)}
    distiller = fxdistill.wrap(student, teacher, [attention_match(case)], **given)
    out = distiller(**{"labels": IDS, **case.batch})
    assert torch.equal(out.logits, want)
    assert float(out.losses["features"]) > 0
    assert F.scaled_dot_product_attention.__module__ != "fxdistill.taps.attention"
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in student.modules())
