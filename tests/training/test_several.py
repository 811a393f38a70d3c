"""Checkpoints, norms and files of several models and further heads."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import fxdistill
from fxdistill import Head, Match, errors
from toys import Toy, tokens


def made(seed: int = 0) -> tuple[fxdistill.Distiller, torch.optim.Optimizer]:
    """Two teachers, a match of the second, and a head with a module of its own."""
    torch.manual_seed(0)
    teachers = {"big": Toy(3), "small": Toy(2)}
    torch.manual_seed(seed)
    distiller = fxdistill.wrap(
        Toy(2),
        teachers,
        {"blocks.1.mlp": Match(teacher="blocks.1.mlp", of="small", project="linear")},
        heads={
            "early": Head(
                "blocks.0.mlp", module=nn.Linear(8, 50), logit_weight=0.5, label_weight=2.0
            )
        },
        task="causal_lm",
        compile=False,
    )
    return distiller, torch.optim.AdamW(distiller.param_groups(), lr=1e-2)


def steps(distiller: Any, optimizer: Any, count: int) -> list[float]:
    losses = []
    for _ in range(count):
        out = distiller(tokens(), labels=tokens())
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(out.loss.detach()))
    return losses


def test_heads_and_teachers_weights_go_on(tmp_path: Path) -> None:
    one, other = made(), made(seed=5)
    steps(*one, 2)
    one[0].set(teacher_weights=(3.0, 1.0), weights={"early:labels": 0.25})
    fxdistill.save_checkpoint(tmp_path, one[0], optimizer=one[1])
    fxdistill.load_checkpoint(tmp_path, other[0], optimizer=other[1])
    assert other[0].settings == one[0].settings
    assert steps(*other, 2) == steps(*one, 2)
    plain = fxdistill.wrap(Toy(2), Toy(3), task="causal_lm", compile=False)
    with pytest.raises(errors.ResumeError) as caught:
        fxdistill.load_checkpoint(tmp_path, plain)
    for said in ("model 'big'", "term 'early:logits'", "'heads.early.weight'", "term 'logits'"):
        assert said in str(caught.value), said


def test_students_of_mutual_learning(tmp_path: Path) -> None:
    def several(seed: int) -> tuple[Any, Any]:
        torch.manual_seed(seed)
        distiller = fxdistill.mutual([Toy(2), Toy(3), Toy(2)], task="causal_lm", compile=False)
        return distiller, torch.optim.AdamW(distiller.param_groups(), lr=1e-2)

    one, other = several(0), several(5)
    steps(*one, 2)
    fxdistill.save_checkpoint(tmp_path / "run", one[0], optimizer=one[1])
    fxdistill.load_checkpoint(tmp_path / "run", other[0], optimizer=other[1])
    assert steps(*other, 2) == steps(*one, 2)
    one[0].save_pretrained(tmp_path / "out")
    for i, student in enumerate(one[0].students):
        state = load_file(tmp_path / "out" / f"student{i}" / "model.safetensors")
        assert all(torch.equal(state[name], x) for name, x in student.state_dict().items())
    norms = fxdistill.gradient_norms(one[0], (tokens(),))
    assert set(norms) == {"logits"}
    copied = copy.deepcopy(one[0])
    assert copied.explain((tokens(),)).finite


def weighted(distiller: Any, name: str) -> float:
    """The norm of what one term adds to the gradient of the total, by other settings alone."""
    other = copy.deepcopy(distiller)
    heads = other.objective.names.heads
    off: dict[str, Any] = {"weights": {name: 0.0}}
    if name not in heads:
        other.set(weights=dict.fromkeys(heads, 0.0))  # they are under the global weights too
        off = {{"logits": "logit_weight", "labels": "label_weight"}[name]: 0.0}
    total = other(tokens(), labels=tokens()).loss
    other.set(**off)
    term = (total, other(tokens(), labels=tokens()).loss)
    parameters = list(other.student.parameters())
    gradients = torch.autograd.grad(term[0] - term[1], parameters, allow_unused=True)
    return float(torch.cat([g.flatten() for g in gradients if g is not None]).norm())


def test_terms_of_heads_have_norms_and_are_balanced() -> None:
    distiller, _ = made()
    batch = {"ids": tokens(), "labels": tokens()}
    norms = fxdistill.gradient_norms(distiller, batch)
    names = ("logits", "labels", "early:logits", "early:labels")
    assert set(norms) == {*names, "features", "small/blocks.1.mlp"}
    weights = {"logits": 1.0, "labels": 1.0, "early:logits": 0.5, "early:labels": 2.0}
    for name, weight in weights.items():
        assert weighted(distiller, name) == pytest.approx(weight * norms[name], rel=1e-3), name
    target = {"early:labels": 0.5, "logits": 1.0, "labels": 2.0, "early:logits": 0.25}
    assert list(fxdistill.balance(distiller, batch, target)) == list(target)
    found = {name: weighted(distiller, name) for name in names}
    for name in names:
        assert found[name] / found["logits"] == pytest.approx(target[name], rel=1e-3), name
