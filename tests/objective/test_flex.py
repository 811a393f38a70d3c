"""The port "attention" of models that call ``flex_attention``, against explicit maps.

On a CPU torch trains no model that calls it, by a check at its door; behind that the gradients are
there. Tests of a student take the check away.
"""

import types
from typing import Any

import pytest
import torch
import torch.nn.attention.flex_attention as of_torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint

import attention_cases as cases
import fxdistill
from fxdistill import Match, errors
from fxdistill.taps import flex
from toys import AOT, MODES, assert_same_gradients, gradients

LENGTH, WIDTH, WINDOW = 9, 16, 4
compiled_flex_attention: Any = torch.compile(flex_attention, backend="aot_eager")
pytestmark = pytest.mark.filterwarnings("ignore:.*flex_attention called without torch.compile")


class Attends(nn.Module):
    """Grouped queries, left padding, a sliding window; ``bent``: a softcap and a learned bias."""

    def __init__(self, heads: int, *, bent: bool = False, compiled: bool = False) -> None:
        super().__init__()
        self.heads, self.compiled = heads, compiled
        self.q, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.kv = nn.Linear(WIDTH, WIDTH)
        self.bias = nn.Parameter(torch.randn(heads, LENGTH, LENGTH)) if bent else None

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        size = WIDTH // self.heads
        q, k, v = self.q(x), *self.kv(x).chunk(2, -1)
        return tuple(y.unflatten(-1, (-1, size)).transpose(1, 2) for y in (3 * q, k, v))

    def forward(self, x: Tensor, attended: Tensor) -> Tensor:
        def mask_mod(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return (i >= j) & (i - j < WINDOW) & attended[b, j]

        def score_mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return score if self.bias is None else 2 * torch.tanh(score / 2) + self.bias[h, i, j]

        mask = create_block_mask(mask_mod, len(x), None, LENGTH, LENGTH, device="cpu")
        q, k, v = self.parts(x)
        attend = compiled_flex_attention if self.compiled else flex_attention
        h = attend(q, k, v, score_mod, mask, enable_gqa=True)
        return self.out(h.transpose(1, 2).flatten(2))

    def map(self, x: Tensor, attended: Tensor) -> Tensor:
        q, k, _ = self.parts(x)
        scores = q @ k.repeat_interleave(2, 1).mT * q.shape[-1] ** -0.5
        if self.bias is not None:
            scores = 2 * torch.tanh(scores / 2) + self.bias
        i, j = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)
        kept = (i >= j) & (i - j < WINDOW) & attended[:, None, None]
        return torch.where(kept, scores, -1e30).softmax(-1) * kept


class Model(nn.Module):
    def __init__(self, heads: int, remat: bool = False, **options: Any) -> None:
        super().__init__()
        self.embed, self.attention = nn.Embedding(20, WIDTH), Attends(heads, **options)
        self.remat = remat

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        given = self.embed(input_ids), attention_mask.bool()
        if self.remat:
            return checkpoint(self.attention, *given, use_reentrant=False)
        return self.attention(*given)


