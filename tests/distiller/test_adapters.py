"""A student with PEFT's adapters, whose teacher is its own base with the adapters off."""

import copy
import warnings

import pytest
import torch
from peft import IA3Config, LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn
from torch.nn.functional import cross_entropy, kl_div, mse_loss
from transformers import LlamaConfig, LlamaForCausalLM

import fxdistill
from fxdistill.errors import FrozenStudentError, ModeError, OptionError

MODES = {"eager": False, "regional": "regional", "one graph": {"backend": "aot_eager"}}
IDS = torch.randint(4, 60, (2, 8), generator=torch.Generator().manual_seed(0))
LAYERS = ["q_proj", "v_proj", "down_proj"]
PAIRS = {"base_model.model.model.layers.{i}.mlp": "model.layers.{i}.mlp"}
LORA = {"r": 4, "target_modules": LAYERS, "task_type": "CAUSAL_LM"}


def llama(**options):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    sizes |= {"vocab_size": 64, "num_hidden_layers": 2, "use_cache": False}
    return LlamaForCausalLM(LlamaConfig(**sizes, **options))


def adapted(model, seed=1, **options):
    """The model with adapters that do something: those of LoRA begin as zero."""
    student = get_peft_model(model, LoraConfig(**{**LORA, **options}))
    return scrambled(student, seed)


def scrambled(student, seed=1):
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in student.parameters():
            if p.requires_grad:
                p.normal_(std=0.1)
    return student


def plain_step(student, teacher):
    """The default objective in plain torch: models run apart, hooks collect, no distiller."""
    values = {}
    names = {student: "base_model.model.model.layers", teacher: "model.layers"}
    handles = [
        model.get_submodule(f"{path}.{i}.mlp").register_forward_hook(
            lambda _, __, out, key=(model, i): values.__setitem__(key, out)
        )
        for model, path in names.items()
        for i in range(2)
    ]
    with torch.no_grad():
        target = teacher(input_ids=IDS).logits[:, :-1].flatten(0, 1).log_softmax(-1)
    logits = student(input_ids=IDS).logits[:, :-1].flatten(0, 1)
    for handle in handles:
        handle.remove()
    pairs = [mse_loss(values[student, i], values[teacher, i]) for i in range(2)]
    divergence = kl_div(logits.log_softmax(-1), target, reduction="batchmean", log_target=True)
    loss = divergence + sum(pairs) / 2 + cross_entropy(logits, IDS[:, 1:].flatten())
    loss.backward()
    return loss.detach(), gradients(student)


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_step(distiller, student, expected):
    loss, grads = expected
    student.zero_grad()
    out = distiller(input_ids=IDS, labels=IDS)
    out.loss.backward()
    torch.testing.assert_close(out.loss.detach(), loss)
    torch.testing.assert_close(gradients(student), grads)
    assert grads
    assert all("lora" in name or "modules_to_save" in name for name in grads)


@pytest.mark.parametrize("mode", MODES)
def test_value_and_gradient_are_those_of_a_copy_of_the_base(mode):
    apart = llama()
    student = adapted(llama())
    teacher = fxdistill.base_of(student)
    assert {id(p) for p in teacher.parameters()} <= {id(p) for p in student.parameters()}
    assert fxdistill.module_names(teacher) == fxdistill.module_names(apart)
    before = {name: p.clone() for name, p in apart.named_parameters()}

    distiller = fxdistill.wrap(student, teacher, PAIRS, compile=MODES[mode])
    oracle = copy.deepcopy(student)
    assert_step(distiller, student, plain_step(oracle, apart))
    optimizer = torch.optim.SGD(distiller.parameters(), lr=0.5)
    for _ in range(2):  # the adapters move, the teacher does not
        optimizer.step()
        oracle.load_state_dict(student.state_dict())
        oracle.zero_grad()
        assert_step(distiller, student, plain_step(oracle, apart))
    torch.testing.assert_close(dict(teacher.named_parameters()), before, rtol=0, atol=0)


