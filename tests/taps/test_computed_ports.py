"""Ports that are functions: a value that no module takes or returns, with its gradient."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import fxdistill
from fxdistill import Match, errors

MODES = pytest.mark.parametrize("compile", [False, "regional", {"backend": "aot_eager"}])
HEADS, WIDTH, LENGTH = 2, 8, 5
X = torch.randn(3, LENGTH, WIDTH, generator=torch.Generator().manual_seed(0))
TAUGHT = {"logit_loss": None, "label_loss": None, "task": "causal_lm"}


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def heads(self, x):
        return (h.unflatten(-1, (HEADS, -1)).transpose(1, 2) for h in self.qkv(x).chunk(3, -1))

    def forward(self, x):
        return F.scaled_dot_product_attention(*self.heads(x), is_causal=True)


class Decaying(nn.Module):
    """A state space: h ← a·h + b(x), whose matrix a^(i−j)·scale it never makes."""

    def __init__(self):
        super().__init__()
        self.decay = nn.Parameter(torch.tensor([0.3, 0.8]))
        self.value = nn.Linear(WIDTH, WIDTH)

    def forward(self, x, *, scale):
        states, h = [], torch.zeros_like(x[:, 0])
        for token in self.value(x).unbind(1):
            h = self.decay.repeat_interleave(WIDTH // HEADS) * h + scale * token
            states.append(h)
        return torch.stack(states, 1)


class Model(nn.Module):
    def __init__(self, mixer, checkpoints=False):
        super().__init__()
        self.mixer, self.checkpoints = mixer, checkpoints

    def forward(self, x):
        options = {"scale": x.new_tensor(0.5)} if isinstance(self.mixer, Decaying) else {}
        if self.checkpoints:
            return checkpoint(self.mixer, x, use_reentrant=False, **options)
        return self.mixer(x, **options)


def matrix(module, args, kwargs, output):
    """Computed from a parameter, from an argument, from a keyword and from the output."""
    place = torch.arange(args[0].shape[1])
    apart = place[:, None] - place
    made = module.decay[:, None, None] ** apart.clamp(min=0) * (apart >= 0) * kwargs["scale"]
    return made.expand(output.shape[0], -1, -1, -1)


def pair(checkpoints=False):
    torch.manual_seed(0)
    return Model(Decaying(), checkpoints), Model(Attention())


def by_hand(student, teacher):
    """The mean over samples and heads of ‖M − A‖_F / L, entry by entry."""
    with torch.no_grad():
        q, k, _ = teacher.mixer.heads(X)
        scores = (q @ k.mT) / (WIDTH // HEADS) ** 0.5
        hidden = torch.ones(LENGTH, LENGTH).triu(1).bool()
        maps = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    total = 0.0
    for b in range(len(X)):
        for h in range(HEADS):
            square = 0.0
            for i in range(LENGTH):
                for j in range(LENGTH):
                    mine = 0.5 * student.mixer.decay[h] ** (i - j) if j <= i else 0.0
                    square = square + (mine - maps[b, h, i, j]) ** 2
            total = total + square.sqrt() / LENGTH
    loss = total / (len(X) * HEADS)
    return loss, torch.autograd.grad(loss, student.mixer.decay)[0]


def distilled(student, teacher, port, compile=False, **options):
    match = Match("mixer", "mixer", student_port=port, **options)
    return fxdistill.wrap(student, teacher, [match], compile=compile, **TAUGHT)


@MODES
@pytest.mark.parametrize("checkpoints", [False, True])
def test_a_state_space_learns_the_map_of_attention(compile, checkpoints):
    student, teacher = pair(checkpoints)
    loss, slope = by_hand(student, teacher)
    distiller = distilled(
        student, teacher, matrix, compile, loss="transfer_matrix", teacher_port="attention"
    )
    for _ in range(2):  # hooks of traced steps are made once
        student.zero_grad()
        out = distiller(X)
        out.loss.backward()
        torch.testing.assert_close(out.loss, loss)
        torch.testing.assert_close(student.mixer.decay.grad, slope)
    assert "mixer:matrix()" in out.losses
    assert not any(m._forward_hooks for m in student.modules())


@MODES
def test_a_teachers_value_is_computed_without_gradient(compile):
    student, teacher = (Model(nn.Linear(WIDTH, WIDTH)) for _ in range(2))

    def output(module, args, kwargs, output):  # called as a port of its own is: no other's tap
        assert torch.is_grad_enabled() == (module is student.mixer)
        return 2 * output

    distiller = distilled(student, teacher, output, compile, teacher_port=output)
    loss = (2 * student(X) - 2 * teacher(X)).square().mean()
    out = distiller(X)
    torch.testing.assert_close(out.loss, loss.detach())
    out.loss.backward()
    slope = torch.autograd.grad(loss, student.mixer.weight)[0]
    torch.testing.assert_close(student.mixer.weight.grad, slope)


def test_a_module_that_torch_compile_compiles_is_computed_outside():
    student, teacher = pair()
    loss, _ = by_hand(student, teacher)
    student.mixer.compile(backend="eager")
    options = {"loss": "transfer_matrix", "teacher_port": "attention"}
    torch.testing.assert_close(distilled(student, teacher, matrix, **options)(X).loss, loss)


@MODES
def test_what_is_no_tensor_is_an_error_that_names_the_port(compile):
    def nothing(module, args, kwargs, output):
        return None

    distiller = distilled(*pair(), nothing, compile)
    with pytest.raises(errors.PortError, match=r"nothing\(\).*'mixer' returned a NoneType"):
        distiller(X)


def test_two_functions_of_one_module_need_two_names():
    student, teacher = pair()
    matches = [
        Match("mixer", "mixer", student_port=port, loss=loss)
        for port, loss in ((functools.partial(matrix), "mse"), (matrix, "l1"))
    ]
    with pytest.raises(errors.PortError, match=r"two ports called 'matrix\(\)'"):
        fxdistill.resolve(student, teacher, matches)
    fxdistill.resolve(student, teacher, [*matches[1:], Match("mixer", "mixer")])


def test_no_file_holds_a_function(tmp_path):
    matches = fxdistill.resolve(*pair(), [Match("mixer", "mixer", student_port=matrix)])
    assert "mixer:matrix()" in str(matches)
    with pytest.raises(errors.MappingFileError, match=r"student_port.*matrix\(\)"):
        matches.save(tmp_path / "mapping.toml")
    assert not list(tmp_path.iterdir())
