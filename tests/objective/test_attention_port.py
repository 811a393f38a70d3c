"""The port "attention" in a distiller: against the maps that models return when asked for them."""

import copy
import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fxdistill
from families import spread
from fxdistill import Match, errors, losses
from mesh_steps import AOT, aot

VOCAB, BATCH, LENGTH = 60, 2, 9
IDS = torch.randint(3, VOCAB, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
LEFT = torch.ones(BATCH, LENGTH, dtype=torch.long)
LEFT[0, :3] = 0
RIGHT = LEFT.flip(1)
TARGETS = IDS[:, :5].clone()
TARGETS[1, 3:] = -100
NONE = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def decoder(config: Any, model: Any, layers: int, heads: int, attention: str, **more: Any) -> Any:
    sizes = {"hidden_size": 8 * heads, "num_attention_heads": heads, "num_key_value_heads": 2}
    sizes |= {"intermediate_size": 16, "num_hidden_layers": layers, "use_cache": False}
    return model(config(vocab_size=VOCAB, **sizes, **more, attn_implementation=attention))


def bert(layers: int, heads: int, attention: str) -> Any:
    sizes = {"hidden_size": 8 * heads, "num_attention_heads": heads, "intermediate_size": 16}
    sizes |= {"num_hidden_layers": layers, "vocab_size": VOCAB, **NONE}
    return hf.BertForMaskedLM(hf.BertConfig(**sizes, attn_implementation=attention))


def t5(layers: int, heads: int, attention: str) -> Any:
    sizes = {"d_model": 16, "d_kv": 8, "num_heads": heads, "d_ff": 16, "num_layers": layers}
    sizes |= {"vocab_size": VOCAB, "dropout_rate": 0.0, "use_cache": False}
    config = hf.T5Config(**sizes, decoder_start_token_id=0, attn_implementation=attention)
    return hf.T5ForConditionalGeneration(config)


def vit(layers: int, heads: int, attention: str) -> Any:
    sizes = {"hidden_size": 8 * heads, "num_attention_heads": heads, "intermediate_size": 16}
    sizes |= {"num_hidden_layers": layers, "image_size": 12, "patch_size": 4, **NONE}
    return hf.ViTForImageClassification(
        hf.ViTConfig(**sizes, num_labels=4, attn_implementation=attention)
    )


def whisper(layers: int, heads: int, attention: str) -> Any:
    sides: dict[str, int] = {"d_model": 8 * heads}
    for side in ("encoder", "decoder"):
        sides |= {f"{side}_layers": layers, f"{side}_attention_heads": heads}
        sides[f"{side}_ffn_dim"] = 16
    special = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 0)
    config = hf.WhisperConfig(
        vocab_size=VOCAB,
        num_mel_bins=4,
        max_source_positions=7,
        max_target_positions=16,
        decoder_start_token_id=1,
        use_cache=False,
        attn_implementation=attention,
        **sides,
        **special,
    )
    return hf.WhisperForConditionalGeneration(config)


@dataclasses.dataclass(frozen=True)
class Case:
    """``build(layers, heads, attention)``, the module, and where its map is among the outputs."""

    build: Callable[[int, int, str], Any]
    path: str
    batch: dict[str, Tensor]
    weights: Tensor | None
    field: str = "attentions"
    heads: tuple[int, int] = (4, 8)
    explicit: bool = False


