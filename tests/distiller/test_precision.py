"""Precisions of a run: another dtype for the teacher, quantized weights, float16 with a scaler."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

import fxdistill
from fxdistill import Match
from heads import remarks

AOT = {"backend": "aot_eager"}
MODES = pytest.mark.parametrize(
    "compile", [False, "regional", AOT], ids=["eager", "regional", "graph"]
)
PATHS = ("model.layers.0.mlp", "model.layers.1.mlp")
V, TAU = 96, 2.0


def llama(layers, width):
    torch.manual_seed(layers)
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=V, num_hidden_layers=layers, **sizes)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight.mul_(10)  # predictions that differ
    return model


def quantized(kind):
    """A teacher of int8 weights, in its head too, or of int4 weights with a plain head."""
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerGroup

    model = llama(2, 64)
    if kind == "int8 weights":
        quantize_(model, Int8WeightOnlyConfig())
    else:
        config = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))
        quantize_(model.model, config)
    return model


def seen(model, ids, path):
    """The logits, and what the module at ``path`` returns, in float32."""
    found = []
    handle = model.get_submodule(path).register_forward_hook(lambda m, a, out: found.append(out))
    logits = model(input_ids=ids).logits
    handle.remove()
    return logits.float(), found[0].float()


def outside(student, teacher, projection, ids):
    """The total by plain PyTorch, with the same models."""
    s, f = seen(student, ids, PATHS[0])
    with torch.no_grad():
        t, g = seen(teacher.eval(), ids, PATHS[1])
    p = (t / TAU).softmax(-1)
    kl = (p * ((t / TAU).log_softmax(-1) - (s / TAU).log_softmax(-1))).sum(-1)[:, :-1].mean()
    labels = F.cross_entropy(s[:, :-1].reshape(-1, V), ids[:, 1:].reshape(-1))
    return TAU**2 * kl + labels + F.mse_loss(projection(f), g)


@pytest.mark.parametrize(
    ("kind", "compile"),
    [
        *itertools.product(["bfloat16", "int8 weights"], [False, "regional", AOT]),
        *itertools.product(["int4 weights"], [False, AOT]),
        ("float16", AOT),  # the head that is fused refuses that of a student
    ],
)
def test_a_teacher_of_lower_precision(kind, compile):
    student = llama(1, 32)
    weights = kind.endswith("weights")
    teacher = quantized(kind) if weights else llama(2, 64).to(getattr(torch, kind))
    plain, ids = copy.deepcopy(student), torch.randint(V, (2, 9))
    mapping = {PATHS[0]: Match(teacher=PATHS[1], project="linear")}
    distiller = fxdistill.wrap(student, teacher, mapping, temperature=TAU, compile=compile)
    (projection,) = copy.deepcopy(distiller.projections)
    out = distiller(input_ids=ids, labels=ids)
    out.loss.backward()
    want = outside(plain, teacher, projection, ids)
    want.backward()
    torch.testing.assert_close(out.loss, want, rtol=1e-5, atol=1e-6)
    assert {value.dtype for value in out.losses.values()} == {torch.float32}
    for (name, a), b in zip(student.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5, msg=name)
    if weights and compile:
        said = "the teacher's head reads a Int8Tensor" if kind == "int8 weights" else "logits fused"
        assert said in remarks(distiller)


@MODES
def test_float16_with_a_scaler(compile):
    """The scaler's factor comes before the backward, so nothing may form gradients earlier.

    The loss is formed in float32, so that it neither vanishes nor overflows; a step that overflows
    is left out, and the weights are as they were.
    """
    student, teacher = llama(1, 32), llama(2, 64)
    plain, ids = copy.deepcopy(student), torch.randint(V, (2, 9))
    distiller = fxdistill.wrap(student, teacher, temperature=TAU, compile=compile)

    def step(model, loss_of, scale):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        with torch.autocast("cpu", dtype=torch.float16):
            loss = loss_of()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        return loss.detach(), scaler.get_scale()

    def by_hand():
        s = plain(input_ids=ids).logits.float()
        with torch.no_grad():
            t = teacher(input_ids=ids).logits.float()
        p = (t / TAU).softmax(-1)
        kl = (p * ((t / TAU).log_softmax(-1) - (s / TAU).log_softmax(-1))).sum(-1)
        labels = F.cross_entropy(s[:, :-1].reshape(-1, V), ids[:, 1:].reshape(-1))
        return TAU**2 * kl[:, :-1].mean() + labels

    for scale in (2.0**12, 2.0**40):  # the second overflows
        before = [p.detach().clone() for p in student.parameters()]
        loss, after = step(student, lambda: distiller(input_ids=ids, labels=ids).loss, scale)
        wanted, same = step(plain, by_hand, scale)
        assert (loss.dtype, after) == (torch.float32, same)
        torch.testing.assert_close(loss, wanted, rtol=2e-3, atol=1e-3)
        moved = any(
            not torch.equal(a, b) for a, b in zip(student.parameters(), before, strict=True)
        )
        assert moved == (scale == 2.0**12)
        for a, b in zip(student.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=5e-2, atol=2e-3)
