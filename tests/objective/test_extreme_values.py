"""Every kind of loss in one distiller, at values and masks from the edge, in every mode."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxdistill
from fxdistill import Match, losses
from fxdistill.losses.names import FEATURE_LOSSES, LOGIT_LOSSES, OF_ATTENTION
from mesh_steps import AOT

VOCABULARY, WIDTH = 11, 8


class Attends(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x):
        q, k, v = (y.unflatten(-1, (2, -1)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


class Small(nn.Module):
    """A language model, of which one layer makes boxes."""

    def __init__(self):
        super().__init__()
        self.embed, self.attn = nn.Embedding(VOCABULARY, WIDTH), Attends()
        self.boxes = nn.Linear(WIDTH, 4)
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, ids):
        x = self.embed(ids)
        x = x + self.attn(x)
        x = x + F.pad(self.boxes(x), (0, WIDTH - 4))
        return {"logits": self.lm_head(x)}


def every_divergence(student, teacher, *, temperature, weights):
    options = {"temperature": temperature, "weights": weights}
    return sum(loss(student, teacher, **options) for loss in LOGIT_LOSSES.values()) / 10


def made(compile, logit_loss):
    torch.manual_seed(0)
    student, teacher = Small(), Small()
    mapping = []
    for name in FEATURE_LOSSES:
        loss = functools.partial(losses.CRD, width=3, size=5) if name == "CRD" else name
        of_attention = any(FEATURE_LOSSES[name] is f for f in OF_ATTENTION)
        path, port = ("attn", "attention") if of_attention else ("boxes", "output")
        mapping.append(Match(path, path, loss=loss, student_port=port, teacher_port=port))
    options = {"logit_loss": logit_loss, "task": "causal_lm"}
    return fxdistill.wrap(student, teacher, mapping, compile=compile, **options)


IDS = torch.randint(0, VOCABULARY, (3, 4), generator=torch.Generator().manual_seed(1))


def extremes():
    """The scale of each model's values, the ids and the mask; nothing recompiles for them.

    Larger scores, of which float32 holds no decimals, would have no gradient to compare.
    """
    some = torch.ones(3, 4)
    some[0], some[1, 2:] = 0, 0
    alike = IDS[:1].expand(3, -1).contiguous()
    return {
        "large": ((10.0, 1e4), IDS, some),
        "all zeros": ((0.0, 0.0), IDS, some),
        "equal samples": ((1.0, 1.0), alike, torch.ones(3, 4)),
        "nothing counts": ((1.0, 1.0), IDS, torch.zeros(3, 4)),
    }


def stepped(distiller):
    found = {}
    start = {name: x.clone() for name, x in distiller.state_dict().items()}
    for name, ((of_tokens, of_results), ids, mask) in extremes().items():
        with torch.no_grad():
            for model in (distiller.student, distiller.teacher):
                model.embed.weight.mul_(of_tokens)
                model.attn.qkv.bias.mul_(of_tokens)
                for x in (model.lm_head.weight, *model.boxes.parameters()):
                    x.mul_(of_results)
        out = distiller(ids, labels=ids, loss_mask=mask)
        out.loss.backward()
        gradients = {n: p.grad for n, p in distiller.named_parameters() if p.grad is not None}
        found[name] = ({"loss": out.loss.detach(), **out.losses}, gradients)
        distiller.zero_grad()
        distiller.load_state_dict(start)
    return found


@functools.cache
def eager(logit_loss):
    return stepped(made(False, logit_loss))


CASES = [(AOT, "forward_kl"), ("regional", every_divergence)]


@pytest.mark.parametrize(("compile", "logits"), CASES, ids=["one", "terms"])
def test_extreme_values_are_finite_and_those_of_eager(compile, logits):
    for kind, (values, gradients) in stepped(made(compile, logits)).items():
        wanted, theirs = eager(logits)[kind]
        assert len(values) > len(FEATURE_LOSSES)
        for name, value in values.items():
            assert value.isfinite(), (kind, name, value)
            torch.testing.assert_close(
                value, wanted[name], msg=lambda m, n=(kind, name): f"{n}: {m}"
            )
        for name, gradient in gradients.items():
            assert gradient.isfinite().all(), (kind, name)
            want = theirs[name]
            assert (gradient - want).norm() <= 1e-4 * want.norm() + 1e-6, (kind, name)
        if kind == "nothing counts":
            assert values["loss"] == 0
            assert not any(gradient.any() for gradient in gradients.values())
