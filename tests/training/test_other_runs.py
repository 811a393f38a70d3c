"""Checkpoints of another run than the one that is to go on: what is refused, and what is told."""

import copy
import functools
import types
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import fxdistill
from fxdistill import Match, errors
from fxdistill.training.checkpoint import contents as contents_of
from lives import assert_equal
from toys import Toy, tokens


def seeded(make: Any, *args: Any, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return make(*args)


def told(folder: Path, saved: Any, here: Any) -> list[str]:
    """The warnings of a load of what another distiller has saved."""
    fxdistill.save_checkpoint(folder, saved)
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        fxdistill.load_checkpoint(folder, here)
    assert all(warning.filename == __file__ for warning in given)
    return [str(warning.message) for warning in given]


def test_another_teacher_than_the_run_had_is_named(tmp_path: Path) -> None:
    """A frozen teacher is in no checkpoint: class, path, shapes, values tell it from another."""

    def made(teacher: nn.Module) -> fxdistill.Distiller:
        torch.manual_seed(0)
        return fxdistill.wrap(Toy(1), teacher, compile=False, task="causal_lm")

    def toy(count: int, path: str = "", kind: Any = Toy) -> Any:
        teacher = seeded(kind, count)
        if path:
            teacher.config = SimpleNamespace(name_or_path=path)
        return teacher

    class Other(Toy):
        pass

    def said(saved: nn.Module, here: nn.Module) -> list[str]:
        return told(tmp_path, made(saved), made(here))

    assert said(toy(2), toy(2)) == []
    assert said(toy(2, "big"), toy(2, "big")) == []
    (text,) = said(toy(2), toy(3))
    counts = [sum(p.numel() for p in Toy(n).parameters()) for n in (2, 3)]
    assert f"it had Toy ({counts[0]} parameters), this run has Toy ({counts[1]}" in text
    (text,) = said(toy(2, "big"), toy(2, "small"))
    assert "another teacher than the checkpoint was saved with: it had Toy 'big'" in text
    assert "this run has Toy 'small'" in text
    (text,) = said(toy(2), toy(2, kind=Other))
    assert "this run has Other" in text
    turned = toy(2)
    turned.embed.weight = nn.Parameter(turned.embed.weight.detach().t().contiguous())
    (text,) = said(toy(2), turned)
    assert text.count(f"Toy ({counts[0]} parameters)") == 2
    assert "of other shapes" in text
    trained = toy(2)
    with torch.no_grad():
        trained.blocks[1].mlp.bias += 1e-3
    (text,) = said(toy(2), trained)
    assert "of other values ('blocks.1.mlp.bias' is the first)" in text


def test_another_base_below_adapters_is_named(tmp_path: Path) -> None:
    """Of a student with adapters they are saved alone: on another base they mean nothing."""

    def made(seed: int, teacher: bool) -> fxdistill.Distiller:
        config = LoraConfig(r=2, target_modules=["mlp"])
        student = get_peft_model(seeded(Toy, 2, seed=seed), config)
        other = seeded(Toy, 3) if teacher else fxdistill.base_of(student)
        return fxdistill.wrap(student, other, compile=False, task="causal_lm")

    assert told(tmp_path, made(0, True), made(0, True)) == []
    (text,) = told(tmp_path, made(0, True), made(1, True))
    assert "another base of student than" in text
    (text,) = told(tmp_path, made(0, False), made(1, False))  # once, though the two are one
    assert "another teacher than" in text


class Squared(nn.Module):
    """A loss of one's own, with a state and a number beside it."""

    def __init__(self, power: float = 2.0) -> None:
        super().__init__()
        self.power = power
        self.scale = nn.LazyLinear(1)

    def forward(self, student: Any, teacher: Any, weights: Any) -> Any:
        return ((self.scale(student) - self.scale(teacher)).abs() ** self.power).mean()


def of_matches(*matches: Match, **options: Any) -> Any:
    """A distiller of these matches, with an optimizer."""
    options = {"task": "causal_lm", "compile": False, **options}
    distiller = fxdistill.wrap(seeded(Toy, 2), seeded(Toy, 3, seed=1), list(matches), **options)
    return distiller, torch.optim.SGD(distiller.param_groups(), lr=0.1, momentum=0.9)


def refused(folder: Path, saved: Any, here: Any) -> str:
    """Why a checkpoint of ``saved`` does not load into ``here``, which stays as it is."""
    fxdistill.save_checkpoint(folder, saved[0], optimizer=saved[1])
    before = copy.deepcopy((here[0].state_dict(), here[1].state_dict(), here[0].settings))
    with pytest.raises(errors.ResumeError) as caught:
        fxdistill.load_checkpoint(folder, here[0], optimizer=here[1])
    assert_equal((here[0].state_dict(), here[1].state_dict(), here[0].settings), before)
    return str(caught.value)


def test_matches_in_another_order_are_refused_where_their_modules_would_be_swapped(
    tmp_path: Path,
) -> None:
    """Projections and losses are saved by number: state would go to the other match in silence."""
    pairs = ("blocks.0.mlp", "blocks.1.mlp"), ("blocks.1.mlp", "blocks.2.mlp")
    wide = [Match(s, t, project="linear") for s, t in pairs]
    text = refused(tmp_path, of_matches(*wide), of_matches(*wide[::-1]))
    assert "modules of term 'blocks.0.mlp': the checkpoint has 'projections.0', this run" in text
    assert "List the matches in the order that they had" in text
    bank = [Match(s, t, loss=fxdistill.losses.CRD(width=4, size=8)) for s, t in pairs]
    other = [Match(s, t, loss=fxdistill.losses.CRD(width=4, size=8)) for s, t in pairs[::-1]]
    assert "the checkpoint has 'loss_modules.1'" in refused(
        tmp_path, of_matches(*bank), of_matches(*other)
    )
    plain = [Match(s, t) for s, t in pairs]
    fxdistill.save_checkpoint(tmp_path, of_matches(*plain)[0])
    fxdistill.load_checkpoint(tmp_path, of_matches(*plain[::-1])[0])


@pytest.mark.parametrize(
    ("saved", "here", "said"),
    [
        (None, fxdistill.Importance("divergence", keep=0.5), "'None', this run 'divergence, keep"),
        (
            fxdistill.Importance("divergence", threshold=0.5),
            fxdistill.Importance("divergence", features=True),
            "'divergence, with a threshold', this run 'divergence, features=True'",
        ),
    ],
)
def test_another_importance_is_refused(tmp_path: Path, saved: Any, here: Any, said: str) -> None:
    text = refused(tmp_path, of_matches(importance=saved), of_matches(importance=here))
    assert "option 'importance'" in text
    assert said in text


def test_other_options_and_settings_of_losses_are_refused(tmp_path: Path) -> None:
    """Of the library's own modules all settings are known; those of others are told, below."""
    pair = "blocks.0.mlp", "blocks.1.mlp"

    def with_bank(temperature: float) -> Any:
        bank = fxdistill.losses.CRD(width=4, size=8, temperature=temperature)
        return of_matches(Match(*pair, loss=bank))

    text = refused(tmp_path, with_bank(0.07), with_bank(0.5))
    assert "CRD(across_ranks=True, in_batch=False, temperature=0.07)', this run" in text
    text = refused(tmp_path, of_matches(vocab_size=40), of_matches(vocab_size=50))
    assert "option 'vocab_size': the checkpoint has '40', this run '50'" in text


def test_a_lazy_loss_of_ones_own_must_run_first(tmp_path: Path) -> None:
    def made() -> Any:
        return of_matches(Match("blocks.0.mlp", "blocks.1.mlp", loss=Squared()))

    run, other = made(), made()
    run[0](tokens(), labels=tokens())
    text = refused(tmp_path, (run[0], None), (other[0], other[1]))
    assert "'loss_modules.0.scale.weight' is in the checkpoint, and not in this run" in text
    assert "call distiller(**batch) once, under torch.no_grad(), before load_checkpoint" in text
    with torch.no_grad():
        other[0](tokens(), labels=tokens())
    fxdistill.load_checkpoint(tmp_path, other[0])
    assert_equal(other[0].state_dict(), run[0].state_dict())


def doubled(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
    return output * 2


def test_another_process_loads_a_run_with_ports_that_are_functions(tmp_path: Path) -> None:
    """A port's address is another one in each process; here the function is made again."""
    again = types.FunctionType(doubled.__code__, globals(), "doubled")
    pair = "blocks.0.mlp", "blocks.1.mlp"
    ports = [
        {"student_port": each, "teacher_port": functools.partial(each)} for each in (doubled, again)
    ]
    saved, here = (of_matches(Match(*pair, **each))[0] for each in ports)
    assert told(tmp_path, saved, here) == []


def test_other_code_of_ones_own_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two lambdas have one name; numbers of one's own modules are settings, or counts."""

    def made(loss: Any, **options: Any) -> Any:
        return of_matches(Match("blocks.0.mlp", "blocks.1.mlp", loss=loss), **options)[0]

    def scaled(factor: float) -> Any:
        return lambda s, t, w: (factor * (s - t)).abs().mean()

    squares = made(lambda s, t, w: ((s - t) ** 2).mean())
    assert told(tmp_path, made(scaled(2.0)), made(scaled(2.0))) == []
    (text,) = told(tmp_path, made(scaled(2.0)), squares)
    assert "the loss of 'blocks.0.mlp': a function of yours, whose code is another one" in text
    (text,) = told(tmp_path, made(scaled(2.0)), made(scaled(3.0)))  # what it closes over
    scores = [
        fxdistill.Importance(score) for score in (lambda s, t: s.mean(-1), lambda s, t: t.mean(-1))
    ]
    (text,) = told(tmp_path, *(made("mse", importance=score) for score in scores))
    assert "the score of importance" in text
    (text,) = told(tmp_path, made(Squared()), made(Squared(3.0)))
    assert "'loss_modules.0' had power=2.0 when the checkpoint was saved, and has power=3.0" in text
    fxdistill.save_checkpoint(tmp_path, made(scaled(2.0)))
    monkeypatch.setattr(contents_of, "PYTHON", "2.7")
    with pytest.warns(UserWarning, match=r"cannot be told: that was Python 3\..*this is 2\.7"):
        fxdistill.load_checkpoint(tmp_path, squares)