@pytest.mark.parametrize("mode", MODES)
def test_dropout_is_on_in_the_student_and_off_in_its_base(mode):
    torch.manual_seed(2)
    scale = torch.rand(2, 8, 64)

    def teacher_alone(student, teacher, *, temperature, weights):
        return (teacher.view_as(scale) * scale).sum() + 0 * student.sum()

    student = adapted(llama(attention_dropout=0.3), lora_dropout=0.5)
    teacher = fxdistill.base_of(student)
    options = {"compile": MODES[mode], "outputs": ("logits",), "logit_loss": teacher_alone}
    distiller = fxdistill.wrap(student, teacher, **options).train()
    assert student.training
    one, two = (distiller(input_ids=IDS) for _ in range(2))
    assert not torch.allclose(one.logits, two.logits, atol=1e-3)
    expected = (llama().eval()(IDS).logits * scale).sum()
    for out in (one, two):
        torch.testing.assert_close(out.losses["logits"].detach(), expected.detach())


@pytest.mark.parametrize("mode", MODES)
def test_adapters_may_be_switched_between_steps(mode):
    student = adapted(llama())
    student.add_adapter("second", LoraConfig(**{**LORA, "r": 2}))
    student.set_adapter("second")
    scrambled(student, seed=2)
    distiller = fxdistill.wrap(student, fxdistill.base_of(student), PAIRS, compile=MODES[mode])
    apart = llama()
    for active in ("second", "default", "second"):
        student.set_adapter(active)
        assert_step(distiller, student, plain_step(copy.deepcopy(student), apart))
        assert all(active in name for name in gradients(student))
        assert student.get_model_status().enabled is True
        assert student.active_adapter == active


class Breaks(nn.Module):
    """A head that raises while ``broken``."""

    broken = False

    def __init__(self, head):
        super().__init__()
        self.head = head

    def forward(self, x):
        if self.broken:
            raise RuntimeError("broken")
        return self.head(x)


def test_a_step_that_fails_leaves_the_adapters_as_they_were():
    base = llama()
    base.lm_head = Breaks(base.lm_head)
    student = adapted(base)
    teacher = fxdistill.base_of(student)
    distiller = fxdistill.wrap(student, teacher, PAIRS, compile=False)
    expected = distiller(input_ids=IDS, labels=IDS).loss.detach()
    for model in (teacher, student.get_base_model()):
        model.lm_head.broken = True
        with pytest.raises(RuntimeError, match="broken"):
            distiller(input_ids=IDS, labels=IDS)
        model.lm_head.broken = False
        assert student.get_model_status().enabled is True
        assert not any(m._forward_hooks for d in (student, teacher) for m in d.modules())
        torch.testing.assert_close(distiller(input_ids=IDS, labels=IDS).loss.detach(), expected)


@pytest.mark.parametrize("mode", MODES)
def test_whole_modules_that_are_trained_beside_adapters(mode):
    """``modules_to_save`` keeps the original module for when adapters are off."""
    student = adapted(llama(), modules_to_save=["lm_head"])
    distiller = fxdistill.wrap(student, fxdistill.base_of(student), PAIRS, compile=MODES[mode])
    assert_step(distiller, student, plain_step(copy.deepcopy(student), llama()))
    assert any("modules_to_save" in name for name in gradients(student))


@pytest.mark.parametrize("kind", ["ia3", "dora", "embedding", "trainable tokens", "parameter"])
def test_other_adapters_come_off_too(kind):
    config = {
        "ia3": lambda: IA3Config(
            target_modules=["k_proj", "down_proj"],
            feedforward_modules=["down_proj"],
            task_type="CAUSAL_LM",
        ),
        "dora": lambda: LoraConfig(**LORA, use_dora=True),
        "embedding": lambda: LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"]),
        "trainable tokens": lambda: LoraConfig(**LORA, trainable_token_indices=[5, 6, 7]),
        "parameter": lambda: LoraConfig(r=2, target_parameters=["mlp.up_proj.weight"]),
    }
    student = scrambled(get_peft_model(llama(), config[kind]()))
    base, apart = fxdistill.base_of(student), llama().eval()
    assert fxdistill.module_names(base) == fxdistill.module_names(apart)
    expected = apart(IDS).logits
    assert not torch.allclose(student.eval()(IDS).logits, expected, atol=1e-4)
    torch.testing.assert_close(base(IDS).logits, expected)
    with torch.no_grad(), student.disable_adapter():
        torch.testing.assert_close(student(IDS).logits, expected)