TEXT = {"input_ids": IDS, "attention_mask": LEFT}
ENCODED = {"input_ids": IDS, "attention_mask": RIGHT, "labels": TARGETS}
SOUND = {"input_features": torch.randn(BATCH, 4, 14), "labels": TARGETS}
OF_LABELS = (TARGETS != -100).float()
CASES = {
    "llama": Case(
        partial(decoder, hf.LlamaConfig, hf.LlamaForCausalLM),
        "model.layers.{}.self_attn",
        TEXT,
        LEFT.float(),
    ),
    "llama without a mask": Case(
        partial(decoder, hf.LlamaConfig, hf.LlamaForCausalLM),
        "model.layers.{}.self_attn",
        {"input_ids": IDS},
        None,
        heads=(4, 4),
    ),
    "mistral": Case(
        partial(decoder, hf.MistralConfig, hf.MistralForCausalLM, sliding_window=4),
        "model.layers.{}.self_attn",
        TEXT,
        LEFT.float(),
    ),
    "gemma2": Case(
        partial(decoder, hf.Gemma2Config, hf.Gemma2ForCausalLM, head_dim=8),
        "model.layers.{}.self_attn",
        TEXT,
        LEFT.float(),
        explicit=True,
    ),
    "t5 that makes its map": Case(
        t5,
        "decoder.block.{}.layer.0.SelfAttention",
        ENCODED,
        OF_LABELS,
        "decoder_attentions",
        explicit=True,
    ),
    "bert": Case(
        bert,
        "bert.encoder.layer.{}.attention.self",
        {"input_ids": IDS, "attention_mask": RIGHT},
        RIGHT.float(),
        heads=(2, 2),
    ),
    "t5 encoder": Case(
        t5,
        "encoder.block.{}.layer.0.SelfAttention",
        ENCODED,
        RIGHT.float(),
        "encoder_attentions",
    ),
    "t5 decoder": Case(
        t5,
        "decoder.block.{}.layer.0.SelfAttention",
        ENCODED,
        OF_LABELS,
        "decoder_attentions",
        heads=(2, 2),
    ),
    "t5 cross": Case(
        t5,
        "decoder.block.{}.layer.1.EncDecAttention",
        ENCODED,
        OF_LABELS,
        "cross_attentions",
    ),
    "vit": Case(
        vit,
        "vit.layers.{}.attention",
        {"pixel_values": torch.randn(BATCH, 3, 12, 12)},
        None,
        heads=(2, 4),
    ),
    "whisper cross": Case(
        whisper,
        "model.decoder.layers.{}.encoder_attn",
        SOUND,
        OF_LABELS,
        "cross_attentions",
        heads=(2, 2),
    ),
}
LAYERS = {"student": (1, 0), "teacher": (2, 1)}  # how many, and which is compared


def made(case: Case, side: str, attention: str) -> Any:
    """One model; of the same weights, however it attends."""
    torch.manual_seed(len(side))
    heads = case.heads[side == "teacher"]
    return spread(case.build(LAYERS[side][0], heads, attention)).eval()


def map_of(case: Case, side: str, model: Any) -> Tensor:
    """The map that a model returns which forms it."""
    output = model(**case.batch, output_attentions=True, return_dict=True)
    return getattr(output, case.field)[LAYERS[side][1]]


def divergence(s: Tensor, t: Tensor, w: Tensor | None) -> Tensor:
    """KL(a_T ‖ a_S), by a formula of this file."""
    if s.shape[1] != t.shape[1]:
        s, t = s.mean(1, keepdim=True), t.mean(1, keepdim=True)
    each = F.kl_div((s + 1e-30).log(), t, reduction="none").sum(-1).mean(1)
    w = torch.ones_like(each) if w is None else w
    return (each * w).sum() / w.sum()


def attention_match(case: Case, loss: Any = "attention_kl", port: str = "attention") -> Match:
    paths = (case.path.format(LAYERS[side][1]) for side in ("student", "teacher"))
    return Match(*paths, loss=loss, student_port=port, teacher_port=port)


def distilled(case: Case, student: Any, teacher: Any, loss: Any, compile: Any, **more: Any) -> Any:
    return aot(
        fxdistill.wrap(
            student,
            teacher,
            [attention_match(case, loss)],
            logit_loss=None,
            label_loss=None,
            compile=compile,
            **more,
        )
    )


def gradients(student: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad for n, p in student.named_parameters() if p.grad is not None}


