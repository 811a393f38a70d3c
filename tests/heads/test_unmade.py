"""Regional mode makes no logits that only losses read, and the right ones where something does."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fxdistill
import heads
from fxdistill.compiler.lower import Lowering
from fxdistill.errors import StepError
from fxdistill.heads.curve import Unreadable
from fxdistill.heads.find import deferrable, head_of
from fxdistill.heads.hold_back import DeferrableHead
from fxdistill.heads.unmade import UnmadeLogits, deferring
from fxdistill.models.landmarks import head_path
from heads import LEFT, READ, Model, batch, run, variant


def agree(student: nn.Module, teacher: nn.Module, **options: Any) -> str:
    remark = heads.agree(student, teacher, "regional", **options)
    assert all("forward" not in m.__dict__ for model in (student, teacher) for m in model.modules())
    return remark


BY_FUNCTIONS = {"tied", "matmul", "transposed weight", "bias"}  # no module to be asked


@pytest.mark.parametrize("kind", READ)
def test_heads(kind: str) -> None:
    remark = agree(variant(READ[kind])(0), variant(READ[kind])(1))
    made = "come from the model" if kind in BY_FUNCTIONS else ""
    assert remark.startswith("logits are made" if made else "logits fused"), remark
    assert made in remark


@pytest.mark.parametrize("kind", LEFT)
def test_what_is_left_alone(kind: str) -> None:
    made, _, options = LEFT[kind]
    if kind == "own loss":  # nothing in the graph is a loss that could be fused
        remark = agree(made(0), made(1), **options, label_loss=None)
        assert remark == "logits are made: no loss of this library reads them"
    elif kind == "written":
        with pytest.raises(StepError, match="in place"):
            agree(made(0), made(1), **options)
    else:
        assert agree(made(0), made(1), **options).startswith("logits are made")


class WritesThenReads(Model):
    """The hidden state is written before the logits, which are read, have been made."""

    def head(self, x: Tensor) -> Any:
        self.lm_head.weight.requires_grad_(False)
        y = x + 1.0
        logits = self.lm_head(y)
        y.mul_(2.0)
        return logits.relu()


class InPlace(Model):
    """Reads and writes its logits in ways that no stand-in can follow."""

    def head(self, x: Tensor) -> Any:
        logits = self.lm_head(x)
        same = logits.float()
        twice = logits * 2
        logits.mul_(0.5)
        return {"logits": same + twice, "seen": logits.sum()}


class Biased(Model):
    def head(self, x: Tensor) -> Any:
        logits = self.lm_head(x)
        return logits if logits.shape[-1] == 1 else logits + torch.zeros_like(logits)


class NoGradient(Model):
    def head(self, x: Tensor) -> Any:
        with torch.no_grad():
            fixed = self.lm_head(x)
        return fixed + self.body(x).mean()


def test_a_hidden_state_that_is_written_first() -> None:
    with pytest.raises(StepError, match="in place"):
        agree(WritesThenReads(0), Model(1))


@pytest.mark.parametrize("kind", [InPlace, Biased, NoGradient])
def test_logits_are_made_where_a_model_uses_them(kind: type[Model]) -> None:
    assert agree(kind(0), kind(1)).startswith("logits are made")


def test_under_autocast() -> None:
    found = []
    for compile in ("regional", False):
        with torch.autocast("cpu", torch.bfloat16):
            found.append(run(Model(0), Model(1), compile))
    assert found[0][2].startswith("logits fused")
    torch.testing.assert_close(found[0][0]["loss"], found[1][0]["loss"], rtol=2e-2, atol=0)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_evaluation(mode: Any) -> None:
    student, teacher = Model(0), Model(1)
    losses = []
    for compile in ("regional", False):
        distiller = fxdistill.wrap(student, teacher, task="causal_lm", compile=compile)
        distiller.options = dataclasses.replace(distiller.options, lowering=Lowering("aot_eager"))
        ids, own = batch()
        with mode():
            losses.append(distiller(ids, **own).loss)
    assert not losses[0].requires_grad
    torch.testing.assert_close(*losses)


def test_hooks_on_the_head_see_logits() -> None:
    """A hook of the user's own gets numbers when it asks for them."""
    student, seen = Model(0), []
    student.lm_head.register_forward_hook(lambda m, args, out: seen.append(out.sum().item()))
    assert agree(student, Model(1)).startswith("logits are made")
    assert seen[0] == pytest.approx(seen[1], rel=1e-5)


def test_labels_only_and_matches_only() -> None:
    assert agree(Model(0), Model(1), logit_loss=None).startswith("logits fused")
    student, teacher = Model(0), Model(1)
    options = {"logit_loss": None, "label_loss": None, "mapping": {"body": "body"}}
    numbers, gradients, _ = run(student, teacher, "regional", call={}, **options)
    plain, wanted, _ = run(student, teacher, False, call={}, **options)
    torch.testing.assert_close(numbers["loss"], plain["loss"])
    assert gradients.keys() == wanted.keys()


def test_a_failing_model_gets_its_head_back() -> None:
    class Failing(Model):
        def head(self, x: Tensor) -> Any:
            self.lm_head(x)
            raise RuntimeError("as it happens")

    student = Failing(0)
    with pytest.raises(RuntimeError, match="as it happens"):
        run(student, Model(1), "regional")
    assert "forward" not in student.lm_head.__dict__