def test_a_model_of_transformers_with_an_adapter_of_its_own():
    student = llama()
    student.add_adapter(LoraConfig(**LORA))
    scrambled(student)
    base = fxdistill.base_of(student)
    torch.testing.assert_close(base(IDS).logits, llama().eval()(IDS).logits)
    pairs = {"model.layers.*.mlp": "model.layers.*.mlp"}
    out = fxdistill.wrap(student, base, pairs, compile=False)(input_ids=IDS, labels=IDS)
    assert float(out.losses["features"].detach()) > 0


def test_tied_weights_stay_tied():
    student = adapted(llama(tie_word_embeddings=True))
    base = fxdistill.base_of(student)
    assert base.lm_head.weight is base.model.embed_tokens.weight
    assert base.lm_head.weight is student.get_base_model().lm_head.weight


def test_running_statistics_of_the_base_stay_what_they_were():
    """A student in train mode writes its own, though its weights are frozen."""
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    apart = copy.deepcopy(net).eval()
    student = get_peft_model(net, LoraConfig(r=2, target_modules=["0", "2"])).train()
    base = fxdistill.base_of(student)
    task = {"task": "classification", "compile": False}
    distiller = fxdistill.wrap(student, base, **task).train()
    x = torch.randn(16, 4)
    distiller(x, labels=torch.randint(0, 3, (16,))).loss.backward()
    assert int(student.get_base_model()[1].num_batches_tracked) == 1
    torch.testing.assert_close(base(x), apart(x))


def test_the_base_is_of_a_prompted_model_too():
    config = PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    base = fxdistill.base_of(get_peft_model(llama(), config))
    torch.testing.assert_close(base(IDS).logits, llama().eval()(IDS).logits)


@pytest.mark.parametrize("targets", [LAYERS, "all-linear", ["embed_tokens", "up_proj"]])
@pytest.mark.parametrize("saved", [None, ["lm_head", "embed_tokens"]])
def test_match_finds_the_same_layers_below_adapters(targets, saved):
    """The narrow matrices of adapters are no part of the architecture."""
    saved = None if "embed_tokens" in targets else saved
    student = adapted(llama(), target_modules=targets, modules_to_save=saved)
    base, roles = (
        fxdistill.base_of(student),
        ("embedding", "block", "mixer", "mlp", "norm", "logits"),
    )
    found = fxdistill.match(student, base, roles)
    expected = fxdistill.match(llama(), base, roles)
    assert not found.notes
    prefix = "base_model.model."
    assert [m.student.removeprefix(prefix) for m in found] == [m.student for m in expected]
    assert [(m.teacher, m.project) for m in found] == [(m.teacher, m.project) for m in expected]
    assert [m.reason for m in found] == [m.reason for m in expected]
    found = [pair for pair in found if "embed" not in pair.student]  # frozen in most of the cases
    out = fxdistill.wrap(student, base, found, compile=False)(input_ids=IDS, labels=IDS)
    assert len(out.losses) == 3 + 2 * 3 + 2


# ---------------------------------------------------------------------- saving


