"""Taps see the value at return, whatever the model does around them."""

import contextlib

import pytest
import torch

import fxdistill
from fxdistill.errors import CheckpointError, MatchWarning, PortError, TapError
from toys import KINDS, MAPPING, Toy, assert_same_gradients, gradients, tokens, toy_pair

AOT = {"backend": "aot_eager"}


def hook_oracle(student, teacher, mapping, ids):
    """Feature losses by plain hooks that clone at return."""
    seen = {}

    def keep(key):
        def hook(module, args, out):
            x = out
            while not isinstance(x, torch.Tensor):
                x = next(iter(x.values() if isinstance(x, dict) else x))
            seen.setdefault(key, []).append(x.clone())

        return hook

    handles = []
    for tower, model, paths in (("s", student, mapping), ("t", teacher, mapping.values())):
        for path in paths:
            name = path.partition("@")[0]
            handles.append(model.get_submodule(name).register_forward_hook(keep((tower, path))))
    with torch.no_grad():
        teacher.eval()(ids)
    student(ids)
    for handle in handles:
        handle.remove()
    call = {path: int(path.partition("@")[2] or 0) for path in [*mapping, *mapping.values()]}
    return {
        s: torch.nn.functional.mse_loss(seen["s", s][call[s]], seen["t", t][call[t]])
        for s, t in mapping.items()
    }


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", [False, AOT], ids=["eager", "graph"])
def test_equal_hooks(kind, remat, mode):
    student, teacher = toy_pair(kind, remat=remat)
    # Eagerly, a checkpointed BatchNorm updates its statistics a second time when it is recomputed;
    # compiled, once, like the model without checkpointing.
    reference = toy_pair(kind, remat=remat and not mode)[0]
    mapping = {**MAPPING, "blocks.0.mlp@1": "blocks.0.mlp@1"} if kind == "twice" else MAPPING
    want = hook_oracle(reference, teacher, mapping, tokens())
    (sum(want.values()) / len(want)).backward()
    distiller = fxdistill.wrap(student, teacher, mapping, logit_loss=None, compile=mode)
    # Of the kinds, one runs what is tapped without gradients, and is told so.
    warned = pytest.warns(MatchWarning, match=r"blocks\.1\.mlp.*no trainable")
    with warned if kind == "no_grad" else contextlib.nullcontext():
        out = distiller(tokens())
    out.loss.backward()
    for name, value in want.items():
        torch.testing.assert_close(out.losses[name], value.detach(), rtol=1e-5, atol=1e-7)
    assert_same_gradients(gradients(student), gradients(reference))
    for name, buffer in reference.named_buffers():
        torch.testing.assert_close(student.get_buffer(name), buffer)


@pytest.mark.parametrize("mode", [False, AOT, "regional"], ids=["eager", "graph", "regional"])
def test_no_hook_is_left(mode):
    student, teacher = toy_pair()
    distiller = fxdistill.wrap(student, teacher, MAPPING, compile=mode)
    distiller(tokens())
    with pytest.raises(IndexError):
        fxdistill.wrap(student, teacher, MAPPING, compile=False)(tokens() + 1000)
    for module in (*student.modules(), *teacher.modules()):
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_reentrant_checkpointing_is_an_error_eagerly():
    student, teacher = toy_pair(remat=True, reentrant=True)
    with pytest.raises(CheckpointError, match="use_reentrant=False"):
        fxdistill.wrap(student, teacher, MAPPING, compile=False)(tokens())


def test_reentrant_checkpointing_keeps_its_gradients_in_one_graph():
    student, teacher = toy_pair(remat=True, reentrant=True)
    reference, _ = toy_pair()
    for model, mode in ((student, AOT), (reference, False)):
        fxdistill.wrap(model, teacher, MAPPING, compile=mode)(tokens()).loss.backward()
    assert_same_gradients(gradients(student), gradients(reference))


