"""The public face: errors, life cycle, outputs."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from transformers import XLMConfig, XLMWithLMHeadModel, XLNetConfig, XLNetLMHeadModel

import fxdistill
from fxdistill import errors
from fxdistill.losses.names import FEATURE_LOSSES, OF_ATTENTION
from toys import MAPPING, WIDTH, Toy, gradients, tokens, toy_pair

AOT = {"backend": "aot_eager"}
MODES = pytest.mark.parametrize("mode", [False, AOT], ids=["eager", "graph"])


def test_an_unknown_path_names_the_nearest():
    with pytest.raises(errors.PathError, match=r"blocks\.0\.mixer"):
        fxdistill.wrap(*toy_pair(), {"blocks.0.mixr": "blocks.1.mixer"})


def test_unequal_counts():
    with pytest.raises(errors.CountError, match=r"matches 2 .*blocks\.1\.mlp.* 3 "):
        fxdistill.wrap(*toy_pair(), {"blocks.*.mlp": "blocks.*.mlp"})


def test_patterns_pair_in_natural_order():
    student, teacher = Toy(11), Toy(11)
    distiller = fxdistill.wrap(student, teacher, {"blocks.*.mlp": "blocks.*.mlp"})
    assert [t.name for t in distiller.objective.features] == [f"blocks.{i}.mlp" for i in range(11)]


@pytest.mark.parametrize(
    "options",
    [
        {"feature_loss": "mes"},
        {"logit_loss": "kl"},
        {"task": "language"},
        {"compile": "region"},
        {"compile": {"bakend": "inductor"}},
        {"outputs": ("hidden",)},
    ],
)
def test_unknown_options(options):
    with pytest.raises(errors.OptionError):
        fxdistill.wrap(*toy_pair(), MAPPING, **options)


def test_a_student_without_trainable_parameters():
    student, teacher = toy_pair()
    with pytest.raises(errors.FrozenStudentError):
        fxdistill.wrap(student.requires_grad_(False), teacher)


@MODES
def test_a_width_clash(mode):
    student, teacher = toy_pair()
    teacher.blocks[1].mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH))
    with pytest.raises(errors.ShapeError, match=r"\[3, 7, 8\].*\[3, 7, 16\].*project"):
        fxdistill.wrap(student, teacher, {"blocks.0.mlp": "blocks.1.mlp.0"}, compile=mode)(tokens())


@MODES
def test_logits_that_cannot_be_found(mode):
    class Headless(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            return {"hidden": self.linear(x)}

    with pytest.raises(errors.LogitsError, match="logit_loss=None"):
        fxdistill.wrap(Headless(), Headless(), compile=mode)(torch.randn(2, 4))


@MODES
def test_labels_without_a_task(mode):
    with pytest.raises(errors.TaskError, match="causal_lm"):
        fxdistill.wrap(*toy_pair(), compile=mode)(tokens(), labels=tokens())


@MODES
def test_labels_of_another_shape(mode):
    distiller = fxdistill.wrap(*toy_pair(), task="causal_lm", compile=mode)
    with pytest.raises(errors.BatchError, match="labels"):
        distiller(tokens(), labels=tokens(2, 7))


def test_a_batch_on_the_wrong_device():
    with pytest.raises(errors.DeviceError, match="meta"):
        fxdistill.wrap(*toy_pair())(tokens().to("meta"))


def test_a_teacher_on_another_device():
    student, teacher = toy_pair()
    with pytest.raises(errors.DeviceError, match="teacher on meta"):
        fxdistill.wrap(student, teacher.to("meta"))(tokens())
    distiller = fxdistill.wrap(*toy_pair(), task="causal_lm")
    with pytest.raises(errors.DeviceError, match="labels on meta"):
        distiller(tokens(), labels=tokens().to("meta"))


def test_projections_and_inputs_of_the_teacher_on_another_device():
    project = nn.Linear(WIDTH, WIDTH, device="meta")
    mapping = {"blocks.0.mlp": fxdistill.Match(teacher="blocks.1.mlp", project=project)}
    with pytest.raises(errors.DeviceError, match="projection 0 on meta"):
        fxdistill.wrap(*toy_pair(), mapping)(tokens())
    with pytest.raises(errors.DeviceError, match="teacher is on cpu, but ids on meta"):
        fxdistill.wrap(*toy_pair())(tokens(), teacher_inputs={"ids": tokens().to("meta")})


def test_one_module_under_two_paths():
    student, teacher = toy_pair()
    student.blocks[1] = student.blocks[0]
    mapping = {"blocks.*.mlp": "blocks.*.mlp"}
    del teacher.blocks[2]
    with pytest.raises(errors.PathError, match=r"one module.*blocks\.0\.mlp@1"):
        fxdistill.wrap(student, teacher, mapping)
    mapping = {"blocks.0.mlp": "blocks.0.mlp", "blocks.0.mlp@1": "blocks.1.mlp"}
    out = fxdistill.wrap(student, teacher, mapping, compile=False)(tokens())
    assert out.losses["blocks.0.mlp"] != out.losses["blocks.0.mlp@1"]


def test_options_that_nothing_would_read():
    def nothing(program):
        return program

    for options in (
        {"compile": "regional", "passes": (nothing,)},
        {"compile": False, "passes": (nothing,)},
        {"compile": {"backend": "aot_eager", "options": {"epilogue_fusion": False}}},
        {"compile": {"backend": "aot_eager", "mode": "max-autotune"}},
    ):
        with pytest.raises(errors.OptionError):
            fxdistill.wrap(*toy_pair(), **options)


def test_wrap_keeps_the_modes_of_the_students_parts():
    student, teacher = toy_pair("batchnorm")
    student.train().blocks[0].norm.eval()
    fxdistill.wrap(student, teacher, MAPPING, compile=False)(tokens())
    assert student.training
    assert not student.blocks[0].norm.training


def test_examples_are_checked_in_wrap_and_nothing_is_changed():
    student, teacher = toy_pair()
    teacher.blocks[0].mlp = nn.Linear(WIDTH, WIDTH, bias=False)
    teacher.train()
    before = copy.deepcopy(student.state_dict())
    fxdistill.wrap(student, teacher, MAPPING, example_inputs=(tokens(),))
    teacher.train()
    teacher.blocks[2].mlp = nn.Linear(WIDTH, 2 * WIDTH)
    with pytest.raises(fxdistill.FxDistillError):
        fxdistill.wrap(student, teacher, MAPPING, example_inputs=(tokens(),))
    assert all(module.training for module in teacher.modules())
    for name, value in student.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.filterwarnings("ignore:the frozen teacher holds:fxdistill.errors.MatchWarning")
def test_shared_modules_with_dropout_conflict():
    student = Toy(2, dropout=0.1)
    teacher = Toy(2)
    teacher.blocks = student.blocks
    distiller = fxdistill.wrap(student.eval(), teacher, compile=False)
    distiller(tokens())
    with pytest.raises(errors.ModeError, match="Dropout"):
        distiller.train()
    assert not any(module.training for module in student.modules())
    with pytest.raises(errors.ModeError, match="Dropout"):
        fxdistill.wrap(student.train(), teacher, compile=False)


@pytest.mark.filterwarnings("ignore:the frozen teacher holds:fxdistill.errors.MatchWarning")
def test_a_mode_conflict_changes_no_mode():
    student, teacher = Toy(2, dropout=0.1), Toy(2)
    teacher.blocks = student.blocks
    distiller = fxdistill.wrap(student.eval(), teacher, compile=False)
    teacher.train()
    with pytest.raises(errors.ModeError, match="Dropout"):
        distiller(tokens())
    assert all(module.training for module in teacher.modules())


@pytest.mark.filterwarnings("ignore:the frozen teacher holds:fxdistill.errors.MatchWarning")
def test_shared_modules_without_dropout_are_fine():
    student = Toy(2)
    teacher = Toy(2)
    teacher.blocks = student.blocks
    distiller = fxdistill.wrap(
        student.train(), teacher, {"blocks.0.mlp": "blocks.1.mlp"}, compile=AOT
    )
    distiller(tokens()).loss.backward()
    assert student.blocks.training


@pytest.mark.parametrize("mode", [False, AOT, "regional"], ids=["eager", "graph", "regional"])
def test_the_student_is_not_touched(mode):
    student, teacher = toy_pair()
    kinds = {name: type(m) for name, m in student.named_modules()}
    ids = {name: id(p) for name, p in student.named_parameters()}
    keys = list(student.state_dict())
    distiller = fxdistill.wrap(student, teacher, MAPPING, compile=mode)
    distiller(tokens()).loss.backward()
    assert {name: type(m) for name, m in student.named_modules()} == kinds
    assert {name: id(p) for name, p in student.named_parameters()} == ids
    assert list(student.state_dict()) == keys
    assert distiller.student is student


def test_state_dict_holds_student_and_projections():
    student, teacher = toy_pair()
    projection = nn.Linear(WIDTH, WIDTH)
    mapping = {"blocks.0.mlp": fxdistill.Match(teacher="blocks.1.mlp", project=projection)}
    distiller = fxdistill.wrap(student, teacher, mapping, compile=AOT)
    out = distiller(tokens())
    out.loss.backward()
    assert projection.weight.grad is not None
    assert projection.weight.grad.norm() > 0
    state = distiller.state_dict()
    assert {key.split(".")[0] for key in state} == {"student", "projections"}
    other = fxdistill.wrap(*toy_pair(), mapping, compile=False)
    other.load_state_dict(state)
    names = {id(p) for p in distiller.parameters()}
    assert not names & {id(p) for p in teacher.parameters()}
    assert [len(g["params"]) for g in distiller.param_groups(lr=1.0)][1] == 2


def test_to_moves_the_teacher_too():
    distiller = fxdistill.wrap(*toy_pair(), MAPPING, compile=False).double()
    assert distiller.teacher.embed.weight.dtype == torch.float64
    assert distiller(tokens()).loss.dtype == torch.float64


def test_an_unfrozen_teacher_is_trained():
    student, teacher = toy_pair()
    distiller = fxdistill.wrap(student, teacher, MAPPING, freeze_teacher=False, compile=AOT)
    distiller(tokens()).loss.backward()
    assert gradients(teacher)["blocks.1.mixer.linear.weight"].norm() > 0


def test_a_frozen_teacher_gets_no_gradient():
    student, teacher = toy_pair()
    fxdistill.wrap(student, teacher, MAPPING, compile=AOT)(tokens()).loss.backward()
    assert all(g is None for g in gradients(teacher).values())
    assert all(p.requires_grad for p in teacher.parameters())


def test_output_is_a_mapping_that_survives_rebuilding():
    out = fxdistill.wrap(*toy_pair(), MAPPING, compile=False, outputs=("logits",))(tokens())
    assert out["loss"] is out.loss is out[0]
    again = type(out)(dict(out))
    assert again.loss is out.loss
    assert list(again) == ["loss", "losses", "logits", "metrics"]
    again.loss = out.loss * 2
    assert again["loss"] is again[0]
    doubled = tree_map(lambda t: t * 2, out)
    assert torch.equal(doubled.losses["logits"], out.losses["logits"] * 2)
    assert out.logits.shape == (3, 7, 50)
    assert not out.logits.requires_grad
    with pytest.raises(AttributeError, match="loss"):
        out.nothing  # noqa: B018


@MODES
def test_no_term_at_all(mode):
    student, teacher = toy_pair()
    distiller = fxdistill.wrap(student, teacher, logit_loss=None, compile=mode)
    with pytest.warns(errors.MatchWarning, match="no term is in the loss"):
        out = distiller(tokens())
    out.loss.backward()
    assert out.loss.item() == 0
    assert not out.losses
    distiller(tokens())  # warned of once


def test_a_distiller_can_be_pickled_and_copied():
    distiller = fxdistill.wrap(*toy_pair(), MAPPING, compile=AOT)
    want = distiller(tokens()).loss
    for other in (copy.deepcopy(distiller), pickle.loads(pickle.dumps(distiller))):
        torch.testing.assert_close(other(tokens()).loss, want)


class NoSync(TorchDispatchMode):
    """Forbids what would make the host wait for the device."""

    BANNED = ("_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "unique")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")[1]
        assert not name.startswith(self.BANNED), f"{name} synchronises"
        return func(*args, **(kwargs or {}))


def test_a_step_does_not_synchronise():
    student, teacher = toy_pair()
    distiller = fxdistill.wrap(student, teacher, MAPPING, task="causal_lm", compile=False)
    mask = torch.ones(3, 7)
    with NoSync():
        ids = tokens()
        out = distiller(ids, labels=ids, loss_mask=mask, num_items=7)
        out.loss.backward()
        distiller.set(temperature=2.0, feature_weight=torch.tensor(0.5))
        distiller(ids, labels=ids, num_items=torch.tensor(9)).loss.backward()


def test_the_graph_does_not_synchronise():
    distiller = fxdistill.wrap(*toy_pair(), MAPPING, task="causal_lm", compile=AOT)
    distiller(tokens(), labels=tokens(), num_items=7).loss.backward()
    targets = " ".join(str(node.target) for node in distiller.program.gm.graph.nodes)
    assert not any(word in targets for word in (".item", "nonzero", "_local_scalar_dense"))


def test_a_frozen_teacher_that_switches_gradients_on_gets_none():
    class Stubborn(nn.Linear):
        def forward(self, x):
            with torch.enable_grad():
                return super().forward(x)

    student, teacher = nn.Linear(4, 4), Stubborn(4, 4)
    fxdistill.wrap(student, teacher, compile=False)(torch.randn(2, 4)).loss.backward()
    assert teacher.weight.grad is None


def test_the_class_says_the_task_before_the_checkpoint_does():
    from transformers import BartConfig, BartForSequenceClassification, BertConfig
    from transformers import BertForSequenceClassification as Classifier

    from fxdistill.models.conventions import find_task

    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    bert = Classifier(BertConfig(**small, intermediate_size=8, vocab_size=9))
    bert.config.architectures = ["BertForMaskedLM"]
    assert find_task(bert, "auto") == "classification"
    sizes = {"d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 9}
    heads = {"encoder_attention_heads": 1, "decoder_attention_heads": 1}
    bart = BartForSequenceClassification(BartConfig(**sizes, **heads, eos_token_id=2))
    assert find_task(bart, "auto") == "classification"


def test_a_class_whose_own_loss_shifts_no_labels_is_no_causal_model():
    """The name ends like those that shift; value and gradient are those of its own loss."""
    sizes = {"vocab_size": 30, "emb_dim": 16, "n_layers": 1, "n_heads": 2}
    student = XLMWithLMHeadModel(XLMConfig(**sizes)).eval()
    ids = torch.randint(3, 30, (2, 6))
    found = fxdistill.wrap(student, None, compile=False)(input_ids=ids, labels=ids).loss
    want = student(input_ids=ids, labels=ids).loss
    torch.testing.assert_close(found, want)
    weight = student.transformer.embeddings.weight
    ours, theirs = (torch.autograd.grad(loss, weight)[0] for loss in (found, want))
    torch.testing.assert_close(ours, theirs)
    permuted = XLNetLMHeadModel(XLNetConfig(vocab_size=30, d_model=16, n_layer=1, n_head=2))
    with pytest.raises(errors.TaskError):
        fxdistill.wrap(permuted, None, compile=False)(input_ids=ids, labels=ids)


def test_options_of_matches_without_a_match_are_told():
    for options in ({"feature_loss": "cosine"}, {"feature_weight": 0.5}, {"pairs_loss": max}):
        with pytest.warns(errors.MatchWarning, match="there is no mapping: nothing is compared"):
            fxdistill.wrap(*toy_pair(), **options)


def test_a_task_read_from_the_logits_weights_features_too():
    torch.manual_seed(0)
    student, teacher = nn.Sequential(nn.Linear(4, 4)), nn.Sequential(nn.Linear(4, 4))
    x, weights = torch.randn(3, 4), torch.tensor([1.0, 0.0, 0.0])
    auto, told = (
        fxdistill.wrap(student, teacher, {"0": "0"}, task=task, compile=False)(
            x, labels=torch.tensor([0, 1, 2]), token_weights=weights
        )
        for task in ("auto", "classification")
    )
    assert torch.equal(auto.losses["0"], told.losses["0"])


@pytest.mark.parametrize("bad", [{"temperature": torch.ones(2)}, {"temperature": 0.0}])
def test_settings_that_are_no_number_change_nothing(bad):
    distiller = fxdistill.wrap(*toy_pair(), compile=False)
    with pytest.raises(errors.OptionError):
        distiller.set(**bad)
    distiller(tokens())
    with pytest.raises(errors.OptionError):
        fxdistill.wrap(*toy_pair(), label_weight=None)


def test_a_module_called_like_a_term_keeps_its_own_name():
    class Vgg(nn.Module):
        def __init__(self):
            super().__init__()
            self.features, self.head = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.head(self.features(x))

    mapping = {"features": "features", "head": "head"}
    out = fxdistill.wrap(Vgg(), Vgg(), mapping, logit_loss=None, compile=False)(torch.randn(2, 4))
    mean = (out.losses["features:output"] + out.losses["head"]) / 2
    torch.testing.assert_close(out.losses["features"], mean)


# Not those that are not 0 where both agree (entropies), boxes, which are 4 wide, and attention.
ATTENTION = tuple(f.__name__ for f in OF_ATTENTION)
_OTHERS = ("detection_classification", "detection_box", "info_nce", "CRD", *ATTENTION)
FEATURES = tuple(name for name in FEATURE_LOSSES if name not in _OTHERS)
LOGITS = ("forward_kl", "reverse_kl", "jsd")
PLACES = [f"blocks.{i}.{part}" for i in range(3) for part in ("mlp", "mixer")]


@pytest.mark.parametrize("mode", [False, AOT, "regional"], ids=["eager", "graph", "regional"])
@pytest.mark.parametrize("third", range(3))
def test_a_student_equal_to_its_teacher_loses_nothing(third, mode):
    """A third of the feature losses, each at a place of its own, with one of the divergences."""
    student, teacher = Toy(3), Toy(3)
    teacher.load_state_dict(student.state_dict())
    losses = dict(zip(PLACES, FEATURES[third::3], strict=False))
    mapping = [fxdistill.Match(place, place, loss=loss) for place, loss in losses.items()]
    distiller = fxdistill.wrap(student, teacher, mapping, logit_loss=LOGITS[third], compile=mode)
    out = distiller(tokens())
    out.loss.backward()
    exact = () if mode else ("mse", "l1", "l2", "smooth_l1", "forward_kl", "reverse_kl")
    for name, loss in {**losses, "logits": LOGITS[third]}.items():
        assert out.losses[name].abs() <= (0.0 if loss in exact else 1e-6), loss
    # Compiled, the towers may round apart, and l2 has a slope of one.
    if "l2" not in losses.values() or not mode:
        assert all(g is None or g.abs().max() <= 1e-6 for g in gradients(student).values())


def test_every_loss_has_its_place():
    assert len(FEATURES) <= 3 * len(PLACES)


@pytest.mark.slow
def test_the_second_step_compiles_nothing():
    """Dynamo guards on dispatch keys: those of the fused head's body are alike in every step."""
    distiller = fxdistill.wrap(*toy_pair(), task="causal_lm")
    counts = []
    for _ in range(3):
        ids = tokens()
        distiller(ids, labels=ids).loss.backward()
        counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert counts[0] == counts[1] == counts[2]
    assert any(r.name == "FuseHead" and r.changed for r in distiller.program.history)
