"""Arguments of a call: each model gets what its ``forward`` takes, and nothing else."""

from typing import TypedDict

import pytest
import torch
from torch import nn
from torch.nn.parallel import DataParallel
from transformers import LlamaConfig, LlamaForCausalLM
from typing_extensions import Unpack

import fxdistill
from fxdistill import errors
from fxdistill.models.binding import may_read
from toys import Wrapper

MODES = [False, "regional", {"backend": "aot_eager"}]
X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
DOMAIN = torch.tensor([0, 1, 2, 0])


class WithDomain(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.domains = nn.Linear(6, 3), nn.Embedding(5, 3)

    def forward(self, x, domain):
        return self.linear(x) + self.domains(domain)


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 3)

    def forward(self, x):
        return self.linear(x)


class TakesAll(Plain):
    def __init__(self):
        super().__init__()
        self.seen = None

    def forward(self, x, **others):
        self.seen = set(others)
        return self.linear(x)


def towers(student=WithDomain, teacher=Plain):
    torch.manual_seed(0)
    return student(), teacher()


@pytest.mark.parametrize("compile", MODES)
def test_an_input_of_the_student_alone_stays_from_the_teacher(compile):
    student, teacher = towers()
    out = fxdistill.wrap(student, teacher, compile=compile)(x=X, domain=DOMAIN, labels=DOMAIN)
    z, t = student(X, DOMAIN), teacher(X)
    want = (t.softmax(-1) * (t.log_softmax(-1) - z.log_softmax(-1))).sum(-1).mean()
    torch.testing.assert_close(out.losses["logits"], want.detach())
    want = want + nn.functional.cross_entropy(z, DOMAIN)
    torch.testing.assert_close(out.loss, want)
    out.loss.backward()
    assert student.domains.weight.grad is not None


@pytest.mark.parametrize("compile", MODES[:1])
def test_an_input_of_the_teacher_alone_stays_from_the_student(compile):
    student, teacher = towers(Plain, WithDomain)
    out = fxdistill.wrap(student, teacher, compile=compile)(x=X, domain=DOMAIN)
    z, t = student(X), teacher(X, DOMAIN)
    want = (t.softmax(-1) * (t.log_softmax(-1) - z.log_softmax(-1))).sum(-1).mean()
    torch.testing.assert_close(out.loss, want)


def test_own_inputs_of_either_side():
    student, teacher = towers(WithDomain, WithDomain)
    other = DOMAIN.flip(0)
    distiller = fxdistill.wrap(student, teacher, compile=False)
    out = distiller(x=X, student_inputs={"domain": DOMAIN}, teacher_inputs={"domain": other})
    z, t = student(X, DOMAIN), teacher(X, other)
    want = (t.softmax(-1) * (t.log_softmax(-1) - z.log_softmax(-1))).sum(-1).mean()
    torch.testing.assert_close(out.loss, want)


def test_a_keyword_that_no_model_takes_is_named():
    distiller = fxdistill.wrap(*towers(), compile=False)
    with pytest.raises(errors.BatchError, match=r"no model takes 'domian'.*Nearest: 'domain'"):
        distiller(x=X, domian=DOMAIN)
    with pytest.raises(errors.BatchError, match=r"no model takes 'loss_masks'.*'loss_mask'"):
        distiller(x=X, domain=DOMAIN, loss_masks=DOMAIN)


def test_a_model_that_takes_any_keyword_gets_them_all():
    student, teacher = towers(WithDomain, TakesAll)
    fxdistill.wrap(student, teacher, compile=False)(x=X, domain=DOMAIN)
    assert teacher.seen == {"domain"}


@pytest.mark.parametrize("name", ["domains", "label", "los_mask", "num_itens", "teacher_input"])
def test_a_slip_is_named_though_a_model_takes_any_keyword(name):
    distiller = fxdistill.wrap(*towers(WithDomain, TakesAll), compile=False)
    with pytest.raises(errors.BatchError, match=f"no model takes '{name}'"):
        distiller(x=X, domain=DOMAIN, **{name: DOMAIN})


@pytest.mark.parametrize("wrapper", [Wrapper, DataParallel])
def test_a_wrapper_takes_what_its_model_takes(wrapper):
    student, teacher = towers()
    distiller = fxdistill.wrap(student, wrapper(teacher), compile=False)
    assert torch.isfinite(distiller(x=X, domain=DOMAIN).loss)


