"""The hooks of traced steps are made once: they go to the modules that stand there now."""

import copy

import pytest
import torch
from torch import nn

import fxdistill
from fxdistill import Match

AOT = {"backend": "aot_eager"}
X, Y = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 0])


def net():
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3))


def tables(model):
    return [
        table
        for m in model.modules()
        for table in (m._forward_hooks, m._forward_pre_hooks, m._forward_pre_hooks_with_kwargs)
    ]


@pytest.mark.parametrize("port", ["output", "input"])
def test_a_module_that_is_exchanged_between_steps_is_tapped(port):
    torch.manual_seed(0)
    student, teacher = net(), net()
    match = {"2": Match(teacher="2", student_port=port, teacher_port=port)}
    options = {"task": "classification", "logit_loss": None, "compile": AOT}
    distiller = fxdistill.wrap(student, teacher, match, **options)
    for model, i in ((student, 0), (student, 2), (teacher, 2), (teacher, 0)):
        model[i] = copy.deepcopy(model[i])
        with torch.no_grad():
            for p in model[i].parameters():
                p.add_(0.5)
        found = distiller(X, labels=Y).losses["features"]
        end = 3 if port == "output" else 2
        s, t = (m[:end](X) for m in (student, teacher))
        torch.testing.assert_close(found, (s - t).square().mean().detach())
        assert not any(tables(student) + tables(teacher))


def test_the_users_hooks_stay_and_count():
    student, teacher = net(), net()
    student[0].register_forward_hook(lambda module, args, out: out * 2)
    options = {"task": "classification", "logit_loss": None, "compile": AOT}
    distiller = fxdistill.wrap(student, teacher, {"0": "0"}, **options)
    for _ in range(2):
        found = distiller(X, labels=Y).losses["0"]
        wanted = (student[0](X) - teacher[0](X)).square().mean()
        torch.testing.assert_close(found, wanted.detach())
        assert [len(t) for t in tables(student) if t] == [1]


def test_no_hook_stays_after_an_error():
    class Fails(nn.Sequential):
        fails = False

        def forward(self, x):
            if self.fails:
                raise ValueError("as asked")
            return super().forward(x)

    student, teacher = Fails(*net()), net()
    options = {"task": "classification", "compile": AOT}
    distiller = fxdistill.wrap(student, teacher, {"0": "0"}, **options)
    distiller(X, labels=Y)
    student.fails = True
    with pytest.raises(Exception, match="as asked"):
        distiller(X, labels=Y)
    assert not any(tables(student) + tables(teacher))
    student.fails = False
    assert torch.isfinite(distiller(X, labels=Y).loss)
