"""Projections and layouts in a whole step: value and gradient against plain hooks and einsum."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import fxdistill
from architectures import ARCHITECTURES
from fxdistill import Match, errors
from toys import assert_same_gradients

AOT = {"backend": "aot_eager"}
MODES = pytest.mark.parametrize(
    "mode",
    [False, AOT, pytest.param("regional", marks=pytest.mark.slow)],  # compiles with Inductor
    ids=["eager", "graph", "regional"],
)
# transformers asks for versions in forward(), through a cache that dynamo warns about.
pytestmark = pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")


def build(name: str, layers: int, width: int = 32) -> nn.Module:
    torch.manual_seed(layers)
    return ARCHITECTURES[name].build(layers, width)


@pytest.fixture
def llamas() -> tuple[nn.Module, nn.Module]:
    return build("LlamaForCausalLM", 2, 16), build("LlamaForCausalLM", 4, 32)


def batch(length: int = 9) -> dict[str, Tensor]:
    ids = torch.randint(3, 96, (2, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, -3:] = 0
    return {"input_ids": ids, "attention_mask": mask}


@contextmanager
def hooked(model: nn.Module, paths: list[str]) -> Iterator[dict[str, Tensor]]:
    """What modules return, by plain hooks."""
    seen: dict[str, Tensor] = {}

    def keep(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            while not isinstance(output, Tensor):
                output = output[0]
            seen[path] = output.clone()

        return hook

    handles = [model.get_submodule(path).register_forward_hook(keep(path)) for path in paths]
    yield seen
    for handle in handles:
        handle.remove()


def features(
    student: nn.Module, teacher: nn.Module, pairs: list[tuple[str, str]], inputs: Mapping[str, Any]
) -> list[tuple[Tensor, Tensor]]:
    with (
        hooked(student, [s for s, _ in pairs]) as ours,
        hooked(teacher, [t for _, t in pairs]) as theirs,
    ):
        with torch.no_grad():
            teacher.eval()(**inputs)
        student(**inputs)
    return [(ours[s], theirs[t]) for s, t in pairs]


def gradients(module: nn.Module) -> dict[str, Tensor | None]:
    found = {name: p.grad for name, p in module.named_parameters()}
    module.zero_grad(set_to_none=True)
    return found


def compare(distiller: Any, wanted: Tensor, inputs: Mapping[str, Any]) -> None:
    """The feature term, and the gradients of student and projections."""
    modules = nn.ModuleList([distiller.student, distiller.projections])
    wanted.backward()
    reference = gradients(modules)
    out = distiller(**inputs)
    out.loss.backward()
    torch.testing.assert_close(out.losses["features"], wanted.detach(), rtol=1e-5, atol=1e-7)
    assert_same_gradients(gradients(modules), reference)


@MODES
def test_proposed_projections_equal_plain_linear_algebra(llamas: Any, mode: Any) -> None:
    student, teacher = llamas
    mapping = fxdistill.match(student, teacher)
    distiller = fxdistill.wrap(student, teacher, mapping, logit_loss=None, compile=mode)
    inputs = batch()
    values = features(student, teacher, [(m.student, m.teacher) for m in mapping], inputs)
    kept = inputs["attention_mask"].bool()
    losses = []
    for (s, t), linear in zip(values, distiller.projections, strict=True):
        projected = torch.einsum("bli,oi->blo", s, linear.weight) + linear.bias
        losses.append(F.mse_loss(projected[kept], t[kept]))
    compare(distiller, sum(losses) / len(losses), inputs)


@MODES
@pytest.mark.parametrize("reduction", ["mean", "max"])
def test_pooling_skips_padding(llamas: Any, mode: Any, reduction: str) -> None:
    student, teacher = llamas[0], build("LlamaForCausalLM", 3, 16)
    pool = ("b l d -> b d", reduction)
    mapping = {"model.layers.1": Match(teacher="model.layers.2", reduce=pool)}
    distiller = fxdistill.wrap(student, teacher, mapping, logit_loss=None, compile=mode)
    inputs = batch()
    ((s, t),) = features(student, teacher, [("model.layers.1", "model.layers.2")], inputs)
    lengths = inputs["attention_mask"].sum(1).tolist()
    rows = [(a[:n], b[:n]) for a, b, n in zip(s, t, lengths, strict=True)]
    of = {"mean": lambda x: x.mean(0), "max": lambda x: x.amax(0)}[reduction]
    compare(distiller, sum(F.mse_loss(of(a), of(b)) for a, b in rows) / len(rows), inputs)


@pytest.fixture
def vision() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    cnn = hf.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=5
    )
    vit = hf.ViTConfig(
        image_size=32,
        patch_size=8,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_labels=5,
    )
    return hf.ResNetForImageClassification(cnn), hf.ViTForImageClassification(vit)


def images() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))}


@MODES
@pytest.mark.parametrize("examples", [False, True])
def test_a_map_meets_tokens_by_a_convolution(vision: Any, mode: Any, examples: bool) -> None:
    student, teacher = vision
    stage, layer = "resnet.encoder.stages.1", "vit.layers.1"
    layouts = ("b c h w -> b c h w", "b (1 + h w) c -> b c h w")
    mapping = {stage: Match(teacher=layer, rearrange=layouts, project="auto")}
    inputs = images()
    distiller = fxdistill.wrap(
        student,
        teacher,
        mapping,
        logit_loss=None,
        compile=mode,
        example_inputs=inputs if examples else None,
    )
    (conv,) = distiller.projections
    assert isinstance(conv, nn.Conv2d)
    assert conv.weight.shape == (32, 16, 1, 1)
    student.eval(), distiller.eval()
    ((s, t),) = features(student, teacher, [(stage, layer)], inputs)
    projected = torch.einsum("bihw,oi->bohw", s, conv.weight[:, :, 0, 0]) + conv.bias[:, None, None]
    target = t[:, 1:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    compare(distiller, (projected - target).square().mean(), inputs)


@MODES
def test_tokens_drop_the_class_token_and_pool(vision: Any, mode: Any) -> None:
    student, teacher = vision
    mapping = {
        "resnet.encoder": Match(
            teacher="vit.layernorm",
            rearrange=("b c h w -> b (h w) c", "b (1 + n) c -> b n c"),
            reduce=("b n c -> b c", "mean"),
            project="linear",
        )
    }
    inputs = images()
    distiller = fxdistill.wrap(student, teacher, mapping, logit_loss=None, compile=mode).eval()
    (linear,) = distiller.projections
    ((s, t),) = features(student, teacher, [("resnet.encoder", "vit.layernorm")], inputs)
    wanted = F.mse_loss(F.linear(s.mean((2, 3)), linear.weight, linear.bias), t[:, 1:].mean(1))
    compare(distiller, wanted, inputs)


@pytest.mark.slow
def test_layouts_follow_other_shapes_without_more_graphs(llamas: Any) -> None:
    student, teacher = llamas
    del teacher.model.layers[2:]
    pool, flat = ("b l d -> b d", "mean"), "b l d -> (b l) d"
    mapping = {
        "model.layers.0": Match(teacher="model.layers.0", reduce=pool, project="auto"),
        "model.layers.1": Match(teacher="model.layers.1", rearrange=flat, project="auto"),
    }
    torch.manual_seed(0)
    graph = fxdistill.wrap(student, teacher, mapping, compile=AOT)
    eager = fxdistill.wrap(student, teacher, mapping, compile=False)
    eager.projections.load_state_dict(graph.projections.state_dict())
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for length in (9, 11, 13, 6):
        got, want = graph(**batch(length)), eager(**batch(length))
        torch.testing.assert_close(got.loss, want.loss, rtol=1e-5, atol=1e-7)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - before <= 2


class Convolved(nn.Module):
    """A convolution over 1, 2 or 3 axes, whose output has as many samples as channels."""

    def __init__(self, convolution: Any, width: int) -> None:
        super().__init__()
        self.conv, self.head = convolution(3, width, 1), nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).flatten(2).mean(-1))


@pytest.mark.parametrize("port", ["output", "input"])
@pytest.mark.parametrize("examples", [False, True], ids=["structure", "examples"])
@pytest.mark.parametrize(
    ("convolution", "places"),
    [(nn.Conv1d, (7,)), (nn.ConvTranspose2d, (2, 4)), (nn.Conv3d, (2, 4, 5))],
)
def test_maps_are_projected_over_their_channels_in_any_number_of_axes(
    convolution: Any, places: tuple[int, ...], examples: bool, port: str
) -> None:
    """With as many samples as channels, a convolution of other axes would mix the samples."""
    torch.manual_seed(0)
    student, teacher = Convolved(convolution, 5), Convolved(convolution, 6)
    width = 5 if port == "output" else 3
    x = torch.randn(
        width, 3, *places, requires_grad=True
    )  # else a match of the input teaches nothing
    match = Match("conv", "conv", loss="mse", project="linear", student_port=port)
    distiller = fxdistill.wrap(
        student,
        teacher,
        [match],
        logit_loss=None,
        label_loss=None,
        compile=False,
        example_inputs=(x,) if examples else None,
    )
    (made,) = distiller.projections
    assert type(made) is [nn.Conv1d, nn.Conv2d, nn.Conv3d][len(places) - 1]
    value = student.conv(x) if port == "output" else x
    linear = torch.einsum("oc,bc...->bo...", made.weight.flatten(1), value)
    wanted = linear + made.bias.reshape(-1, *(1,) * len(places))
    out = distiller(x)
    torch.testing.assert_close(out.loss, F.mse_loss(wanted, teacher.conv(x)))


def test_auto_makes_a_layer_only_where_widths_differ() -> None:
    student, teacher = build("LlamaForCausalLM", 1, 32), build("LlamaForCausalLM", 2, 32)
    path = "model.layers.0.mlp"
    for project, count in (("auto", 0), ("linear", 1), (None, 0)):
        mapping = {path: Match(teacher=path, project=project)}
        assert len(fxdistill.wrap(student, teacher, mapping).projections) == count


def test_a_projection_starts_as_torch_starts_it_and_can_be_shared(llamas: Any) -> None:
    student, teacher = llamas
    shared = nn.Linear(16, 32)
    mapping = {"model.layers.{i}.mlp": Match(teacher="model.layers.{2*i+1}.mlp", project=shared)}
    distiller = fxdistill.wrap(student, teacher, mapping, logit_loss=None, compile=False)
    assert list(distiller.projections) == [shared]
    distiller(**batch()).loss.backward()
    assert shared.weight.grad is not None
    own = fxdistill.wrap(student, teacher, fxdistill.match(student, teacher)).projections
    assert len({id(module) for module in own}) == 4
    bound = 16**-0.5
    for module in own:
        for parameter in module.parameters():
            assert parameter.abs().max() <= bound
            assert parameter.abs().max() > 0.5 * bound


def test_projections_are_the_distillers_and_not_the_students(llamas: Any) -> None:
    student, teacher = llamas
    keys = list(student.state_dict())
    mapping = fxdistill.match(student, teacher, roles="mlp")
    distiller = fxdistill.wrap(student, teacher, mapping)
    ours = {id(p) for p in distiller.projections.parameters()}
    assert ours <= {id(p) for p in distiller.parameters()}
    assert not ours & {id(p) for p in student.parameters()}
    first, second = distiller.param_groups(lr=1.0)
    assert {id(p) for p in second["params"]} == ours
    assert not ours & {id(p) for p in first["params"]}
    assert list(student.state_dict()) == keys
    assert any(key.startswith("projections.") for key in distiller.state_dict())


def test_a_projection_takes_dtype_and_device_of_what_it_projects(llamas: Any) -> None:
    student, teacher = llamas
    mapping = fxdistill.match(student, teacher, roles="mixer")
    half = fxdistill.wrap(student.bfloat16(), teacher, mapping)
    assert {p.dtype for p in half.projections.parameters()} == {torch.bfloat16}
    meta = fxdistill.wrap(student.to("meta"), teacher.to("meta"), mapping)
    assert {p.device.type for p in meta.projections.parameters()} == {"meta"}


@pytest.mark.parametrize("kind", ["meta", "fake"])
def test_models_without_values_get_projections_without_values(kind: str) -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta") if kind == "meta" else FakeTensorMode():
            student, teacher = build("LlamaForCausalLM", 2, 16), build("LlamaForCausalLM", 4, 32)
    finally:
        torch.set_default_dtype(torch.float32)
    weight = next(student.parameters())
    with weight.fake_mode if isinstance(weight, FakeTensor) else nullcontext():
        distiller = fxdistill.wrap(student, teacher, fxdistill.match(student, teacher))
    parameters = list(distiller.projections.parameters())
    assert parameters
    assert {p.dtype for p in parameters} == {torch.bfloat16}
    if kind == "meta":
        assert all(p.is_meta for p in parameters)
    else:
        assert all(isinstance(p, FakeTensor) for p in parameters)


def test_a_step_of_models_without_weights_is_checked() -> None:
    with torch.device("meta"):
        student, teacher = build("LlamaForCausalLM", 2, 16), build("LlamaForCausalLM", 4, 32)
    inputs = {name: tensor.to("meta") for name, tensor in batch().items()}
    inputs["labels"] = inputs["input_ids"]
    distiller = fxdistill.wrap(student, teacher, fxdistill.match(student, teacher))
    program = distiller.check(**inputs)
    assert program.history[-1].name == "PruneTeacher"
    for projection in distiller.projections:
        projection.to(torch.float64)
    with pytest.raises(errors.DtypeError, match=r"is torch\.float64, and the student's value"):
        distiller.check(**inputs)


def test_a_projection_that_is_nothing_is_an_option_error(llamas: Any) -> None:
    mapping = {"model.norm": Match(teacher="model.norm", project="conv")}
    with pytest.raises(errors.OptionError, match=r"project='conv'.*'linear'.*'auto'"):
        fxdistill.wrap(*llamas, mapping)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_match_proposes_trains(name: str) -> None:
    """Every architecture: narrower and shallower student, projections by structure alone."""
    student, teacher = build(name, 1, 32), build(name, 2, 64)
    architecture = ARCHITECTURES[name]
    mapping = fxdistill.match(student, teacher)
    distiller = fxdistill.wrap(student, teacher, mapping, logit_loss=None, compile=False)
    out = distiller(**architecture.batch(7))
    out.loss.backward()
    assert len(out.losses) == len(mapping) + 1
    assert all(p.grad is not None for p in distiller.projections.parameters())


def test_a_layer_behind_the_blocks_of_a_stage_makes_its_width() -> None:
    """A stage of Swin returns what its last layer makes: half the places, twice the channels."""
    torch.manual_seed(0)
    sizes = {"image_size": 32, "patch_size": 4, "depths": [1, 1], "num_heads": [2, 2]}
    student, teacher = (
        hf.SwinForImageClassification(hf.SwinConfig(embed_dim=width, window_size=4, **sizes))
        for width in (16, 24)
    )
    pixels = torch.randn(2, 3, 32, 32)
    for path, widths in {
        "swin.encoder.layers.0": (32, 48),
        "swin.encoder.layers.0.blocks.0": (16, 24),
        "swin.encoder.layers.1": (32, 48),
        "swin.encoder": (32, 48),
    }.items():
        match = Match(path, path, project="auto")
        distiller = fxdistill.wrap(student, teacher, [match], logit_loss=None, compile=False)
        (layer,) = distiller.projections
        assert (layer.in_features, layer.out_features) == widths
        assert distiller(pixel_values=pixels).loss > 0
