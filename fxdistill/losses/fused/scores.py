"""Scores of single predictions: how uncertain they are, and how far from the teacher's.

With q and p the probabilities of student and teacher at τ, over the columns that are compared:

===============  ====================================
score            of a token
===============  ====================================
student_entropy  -Σ q log q
teacher_entropy  -Σ p log p
teacher_margin   p₁ - p₂, its two largest entries
divergence       τ²v of its own divergence, or mix
gradient_norm    √ Σ (q - p)²
===============  ====================================

A token is scored in three steps, like those of ``shard.py``: ``statistics`` of some columns,
``merged`` over ranks; ``sums`` over these columns, added up over ranks; ``finished`` scores.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fxdistill.losses.fused.chunk import ChunkSpec, through_head
from fxdistill.losses.fused.formulas import Compared, Mix, Pair
from fxdistill.losses.fused.score_formulas import entropy, largest_two, squared_distance
from fxdistill.losses.fused.shard import partial_lse

# For each score, whether it reads the student and the teacher.
READS = {
    "student_entropy": (True, False),
    "teacher_entropy": (False, True),
    "teacher_margin": (False, True),
    "divergence": (True, True),
    "gradient_norm": (True, True),
}
Names = tuple[str, ...]


class Sides(NamedTuple):
    """The logits of both models over τ ``[c, V]``, -inf in columns that are not compared.

    A model that no score reads is ``None``.
    """

    student: Tensor | None
    teacher: Tensor | None


def reads(names: Names) -> tuple[bool, bool]:
    """Whether any of the scores reads the student, and the teacher."""
    student, teacher = zip(*(READS[name] for name in names), strict=True)
    return any(student), any(teacher)


def sides_of(raw: Sides, live: Tensor, tau: Tensor, shape: ChunkSpec, offset: int = 0) -> Sides:
    """The logits over τ from ``raw``, the outputs of the heads' weights.

    ``live`` ``[c]`` says which tokens count; the others may hold anything. The first column is the
    vocabulary's ``offset``-th.
    """
    made = [
        None if x is None else _over_tau(x, side, live, tau, shape, offset)
        for side, x in enumerate(raw)
    ]
    return Sides(*made)


def _over_tau(
    raw: Tensor, side: int, live: Tensor, tau: Tensor, shape: ChunkSpec, offset: int
) -> Tensor:
    raw = raw[:, : max(1, shape.columns - offset)]  # one column at least, compared or not
    x, _ = through_head(raw, shape.scales[side], shape.softcaps[side])
    x = torch.where(live[:, None], x, 0.0) / tau
    inside = torch.arange(x.shape[-1], device=x.device) + offset < shape.columns
    return torch.where(inside, x, -torch.inf)


def scored(sides: Sides, names: Names, mix: Mix) -> Tensor:
    """``[c, n]``: the scores of tokens with all of their columns."""
    whole = merged(statistics(sides, names)[None])
    return finished(sums(sides, whole, names, mix), whole, names, mix)


def statistics(sides: Sides, names: Names) -> Tensor:
    """``[c, 6]``: maximum and sum for student and teacher; the teacher's two largest logits."""
    one = next(x for x in sides if x is not None)
    nothing = [torch.zeros_like(one[:, 0])] * 2
    found: list[Tensor] = []
    for x in sides:
        found += nothing if x is None else partial_lse(x)
    wanted = sides.teacher is not None and "teacher_margin" in names
    return torch.stack([*found, *(largest_two(sides.teacher) if wanted else nothing)], -1)  # type: ignore[arg-type]


def merged(gathered: Tensor) -> Tensor:
    """``[ranks, c, 6]`` → ``[c, 4]``: log-sum-exp of both models; the teacher's largest logits."""
    most = gathered[..., 0:4:2].amax(0)
    total = (gathered[..., 1:4:2] * (gathered[..., 0:4:2] - most).exp()).sum(0)
    top = gathered[..., 4:].movedim(0, 1).flatten(1)
    if gathered.shape[0] > 1:
        top = top.topk(2, -1).values
    return torch.cat([most + total.log(), top], -1)


def sums(sides: Sides, whole: Tensor, names: Names, mix: Mix) -> Tensor:
    """``[c, n]``: what the scores sum over these columns."""
    logs = Sides(*(None if x is None else x - whole[:, i, None] for i, x in enumerate(sides)))
    return torch.stack([_sum(name, sides, logs, mix) for name in names], -1)


def _sum(name: str, sides: Sides, logs: Sides, mix: Mix) -> Tensor:
    if name == "divergence":
        return mix.sums(Compared(_both(logs), _both(sides)))[0]
    if name == "gradient_norm":
        return squared_distance(*_both(logs))
    log = logs.student if name == "student_entropy" else logs.teacher
    assert log is not None
    if name == "teacher_margin":  # statistics have all that it needs
        return torch.zeros_like(log[:, 0])
    return entropy(log)


def _both(x: Sides) -> Pair:
    student, teacher = x
    assert student is not None
    assert teacher is not None
    return student, teacher


def finished(total: Tensor, whole: Tensor, names: Names, mix: Mix) -> Tensor:
    """``[c, n]``: the scores, from their sums over all columns."""
    found = []
    for name, x in zip(names, total.unbind(-1), strict=True):
        if name == "divergence":
            x = mix.tau.square() * x
        elif name == "gradient_norm":
            x = x.sqrt()
        elif name == "teacher_margin":
            x = (whole[:, 2] - whole[:, 1]).exp() - (whole[:, 3] - whole[:, 1]).exp()
        found.append(x)
    return torch.stack(found, -1)
