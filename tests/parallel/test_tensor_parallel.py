"""Models that arrive tensor parallel: logits and labels, loss and gradients of one device."""

import functools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from fxdistill import Importance, errors
from fxdistill.losses import cross_entropy, forward_kl, jsd
from mesh_steps import AOT, MODES, compare, step
from placed_models import LM, parallel
from processes import run

OPTIONS: dict[str, dict[str, Any]] = {
    "forward_kl": {},
    "jsd": {"logit_loss": functools.partial(jsd, beta=0.3), "temperature": 2.0},
    "reverse": {"logit_loss": "reverse_kl", "label_weight": 0.5},
    "soft": {"logit_loss": "soft_cross_entropy"},
    "variation": {"logit_loss": "total_variation", "temperature": 2.0},
    "squares": {"logit_loss": "mse_logits"},
    "sigmoids": {"logit_loss": "sigmoid_kl", "temperature": 2.0},
    # Equal tokens have equal scores here, but for rounding: keep would choose others on each mesh.
    "tip": {"importance": Importance("tip"), "temperature": 2.0},
    "margin": {"importance": Importance("teacher_margin", threshold=0.01), "label_loss": None},
    "labels": {
        "logit_loss": None,
        "label_loss": functools.partial(cross_entropy, label_smoothing=0.1, z_loss=0.01),
    },
}


def towers(vocabulary: int) -> tuple[LM, LM]:
    torch.manual_seed(0)
    return LM(vocabulary, 16, 2, bias=True), LM(vocabulary, 24, 3)


def parity(rank: int, ranks: int, cases: list[tuple[str, str, bool, int, Any]]) -> list[str]:
    """Every case against one device; what FuseHead said of each."""
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("tp",))
    said = []
    for kind, mode, sequence, length, head in cases:
        # Even shards and uneven ones; what is captured has the latter.
        for vocabulary in (64, 61) if mode == "eager" else (61,):
            wanted = step(*towers(vocabulary), length, False, **OPTIONS[kind])
            student, teacher = towers(vocabulary)
            parallel(student, mesh, sequence=sequence, head=head)
            parallel(teacher, mesh, sequence=sequence, head=head)
            found = step(student, teacher, length, MODES[mode], **OPTIONS[kind])
            compare(found, wanted, (kind, mode, sequence, length, vocabulary))
            torch._dynamo.reset()
        said.append(found[2].get("FuseHead", ""))
    return said


@pytest.mark.slow
def test_eager_and_one_graph() -> None:
    cases = [(kind, "eager", True, 8, None) for kind in OPTIONS]
    cases += [("forward_kl", "eager", False, 8, head) for head in (None, Replicate(), Shard(1))]
    cases += [("forward_kl", "one graph", sequence, 8, None) for sequence in (False, True)]
    cases += [(kind, "one graph", True, 8, None) for kind in ("tip", "margin", "jsd", "labels")]
    said = run(2, parity, 2, cases)[0]
    assert all("statistics are gathered" in text for text in said[-6:]), said


@pytest.mark.slow
def test_four_ranks() -> None:
    """More ranks than two, of which one may have no column that counts."""
    cases = [(kind, "eager", True, 8, None) for kind in OPTIONS]
    cases += [(kind, "one graph", True, 8, None) for kind in ("tip", "labels")]
    said = run(4, parity, 4, cases)[0]
    assert all("statistics are gathered" in text for text in said[-2:]), said


@pytest.mark.slow
def test_other_forms() -> None:
    cases = [
        ("forward_kl", "one graph", True, 64, None),  # tokens outnumber the vocabulary
        ("tip", "one graph", True, 64, None),
        ("reverse", "logits made", True, 8, None),
        ("tip", "logits made", True, 8, None),
        ("forward_kl", "regional", True, 8, None),
    ]
    said = run(2, parity, 2, cases)[0]
    assert all("both weights are gathered" in text for text in said[:2])
    assert said[2:4] == ["", ""]
    assert "logits are made" in said[4]