def close(found: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    """Equal but for rounding, measured against the largest of all gradients."""
    largest = max(float(g.norm()) for g in want.values())
    assert largest > 0
    for name, gradient in want.items():
        gap = (found[name] - gradient).norm() if name in found else gradient.norm()
        assert gap <= 2e-5 * gradient.norm() + 1e-5 * largest, (name, gap, gradient.norm())


RUNS = [
    *((name, compile) for name in CASES for compile in (False, AOT)),
    *((name, "regional") for name in ("llama", "t5 cross")),
]


@pytest.mark.parametrize(("name", "compile"), RUNS)
def test_the_loss_is_that_of_the_maps_that_models_return(name, compile):
    case = CASES[name]
    student, teacher = (made(case, side, "eager" if case.explicit else "sdpa") for side in LAYERS)
    distiller = distilled(case, student, teacher, "attention_kl", compile)
    out = distiller(**case.batch)
    out.loss.backward()
    own = made(case, "student", "eager")
    with torch.no_grad():
        t = map_of(case, "teacher", made(case, "teacher", "eager"))
    want = divergence(map_of(case, "student", own), t, case.weights)
    want.backward()
    assert float(want.detach()) > 1e-3
    torch.testing.assert_close(out.loss.detach(), want.detach(), rtol=2e-5, atol=1e-7)
    close(gradients(student), gradients(own))


LLAMA = CASES["llama"]


def llamas(**options: Any) -> tuple[Any, Any]:
    return made(LLAMA, "student", "sdpa"), made(LLAMA, "teacher", "sdpa")


MODES = pytest.mark.parametrize("compile", [False, AOT, "regional"], ids=["eager", "one", "terms"])


@MODES
@pytest.mark.parametrize("name", ["llama", "t5 decoder", "gemma2"])
def test_the_models_own_output_is_what_it_was(name, compile):
    case = CASES[name]
    attention = "eager" if case.explicit else "sdpa"
    student, teacher = (made(case, side, attention) for side in LAYERS)
    want = student(**case.batch).logits.detach()  # with gradients: torch's kernels depend on that
    given = {"compile": compile, "outputs": ("logits",)}
    distiller = aot(fxdistill.wrap(student, teacher, [attention_match(case)], **given))
    out = distiller(**{"labels": IDS, **case.batch})
    assert torch.equal(out.logits, want)
    assert float(out.losses["features"]) > 0
    assert F.scaled_dot_product_attention.__module__ != "fxdistill.taps.attention"
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in student.modules())


@MODES
@pytest.mark.parametrize(
    "loss",
    [
        "attention_mse",
        partial(losses.attention_mse, scores=True),
        partial(losses.attention_mse, heads=[(3, 0), (0, 5)]),
        "transfer_matrix",
        "relation_kl",
        partial(losses.relation_kl, of="v", heads=8),
    ],
    ids=["mse", "scores", "pairs", "matrix", "queries", "values"],
)
def test_each_loss_reads_what_the_attention_is_called_with(loss, compile):
    student, teacher = llamas()
    distiller = distilled(LLAMA, student, teacher, loss, compile)
    out = distiller(**LLAMA.batch)
    out.loss.backward()
    own = made(LLAMA, "student", "sdpa")
    s = called_with(own, LLAMA.path.format(0), LLAMA.batch)
    with torch.no_grad():
        t = called_with(teacher, LLAMA.path.format(1), LLAMA.batch)
    plain = getattr(losses, loss) if isinstance(loss, str) else loss
    want = plain(s, t, LEFT.float())
    want.backward()
    torch.testing.assert_close(out.loss.detach(), want.detach())
    close(gradients(student), gradients(own))


def called_with(model: Any, path: str, batch: dict[str, Tensor]) -> losses.Attention:
    """The arguments of one module's call, through a mode of torch instead of a stand-in."""
    seen = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is F.scaled_dot_product_attention and inside:
                given = kwargs
                seen.append(
                    losses.Attention(*args, given["attn_mask"], given["is_causal"], given["scale"])
                )
            return func(*args, **(kwargs or {}))

    inside: list[int] = []
    module = model.get_submodule(path)
    handles = [
        module.register_forward_pre_hook(lambda *_: inside.append(1)),
        module.register_forward_hook(lambda *_: inside.clear()),
    ]
    with Watch():
        model(**batch)
    for handle in handles:
        handle.remove()
    assert len(seen) == 1
    return seen[0]


