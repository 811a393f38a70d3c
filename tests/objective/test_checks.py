"""What is wrong with a mapping is told before the first step, all at once, and nothing changes."""

import copy
import warnings

import pytest
import torch
from torch import nn

import fxdistill
from architectures import ARCHITECTURES
from fxdistill import Match, errors
from toys import MAPPING, WIDTH, gradients, tokens, toy_pair

AOT = {"backend": "aot_eager"}
NAMES = ["eager", "graph", "regional"]
MODES = pytest.mark.parametrize("mode", [False, AOT, "regional"], ids=NAMES)


def llamas():
    torch.manual_seed(0)
    build = ARCHITECTURES["LlamaForCausalLM"].build
    return build(2, 16), build(4, 32)


def ids():
    return torch.randint(3, 96, (2, 9), generator=torch.Generator().manual_seed(0))


@MODES
def test_all_that_is_wrong_with_the_values_is_told_at_once(mode):
    student, teacher = llamas()
    student.spare = nn.Linear(2, 2)
    before = copy.deepcopy(student.state_dict())
    mapping = {
        "model.layers.0.mlp": "model.layers.1.mlp",  # widths
        "spare": "model.layers.0",  # does not run
        "model.layers.1.mlp": Match(teacher="model.layers.3.mlp", rearrange="b c h w -> b (h w) c"),
        "model.layers.0": Match(teacher="model.norm", project=nn.Linear(15, 32)),
        "model.embed_tokens": Match(teacher="model.embed_tokens", student_port="input"),
        "model.layers.0.self_attn": Match(teacher="model.norm", student_port="output[7]"),
    }
    distiller = fxdistill.wrap(student, teacher, mapping, compile=mode)
    with pytest.raises(errors.Problems, match="7 things") as caught:
        distiller(input_ids=ids())
    kinds = {type(problem) for problem in caught.value.problems}
    assert kinds == {
        errors.ShapeError,
        errors.TapError,
        errors.LayoutError,
        errors.ProjectionError,
        errors.DtypeError,
        errors.PortError,
    }
    text = str(caught.value)
    assert "project='auto' or nn.Linear(16, 32)" in text
    assert "student module 'spare' was not executed" in text
    assert "describes 4 axes, but the value has 3" in text
    assert "takes 15 features" in text
    assert "is torch.int64" in text
    assert "no tensor at port 'output[7]': it returns 2 values" in text
    assert all(g is None for g in gradients(student).values())
    for name, value in student.state_dict().items():
        assert torch.equal(value, before[name])
    for module in (*student.modules(), *teacher.modules()):
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_examples_bring_it_forward_to_wrap():
    mapping = {"model.layers.{i}.mlp": "model.layers.{2*i+1}.mlp"}
    with pytest.raises(errors.ShapeError, match="2 things are wrong"):
        fxdistill.wrap(*llamas(), mapping, example_inputs={"input_ids": ids()}, compile=AOT)


def test_options_of_all_matches_are_told_at_once():
    mapping = {
        "blocks.0.mlp": Match(teacher="blocks.0.mlp", loss="mes"),
        "blocks.1.mlp": Match(teacher="blocks.0.mlp", rearrange="b c"),
        "blocks.0.mixer": Match(teacher="blocks.0.mixer", project="conv"),
    }
    with pytest.raises(errors.Problems, match=r"(?s)3 things.*'mse'.*no einops.*'auto'"):
        fxdistill.wrap(*toy_pair(), mapping)


@MODES
def test_a_frozen_pair_is_warned_of_once(mode):
    student, teacher = toy_pair()
    student.embed.requires_grad_(False)
    student.blocks[0].requires_grad_(False)
    mapping = {"blocks.0.mlp": "blocks.0.mlp", "blocks.1.mlp": "blocks.2.mlp"}
    distiller = fxdistill.wrap(student, teacher, mapping, compile=mode)
    with pytest.warns(
        errors.MatchWarning, match=r"'blocks\.0\.mlp' depends on no trainable"
    ) as seen:
        distiller(tokens()).loss.backward()
    assert len(seen) == 1
    assert student.blocks[1].mlp.weight.grad is not None
    with warnings.catch_warnings():
        warnings.simplefilter("error", errors.MatchWarning)
        distiller(tokens())


@MODES
def test_frozen_pairs_alone_are_an_error(mode):
    student, teacher = toy_pair()
    student.embed.requires_grad_(False)
    student.blocks[0].requires_grad_(False)
    mapping = {"blocks.0.mlp": "blocks.0.mlp"}
    distiller = fxdistill.wrap(student, teacher, mapping, logit_loss=None, compile=mode)
    with pytest.raises(errors.FrozenStudentError, match=r"blocks\.0\.mlp"):
        distiller(tokens())
    with torch.no_grad():  # an evaluation needs no gradient
        assert distiller(tokens()).loss > 0


