"""The port "attention" in a distiller: losses, parts, modules, what does not fit."""

import copy
import dataclasses
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fxdistill
from attention_cases import (
    BATCH,
    CASES,
    LAYERS,
    LEFT,
    LENGTH,
    LLAMA,
    MODES,
    attention_match,
    close,
    distilled,
    gradients,
    llamas,
    made,
    map_of,
)
from fxdistill import Match, errors, losses
from mesh_steps import AOT


@MODES
@pytest.mark.parametrize(
    "loss",
    [
        "attention_mse",
        partial(losses.attention_mse, scores=True),
        partial(losses.attention_mse, heads=[(3, 0), (0, 5)]),
        "transfer_matrix",
        "relation_kl",
        partial(losses.relation_kl, of="v", heads=8),
    ],
    ids=["mse", "scores", "pairs", "matrix", "queries", "values"],
)
def test_each_loss_reads_what_the_attention_is_called_with(loss, compile):
    student, teacher = llamas()
    distiller = distilled(LLAMA, student, teacher, loss, compile)
    out = distiller(**LLAMA.batch)
    out.loss.backward()
    own = made(LLAMA, "student", "sdpa")
    s = called_with(own, LLAMA.path.format(0), LLAMA.batch)
    with torch.no_grad():
        t = called_with(teacher, LLAMA.path.format(1), LLAMA.batch)
    plain = getattr(losses, loss) if isinstance(loss, str) else loss
    want = plain(s, t, LEFT.float())
    want.backward()
    torch.testing.assert_close(out.loss.detach(), want.detach())
    close(gradients(student), gradients(own))


def called_with(model: Any, path: str, batch: dict[str, Tensor]) -> losses.Attention:
    """The arguments of one module's call, through a mode of torch instead of a stand-in."""
    seen = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is F.scaled_dot_product_attention and inside:
                given = kwargs
                seen.append(
                    losses.Attention(*args, given["attn_mask"], given["is_causal"], given["scale"])
                )
            return func(*args, **(kwargs or {}))

    inside: list[int] = []
    module = model.get_submodule(path)
    handles = [
        module.register_forward_pre_hook(lambda *_: inside.append(1)),
        module.register_forward_hook(lambda *_: inside.clear()),
    ]
    with Watch():
        model(**batch)
    for handle in handles:
        handle.remove()
    assert len(seen) == 1
    return seen[0]


PARTS = [*((p, False) for p in ("q", "k", "v", "heads")), ("heads", AOT), ("k", "regional")]


@pytest.mark.parametrize(("port", "compile"), PARTS)
def test_parts_are_values_like_others(port, compile):
    """[B, L, heads·width] of tokens: any loss takes them, and padding does not count."""
    student, teacher = llamas()
    match = dataclasses.replace(attention_match(LLAMA, "l2", f"attention.{port}"), project="auto")
    given = {"logit_loss": None, "compile": compile, "example_inputs": LLAMA.batch}
    distiller = fxdistill.wrap(student, teacher, [match], **given)
    out = distiller(**LLAMA.batch)
    found = []
    for model, layer in ((student, 0), (teacher, 1)):
        path = LLAMA.path.format(layer)
        if port == "heads":
            with torch.no_grad():
                found.append(taken(model, f"{path}.o_proj", LLAMA.batch))
        else:
            with torch.no_grad():
                called = called_with(model, path, LLAMA.batch)
            x = {"q": called.query, "k": called.key, "v": called.value}[port]
            found.append(x.transpose(1, 2).flatten(2))
    s = distiller.projections[0](found[0])
    torch.testing.assert_close(out.loss, losses.l2(s, found[1], LEFT.float()))


def taken(model: Any, path: str, batch: dict[str, Tensor]) -> Tensor:
    seen = []
    handle = model.get_submodule(path).register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    model(**batch)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("compile", [False, AOT], ids=["eager", "one"])
def test_in_a_checkpointed_student(compile):
    case = CASES["llama"]
    plain, teacher = llamas()
    student = made(case, "student", "sdpa").train()
    plain.train()
    student.activation_checkpointing_enable({"use_reentrant": False})
    for model in (plain, student):
        out = distilled(case, model, teacher, "attention_kl", compile)(**case.batch)
        out.loss.backward()
    close(gradients(student), gradients(plain))


def test_steps_of_one_graph_do_not_compile_again():
    distiller = distilled(LLAMA, *llamas(), "attention_kl", AOT)
    for _ in range(3):
        distiller(**LLAMA.batch).loss.backward()
    assert [event for event, _ in distiller.journal.events] == ["capture"]


