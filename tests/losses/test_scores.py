"""Scores of predictions: from logits, from heads, on shards; by torch.distributions."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributions import Categorical, kl_divergence

from fxdistill import errors
from fxdistill.losses import vocab_loss
from fxdistill.losses.fused.chunk import ChunkSpec
from fxdistill.losses.fused.score_operator import score_operator
from fxdistill.losses.fused.scores import READS
from fxdistill.losses.scores import Asked, token_scores, vocab_scores
from processes import run

ALL = Asked(tuple(READS), (("forward_kl", 1.0, 0.5),)).text
B, L, D, D_T = 2, 9, 12, 20


def by_distributions(s: Tensor, t: Tensor, tau: float) -> Tensor:
    q, p = Categorical(logits=s / tau), Categorical(logits=t / tau)
    first, second = p.probs.sort(-1, descending=True).values[..., :2].unbind(-1)
    divergence = tau**2 * kl_divergence(p, q)
    norm = (q.probs - p.probs).square().sum(-1).sqrt()
    return torch.stack([q.entropy(), p.entropy(), first - second, divergence, norm], -1)


def operands(v: int = 31, v_t: int = 31) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    return {
        "student_hidden": torch.randn(B, L, D, generator=g),
        "student_weight": torch.randn(v, D, generator=g) * 0.5,
        "teacher_hidden": torch.randn(B, L, D_T, generator=g),
        "teacher_weight": torch.randn(v_t, D_T, generator=g) * 0.5,
        "student_bias": torch.randn(v, generator=g),
        "teacher_bias": torch.randn(v_t, generator=g),
    }


def logits_of(x: dict[str, Tensor], columns: int) -> tuple[Tensor, Tensor]:
    s = x["student_hidden"] @ x["student_weight"].T + x["student_bias"]
    t = x["teacher_hidden"] @ x["teacher_weight"].T + x["teacher_bias"]
    return s[..., :columns], t[..., :columns]


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted.to(found.dtype), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tau", [1.0, 2.5])
def test_scores_of_logits(tau: float) -> None:
    s, t = (x.double() for x in logits_of(operands(), 31))
    found = token_scores(s.requires_grad_(), t, asked=ALL, temperature=torch.tensor(tau))
    assert not found.requires_grad
    torch.testing.assert_close(found, by_distributions(s, t, tau), rtol=1e-6, atol=1e-8)
    for i, name in enumerate(READS):  # alone, too
        alone = token_scores(s, t, asked=Asked((name,), (("forward_kl", 1.0, 0.5),)).text,
                             temperature=tau)  # fmt: skip
        torch.testing.assert_close(alone[..., 0], found[..., i])


@pytest.mark.parametrize("v_t", [31, 29, 33])
@pytest.mark.parametrize("columns", [None, 20])
def test_scores_of_heads(columns: int | None, v_t: int) -> None:
    x = operands(v_t=v_t)
    wanted = by_distributions(*logits_of(x, columns or min(31, v_t)), 2.0)
    for chunk in (16, None):
        options = {"chunk_tokens": chunk, "compile": False, "vocab_size": columns}
        close(vocab_scores(**x, asked=ALL, temperature=2.0, **options), wanted)


def test_curves_of_heads() -> None:
    x = operands()
    s, t = logits_of(x, 31)
    wanted = by_distributions(3 * torch.tanh(s * 0.5 / 3), 2 * t, 1.0)
    curves = {"student_scale": 0.5, "student_softcap": 3.0, "teacher_scale": 2.0}
    close(vocab_scores(**x, asked=ALL, compile=False, **curves), wanted)


def test_known_values() -> None:
    """Uniform, certain, and two halves."""
    s = torch.tensor([[0.0, 0.0, 0.0, 0.0], [1e4, 0.0, 0.0, -1e4], [5.0, 5.0, -math.inf, -1e4]])
    t = s.roll(1, 0)
    found = token_scores(s, t, asked=ALL)
    entropy = torch.tensor([math.log(4), 0.0, math.log(2)])
    close(found[:, 0], entropy)
    close(found[:, 1], entropy.roll(1))
    close(found[:, 2], torch.tensor([0.0, 0.0, 1.0]))
    assert float(found[0, 3]) == pytest.approx(math.log(4) - math.log(2))
    close(found[:, 4], torch.tensor([0.5, math.sqrt(0.75), math.sqrt(0.5)]))


def test_what_does_not_count_may_be_anything() -> None:
    x = operands()
    weights = torch.ones(B, L)
    weights[0, 3] = weights[1, 0] = 0
    wanted = vocab_scores(**x, asked=ALL, compile=False)
    x["student_hidden"][0, 3], x["teacher_hidden"][1, 0] = math.nan, math.inf
    found = vocab_scores(**x, asked=ALL, weights=weights, compile=False)
    assert found.isfinite().all()
    close(found[weights != 0], wanted[weights != 0])
    made = token_scores(*logits_of(x, 31), asked=ALL, weights=weights)
    close(made[weights != 0], wanted[weights != 0])


@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", READS)
def test_a_loss_that_scores_in_the_same_pass(name: str, compile: bool) -> None:
    """Value and gradients as with weights that are scored first; chunks change nothing."""
    x = operands()
    weights = torch.rand(B, L)
    weights[0, 3] = weights[1, 0] = 0
    one = Asked((name,), (("reverse_kl", 1.0, 0.5),)).text
    scores = vocab_scores(**x, asked=one, temperature=2.0, weights=weights, compile=False)
    found = []
    for given in ({"weights": weights * scores[..., 0]}, {"weights": weights, "score": name}):
        x["student_hidden"][0, 3] = math.nan
        own = {k: v.clone().requires_grad_() for k, v in x.items() if k.startswith("student")}
        options = {"divergence": "reverse_kl", "temperature": 2.0, "logit_weight": 0.7, **given}
        out = vocab_loss(**{**x, **own}, chunk_tokens=16, compile=compile, **options)
        found.append(
            [out.loss.detach(), out.logits, *torch.autograd.grad(out.loss * 3, list(own.values()))]
        )
    for a, b in zip(*found, strict=True):
        close(a, b)
    nothing = vocab_loss(**x, weights=torch.zeros(B, L), score=name, compile=False)
    assert nothing.loss == 0
    with pytest.raises(errors.OptionError, match="no num_items"):
        vocab_loss(**x, score=name, num_items=3, compile=False)


def test_a_head_that_no_score_reads_is_not_applied() -> None:
    x = operands()
    x["student_weight"] = torch.full_like(x["student_weight"], math.nan)
    found = vocab_scores(
        **x, asked=Asked(("teacher_entropy", "teacher_margin")).text, compile=False
    )
    assert found.isfinite().all()


def test_the_operator_is_as_torch_wants_it() -> None:
    x = {k: v.flatten(0, -2) if v.ndim == 3 else v for k, v in operands().items()}
    heads = [x[f"{side}_{part}"] for side in ("student", "teacher")
             for part in ("hidden", "weight", "bias")]  # fmt: skip
    spec = ChunkSpec((("jsd", 1.0, 0.5),), 31).text
    rest = (torch.ones(B * L) > 0, torch.tensor(2.0), ",".join(READS), spec, 16, False)
    torch.library.opcheck(score_operator, (*heads, *rest))


def on_shards(rank: int, ranks: int) -> None:
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("tp",))
    weights = torch.ones(B, L)
    weights[0, 3] = weights[1, 0] = 0

    def placed(x: Tensor, of: Any) -> Tensor:
        return distribute_tensor(x, mesh, [of])

    # Even shards; uneven ones; padding; a rank without columns; tokens that outnumber entries.
    for v, v_t in ((32, 32), (31, 31), (31, 32), (32, 31), (5, 5)):
        x = operands(v, v_t)
        columns = min(v, v_t)
        wanted = by_distributions(*logits_of(x, columns), 2.0)[weights != 0]
        for tokens in (Replicate(), Shard(1)):
            at = {k: placed(w, tokens if "hidden" in k else Shard(0)) for k, w in x.items()}
            options = {"temperature": 2.0, "weights": weights, "compile": False}
            found = vocab_scores(**at, asked=ALL, **options)
            assert type(found) is Tensor
            close(found[weights != 0], wanted)
            for name in READS:
                one = Asked((name,), (("forward_kl", 1.0, 0.5),)).text
                alone = vocab_scores(**at, asked=one, **options)[..., 0]
                close(alone[weights != 0], wanted[:, list(READS).index(name)])
        if v != v_t:
            continue
        s, t = logits_of(x, columns)
        s[weights == 0] = math.nan
        for of in (Replicate(), Shard(0), Shard(1), Shard(2)):
            for theirs in (of, Replicate()):
                found = token_scores(placed(s, of), placed(t, theirs), asked=ALL,
                                     temperature=2.0, weights=weights)  # fmt: skip
                assert type(found) is Tensor
                close(found[weights != 0], wanted)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_shards(ranks: int) -> None:
    run(ranks, on_shards, ranks)
