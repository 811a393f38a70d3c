"""Models of different dtypes: each gets the inputs in its own, and the report says so."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div

import fxdistill
from toys import AOT

X = torch.randn(3, 3, 6, 6, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 3, 1])


class Net(nn.Module):
    """A convolution, which takes its own dtype alone."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 5)

    def forward(self, pixels: Any, scale: Tensor | None = None) -> Tensor:
        x = pixels["image"] if isinstance(pixels, dict) else pixels
        return self.head(self.conv(x).mean((2, 3)))


def by_hand(student: Net, teacher: Net, dtype: torch.dtype) -> Tensor:
    logits = student(X.to(student.head.weight.dtype)).float()
    with torch.no_grad():
        target = teacher(X.to(dtype)).double().log_softmax(-1)
    ours = logits.double().log_softmax(-1)
    divergence = kl_div(ours, target, log_target=True, reduction="batchmean")
    return divergence + cross_entropy(logits, Y)


@pytest.mark.parametrize("compile", [False, "regional", AOT], ids=["eager", "terms", "one"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_a_teacher_of_another_dtype_gets_its_inputs_in_it(dtype: torch.dtype, compile: Any) -> None:
    student, teacher = Net(0), Net(1).to(dtype)
    alone = copy.deepcopy(student)
    distiller = fxdistill.wrap(student, teacher, task="classification", compile=compile)
    out = distiller(X, labels=Y)
    out.loss.backward()
    want = by_hand(alone, teacher, dtype)
    want.backward()
    torch.testing.assert_close(out.loss.double(), want.double().detach(), rtol=1e-5, atol=0)
    for ours, theirs in zip(student.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)


def test_a_student_of_another_dtype_too_and_tensors_within_a_dict() -> None:
    student, teacher = Net(0).double(), Net(1)
    distiller = fxdistill.wrap(student, teacher, task="classification", compile=False)
    out = distiller({"image": X}, labels=Y)
    want = by_hand(student, teacher, torch.float32)
    torch.testing.assert_close(out.loss.double(), want.double(), rtol=1e-5, atol=0)


def test_the_report_lists_the_cast() -> None:
    distiller = fxdistill.wrap(Net(0), Net(1).bfloat16(), task="classification", compile=AOT)
    casts = [(c.owner, c.before, c.after, c.times) for c in distiller.report(X, labels=Y).casts]
    assert ("teacher", "float32", "bfloat16", 1) in casts


class Looking(Net):
    """Keeps the dtypes that it was called with."""

    def forward(self, pixels: Any, scale: Tensor | None = None) -> Tensor:
        self.seen = pixels.dtype, None if scale is None else scale.dtype
        return super().forward(pixels.to(self.head.weight.dtype))


def test_what_is_a_models_own_stays_as_it_is() -> None:
    """Its own inputs, what no other model has as its dtype, and all under autocast."""
    teacher = Looking(1).bfloat16()
    distiller = fxdistill.wrap(Net(0), teacher, task="classification", compile=False)
    distiller(X, scale=torch.ones(1, dtype=torch.float64), teacher_inputs={"pixels": X})
    assert teacher.seen == (torch.float32, torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        distiller(X)
    assert teacher.seen == (torch.float32, None)
    alike = fxdistill.wrap(Looking(0), Looking(1), task="classification", compile=False)
    alike(X.double())
    assert alike.teacher.seen == (torch.float64, None)
