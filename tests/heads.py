"""A small language model with many heads: those that FuseHead reads, and those it leaves alone."""

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxdistill
from fxdistill.compiler.lower import Lowering

V, D, B, L = 61, 16, 3, 7


class Model(nn.Module):
    """An embedding, a layer, and a head to be overridden."""

    def __init__(self, seed: int = 0, vocabulary: int = V, width: int = D) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.body = nn.Linear(width, width)
        self.lm_head = nn.Linear(width, vocabulary, bias=False)
        self.other = nn.Parameter(torch.empty(width, vocabulary))
        self.low = nn.Linear(width, 2, bias=False)
        g = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=g) / parameter.shape[-1] ** 0.5

    def forward(self, ids: Tensor) -> Any:
        return self.head(torch.tanh(self.body(self.embed(ids))))

    def head(self, x: Tensor) -> Any:
        return self.lm_head(x)


def variant(head: Any) -> type[Model]:
    """A model whose head is ``head(self, x)``."""
    return type("Variant", (Model,), {"head": head})


def flat(self: Any, x: Tensor) -> Tensor:
    return self.lm_head(x.reshape(-1, D)).view(x.shape[0], x.shape[1], -1)


def flat_by_hand(self: Any, x: Tensor) -> Tensor:
    return self.lm_head(x.flatten(0, 1)).reshape(B, L, V)


READ = {
    "linear": lambda self, x: self.lm_head(x),
    "tied": lambda self, x: F.linear(x, self.embed.weight),
    "matmul": lambda self, x: x @ self.embed.weight.T,
    "transposed weight": lambda self, x: torch.matmul(x, self.other),
    "float": lambda self, x: self.lm_head(x).float(),
    "scaled": lambda self, x: self.lm_head(x) * 0.3,
    "scaled from the left": lambda self, x: 0.3 * self.lm_head(x),
    "divided": lambda self, x: self.lm_head(x) / 1.7,
    "capped": lambda self, x: 2.0 * torch.tanh(self.lm_head(x) / 2.0),
    "scaled and capped": lambda self, x: 1.5 * torch.tanh(self.lm_head(x) * 0.7),
    "bias": lambda self, x: F.linear(x, self.other.T, self.other[0]),
    "bias apart": lambda self, x: self.lm_head(x) + self.other[:1],
    "fewer columns": lambda self, x: self.lm_head(x)[..., :50],
    "fewer columns, capped": lambda self, x: torch.tanh(self.lm_head(x)[:, :, 0:50] * 2) * 3,
    "flat": flat,
    "flat by hand": flat_by_hand,
    "positions": lambda self, x: self.lm_head(torch.cat([x, x], 1))[:, L:],
    "dict": lambda self, x: {"logits": self.lm_head(x), "hidden": x},
}


def batch() -> tuple[Tensor, dict[str, Tensor]]:
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 50, (B, L), generator=g)
    labels = ids.clone()
    labels[0, :3] = -100
    return ids, {"labels": labels, "token_weights": torch.rand(B, L, generator=g)}


class Adapted(Model):
    """LoRA on the head."""

    def head(self, x: Tensor) -> Tensor:
        return self.lm_head(x) + F.linear(self.low(x), self.other[:2].T) * 2.0


class Written(Model):
    """The hidden state is written after the head has read it."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.lm_head.weight.requires_grad_(False)  # its gradient would need the hidden state

    def head(self, x: Tensor) -> Tensor:
        y = x + 1.0
        logits = self.lm_head(y)
        y.mul_(2.0)
        return logits


class Autocast(Model):
    def head(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.lm_head(x).float()


class Twice(Model):
    def head(self, x: Tensor) -> dict[str, Tensor]:
        logits = self.lm_head(x)
        return {"logits": logits, "entropy": logits.softmax(-1).log().sum()}


LEFT: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "LoRA": (Adapted, "come from add", {}),
    "tensor scale": (variant(lambda m, x: m.lm_head(x) * m.other.mean()), "no constant", {}),
    "two bends": (variant(lambda m, x: m.lm_head(x).tanh().tanh()), "two tanh", {}),
    "other columns": (variant(lambda m, x: m.lm_head(x)[..., 3:]), "first ones", {}),
    "softmax": (variant(lambda m, x: m.lm_head(x).log_softmax(-1)), "log_softmax", {}),
    "half": (variant(lambda m, x: m.lm_head(x).bfloat16().float()), "bfloat16", {}),
    "written": (Written, "is written", {}),
    "autocast": (Autocast, "another autocast", {}),
    "matched": (Model, "also read by mse", {"mapping": {"lm_head": "lm_head"}}),
    "output": (Model, "also read by the output", {"outputs": ("logits",)}),
    "own loss": (
        Model,
        "no loss of this library reads",
        {"logit_loss": lambda s, t, **o: (s - t).sum()},
    ),
    "mutual": (Model, "the teacher learns too", {"freeze_teacher": False}),
}


Result = tuple[dict[str, Tensor], dict[str, Tensor], str | None]


def run(
    student: nn.Module, teacher: nn.Module, compile: Any, call: Any = None, **options: Any
) -> Result:
    """Loss and terms, gradients, and what FuseHead has to say (``None`` where it does not run)."""
    student.zero_grad(set_to_none=True)
    options = {"task": "causal_lm", **options}
    distiller = fxdistill.wrap(student, teacher, compile=compile, **options)
    if compile == "regional":  # its terms without Inductor, for speed
        distiller.options = dataclasses.replace(distiller.options, lowering=Lowering("aot_eager"))
    ids, own = batch()
    out = distiller(ids, **(own if call is None else call))
    out.loss.backward()
    gradients = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    return {"loss": out.loss.detach(), **out.losses}, gradients, remarks(distiller)


def agree(student: nn.Module, teacher: nn.Module, compile: Any, **options: Any) -> str:
    """The numbers of ``compile`` and of the eager form are the same; returns the remark."""
    numbers, gradients, remark = run(student, teacher, compile, **options)
    plain, wanted, _ = run(student, teacher, False, **options)
    for name, value in plain.items():
        torch.testing.assert_close(numbers[name], value, rtol=1e-5, atol=1e-6)
    assert gradients.keys() == wanted.keys()
    for name, gradient in wanted.items():
        bound = 1e-5 * gradient.norm() + 1e-6 * gradient.abs().max()
        assert (gradients[name] - gradient).norm() <= bound, name
    assert remark is not None
    return remark


def remarks(distiller: Any) -> str | None:
    history = () if distiller.program is None else distiller.program.history
    return next((" ".join(r.remarks) for r in history if r.name == "FuseHead"), None)