IDS = torch.randint(0, 20, (2, LENGTH), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[0, :3] = 0
CALL = {"input_ids": IDS, "attention_mask": MASK}
PORT = {"student_port": "attention", "teacher_port": "attention"}


def models(**of_student: Any) -> tuple[Model, Model]:
    torch.manual_seed(0)
    return Model(4, **of_student), Model(4)


def distilled(student: nn.Module, teacher: nn.Module, compile: Any, **match: Any) -> Any:
    given = Match("attention", "attention", **{"loss": "attention_kl", **PORT, **match})
    options = {"logit_loss": None, "label_loss": None, "task": "causal_lm", "compile": compile}
    return fxdistill.wrap(student, teacher, [given], **options)


def divergence(student: Model, teacher: Model) -> Tensor:
    maps = [m.attention.map(m.embed(IDS), MASK.bool()) for m in (student, teacher)]
    s, t = maps[0], maps[1].detach()
    each = (t * (torch.where(t > 0, t, 1).log() - torch.where(s > 0, s, 1).log())).sum(-1).mean(1)
    return (each * MASK).sum() / MASK.sum()


@pytest.fixture
def trains(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(of_torch, "_validate_device", lambda *_: None)


OPTIONS = {
    "mask": {},
    "compiled": {"compiled": True},
    "score_mod": {"bent": True},
    "checkpoint": {"bent": True, "remat": True},
}


@MODES
@pytest.mark.parametrize("options", OPTIONS)
def test_maps_of_both_models(options: str, compile: Any, trains: None) -> None:
    student, teacher = models(**OPTIONS[options])
    wanted = divergence(student, teacher)
    wanted.backward()
    want = gradients(student)
    plain, seen = student(**CALL), []
    student.register_forward_hook(lambda module, args, output: seen.append(output.detach()))
    distiller = distilled(student, teacher, compile)
    out = distiller(**CALL)
    out.loss.backward()
    torch.testing.assert_close(out.loss, wanted)
    assert_same_gradients(gradients(student), want)
    assert want["attention.q.weight"].norm() > 0
    if not compile:
        assert torch.equal(seen[0], plain)
    assert of_torch.flex_attention is flex_attention  # what stood in is gone


def test_ports_of_its_parts(trains: None) -> None:
    student, teacher = models()
    seen: dict[str, list[Tensor]] = {name: [] for name in ("q", "k", "v", "heads")}
    for model in (student, teacher):
        x, attended = model.embed(IDS), MASK.bool()
        parts = model.attention.parts(x)
        heads = model.attention.map(x, attended) @ parts[2].repeat_interleave(2, 1)
        for name, value in zip(seen, (*parts, heads), strict=True):
            seen[name].append(value.transpose(1, 2).flatten(2))
    for name, (s, t) in seen.items():
        port = f"attention.{name}"
        match = {"student_port": port, "teacher_port": port, "loss": "mse"}
        out = distilled(student, teacher, False, **match)(**CALL)
        each = (s - t).square().mean(-1)
        torch.testing.assert_close(out.loss, (each * MASK).sum() / MASK.sum())


def test_report(trains: None) -> None:
    report = distilled(*models(bent=True), AOT).report(**CALL)
    assert [line.name for line in report.terms] == ["features"]
    assert report.flops.teacher > 0
    assert not report.casts


def test_block_masks_of_blocks_alone(trains: None) -> None:
    """What ``from_kv_blocks`` leaves out is masked, though its mask_mod says nothing of it."""
    count, indices = torch.ones(1, 1, 2, dtype=torch.int32), torch.tensor([[[[0, 1], [1, 0]]]])
    blocks = BlockMask.from_kv_blocks(count, indices.int(), BLOCK_SIZE=5, seq_lengths=(9, 9))
    query = torch.randn(2, 4, 9, 8)
    wanted = torch.block_diag(torch.ones(5, 5), torch.ones(4, 4)).bool()
    assert torch.equal(flex.mask_of(blocks, query, query)[0, 0], wanted)


def test_a_score_mod_that_masks_a_whole_row() -> None:
    x = torch.randn(1, 2, 3, 4, requires_grad=True)

    def score_mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return torch.where(i > j, score, -torch.inf)

    found = flex.map_of(x, x, None, 0.5, score_mod)
    kept = torch.ones(3, 3).tril(-1).bool()
    wanted = torch.where(kept, 0.5 * x @ x.mT, -1e30).softmax(-1) * kept
    torch.testing.assert_close(found, wanted)
    (slope,) = torch.autograd.grad(found.square().sum(), x)
    assert slope.isfinite().all()


@pytest.mark.parametrize("compile", [False, AOT], ids=["eager", "graph"])
def test_torch_trains_none_on_a_cpu(compile: Any) -> None:
    distiller = distilled(*models(), compile)
    with pytest.raises(Exception, match="does not support backward on CPU"):
        distiller(**CALL)


elsewhere = types.ModuleType("elsewhere")
exec(
    "from torch.nn.attention.flex_attention import flex_attention\n"
    "def attend(q): return flex_attention(q, q, q)",
    vars(elsewhere),
)


class Elsewhere(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return elsewhere.attend(x.unflatten(-1, (4, -1)).transpose(1, 2)).transpose(1, 2).flatten(2)


def test_a_call_in_another_file_is_an_error_that_says_so(trains: None) -> None:
    student, teacher = models()
    student.attention.inner = Elsewhere()
    student.attention.register_forward_hook(lambda m, args, y: m.inner(y))
    match = {"student": "attention.inner", "teacher": "attention", "loss": "attention_kl", **PORT}
    options = {"logit_loss": None, "task": "causal_lm", "compile": False}
    distiller = fxdistill.wrap(student, teacher, [Match(**match)], **options)
    with pytest.raises(errors.PortError, match="the file of the module's class"):
        distiller(**CALL)


@pytest.mark.slow  # transformers compiles flex_attention itself
@pytest.mark.filterwarnings("ignore:_compile flag on create_block_mask:DeprecationWarning")
@pytest.mark.parametrize(
    ("name", "compile"), [("llama", "regional"), ("gemma2", False), ("mistral", AOT)]
)
def test_teachers_of_transformers(name: str, compile: Any) -> None:
    """The student makes its map, or has SDPA; Gemma 2 has a softcap, which is a score_mod."""
    case = cases.CASES[name]
    plain, teacher = (cases.made(case, side, "eager") for side in ("student", "teacher"))
    maps = cases.map_of(case, "student", plain), cases.map_of(case, "teacher", teacher).detach()
    wanted = cases.divergence(*maps, case.weights)
    wanted.backward()
    student = cases.made(case, "student", "eager" if case.explicit else "sdpa")
    teacher = cases.made(case, "teacher", "flex_attention")
    distiller = cases.distilled(case, student, teacher, "attention_kl", compile)
    out = distiller(**case.batch)
    out.loss.backward()
    torch.testing.assert_close(out.loss.detach(), wanted.detach(), rtol=1e-5, atol=1e-7)
    cases.close(cases.gradients(student), cases.gradients(plain))