def test_adapters_and_projections_are_saved_and_the_base_is_not(tmp_path):
    student = adapted(llama())
    pairs = {path: fxdistill.Match(teacher=t, project="linear") for path, t in PAIRS.items()}
    distiller = fxdistill.wrap(student, fxdistill.base_of(student), pairs, compile=False)
    state = distiller.state_dict()
    assert all("lora_" in name or name.startswith("projections.") for name in state)
    assert len(state) == 2 * 2 * len(LAYERS) + 2 * 2
    torch.save(state, tmp_path / "state.pt")

    fresh = adapted(llama(), seed=3)
    other = fxdistill.wrap(fresh, fxdistill.base_of(fresh), pairs, compile=False)
    other.load_state_dict(torch.load(tmp_path / "state.pt"))
    expected = distiller(input_ids=IDS, labels=IDS).losses
    torch.testing.assert_close(other(input_ids=IDS, labels=IDS).losses, expected)
    # A state dict that holds the base loads as well; adapters alone are what PEFT saves.
    other.student.load_state_dict(student.state_dict())
    other.load_state_dict({f"student.{k}": v for k, v in student.state_dict().items()}, False)
    student.save_pretrained(tmp_path)
    assert not (tmp_path / "model.safetensors").exists()
    assert (tmp_path / "adapter_model.safetensors").exists()


def test_a_base_that_learns_is_saved():
    student = adapted(llama())
    student.get_base_model().model.norm.weight.requires_grad_(True)
    with pytest.warns(fxdistill.errors.MatchWarning, match="1 parameters that the student learns"):
        distiller = fxdistill.wrap(student, fxdistill.base_of(student), compile=False)
    assert "student.base_model.model.model.norm.weight" in distiller.state_dict()


def test_a_copy_of_the_distiller_shares_as_the_original_does():
    student = adapted(llama())
    distiller = fxdistill.wrap(student, fxdistill.base_of(student), PAIRS, compile=False)
    other = copy.deepcopy(distiller)
    held = {id(p) for p in other.student.parameters()}
    assert {id(p) for p in other.teacher.parameters()} <= held
    assert not held & {id(p) for p in student.parameters()}
    other.student.merge_adapter()
    with pytest.raises(ModeError):
        other(input_ids=IDS)
    distiller(input_ids=IDS)


def test_the_report_counts_the_base_once():
    student = adapted(llama())
    teacher = fxdistill.base_of(student)
    report = fxdistill.wrap(student, teacher, PAIRS).report(input_ids=IDS, labels=IDS)
    apart = fxdistill.wrap(student, llama(), PAIRS).report(input_ids=IDS, labels=IDS)
    base = sum(p.numel() * p.element_size() for p in teacher.parameters())
    assert apart.memory.peak - report.memory.peak >= 0.9 * base


# ---------------------------------------------------------------------- errors


def test_adapters_that_are_merged_are_not_off():
    student = adapted(llama())
    teacher = fxdistill.base_of(student)
    distiller = fxdistill.wrap(student, teacher, PAIRS, compile=False)
    student.merge_adapter()
    with pytest.raises(ModeError, match="'default' are merged into the weights"):
        distiller(input_ids=IDS, labels=IDS)
    with pytest.raises(ModeError, match="unmerge_adapter"):
        fxdistill.base_of(student)
    with pytest.raises(FrozenStudentError, match="unmerge_adapter"):
        fxdistill.wrap(student, llama(), PAIRS)
    student.unmerge_adapter()
    distiller(input_ids=IDS, labels=IDS)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_the_base_with_its_adapters_on_is_no_teacher(dropout):
    student = adapted(llama(), lora_dropout=dropout)
    for teacher in (student.get_base_model(), student.base_model, student.get_base_model().model):
        with pytest.raises(OptionError, match=r"adapters on .*fxdistill\.base_of\(student\)"):
            fxdistill.wrap(student, teacher, logit_loss=None)


def test_what_has_no_adapters_has_no_base():
    with pytest.raises(OptionError, match="LlamaForCausalLM has no adapters of PEFT"):
        fxdistill.base_of(llama())


def test_the_student_is_left_as_it_was():
    student = adapted(llama(), lora_dropout=0.1).train()
    before = {name: (id(m), m.training) for name, m in student.named_modules()}
    flags = {name: p.requires_grad for name, p in student.named_parameters()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fxdistill.wrap(student, fxdistill.base_of(student), PAIRS)
    assert {name: (id(m), m.training) for name, m in student.named_modules()} == before
    assert {name: p.requires_grad for name, p in student.named_parameters()} == flags