class Halved(LM):
    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) / 2


def local_logits(rank: int) -> None:
    """The default of ColwiseParallel hands on this rank's columns: a tap looks behind them."""
    mesh = init_device_mesh("cpu", (2,))
    wanted = step(*towers(61), 8, False)
    for compile in (False, AOT, "regional"):
        student, teacher = towers(61)
        for model in (student, teacher):
            parallelize_module(model, mesh, {"lm_head": ColwiseParallel()})
        compare(step(student, teacher, 8, compile), wanted, compile)
        changed = parallelize_module(Halved(61, 16, 2), mesh, {"lm_head": ColwiseParallel()})
        with pytest.raises(errors.LogitsError, match="use_local_output=False"):
            step(changed, teacher, 8, compile)


@pytest.mark.slow
def test_one_ranks_columns_are_not_taken_for_the_vocabulary() -> None:
    run(2, local_logits)


class InParts(torch.nn.Module):
    """A linear layer whose inputs lie on two ranks: each rounds its part of the sum."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        parts = zip(x.chunk(2, -1), self.linear.weight.chunk(2, -1), strict=True)
        one, two = (part @ weight.T for part, weight in parts)
        return one + two


def low_precision(rank: int) -> None:
    """What a teacher of low precision adds to the difference is the rounding of partial sums."""
    mesh = init_device_mesh("cpu", (2,))
    for kind in (torch.float16, torch.bfloat16):
        student, teacher = towers(61)
        teacher.to(kind)
        for block in teacher.blocks:
            block.down = InParts(block.down)
        wanted = step(student, teacher, 8, False)
        for compile in (False, AOT):
            student, teacher = towers(61)
            parallel(student, mesh, sequence=False)
            parallel(teacher.to(kind), mesh, sequence=False)
            compare(step(student, teacher, 8, compile), wanted, (kind, compile))


@pytest.mark.slow
def test_a_teacher_of_low_precision() -> None:
    run(2, low_precision)


def other_roles(rank: int) -> None:
    """Losses of sharded logits called by themselves: a teacher that learns, and float16."""
    mesh = init_device_mesh("cpu", (2,))
    g = torch.Generator().manual_seed(0)
    s, t = (torch.randn(2, 5, 16, generator=g) for _ in range(2))
    weights = torch.rand(2, 5, generator=g)
    for placement in (Shard(2), Shard(1), Shard(0), Replicate()):
        a, b = (distribute_tensor(x, mesh, [placement]).requires_grad_() for x in (s, t))
        p, q = s.clone().requires_grad_(), t.clone().requires_grad_()
        forward_kl(p, q, weights=weights).backward()
        if placement.is_shard(2):
            with pytest.raises(errors.OptionError, match="learn"):
                forward_kl(a, b, weights=weights)
            forward_kl(a, b.detach(), weights=weights).backward()
        else:
            forward_kl(a, b, weights=weights).backward()
            torch.testing.assert_close(b.grad.full_tensor(), q.grad)
        torch.testing.assert_close(a.grad.full_tensor(), p.grad)
    # Tokens whose gradient float16 loses, unless a loss scale (which it does not hold) comes first.
    weights = torch.ones(2, 5)
    weights[0, 0] = 1e7
    half = distribute_tensor(s.half(), mesh, [Shard(2)]).requires_grad_()
    plain = s.half().requires_grad_()
    for logits in (half, plain):
        teacher = t.half() if logits is plain else distribute_tensor(t.half(), mesh, [Shard(2)])
        (forward_kl(logits, teacher, weights=weights) * 2.0**17).backward()
    found, wanted = half.grad.full_tensor()[1], plain.grad[1]
    assert (wanted != 0).all()
    torch.testing.assert_close(found, wanted, rtol=1e-2, atol=1e-6)


@pytest.mark.slow
def test_losses_of_sharded_logits() -> None:
    run(2, other_roles)
