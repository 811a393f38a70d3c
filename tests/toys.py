"""Small models that do what real ones do: each kind has one awkward habit."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

VOCABULARY, WIDTH = 50, 8
AOT = {"backend": "aot_eager"}
MODES = pytest.mark.parametrize(
    "compile", [False, "regional", AOT], ids=["eager", "regional", "graph"]
)
KINDS = (
    "plain",
    "inplace",
    "alias",
    "autograd",
    "batchnorm",
    "no_grad",
    "twice",
    "dict",
    "dataclass",
)


class Cubed(torch.autograd.Function):
    """x², with a backward that is not its derivative, so that using it shows."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * 3 * x


class Mixer(nn.Module):
    """Returns a tuple, a dict or a dataclass, like the mixers of real models."""

    def __init__(self, kind):
        super().__init__()
        self.linear, self.kind = nn.Linear(WIDTH, WIDTH), kind

    def forward(self, x):
        h = self.linear(x)
        if self.kind == "dict":
            return {"hidden": h, "extra": None}
        if self.kind == "dataclass":
            from transformers.modeling_outputs import BaseModelOutput

            return BaseModelOutput(last_hidden_state=h)
        return h, None


class Block(nn.Module):
    def __init__(self, kind, dropout):
        super().__init__()
        self.mixer, self.mlp = Mixer(kind), nn.Linear(WIDTH, WIDTH)
        self.norm = nn.BatchNorm1d(WIDTH) if kind == "batchnorm" else nn.Identity()
        self.relu, self.dropout, self.kind = nn.ReLU(inplace=True), nn.Dropout(dropout), kind

    def forward(self, x):
        out = self.mixer(x)
        h = out["hidden"] if self.kind == "dict" else out[0]
        if self.kind == "inplace":
            h = self.relu(h)
        if self.kind == "alias":
            h.view(-1).add_(1.0)
        if self.kind == "autograd":
            h = Cubed.apply(h)
        if self.kind == "batchnorm":
            h = self.norm(h.reshape(-1, WIDTH)).reshape(h.shape)
        if self.kind == "no_grad":
            with torch.no_grad():
                h = h + self.mlp(h)
            return x + h + self.mixer.linear(x)
        x = x + self.dropout(h)
        y = self.mlp(x)
        return x + F.gelu(self.mlp(y.tanh()) if self.kind == "twice" else y)


class Toy(nn.Module):
    """A language model with tied embeddings; ``remat`` checkpoints its blocks."""

    def __init__(self, depth, kind="plain", *, remat=False, reentrant=False, dropout=0.0):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block(kind, dropout) for _ in range(depth))
        self.remat, self.reentrant = remat, reentrant

    def forward(self, ids: Tensor):
        x = self.embed(ids)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.reentrant) if self.remat else block(x)
        return {"logits": x @ self.embed.weight.T}


class Wrapper(nn.Module):
    """Hands everything on, as wrappers of models do."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


def toy_pair(kind="plain", **options):
    """A student of two blocks and a teacher of three, the same every time."""
    torch.manual_seed(0)
    return Toy(2, kind, **options), Toy(3, kind)


def toys(*depths):
    """Models of these depths, the same every time."""
    torch.manual_seed(0)
    return [Toy(depth) for depth in depths]


def values(model, ids, *paths):
    """Logits, and what the modules at ``paths`` return, by hooks."""
    found, handles = {}, []
    for path in paths:

        def keep(module, args, output, path=path):
            found[path] = output[0] if isinstance(output, tuple) else output

        handles.append(model.get_submodule(path).register_forward_hook(keep))
    logits = model(ids)["logits"]
    for handle in handles:
        handle.remove()
    return logits, found


def tokens(batch=3, length=7):
    return torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(1))


MAPPING = {"blocks.0.mixer": "blocks.1.mixer", "blocks.1.mlp": "blocks.2.mlp"}


def gradients(model):
    """Gradients by name; takes them off the model."""
    found = {name: p.grad for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = None
    return found


def assert_same_gradients(got, want, rtol=1e-5):
    """‖Δ‖ ≤ rtol·‖g‖ + 1e-6·max‖g‖, and None only where the other is None or zero."""
    largest = max(g.norm() for g in want.values() if g is not None)
    for name, g in want.items():
        a = torch.zeros(()) if g is None else g
        b = torch.zeros(()) if got[name] is None else got[name]
        error, bound = (a - b).norm(), rtol * a.norm() + 1e-6 * largest
        assert error <= bound, f"{name}: {error:.3e} > {bound:.3e}"


def same_step(model, found, wanted):
    """Value and gradients of two losses of one model."""
    torch.testing.assert_close(found, wanted)
    found.backward()
    ours = gradients(model)
    wanted.backward()
    assert_same_gradients(ours, gradients(model))