class Attending(nn.Module):
    """Attention of torch's own, or written down; ``remat`` runs it again in the backward."""

    def __init__(self, width: int, heads: int, how: str, twice: bool = False) -> None:
        super().__init__()
        self.how, self.heads, self.twice = how, heads, twice
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def attend(self, x: Tensor) -> Any:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if self.how == "flat":
            q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
        if self.how != "none":
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.5)
        else:
            y = v
        return y.reshape(*x.shape[:1], self.heads, *x.shape[1:2], -1).transpose(1, 2).flatten(2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.out(self.attend(x))
        return self.out(self.attend(y)) if self.twice else y


class Net(nn.Module):
    def __init__(self, width: int, heads: int, how: str = "", **options: Any) -> None:
        super().__init__()
        self.up, self.attn = nn.Linear(4, width), Attending(width, heads, how, **options)
        self.how, self.head = how, nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "remat":
            return self.head(checkpoint(self.attn, self.up(x), use_reentrant=False).mean(1))
        return self.head(self.attn(self.up(x)).mean(1))


X = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(2))


def nets(how: str = "", **options: Any) -> tuple[Net, Net]:
    torch.manual_seed(0)
    return Net(8, 2, how, **options), Net(12, 3)


def of_net(net: Net, x: Tensor | None = None) -> losses.Attention:
    """What its first call of attention is given."""
    h = net.up(X) if x is None else x
    q, k, v = net.attn.qkv(h).unflatten(-1, (3, net.attn.heads, -1)).permute(2, 0, 3, 1, 4)
    return losses.Attention(q, k, v, None, True, 0.5)


ATTENTION = {"student_port": "attention", "teacher_port": "attention"}


@MODES
@pytest.mark.parametrize("loss", ["attention_kl", "transfer_matrix"])
def test_samples_weigh_their_attention_in_classification(loss, compile):
    student, teacher = nets("remat")
    match = Match("attn", "attn", loss=loss, **ATTENTION)
    distiller = fxdistill.wrap(student, teacher, [match], logit_loss=None, compile=compile)
    w = torch.tensor([1.0, 0.0, 3.0])
    out = distiller(X, token_weights=w, labels=torch.arange(3))
    want = getattr(losses, loss)(of_net(student), of_net(teacher), w)
    torch.testing.assert_close(out.losses["attn:attention"], want.detach())


@MODES
def test_a_second_call_in_a_module_has_a_name(compile):
    student, teacher = nets(twice=True)
    match = Match("attn@1", "attn", loss="attention_kl", **ATTENTION)
    distiller = fxdistill.wrap(student, teacher, [match], logit_loss=None, compile=compile)
    first = student.attn.out(student.attn.attend(student.up(X)))
    want = losses.attention_kl(of_net(student, first), of_net(teacher))
    torch.testing.assert_close(distiller(X).losses["attn@1:attention"], want.detach())


@MODES
def test_a_loss_of_the_users_own_gets_the_parts(compile):
    def gap(student, teacher, weights):
        return (student.query.mean() - teacher.key.mean()).square()

    student, teacher = nets()
    match = Match("attn", "attn", loss=gap, **ATTENTION)
    distiller = fxdistill.wrap(student, teacher, [match], logit_loss=None, compile=compile)
    s, t = of_net(student), of_net(teacher)
    want = (s.query.mean() - t.key.mean()).square()
    torch.testing.assert_close(distiller(X).loss.detach(), want.detach())


@MODES
def test_a_teacher_that_learns_gets_its_gradient(compile):
    student, teacher = nets()
    match = Match("attn", "attn", loss="attention_kl", **ATTENTION)
    distiller = fxdistill.wrap(
        student, teacher, [match], logit_loss=None, compile=compile, freeze_teacher=False
    )
    distiller(X).loss.backward()
    want = losses.attention_kl(of_net(student), of_net(teacher))
    learnt = [teacher.attn.qkv.weight, student.attn.qkv.weight]
    for ours, p in zip(torch.autograd.grad(want, learnt), learnt, strict=True):
        torch.testing.assert_close(p.grad, ours)


@pytest.mark.parametrize("compile", [False, AOT], ids=["eager", "one"])
def test_weights_by_name_weigh_queries(compile):
    student, teacher = nets()
    match = Match("attn", "attn", loss="attention_kl", weights="some", **ATTENTION)
    distiller = fxdistill.wrap(student, teacher, [match], logit_loss=None, compile=compile)
    for w in (torch.rand(3, 5), torch.rand(3)):
        want = losses.attention_kl(of_net(student), of_net(teacher), w)
        torch.testing.assert_close(distiller(X, weights={"some": w}).loss.detach(), want.detach())