PARTS = [*((p, False) for p in ("q", "k", "v", "heads")), ("heads", AOT), ("k", "regional")]


@pytest.mark.parametrize(("port", "compile"), PARTS)
def test_parts_are_values_like_others(port, compile):
    """[B, L, heads·width] of tokens: any loss takes them, and padding does not count."""
    student, teacher = llamas()
    match = dataclasses.replace(attention_match(LLAMA, "l2", f"attention.{port}"), project="auto")
    given = {"logit_loss": None, "compile": compile, "example_inputs": LLAMA.batch}
    distiller = aot(fxdistill.wrap(student, teacher, [match], **given))
    out = distiller(**LLAMA.batch)
    found = []
    for model, layer in ((student, 0), (teacher, 1)):
        path = LLAMA.path.format(layer)
        if port == "heads":
            with torch.no_grad():
                found.append(taken(model, f"{path}.o_proj", LLAMA.batch))
        else:
            with torch.no_grad():
                called = called_with(model, path, LLAMA.batch)
            x = {"q": called.query, "k": called.key, "v": called.value}[port]
            found.append(x.transpose(1, 2).flatten(2))
    s = distiller.projections[0](found[0])
    torch.testing.assert_close(out.loss, losses.l2(s, found[1], LEFT.float()))


def taken(model: Any, path: str, batch: dict[str, Tensor]) -> Tensor:
    seen = []
    handle = model.get_submodule(path).register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    model(**batch)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("compile", [False, AOT], ids=["eager", "one"])
def test_in_a_checkpointed_student(compile):
    case = CASES["llama"]
    plain, teacher = llamas()
    student = made(case, "student", "sdpa").train()
    plain.train()
    student.activation_checkpointing_enable({"use_reentrant": False})
    for model in (plain, student):
        out = distilled(case, model, teacher, "attention_kl", compile)(**case.batch)
        out.loss.backward()
    close(gradients(student), gradients(plain))


def test_steps_of_one_graph_do_not_compile_again():
    distiller = distilled(LLAMA, *llamas(), "attention_kl", AOT)
    for _ in range(3):
        distiller(**LLAMA.batch).loss.backward()
    assert [event for event, _ in distiller.journal.events] == ["capture"]


class Attending(nn.Module):
    """Attention of torch's own, or written down; ``remat`` runs it again in the backward."""

    def __init__(self, width: int, heads: int, how: str, twice: bool = False) -> None:
        super().__init__()
        self.how, self.heads, self.twice = how, heads, twice
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def attend(self, x: Tensor) -> Any:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if self.how == "flat":
            q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
        if self.how != "none":
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.5)
        else:
            y = v
        return y.reshape(*x.shape[:1], self.heads, *x.shape[1:2], -1).transpose(1, 2).flatten(2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.out(self.attend(x))
        return self.out(self.attend(y)) if self.twice else y


class Net(nn.Module):
    def __init__(self, width: int, heads: int, how: str = "", **options: Any) -> None:
        super().__init__()
        self.up, self.attn = nn.Linear(4, width), Attending(width, heads, how, **options)
        self.how, self.head = how, nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "remat":
            return self.head(checkpoint(self.attn, self.up(x), use_reentrant=False).mean(1))
        return self.head(self.attn(self.up(x)).mean(1))


X = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(2))


def nets(how: str = "", **options: Any) -> tuple[Net, Net]:
    torch.manual_seed(0)
    return Net(8, 2, how, **options), Net(12, 3)


def of_net(net: Net, x: Tensor | None = None) -> losses.Attention:
    """What its first call of attention is given."""
    h = net.up(X) if x is None else x
    q, k, v = net.attn.qkv(h).unflatten(-1, (3, net.attn.heads, -1)).permute(2, 0, 3, 1, 4)
    return losses.Attention(q, k, v, None, True, 0.5)