@MODES
def test_checkpointed_and_trained_pairs_are_not_warned_of(mode):
    student, teacher = toy_pair(remat=True)
    distiller = fxdistill.wrap(student, teacher, MAPPING, compile=mode)
    with warnings.catch_warnings():
        warnings.simplefilter("error", errors.MatchWarning)
        distiller(tokens()).loss.backward()


def test_a_match_without_weight_is_warned_of():
    mapping = {"blocks.0.mlp": Match(teacher="blocks.0.mlp", weight=0.0)}
    with pytest.warns(errors.MatchWarning, match="weight 0: it is computed and teaches nothing"):
        fxdistill.wrap(*toy_pair(), mapping)


@MODES
def test_a_projection_of_another_dtype(mode):
    student, teacher = toy_pair()
    mapping = {"blocks.0.mlp": Match(teacher="blocks.0.mlp", project=nn.Linear(WIDTH, WIDTH))}
    distiller = fxdistill.wrap(student.bfloat16(), teacher.bfloat16(), mapping, compile=mode)
    with pytest.raises(errors.DtypeError, match=r"float32.*bfloat16"):
        distiller(tokens())


@MODES
@pytest.mark.parametrize("logit_loss", ["forward_kl", None])
def test_a_loss_that_returns_one_value_a_token(mode, logit_loss):
    def by_token(student, teacher, weights):
        return (student - teacher).square().mean(-1)

    distiller = fxdistill.wrap(
        *toy_pair(), MAPPING, feature_loss=by_token, logit_loss=logit_loss, compile=mode
    )
    with pytest.raises(errors.ShapeError, match=r"'blocks\.0\.mixer' returned shape \[3, 7\]"):
        distiller(tokens())


class Returns(nn.Module):
    """Returns logits of any shape."""

    def __init__(self, shape):
        super().__init__()
        self.logits = nn.Parameter(torch.randn(shape))

    def forward(self, x):
        return self.logits * x.sum()


@MODES
@pytest.mark.parametrize(("shape", "task"), [((2, 5, 4, 4), "auto"), ((2, 5), "masked_lm")])
def test_logits_whose_last_axis_is_no_vocabulary(mode, shape, task):
    pair = Returns(shape), Returns(shape)
    with pytest.raises(errors.LogitsError, match="vocabulary or the classes last"):
        fxdistill.wrap(*pair, task=task, compile=mode)(torch.ones(2))

    def over_channels(student, teacher, *, temperature, weights):
        return (student.log_softmax(1) - teacher.log_softmax(1)).square().mean()

    if task == "auto":
        own = fxdistill.wrap(*pair, logit_loss=over_channels, label_loss=None, compile=mode)
        assert own(torch.ones(2)).loss > 0


@MODES
def test_labels_and_counts_that_are_none(mode):
    distiller = fxdistill.wrap(*toy_pair(), task="causal_lm", compile=mode)
    with pytest.raises(errors.BatchError, match=r"float32.*labels\.long\(\)"):
        distiller(tokens(), labels=tokens().float())
    with pytest.raises(errors.BatchError, match="labels is a list"):
        distiller(tokens(), labels=[[1, 2]])
    with pytest.raises(errors.BatchError, match=r"num_items has shape \[2\]"):
        distiller(tokens(), labels=tokens(), num_items=torch.ones(2))


def test_options_of_the_compiler_are_checked_in_wrap():
    for options, words in (
        ({"backend": "inductr"}, "Nearest: 'inductor'"),
        ({"options": {"epilog_fusion": True}}, "'epilogue_fusion'"),
        ({"mode": "max-autotun"}, "'max-autotune'"),
    ):
        with pytest.raises(errors.OptionError, match=words):
            fxdistill.wrap(*toy_pair(), compile=options)
    with pytest.raises(errors.OptionError, match="example_inputs is a Tensor"):
        fxdistill.wrap(*toy_pair(), example_inputs=tokens())


class AsksForItsMode(nn.Linear):
    def forward(self, x):
        return nn.functional.dropout(super().forward(x), 0.5, self.training)


class Jittery(nn.Linear):
    jitter_noise = 0.0

    def __init__(self, noise):
        super().__init__(4, 4)
        self.jitter_noise = noise