def test_the_report_shows_maps_that_nobody_forms():
    models = llamas()
    distiller = distilled(LLAMA, *models, "attention_kl", AOT)
    report = distiller.report(**LLAMA.batch)
    pair = report.pairs[0]
    assert pair.student_value.shape == (BATCH, 4, LENGTH, LENGTH)
    assert pair.teacher_value.shape == (BATCH, 8, LENGTH, LENGTH)
    assert pair.weighed_by == "tokens"
    # Scores of both models, and the gradients by the student's queries and keys.
    widths = [model.config.num_attention_heads * model.config.head_dim for model in models]
    assert report.flops.losses == 2 * BATCH * LENGTH**2 * (3 * widths[0] + widths[1])


@pytest.mark.parametrize("compile", [False, AOT], ids=["eager", "one"])
@pytest.mark.parametrize(
    ("how", "match", "error", "says"),
    [
        ("none", {}, errors.PortError, "student module 'attn' has no attention to tap"),
        ("flat", {}, errors.PortError, r"queries \[6, 5, 4\]"),
        ("", {"loss": "mse"}, errors.OptionError, "compares tensors"),
        ("", {"project": "auto"}, errors.OptionError, "takes it as it is"),
        ("", {"student_port": "attention.o"}, errors.PortError, "attention.heads"),
        ("", {"loss": partial(losses.attention_kl, heads=[(2, 0)])}, errors.OptionError, "of 2"),
        ("", {"loss": partial(losses.relation_kl, heads=5)}, errors.ShapeError, "do not divide"),
        ("", {"student": "attn@1"}, errors.TapError, "it ran once"),
        ("", {"student": "up"}, errors.PortError, r"'up' \(Linear\) has no attention"),
    ],
)
def test_what_does_not_fit_is_an_error(how, match, error, says, compile):
    student, teacher = nets(how)
    given = {"student": "attn", "teacher": "attn", "loss": "attention_kl", **ATTENTION, **match}
    with pytest.raises(error, match=says):
        fxdistill.wrap(student, teacher, [Match(**given)], logit_loss=None, compile=compile)(X)


@pytest.mark.parametrize("compile", [False, AOT], ids=["eager", "one"])
def test_a_map_that_a_model_makes_has_no_queries_and_no_scores(compile):
    case = CASES["gemma2"]
    models = [made(case, side, "eager") for side in LAYERS]
    for loss, port, error, says in (
        ("mse", "attention.q", errors.PortError, "no queries and keys"),
        (partial(losses.attention_mse, scores=True), "attention", errors.PortError, "no scores"),
        ("relation_kl", "attention", errors.PortError, "no queries"),
    ):
        match = attention_match(case, loss, port)
        distiller = fxdistill.wrap(*models, [match], logit_loss=None, compile=compile)
        with pytest.raises(error, match=says):
            distiller(**case.batch)


@MODES
@pytest.mark.parametrize("name", ["bert", "whisper cross"])
def test_padded_queries_of_a_map_do_not_count(name, compile):
    """An ordinary loss of the map that a module returns, however its sizes agree with others."""
    case = CASES[name]
    student, teacher = (made(dataclasses.replace(case, heads=(2, 2)), s, "eager") for s in LAYERS)
    match = attention_match(case, "l2", "output[1]")
    distiller = fxdistill.wrap(student, teacher, [match], logit_loss=None, compile=compile)
    out = distiller(**case.batch)
    s, t = (map_of(case, side, m) for side, m in (("student", student), ("teacher", teacher)))
    each = (s - t).norm(dim=-1).mean(1)  # a row is a vector
    want = (each * case.weights).sum() / case.weights.sum()
    term = next(n for n in out.losses if n.endswith("output[1]"))
    torch.testing.assert_close(out.losses[term], want.detach())
    if compile is False:
        assert "tokens" in distiller.report(**case.batch).pairs[0].weighed_by


def test_modules_that_surely_attend_nothing_are_named_in_wrap():
    student, teacher = llamas()
    match = Match("model.layers.0.mlp", "model.layers.0.mlp", loss="attention_kl", **ATTENTION)
    with pytest.raises(errors.PortError, match=r"LlamaMLP.*nearest first: 'model.layers.0.self_a"):
        fxdistill.wrap(student, teacher, [match])