@pytest.mark.parametrize("mode", [False, AOT], ids=["eager", "graph"])
def test_ports(mode):
    student, teacher = toy_pair("dict")
    ports = [
        fxdistill.Match("blocks.0.mixer", "blocks.1.mixer", student_port="output.hidden"),
        fxdistill.Match("blocks.1", "blocks.2", student_port="input", teacher_port="input[0]"),
    ]
    out = fxdistill.wrap(student, teacher, ports, logit_loss=None, compile=mode)(tokens())
    assert list(out.losses) == ["features", "blocks.0.mixer:output.hidden", "blocks.1:input"]
    plain = hook_oracle(student, teacher, {"blocks.0": "blocks.1"}, tokens())
    torch.testing.assert_close(out.losses["blocks.1:input"], plain["blocks.0"].detach())
    wrong = [fxdistill.Match("blocks.0.mixer", "blocks.1.mixer", student_port="output.nothing")]
    with pytest.raises(PortError, match=r"output\.nothing"):
        fxdistill.wrap(student, teacher, wrong, compile=mode)(tokens())


@pytest.mark.parametrize("mode", [False, AOT, "regional"], ids=["eager", "graph", "regional"])
def test_a_module_that_does_not_run(mode):
    student, teacher = toy_pair()
    student.spare = torch.nn.Linear(8, 8)
    with pytest.raises(TapError, match="student module 'spare' was not executed"):
        fxdistill.wrap(student, teacher, {"spare": "blocks.0.mlp"}, compile=mode)(tokens())
    mapping = {"blocks.0.mlp@1": "blocks.0.mlp"}
    with pytest.raises(TapError, match=r"call 1 of student module 'blocks\.0\.mlp'"):
        fxdistill.wrap(student, teacher, mapping, compile=mode)(tokens())


@pytest.mark.slow
def test_regional_taps_blocks_that_compile_by_themselves():
    student, teacher = toy_pair()
    mapping = {"blocks.0": "blocks.1", "blocks.1": "blocks.2"}
    ports = [fxdistill.Match("blocks.1", "blocks.1", student_port="input")]
    results = []
    for mode in (False, "regional"):
        if mode:
            for block in (*student.blocks, *teacher.blocks):
                block.compile(backend="aot_eager")
        for matches in (mapping, ports):
            out = fxdistill.wrap(student, teacher, matches, logit_loss=None, compile=mode)(tokens())
            out.loss.backward()
            results.append((out.loss.detach(), gradients(student)))
    for got, want in zip(results[2:], results[:2], strict=True):
        torch.testing.assert_close(got[0], want[0])
        assert_same_gradients(got[1], want[1])
    compiled = [block._compiled_call_impl for block in student.blocks]
    assert all("_CompiledCall" not in repr(call) for call in compiled)


def test_regional_refuses_taps_inside_a_compiled_part():
    student, teacher = toy_pair()
    student.blocks[0].compile(backend="aot_eager")
    with pytest.raises(TapError, match=r"lies inside 'blocks\.0'.*compiles by itself"):
        fxdistill.wrap(student, teacher, MAPPING, compile="regional")(tokens())


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
def test_a_reentrant_checkpoint_in_a_frozen_teacher_does_no_harm():
    student, _ = toy_pair()
    torch.manual_seed(1)
    teacher, plain = Toy(3, remat=True, reentrant=True), Toy(3)
    plain.load_state_dict(teacher.state_dict())
    got, want = (
        fxdistill.wrap(student, t, MAPPING, compile=False)(tokens()).loss for t in (teacher, plain)
    )
    torch.testing.assert_close(got, want)


def test_dropout_trains_in_the_student_only():
    torch.manual_seed(0)
    student, teacher = Toy(1, dropout=0.5), Toy(1, dropout=0.5)
    teacher.load_state_dict(student.state_dict())
    mapping = {"blocks.0": "blocks.0"}
    distiller = fxdistill.wrap(student, teacher, mapping, logit_loss=None, compile=AOT)
    first, second = (distiller.train()(tokens()).loss.item() for _ in range(2))
    assert first > 0
    assert first != second
    assert distiller.eval()(tokens()).loss.item() < 1e-12


@pytest.mark.parametrize("mode", [False, AOT], ids=["eager", "graph"])
def test_one_tower_writes_what_the_other_towers_tap_aliases(mode):
    torch.manual_seed(0)
    student = torch.nn.Sequential(torch.nn.ReLU(inplace=True), torch.nn.Linear(4, 4))
    teacher = torch.nn.Sequential(torch.nn.Linear(4, 4))
    match = [fxdistill.Match("0", "0", teacher_port="input")]
    x = torch.randn(3, 4)
    want = (x.relu() - x).square().mean()
    with pytest.warns(MatchWarning, match="no trainable parameter"):
        out = fxdistill.wrap(student, teacher, match, compile=mode)(x.clone())
    torch.testing.assert_close(out.losses["0"], want)
