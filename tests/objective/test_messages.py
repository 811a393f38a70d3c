"""Messages say which sizes a call has, though its graph holds for any."""

import re

import pytest
import torch

import fxdistill
from fxdistill import Match, errors
from toys import toy_pair

DYNAMIC = {"backend": "aot_eager", "dynamic": True}
MLP = "blocks.0.mlp"


def mapped(**options):
    return {"mapping": {MLP: Match(teacher=MLP, **options)}, "logit_loss": None}


@pytest.mark.parametrize(
    ("options", "given", "says"),
    [
        ({}, {"labels": torch.zeros(3, 5).long()}, r"labels has shape \[3, 5\], .* are \[3, 7\]"),
        (mapped(reduce=(("b l d -> b d", "mean"), None)), {}, r"is \[3, 8\] and .* is \[3, 7, 8\]"),
        (
            mapped(rearrange="b (9 + w) d -> b w d"),
            {},
            r"9 of the 7 entries of axis 1 of \[3, 7, 8",
        ),
        (
            mapped(weights="some"),
            {"weights": {"some": torch.ones(3, 5)}},
            r"\[3, 5\], and weigh a value \[3, 7, 8\]",
        ),
        (mapped(loss=lambda s, t, w: (s - t).mean(-1)), {}, r"returned shape \[3, 7\]"),
    ],
    ids=["labels", "shapes", "layouts", "weights", "losses"],
)
def test_sizes_are_numbers_where_a_graph_has_symbols(options, given, says):
    distiller = fxdistill.wrap(*toy_pair(), **options, task="causal_lm", compile=DYNAMIC)
    with pytest.raises(errors.FxDistillError, match=says) as found:
        distiller(ids=torch.arange(21).reshape(3, 7) % 5, **given)
    assert not re.search(r"\bs\d+\b", str(found.value))