class OfTorch(nn.Module):
    """torch's own layer of an encoder, and its attention once more, with its weights or not."""

    def __init__(self, width, heads, **asked):
        super().__init__()
        self.embed = nn.Embedding(20, width)
        self.layer = nn.TransformerEncoderLayer(width, heads, 12, 0.0, batch_first=True)
        self.again = nn.MultiheadAttention(width, heads, batch_first=True)
        self.head, self.asked = nn.Linear(width, 20), asked

    def forward(self, input_ids, attention_mask):
        x, padded = self.embed(input_ids), attention_mask == 0
        hidden = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        x = self.layer(x, hidden, padded)
        y, *_ = self.again(x, x, x, key_padding_mask=padded, **self.asked)
        return self.head(x + y)

    def map(self, input_ids, attention_mask):
        x = self.embed(input_ids)
        hidden = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        options = {"attn_mask": hidden, "key_padding_mask": attention_mask == 0}
        return self.layer.self_attn(x, x, x, average_attn_weights=False, **options)[1]


@MODES
def test_torchs_own_attention_is_seen_through(compile):
    torch.manual_seed(0)
    asked = {"need_weights": False}
    student, teacher = OfTorch(8, 2, **asked), OfTorch(12, 2, **asked)
    mapping = [
        Match(path, path, loss="attention_kl", **ATTENTION) for path in ("layer.self_attn", "again")
    ]
    options = {"logit_loss": None, "compile": compile, "task": "masked_lm"}
    distiller = fxdistill.wrap(student, teacher, mapping, **options)
    ids, kept = torch.randint(0, 20, (3, 6)), torch.ones(3, 6)
    kept[0, 4:] = 0
    out = distiller(input_ids=ids, attention_mask=kept)
    maps = [model.map(ids, kept) for model in (student, teacher)]
    want = losses.attention_kl(maps[0], maps[1].detach(), kept)
    torch.testing.assert_close(out.losses["layer.self_attn:attention"], want.detach())
    assert out.losses["again:attention"] > 0
    parameters = [*student.layer.self_attn.parameters()][:2]
    options = {"logit_loss": None, "compile": compile, "task": "masked_lm"}
    alone = fxdistill.wrap(student, teacher, mapping[:1], **options)
    loss = alone(input_ids=ids, attention_mask=kept).loss
    for ours, theirs in zip(
        torch.autograd.grad(loss, parameters), torch.autograd.grad(want, parameters), strict=True
    ):
        torch.testing.assert_close(ours, theirs)
    assert torch.backends.mha.get_fastpath_enabled()
    assert F.multi_head_attention_forward.__module__ == "torch.nn.functional"


@pytest.mark.parametrize("compile", [False, AOT], ids=["eager", "one"])
def test_torchs_own_attention_that_makes_a_mean_of_its_map_is_named(compile):
    student, teacher = OfTorch(8, 2), OfTorch(12, 2)
    match = Match("again", "again", loss="attention_kl", **ATTENTION)
    distiller = fxdistill.wrap(student, teacher, [match], logit_loss=None, compile=compile)
    with pytest.raises(errors.PortError, match=r"student module 'again'.*need_weights=False"):
        distiller(input_ids=torch.randint(0, 20, (3, 6)), attention_mask=torch.ones(3, 6))


def test_what_another_library_put_in_its_place_is_called(monkeypatch):
    calls = []
    torchs = F.scaled_dot_product_attention

    def others(*args, **kwargs):
        calls.append(1)
        return torchs(*args, **kwargs)

    student, teacher = nets()
    match = Match("attn", "attn", loss="attention_kl", **ATTENTION)
    distiller = fxdistill.wrap(student, teacher, [match], logit_loss=None, compile=False)
    monkeypatch.setattr(F, "scaled_dot_product_attention", others)
    want = losses.attention_kl(of_net(student), of_net(teacher))
    torch.testing.assert_close(distiller(X).loss.detach(), want.detach())
    assert len(calls) == 2
    assert F.scaled_dot_product_attention is others


def test_nothing_of_a_step_is_left_where_it_failed():
    student, teacher = nets()
    match = Match("attn", "attn", loss="attention_kl", **ATTENTION)
    distiller = fxdistill.wrap(student, teacher, [match], logit_loss=None, compile=False)
    with pytest.raises(RuntimeError):
        distiller(X[..., :2])
    assert F.scaled_dot_product_attention.__module__ != "fxdistill.taps.attention"
    assert copy.deepcopy(distiller)(X).loss.isfinite()
