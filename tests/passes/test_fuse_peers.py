"""The heads of students that teach each other become one node, or the remark says why not."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import fxdistill
from fxdistill import Importance
from fxdistill.losses import vocab_loss_of_peers
from heads import READ, Adapted, Model, batch, remarks, variant
from toys import AOT

HEADS = ("linear", "tied", "transposed weight", "scaled and capped", "bias", "flat", "dict")


def models(*heads: str, vocabulary: int = 61) -> list[Model]:
    found = [variant(READ[name])(i, vocabulary) for i, name in enumerate(heads)]
    for model, name in zip(found, heads, strict=True):
        model.lm_head.weight.requires_grad_(name != "dict")  # one weight needs no gradient
    return found


def step(students: list[Model], compile: Any, **options: Any) -> tuple[Any, list[Any], Any]:
    for model in students:
        model.zero_grad(set_to_none=True)
    options = {"task": "causal_lm", "temperature": 1.5, **options}
    distiller = fxdistill.mutual(students, compile=compile, **options)
    ids, own = batch()
    out = distiller(ids, **own)
    out.loss.backward()
    gradients = [p.grad for model in students for p in model.parameters()]
    return {"loss": out.loss.detach(), **out.losses}, gradients, distiller


def agree(students: list[Model], compile: Any, **options: Any) -> Any:
    """The numbers of ``compile`` and of the eager form are the same; returns the distiller."""
    values, gradients, distiller = step(students, compile, **options)
    plain, wanted, _ = step(students, False, **options)
    assert list(values) == list(plain)
    for name, value in plain.items():
        torch.testing.assert_close(values[name], value, rtol=1e-5, atol=1e-6, msg=name)
    for mine, theirs in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
    return distiller


def assert_fused(distiller: Any, vocabularies: set[int]) -> None:
    assert str(remarks(distiller)).endswith("all students' logits of a chunk are made once")
    nodes = distiller.program.gm.graph.nodes
    assert [n.target for n in nodes].count(vocab_loss_of_peers) == 1
    shapes = (n.meta.get("example_value") for n in nodes if n.op != "placeholder")
    wide = [x.shape for x in shapes if isinstance(x, Tensor) and x.ndim == 3]
    assert not any(shape[-1] in vocabularies for shape in wide)


@pytest.mark.parametrize(("first", "second"), list(itertools.pairwise(HEADS)))
def test_two_students(first: str, second: str) -> None:
    assert_fused(agree(models(first, second), AOT, peers="each"), {61})


@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize("head", ["fewer columns", "fewer columns, capped"])
def test_columns_that_the_models_leave_out(head: str, labels: bool) -> None:
    """They are in no loss: neither in the labels' nor in the divergence."""
    options = {} if labels else {"label_loss": None}
    assert_fused(agree(models(head, head), AOT, **options), {50, 61})


@pytest.mark.parametrize("peers", ["logits", "probabilities", "each"])
@pytest.mark.parametrize("compile", ["regional", AOT], ids=["regional", "graph"])
def test_three_students_of_padded_vocabularies(peers: str, compile: Any) -> None:
    students = [*models("linear", "linear"), *models("linear", vocabulary=64)]
    distiller = agree(students, compile, peers=peers, logit_weight=0.7, label_weight=0.4)
    assert_fused(distiller, {61, 64})


@pytest.mark.parametrize("left_out", [{"label_loss": None}, {"logit_loss": "reverse_kl"}])
def test_other_losses(left_out: dict[str, Any]) -> None:
    assert_fused(agree(models("linear", "tied"), AOT, **left_out), {61})


def test_without_labels() -> None:
    students = models("linear", "linear")
    losses = []
    for compile in (AOT, False):
        distiller = fxdistill.mutual(students, task="causal_lm", compile=compile)
        losses.append(distiller(batch()[0]).loss)
    torch.testing.assert_close(*losses)


@pytest.mark.parametrize(
    ("students", "options", "says"),
    [
        (models("linear", "linear"), {"outputs": ("logits",)}, "also read by the output"),
        (models("linear", "linear"), {"mapping": {"lm_head": "lm_head"}}, "also read by mse"),
        ([*models("linear"), Adapted(1)], {}, "come from add"),
        (models("linear", "linear"), {"importance": Importance("student_entropy")}, "also read by"),
        ([*models("linear"), *models("linear")[0:1]], {"dtypes": True}, "differ in dtype"),
    ],
    ids=["output", "matched", "LoRA", "importance", "dtypes"],
)
def test_left_alone(students: list[Model], options: dict[str, Any], says: str) -> None:
    """Logits are made, the numbers are right, and the remark says why."""
    if options.pop("dtypes", False):
        students[1].double()
    said = str(remarks(agree(students, AOT, **options)))
    assert said.startswith("logits are made: ")
    assert says in said