def test_which_heads_can_be_deferred() -> None:
    model = Model(0)
    assert head_path(model) == "lm_head"
    assert head_of(model, "lm_head").module is model.lm_head
    with pytest.raises(Unreadable, match="DataParallel"):
        head_of(nn.DataParallel(model), "module.lm_head")
    with pytest.raises(Unreadable, match="no plain linear layer"):
        head_of(model, "embed")
    model.lm_head.compile(backend="eager")
    with pytest.raises(Unreadable, match="compiled by itself"):
        head_of(model, "lm_head")
    models = {"teacher": model, "student": Model(1)}
    paths = dict.fromkeys(models, "lm_head")
    found = deferrable(models, paths, ["student"])
    assert [head.module for head in found.heads] == [models["student"].lm_head]
    found = deferrable(models, paths, ["student", "teacher"])
    assert not found.heads
    assert found.why_not == "the teacher's head 'lm_head' is compiled by itself"


def test_a_stand_in_answers_without_being_made() -> None:
    model = Model(0)
    x = torch.randn(2, 5, 16)
    with deferring([DeferrableHead(model.lm_head)]):
        logits = model.lm_head(x)
        assert isinstance(logits, UnmadeLogits)
        assert (logits.shape, logits.dtype, logits.ndim) == ((2, 5, 61), torch.float32, 3)
        assert (logits.size(-1), logits.dim(), len(logits)) == (61, 3, 2)
        capped = (logits[:, 1:].float() / 2).tanh() * 2
        assert isinstance(capped, UnmadeLogits)
        assert logits.materialised is None
        assert capped.shape == (2, 4, 61)
    exact = ((x @ model.lm_head.weight.T)[:, 1:] / 2).tanh() * 2
    torch.testing.assert_close(capped.softmax(-1), exact.softmax(-1))
    assert logits.materialised is not None


# ---- what a model may do to its logits before it hands them over


class ReadsWithoutGradient(Model):
    def head(self, x: Tensor) -> Any:
        logits = self.lm_head(x)
        with torch.no_grad():
            self.seen = logits.argmax(-1)
        return logits


class ScaledWithoutGradient(Model):
    def head(self, x: Tensor) -> Any:
        logits = self.lm_head(x)
        with torch.no_grad():
            fixed = logits * 0.5
        return fixed + self.body(x).mean()


class ReadUnderAutocast(Model):
    def head(self, x: Tensor) -> Any:
        logits = self.lm_head(x)
        with torch.autocast("cpu", torch.bfloat16):
            self.seen = logits @ logits.mT
        return logits


class Asks(Model):
    def head(self, x: Tensor) -> Any:
        logits = self.lm_head(x)
        return logits * 2.0 if logits.requires_grad and not logits.is_leaf else logits


class Masked(Model):
    def head(self, x: Tensor) -> Any:
        logits = self.lm_head(x)
        return logits[torch.ones(x.shape[:2], dtype=torch.bool)].view(*x.shape[:2], -1)


class Checkpointed(Model):
    """Head and another branch in one checkpoint."""

    def head(self, x: Tensor) -> Any:
        def both(x: Tensor) -> Tensor:
            return self.lm_head(x) + self.body(x).sum(-1, keepdim=True)

        return checkpoint(both, x, use_reentrant=False)


class NumpyScale(Model):
    def head(self, x: Tensor) -> Any:
        return self.lm_head(x) * (1 / np.sqrt(16))


class Compiled(Model):
    """A function of the model's own that is compiled takes the logits."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.f = torch.compile(lambda x: torch.tanh(x / 2) * 2 + 0.0, backend="eager")

    def head(self, x: Tensor) -> Any:
        return self.f(self.lm_head(x))


USES = (ReadsWithoutGradient, ScaledWithoutGradient, ReadUnderAutocast, Asks, Masked, Checkpointed)


@pytest.mark.parametrize("kind", [*USES, NumpyScale, Compiled])
def test_uses_of_logits(kind: type[Model]) -> None:
    agree(kind(0), kind(1))


def test_a_gradient_is_never_lost_in_silence() -> None:
    class Same(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 1.0

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return g

    student = variant(lambda m, x: Same.apply(m.lm_head(x)))(0)
    with pytest.raises(StepError, match='outputs=\\("logits",\\)'):
        run(student, Model(1), "regional")
    agree_options = {"outputs": ("logits",)}
    assert agree(student, Model(1), **agree_options).startswith("logits are made")


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_backward_hooks_see_their_gradients() -> None:
    for of_head in (True, False):
        student, calls = Model(0), []
        hooked = student.lm_head if of_head else student
        hooked.register_full_backward_hook(lambda *_, calls=calls: calls.append(1))
        assert agree(student, Model(1)).startswith("logits are made")
        assert len(calls) == 2  # regional and eager


@pytest.mark.filterwarnings("ignore:the frozen teacher holds:fxdistill.errors.MatchWarning")
def test_a_head_that_both_towers_share() -> None:
    student, teacher = Model(0), Model(1)
    teacher.lm_head = student.lm_head
    assert agree(student, teacher).startswith("logits fused")