def test_a_forward_that_was_replaced_on_the_instance_is_read():
    student, teacher = towers()
    plain = teacher.forward
    teacher.forward = lambda x, domain: plain(x) + domain.unsqueeze(-1)
    out = fxdistill.wrap(student, teacher, compile=False)(x=X, domain=DOMAIN)
    z, t = student(X, DOMAIN), teacher(X, domain=DOMAIN)
    want = (t.softmax(-1) * (t.log_softmax(-1) - z.log_softmax(-1))).sum(-1).mean()
    torch.testing.assert_close(out.loss, want)


@pytest.mark.parametrize("compile", [False, {"backend": "aot_eager"}])
def test_a_place_that_a_model_does_not_have_stays_from_it(compile):
    student, teacher = towers()
    out = fxdistill.wrap(student, teacher, compile=compile)(X, DOMAIN)
    z, t = student(X, DOMAIN), teacher(X)
    want = (t.softmax(-1) * (t.log_softmax(-1) - z.log_softmax(-1))).sum(-1).mean()
    torch.testing.assert_close(out.loss, want)


@pytest.mark.parametrize("compile", MODES)
@pytest.mark.parametrize(
    ("args", "call", "says"),
    [
        ((), {"x": X}, r"the student \(WithDomain\) needs 'domain': forward\(x, domain\)"),
        ((X,), {"x": X, "domain": DOMAIN}, "gets 'x' twice, by position and by name"),
        ((X, DOMAIN, X), {}, "3 inputs are given by position, and no model takes more than 2"),
        ((X, DOMAIN), {"teacher_inputs": {"y": X}}, r"the teacher \(Plain\) takes no 'y'"),
        ((X, DOMAIN), {"teacher_inputs": X}, "teacher_inputs is a Tensor: a dict of that model's"),
    ],
    ids=["missing", "twice", "too many", "unknown", "no dict"],
)
def test_inputs_that_do_not_fit_a_forward_name_the_model(compile, args, call, says):
    distiller = fxdistill.wrap(*towers(), compile=compile)
    for _ in range(2):  # what fitted once is not looked at again; what did not fit, is
        with pytest.raises(errors.BatchError, match=says):
            distiller(*args, **call)
    assert torch.isfinite(distiller(X, DOMAIN).loss)


class Names(TypedDict, total=False):
    """What the keywords of a model may be called."""

    window: int


class Typed(Plain):
    def forward(self, x, **others: Unpack[Names]):
        return super().forward(x)


class Within(nn.Module):
    """Hands its keywords on to a module that names more of them."""

    def __init__(self):
        super().__init__()
        self.inner = WithDomain()

    def forward(self, x, **others: Unpack[Names]):
        return self.inner(x, others["domain"])


def test_names_behind_annotated_keywords_are_known():
    distiller = fxdistill.wrap(*towers(Typed, Plain), compile=False)
    with pytest.raises(errors.BatchError, match="no model takes 'mask'"):
        distiller(x=X, mask=X)
    distiller(x=X, window=3)
    inside = fxdistill.wrap(*towers(Within, Plain), compile=False)
    assert torch.isfinite(inside(x=X, domain=DOMAIN).loss)
    with pytest.raises(errors.BatchError, match="no model takes 'mask'"):
        inside(x=X, domain=DOMAIN, mask=X)


def test_a_mask_by_another_name_is_not_swallowed_by_transformers():
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=9, num_hidden_layers=1, **sizes)
    student, teacher = LlamaForCausalLM(config), LlamaForCausalLM(config)
    distiller = fxdistill.wrap(student, teacher, compile=False)
    ids = torch.tensor([[1, 2, 3]])
    for name in ("mask", "attn_mask", "padding_mask", "domain"):
        with pytest.raises(errors.BatchError, match=f"no model takes '{name}'"):
            distiller(input_ids=ids, **{name: ids})
    distiller(input_ids=ids, is_causal=False, output_attentions=False, token_type_ids=ids)
    # An attention that somebody registered may read anything.
    teacher.config._attn_implementation_internal = "of_my_own"
    assert may_read(teacher, "domain")


def test_names_are_those_of_the_modules_within_this_model():
    """Two models of one class may hold modules that read other names."""
    other = Within()
    other.inner = Plain()
    assert may_read(Within(), "domain")
    assert not may_read(other, "domain")