ATTENTION = {"student_port": "attention", "teacher_port": "attention"}


@MODES
@pytest.mark.parametrize("loss", ["attention_kl", "transfer_matrix"])
def test_samples_weigh_their_attention_in_classification(loss, compile):
    student, teacher = nets("remat")
    match = Match("attn", "attn", loss=loss, **ATTENTION)
    distiller = aot(fxdistill.wrap(student, teacher, [match], logit_loss=None, compile=compile))
    w = torch.tensor([1.0, 0.0, 3.0])
    out = distiller(X, token_weights=w, labels=torch.arange(3))
    want = getattr(losses, loss)(of_net(student), of_net(teacher), w)
    torch.testing.assert_close(out.losses["attn:attention"], want.detach())


@MODES
def test_a_second_call_in_a_module_has_a_name(compile):
    student, teacher = nets(twice=True)
    match = Match("attn@1", "attn", loss="attention_kl", **ATTENTION)
    distiller = aot(fxdistill.wrap(student, teacher, [match], logit_loss=None, compile=compile))
    first = student.attn.out(student.attn.attend(student.up(X)))
    want = losses.attention_kl(of_net(student, first), of_net(teacher))
    torch.testing.assert_close(distiller(X).losses["attn@1:attention"], want.detach())


@MODES
def test_a_loss_of_the_users_own_gets_the_parts(compile):
    def gap(student, teacher, weights):
        return (student.query.mean() - teacher.key.mean()).square()

    student, teacher = nets()
    match = Match("attn", "attn", loss=gap, **ATTENTION)
    distiller = aot(fxdistill.wrap(student, teacher, [match], logit_loss=None, compile=compile))
    s, t = of_net(student), of_net(teacher)
    want = (s.query.mean() - t.key.mean()).square()
    torch.testing.assert_close(distiller(X).loss.detach(), want.detach())


@MODES
def test_a_teacher_that_learns_gets_its_gradient(compile):
    student, teacher = nets()
    match = Match("attn", "attn", loss="attention_kl", **ATTENTION)
    distiller = fxdistill.wrap(
        student, teacher, [match], logit_loss=None, compile=compile, freeze_teacher=False
    )
    aot(distiller)(X).loss.backward()
    want = losses.attention_kl(of_net(student), of_net(teacher))
    learnt = [teacher.attn.qkv.weight, student.attn.qkv.weight]
    for ours, p in zip(torch.autograd.grad(want, learnt), learnt, strict=True):
        torch.testing.assert_close(p.grad, ours)


@pytest.mark.parametrize("compile", [False, AOT], ids=["eager", "one"])
def test_weights_by_name_weigh_queries(compile):
    student, teacher = nets()
    match = Match("attn", "attn", loss="attention_kl", weights="some", **ATTENTION)
    distiller = fxdistill.wrap(student, teacher, [match], logit_loss=None, compile=compile)
    for w in (torch.rand(3, 5), torch.rand(3)):
        want = losses.attention_kl(of_net(student), of_net(teacher), w)
        torch.testing.assert_close(distiller(X, weights={"some": w}).loss.detach(), want.detach())


def test_the_report_shows_maps_that_nobody_forms():
    models = llamas()
    distiller = distilled(LLAMA, *models, "attention_kl", AOT)
    report = distiller.report(**LLAMA.batch)
    pair = report.pairs[0]
    assert pair.student_value.shape == (BATCH, 4, LENGTH, LENGTH)
    assert pair.teacher_value.shape == (BATCH, 8, LENGTH, LENGTH)
    assert pair.weighed_by == "tokens"
    # Scores of both models, and the gradients by the student's queries and keys.
    widths = [model.config.num_attention_heads * model.config.head_dim for model in models]
    assert report.flops.losses == 2 * BATCH * LENGTH**2 * (3 * widths[0] + widths[1])


