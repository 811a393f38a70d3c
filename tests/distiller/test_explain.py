"""out.metrics["finite"], and what explain names first: model, module, term, NaN or infinity."""

import copy
import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxdistill
from fxdistill import Match, errors, losses
from toys import MAPPING, Toy, tokens, toy_pair

MODES = [False, "regional", {"backend": "aot_eager"}]


@pytest.mark.parametrize("mode", MODES)
def test_finite_is_a_flag_of_the_total(mode: Any) -> None:
    distiller = fxdistill.wrap(*toy_pair(), MAPPING, task="causal_lm", compile=mode)
    out = distiller(tokens(), labels=tokens())
    flag = out.metrics["finite"]
    assert flag.dtype == torch.bool
    assert flag.shape == ()
    assert not flag.requires_grad
    assert flag
    for bad in (torch.nan, torch.inf):
        distiller.set(label_weight=torch.tensor(bad))
        assert not distiller(tokens(), labels=tokens()).metrics["finite"]
        first = distiller.explain({"ids": tokens(), "labels": tokens()}).first
        assert (first.kind, first.name) == ("weight", "label_weight")


class Broken(nn.Module):
    """Hands on what it gets, with one bad value in it."""

    def __init__(self, module: nn.Module, value: float) -> None:
        super().__init__()
        self.module, self.value = module, value
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count += 1
        random.random()
        x = self.module(x).clone()
        x[0, 0, 0] = self.value
        return x


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("tower", "value"), [("student", torch.nan), ("teacher", torch.inf)])
def test_the_first_module_is_named_and_nothing_changes(mode: Any, tower: str, value: float) -> None:
    student, teacher = Toy(2, dropout=0.5), Toy(3)
    broken = {"student": student, "teacher": teacher}[tower]
    broken.blocks[1].mlp = Broken(broken.blocks[1].mlp, value)
    teacher.eval()
    distiller = fxdistill.wrap(student, teacher, MAPPING, task="causal_lm", compile=mode)
    teacher.train()  # a call puts it in eval mode; looking does not
    student.blocks[0].eval()
    before = copy.deepcopy((student.state_dict(), teacher.state_dict()))
    modes = [m.training for m in (*student.modules(), *teacher.modules())]
    states = torch.get_rng_state(), random.getstate()
    found = distiller.explain({"ids": tokens(), "labels": tokens()})
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert [m.training for m in (*student.modules(), *teacher.modules())] == modes
    for model, kept in zip((student, teacher), before, strict=True):
        for name, x in model.state_dict().items():
            assert torch.equal(x, kept[name]), name
        assert all(p.grad is None for p in model.parameters())
        assert not any(m._forward_hooks for m in model.modules())
    word = "NaN" if value != value else "infinite"
    assert found.first is found.module
    assert found.first.model == tower
    assert found.first.name == "blocks.1.mlp (Broken)"
    said = f"{tower} module 'blocks.1.mlp (Broken)': 1 {word} of 168 values"
    assert str(found).startswith(f"The first value that is not finite: {said}")
    assert found.term.name == "logits"
    lines = str(found).splitlines()
    assert any(line.startswith("term 'logits' is") for line in lines)
    assert lines[-1].startswith("loss 'loss' is")


def test_terms_values_inputs_parameters_and_gradients() -> None:
    ids = tokens()

    def of(distiller: fxdistill.Distiller, **batch: Any) -> Any:
        return distiller.explain({"ids": ids, **batch})

    def made(loss: Any = "mse") -> fxdistill.Distiller:
        torch.manual_seed(0)
        match = {"blocks.0.mixer": Match(teacher="blocks.1.mixer", loss=loss)}
        return fxdistill.wrap(Toy(2), Toy(3), match, task="causal_lm", compile=False)

    fine = of(made(), labels=ids)
    assert fine.finite
    assert "All values are finite" in str(fine)
    # A term of finite values.
    found = of(made(lambda s, t, w: (s - s).mean() / 0), labels=ids)
    assert (found.first.kind, found.first.name, found.first.nan) == ("term", "blocks.0.mixer", 1)
    assert {f.name for f in found.findings} == {"features", "blocks.0.mixer", "loss"}
    # An input of the objective, and one of the models.
    weights = torch.ones(3, 7)
    weights[1, 2] = torch.inf
    found = of(made(), token_weights=weights)
    assert str(found.first) == "input 'token_weights': 1 infinite of 21 values"
    # A parameter, before all that it spoils; and a projection's.
    distiller = made()
    with torch.no_grad():
        distiller.teacher.blocks[0].mlp.bias[1] = torch.nan
    first = of(distiller).first
    assert str(first) == "teacher parameter 'blocks.0.mlp.bias': 1 NaN of 8 values"

    # A gradient of a finite loss: √x at 0.
    def root(s: Any, t: Any, w: Any) -> Any:
        return (s - s).square().sum().sqrt()

    found = of(made(root))
    assert {f.kind for f in found.findings} == {"gradient"}
    assert found.first.model == "student"
    assert found.term is None
    # A module of -∞ that a softmax takes: told, and that the rest is finite.
    distiller = made()

    class Masks(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.full((2,), -torch.inf)

    block = distiller.student.blocks[0]
    block.masks, plain = Masks(), block.mlp.forward
    block.mlp.forward = lambda x: plain(x) + block.masks(x).softmax(-1).nan_to_num().sum()
    found = of(distiller)
    assert found.module.name == "blocks.0.masks (Masks)"
    assert "finite all the same" in str(found)
    with pytest.raises(errors.OptionError, match="a dict of the keywords"):
        distiller.explain(ids)


def test_a_queue_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    bank = losses.CRD(width=4, size=8)
    bank.embedding.build(8, 8, torch.device("cpu"))
    distiller = fxdistill.wrap(
        *toy_pair(),
        {"blocks.0.mixer": Match(teacher="blocks.1.mixer", loss=bank)},
        task="causal_lm",
        compile=False,
    )
    before = F.normalize(bank.queue.clone())
    assert distiller.explain((tokens(),)).finite
    assert bank.filled == 0
    assert torch.equal(F.normalize(bank.queue), before)