@pytest.mark.filterwarnings("ignore:the frozen teacher holds:fxdistill.errors.MatchWarning")
@pytest.mark.parametrize(
    ("module", "conflict"),
    [
        (nn.InstanceNorm1d(4, track_running_stats=True), True),
        (nn.InstanceNorm1d(4), False),
        (nn.RReLU(), True),
        (AsksForItsMode(4, 4), True),
        (Jittery(0.1), True),
        (Jittery(0.0), False),
        (nn.LayerNorm(4), False),
    ],
)
def test_shared_modules_whose_mode_matters(module, conflict):
    student, teacher = nn.Sequential(nn.Linear(4, 4), module), nn.Sequential(nn.Identity(), module)
    if conflict:
        with pytest.raises(errors.ModeError):
            fxdistill.wrap(student.train(), teacher)
    else:
        fxdistill.wrap(student.train(), teacher)


def test_a_distiller_keeps_its_models():
    student, teacher = toy_pair()
    distiller = fxdistill.wrap(student, teacher, freeze_teacher=False)
    with pytest.raises(AttributeError, match=r"fxdistill\.wrap"):
        distiller.teacher = student
    keys = {key.split(".")[0] for key in distiller.state_dict()}
    assert keys == {"student", "teacher"}


def test_a_batch_in_one_mapping_is_read_by_its_names():
    class TakesAll(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, batch):
            return self.inner(**batch)

    student, teacher = llamas()
    mask = torch.ones_like(ids())
    mask[0, 4:] = 0
    batch = {"input_ids": ids(), "attention_mask": mask}
    mapping = {"model.norm": Match(teacher="model.norm", project="auto")}
    torch.manual_seed(0)
    plain = fxdistill.wrap(student, teacher, mapping, compile=False)
    want = plain(**batch).losses["features"]
    mapping = {"inner.model.norm": Match(teacher="inner.model.norm", project=plain.projections[0])}
    pair = TakesAll(student), TakesAll(teacher)
    whole = fxdistill.wrap(*pair, mapping, task="causal_lm", compile=False)
    torch.testing.assert_close(whole(batch).losses["features"], want)