@pytest.mark.parametrize("compile", [False, AOT], ids=["eager", "one"])
@pytest.mark.parametrize(
    ("how", "match", "error", "says"),
    [
        ("none", {}, errors.PortError, "student module 'attn' has no attention to tap"),
        ("flat", {}, errors.PortError, r"queries \[6, 5, 4\]"),
        ("", {"loss": "mse"}, errors.OptionError, "compares tensors"),
        ("", {"project": "auto"}, errors.OptionError, "takes it as it is"),
        ("", {"student_port": "attention.o"}, errors.PortError, "attention.heads"),
        ("", {"loss": partial(losses.attention_kl, heads=[(2, 0)])}, errors.OptionError, "of 2"),
        ("", {"loss": partial(losses.relation_kl, heads=5)}, errors.ShapeError, "do not divide"),
        ("", {"student": "attn@1"}, errors.TapError, "it ran once"),
        ("", {"student": "up"}, errors.PortError, r"'up' \(Linear\) has no attention"),
    ],
)
def test_what_does_not_fit_is_an_error(how, match, error, says, compile):
    student, teacher = nets(how)
    given = {"student": "attn", "teacher": "attn", "loss": "attention_kl", **ATTENTION, **match}
    with pytest.raises(error, match=says):
        fxdistill.wrap(student, teacher, [Match(**given)], logit_loss=None, compile=compile)(X)


@pytest.mark.parametrize("compile", [False, AOT], ids=["eager", "one"])
def test_a_map_that_a_model_makes_has_no_queries_and_no_scores(compile):
    case = CASES["gemma2"]
    models = [made(case, side, "eager") for side in LAYERS]
    for loss, port, error, says in (
        ("mse", "attention.q", errors.PortError, "no queries and keys"),
        (partial(losses.attention_mse, scores=True), "attention", errors.PortError, "no scores"),
        ("relation_kl", "attention", errors.PortError, "no queries"),
    ):
        match = attention_match(case, loss, port)
        distiller = fxdistill.wrap(*models, [match], logit_loss=None, compile=compile)
        with pytest.raises(error, match=says):
            distiller(**case.batch)


@MODES
@pytest.mark.parametrize("name", ["bert", "whisper cross"])
def test_padded_queries_of_a_map_do_not_count(name, compile):
    """An ordinary loss of the map that a module returns, however its sizes agree with others."""
    case = CASES[name]
    student, teacher = (made(dataclasses.replace(case, heads=(2, 2)), s, "eager") for s in LAYERS)
    match = attention_match(case, "l2", "output[1]")
    distiller = aot(fxdistill.wrap(student, teacher, [match], logit_loss=None, compile=compile))
    out = distiller(**case.batch)
    s, t = (map_of(case, side, m) for side, m in (("student", student), ("teacher", teacher)))
    each = (s - t).norm(dim=-1).mean(1)  # a row is a vector
    want = (each * case.weights).sum() / case.weights.sum()
    term = next(n for n in out.losses if n.endswith("output[1]"))
    torch.testing.assert_close(out.losses[term], want.detach())
    if compile is False:
        assert "tokens" in distiller.report(**case.batch).pairs[0].weighed_by


def test_modules_that_surely_attend_nothing_are_named_in_wrap():
    student, teacher = llamas()
    match = Match("model.layers.0.mlp", "model.layers.0.mlp", loss="attention_kl", **ATTENTION)
    with pytest.raises(errors.PortError, match=r"LlamaMLP.*nearest first: 'model.layers.0.self_a"):
        fxdistill.wrap(student, teacher, [match])


class OfTorch(nn.Module):
    """torch's own layer of an encoder, and its attention once more, with its weights or not."""

    def __init__(self, width, heads, **asked):
        super().__init__()
        self.embed = nn.Embedding(20, width)
        self.layer = nn.TransformerEncoderLayer(width, heads, 12, 0.0, batch_first=True)
        self.again = nn.MultiheadAttention(width, heads, batch_first=True)
        self.head, self.asked = nn.Linear(width, 20), asked

    def forward(self, input_ids, attention_mask):
        x, padded = self.embed(input_ids), attention_mask == 0
        hidden = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        x = self.layer(x, hidden, padded)
        y, *_ = self.again(x, x, x, key_padding_mask=padded, **self.asked)
        return self.head(x + y)

    def map(self, input_ids, attention_mask):
        x = self.embed(input_ids)
        hidden = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        options = {"attn_mask": hidden, "key_padding_mask": attention_mask == 0}
        return self.layer.self_attn(x, x, x, average_attn_weights=False, **options)[1]


@MODES
def test_torchs_own_attention_is_seen_through(compile):
    torch.manual_seed(0)
    asked = {"need_weights": False}
    student, teacher = OfTorch(8, 2, **asked), OfTorch(12, 2, **asked)
    mapping = [
        Match(path, path, loss="attention_kl", **ATTENTION) for path in ("layer.self_attn", "again")
    ]
    options = {"logit_loss": None, "compile": compile, "task": "masked_lm"}
    distiller = aot(fxdistill.wrap(student, teacher, mapping, **options))
    ids, kept = torch.randint(0, 20, (3, 6)), torch.ones(3, 6)
    kept[0, 4:] = 0
    out = distiller(input_ids=ids, attention_mask=kept)
    maps = [model.map(ids, kept) for model in (student, teacher)]
    want = losses.attention_kl(maps[0], maps[1].detach(), kept)
    torch.testing.assert_close(out.losses["layer.self_attn:attention"], want.detach())
    assert out.losses["again:attention"] > 0
    parameters = [*student.layer.self_attn.parameters()][:2]
    options = {"logit_loss": None, "compile": compile, "task": "masked_lm"}
    alone = aot(fxdistill.wrap(student, teacher, mapping[:1], **options))
    loss = alone(input_ids=ids, attention_mask=kept).loss
    for ours, theirs in zip(
        torch.autograd.grad(loss, parameters), torch.autograd.grad(want, parameters), strict=True
    ):
        torch.testing.assert_close(ours, theirs)
    assert torch.backends.mha.get_fastpath_enabled()
    assert F.multi_head_attention_forward.__module__ == "torch.nn.functional"


@pytest.mark.parametrize("compile", [False, AOT], ids=["eager", "one"])
def test_torchs_own_attention_that_makes_a_mean_of_its_map_is_named(compile):
    student, teacher = OfTorch(8, 2), OfTorch(12, 2)
    match = Match("again", "again", loss="attention_kl", **ATTENTION)
    distiller = fxdistill.wrap(student, teacher, [match], logit_loss=None, compile=compile)
    with pytest.raises(errors.PortError, match=r"student module 'again'.*need_weights=False"):
        distiller(input_ids=torch.randint(0, 20, (3, 6)), attention_mask=torch.ones(3, 6))


def test_what_another_library_put_in_its_place_is_called(monkeypatch):
    calls = []
    torchs = F.scaled_dot_product_attention

    def others(*args, **kwargs):
        calls.append(1)
        return torchs(*args, **kwargs)

    student, teacher = nets()
    match = Match("attn", "attn", loss="attention_kl", **ATTENTION)
    distiller = fxdistill.wrap(student, teacher, [match], logit_loss=None, compile=False)
    monkeypatch.setattr(F, "scaled_dot_product_attention", others)
    want = losses.attention_kl(of_net(student), of_net(teacher))
    torch.testing.assert_close(distiller(X).loss.detach(), want.detach())
    assert len(calls) == 2
    assert F.scaled_dot_product_attention is others


def test_nothing_of_a_step_is_left_where_it_failed():
    student, teacher = nets()
    match = Match("attn", "attn", loss="attention_kl", **ATTENTION)
    distiller = fxdistill.wrap(student, teacher, [match], logit_loss=None, compile=False)
    with pytest.raises(RuntimeError):
        distiller(X[..., :2])
    assert F.scaled_dot_product_attention.__module__ != "fxdistill.taps.attention"
    assert copy.deepcopy(distiller)(X).loss.isfinite()