@MODES
def test_a_convolutions_channels_are_never_taken_for_tokens(mode):
    """[B, D, L] with D = L: the mask must not be laid over the channels."""

    class Convolved(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.conv = nn.Embedding(50, 8), nn.Conv1d(8, 8, 3, padding=1)

        def forward(self, input_ids, attention_mask):
            return self.conv(self.embed(input_ids).mT).mT

    torch.manual_seed(0)
    student, teacher = Convolved(), Convolved()
    inputs = tokens(3, 8)
    mask = torch.ones(3, 8)
    mask[1:, 5:] = 0
    with torch.no_grad():
        squares = (student(inputs, mask) - teacher(inputs, mask)).square()
    by_token = (squares.mean(-1) * mask).sum() / mask.sum()
    for layout, want in ((None, squares.mean()), ("b c l -> b l c", by_token)):
        mapping = {"conv": Match(teacher="conv", rearrange=layout)}
        distiller = fxdistill.wrap(
            student, teacher, mapping, logit_loss=None, task="causal_lm", compile=mode
        )
        out = distiller(input_ids=inputs, attention_mask=mask)
        torch.testing.assert_close(out.losses["features"], want)


def test_vocabularies_that_heads_name_are_compared_in_wrap():
    build = ARCHITECTURES["LlamaForCausalLM"].build
    student, teacher = build(1), build(1)
    teacher.resize_token_embeddings(80)
    with pytest.raises(errors.VocabularyError, match=r"96 entries and the teacher's 80"):
        fxdistill.wrap(student, teacher)
    fxdistill.wrap(student, teacher, logit_loss=None)
    fxdistill.wrap(student, teacher, vocab_size=80)


def test_positional_inputs_without_names_are_warned_of():
    class Passes(nn.Module):
        def __init__(self, held):
            super().__init__()
            self.held = held

        def forward(self, *args):
            return self.held(*args)

    student, teacher = llamas()
    pair = Passes(student), Passes(teacher)
    distiller = fxdistill.wrap(*pair, task="causal_lm", compile=False)
    with pytest.warns(errors.MatchWarning, match="pass inputs by keyword"):
        distiller(ids(), torch.ones_like(ids()))


@pytest.mark.parametrize("mode", [False, AOT, "regional"], ids=NAMES)
def test_a_failed_first_call_leaves_running_statistics_alone(mode):
    build = ARCHITECTURES["ResNetForImageClassification"].build
    student, teacher = build(1).train(), build(1)
    before = {name: b.clone() for name, b in student.named_buffers()}
    mapping = {"resnet.encoder.stages.0": "resnet.encoder.stages.1"}
    distiller = fxdistill.wrap(student, teacher, mapping, compile=mode)
    with pytest.raises(errors.ShapeError):
        distiller(**ARCHITECTURES["ResNetForImageClassification"].batch(7))
    for name, buffer in student.named_buffers():
        assert torch.equal(buffer, before[name])


def test_a_frozen_pair_is_told_in_wrap_where_there_are_examples():
    student, teacher = llamas()
    student.model.embed_tokens.requires_grad_(False)
    student.model.layers[0].requires_grad_(False)
    mapping = {"model.layers.0.mlp": Match(teacher="model.layers.1.mlp", project="auto")}
    with pytest.warns(errors.MatchWarning, match="no trainable"):
        fxdistill.wrap(student, teacher, mapping, example_inputs={"input_ids": ids()}, compile=AOT)


@pytest.mark.slow
@MODES
def test_inputs_by_name_however_they_are_passed(mode):
    build = ARCHITECTURES["GPT2LMHeadModel"].build  # its blocks pass hidden states by position
    student, teacher = build(1).eval(), build(2)  # without dropout
    pairs = {}
    for port in ("input", "input.hidden_states"):
        match = Match("transformer.h.0.attn", "transformer.h.1.attn", student_port=port)
        out = fxdistill.wrap(student, teacher, [match], compile=mode)(input_ids=ids())
        pairs[port] = out.losses[f"transformer.h.0.attn:{port}"]
    torch.testing.assert_close(pairs["input"], pairs["input.hidden_states"])


def test_a_part_of_the_student_is_no_projection():
    student, teacher = llamas()
    own = student.model.layers[0].self_attn.o_proj
    mapping = {"model.layers.0.mlp": Match(teacher="model.layers.1.mlp", project=own)}
    with pytest.raises(errors.OptionError, match="a part of the student"):
        fxdistill.wrap(student, teacher, mapping)
    frozen = nn.Linear(16, 32).requires_grad_(False)
    mapping = {"model.layers.0.mlp": Match(teacher="model.layers.1.mlp", project=frozen)}
    assert len(fxdistill.wrap(student, teacher, mapping).param_groups()) == 1


def test_samples_are_weighed_once_when_their_tokens_are_pooled():
    build = ARCHITECTURES["DistilBertForSequenceClassification"].build
    torch.manual_seed(0)
    student, teacher = build(1).eval(), build(1).eval()
    path = "distilbert.transformer.layer.0"
    weights = torch.tensor([0.5, 1.0])
    for reduction in ("sum", "mean", "max"):
        mapping = {path: Match(teacher=path, reduce=("b l d -> b d", reduction))}
        distiller = fxdistill.wrap(student, teacher, mapping, logit_loss=None, compile=False)
        each = [distiller(input_ids=row[None]).losses["features"] for row in ids()]
        got = distiller(input_ids=ids(), token_weights=weights).losses["features"]
        torch.testing.assert_close(got, (0.5 * each[0] + each[1]) / 1.5)


def test_what_drops_token_weights_is_noted():
    student, teacher = llamas()
    turned = "b l d -> b d l"
    mapping = {"model.norm": Match(teacher="model.norm", rearrange=turned, project=nn.Identity())}
    distiller = fxdistill.wrap(student, teacher, mapping, feature_weight=0.0)
    notes = " ".join(str(part) for part in distiller.summary().renderables)
    assert "token weights and masks do not apply to model.norm" in notes
    assert "feature_weight is 0" in notes


def test_paths_options_and_patterns_are_told_together():
    mapping = {
        "model.layers.0.mpl": "model.layers.1.mlp",
        "model.layers.0.mlp": Match(teacher="model.layers.1.mlp", project="lin"),
        "model.layers.1.mlp": Match(teacher="model.layers.3.mlp", loss="mze"),
        "model.norm": Match(teacher="model.norm", rearrange="b l"),
    }
    with pytest.raises(errors.Problems, match="4 things") as caught:
        fxdistill.wrap(*llamas(), mapping)
    assert {type(p) for p in caught.value.problems} == {
        errors.PathError,
        errors.OptionError,
        errors.LayoutError,
    }


@pytest.mark.slow
def test_widths_that_cannot_be_had_are_told_with_the_shapes():
    student, teacher = llamas()
    student.spare = nn.Linear(2, 2)
    wrong = "b (h w) c -> b h w c"
    mapping = {
        "model.layers.0.mlp": "model.layers.1.mlp",
        "spare": "model.layers.0",
        "model.norm": Match(teacher="model.norm", project="auto", rearrange=wrong),
    }
    with pytest.raises(errors.Problems, match="3 things") as caught:
        fxdistill.wrap(student, teacher, mapping, example_inputs={"input_ids": ids()})
    assert {type(p) for p in caught.value.problems} == {
        errors.ShapeError,
        errors.TapError,
        errors.LayoutError,
    }
