"""Presets: totals and gradients are those of the papers' formulas, written in plain PyTorch."""

import itertools
import pickle

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import nn

import fxdistill
from families import spread
from fxdistill import presets
from fxdistill.errors import CountError, OptionError, PathError, StructureError

V = 40
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def bert(layers, width=16, heads=2):
    sizes = {"hidden_size": width, "num_attention_heads": heads, "intermediate_size": 24}
    config = hf.BertConfig(vocab_size=V, num_hidden_layers=layers, **sizes, **NO_DROPOUT)
    return spread(hf.BertForMaskedLM(config))


def text():
    ids = torch.randint(3, V, (3, 6))
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    labels = ids.masked_fill(torch.rand(3, 6) < 0.5, -100).masked_fill(mask == 0, -100)
    return {"input_ids": ids, "attention_mask": mask}, labels


def compared(student, teacher, preset, batch, expected, labels=None):
    """The total and each gradient of the student are those of ``expected``."""
    distiller = fxdistill.wrap(student, teacher, compile=False, **preset)
    given = batch if labels is None else {**batch, "labels": labels}
    loss = distiller(**given).loss
    parameters = [p for p in distiller.parameters() if p.requires_grad]
    ours = torch.autograd.grad(loss, parameters, allow_unused=True)
    oracle = expected(distiller)
    theirs = torch.autograd.grad(oracle, parameters, allow_unused=True)
    torch.testing.assert_close(loss, oracle, rtol=1e-5, atol=1e-6)
    assert float(loss.detach()) > 0
    for a, b in zip(ours, theirs, strict=True):
        if a is None or b is None:  # an unused parameter may have no gradient, or one of zeros
            assert not any(x is not None and x.any() for x in (a, b))
            continue
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    return distiller


# ---- logits and hidden states


class Cnn(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(1, width, 3, padding=1)
        self.head = nn.Linear(width, 4)

    def forward(self, x):
        return self.head(F.relu(self.conv(x)).mean((2, 3)))


def test_hinton():
    student, teacher = Cnn(3), Cnn(5)
    x, y = torch.randn(6, 1, 5, 5), torch.randint(4, (6,))

    def expected(_):
        s, t = student(x), teacher(x).detach()
        soft = F.kl_div((s / 4).log_softmax(-1), (t / 4).softmax(-1), reduction="batchmean")
        return 0.7 * 16 * soft + 0.3 * F.cross_entropy(s, y)

    preset = {**presets.hinton(), "task": "classification"}
    compared(student, teacher, preset, {"x": x}, expected, labels=y)


@pytest.mark.parametrize(
    "build", [bert, "distilbert", "llama"], ids=["bert", "distilbert", "llama"]
)
def test_distilbert(build):
    if build == "distilbert":
        sizes = {"dim": 16, "n_heads": 2, "n_layers": 1, "hidden_dim": 24}
        config = hf.DistilBertConfig(vocab_size=V, **sizes, dropout=0.0, attention_dropout=0.0)
        student, teacher = spread(hf.DistilBertForMaskedLM(config)), bert(2)
    elif build == "llama":
        sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}
        student, teacher = (
            spread(hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=V, num_hidden_layers=n, **sizes)))
            for n in (1, 2)
        )
    else:
        student, teacher = bert(1), bert(2)
    batch, labels = text()
    alphas = {"alpha_ce": 0.4, "alpha_mlm": 0.5, "alpha_cos": 0.3}
    preset = presets.distilbert(**alphas, student=student, teacher=teacher)
    shifted = build == "llama"

    def expected(_):
        s, t = (m(**batch, output_hidden_states=True) for m in (student, teacher))
        z, u = s.logits / 2, t.logits.detach() / 2
        h, g = s.hidden_states[-1], t.hidden_states[-1].detach()
        y, z, u = (labels[:, 1:], z[:, :-1], u[:, :-1]) if shifted else (labels, z, u)
        predicted = y != -100
        if shifted:
            predicted = predicted & (batch["attention_mask"][:, :-1] == 1)
        z, u = z[predicted], u[predicted]
        soft = 4 * F.kl_div(z.log_softmax(-1), u.softmax(-1), reduction="batchmean")
        hard = F.cross_entropy(2 * z, y[predicted])
        of = batch["attention_mask"] == 1
        cosine = F.cosine_embedding_loss(h[of], g[of], torch.ones(int(of.sum())))
        return 0.4 * soft + 0.5 * hard + 0.3 * cosine

    compared(student, teacher, preset, batch, expected, labels=labels)


def test_distilbert_without_cosines_looks_at_no_model():
    student, teacher = bert(1), bert(2)
    batch, labels = text()

    def expected(_):
        s, t = (m(**batch).logits[labels != -100] for m in (student, teacher))
        soft = F.kl_div((s / 3).log_softmax(-1), (t.detach() / 3).softmax(-1), reduction="sum")
        return 0.5 * 9 * soft / len(s) + 0.5 * F.cross_entropy(s, labels[labels != -100])

    compared(student, teacher, presets.distilbert(temperature=3), batch, expected, labels=labels)


# ---- attention


def attention_inputs(model, batch, layer):
    """What enters a layer of BERT, and its queries, keys and values ``[B, heads, L, D]``."""
    states = model(**batch, output_hidden_states=True).hidden_states
    block = model.bert.encoder.layer[layer]
    inner, heads = block.attention.self, model.config.num_attention_heads
    parts = (getattr(inner, n)(states[layer]) for n in ("query", "key", "value"))
    return states, [x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in parts]


def scores(q, k):
    return q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5


def over_maps(values, mask):
    """The mean over heads and attended queries of the sum over keys."""
    of_queries = values.sum(-1) * mask[:, None]
    return of_queries.sum() / (mask.sum() * values.shape[1])


def relation(h, mask, heads):
    h = h.transpose(1, 2).flatten(2).unflatten(-1, (heads, -1)).transpose(1, 2)
    return scores(h, h).masked_fill(mask[:, None, None] == 0, -torch.inf).softmax(-1)


def kl(t, s, mask):
    return over_maps(
        torch.where(t > 0, t * (t.clamp_min(1e-30) / s.clamp_min(1e-30)).log(), 0), mask
    )


@pytest.mark.parametrize("width", [16, 24])
@pytest.mark.parametrize("prediction", [True, False])
def test_tinybert(width, prediction):
    student, teacher = bert(2, width), bert(4)
    batch, _ = text()
    mask = batch["attention_mask"].float()
    preset = presets.tinybert(student, teacher, prediction=prediction)

    def squares(projections, h, g):
        h = h if width == 16 else next(projections)(h)
        return ((h - g.detach()) ** 2).mean(-1)[mask == 1].mean()

    def expected(distiller):
        maps = iter(distiller.projections)
        states = [m(**batch, output_hidden_states=True).hidden_states for m in (student, teacher)]
        total = squares(maps, states[0][0], states[1][0])
        for s, t in ((0, 1), (1, 3)):  # the last of each half
            (q, k, _), (p, r, _) = (
                attention_inputs(m, batch, i)[1] for m, i in ((student, s), (teacher, t))
            )
            apart = (scores(q, k) - scores(p, r).detach()) ** 2
            of_keys = (apart * mask[:, None, None]).sum(-1, keepdim=True)
            total = total + over_maps(of_keys / mask.sum(1)[:, None, None, None], mask)
            total = total + squares(maps, states[0][s + 1], states[1][t + 1])
        if prediction:
            z, u = student(**batch).logits, teacher(**batch).logits.detach()
            soft = -(u.softmax(-1) * z.log_softmax(-1)).sum(-1)
            total = total + soft[mask == 1].mean()
        return total

    distiller = compared(student, teacher, preset, batch, expected)
    assert len(distiller.projections) == (0 if width == 16 else 3)


def test_layers_that_share_weights_are_calls():
    """ALBERT has one layer, which it calls as often as its config says."""
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}
    config = hf.AlbertConfig(vocab_size=V, embedding_size=8, num_hidden_layers=2, **sizes)
    student, teacher = spread(hf.AlbertForMaskedLM(config)), bert(4)
    batch, _ = text()
    mask = batch["attention_mask"].float()
    layer = "albert.encoder.albert_layer_groups.0.albert_layers.0"
    attention = student.get_submodule(f"{layer}.attention")

    def squares(h, g):
        return ((h - g.detach()) ** 2).mean(-1)[mask == 1].mean()

    def expected(_):
        hidden, states = [], teacher(**batch, output_hidden_states=True).hidden_states
        hook = student.get_submodule(layer).register_forward_hook(
            lambda module, args, out: hidden.extend([*(() if hidden else args[:1]), out])
        )
        student(**batch)
        hook.remove()
        total = squares(hidden[0], states[0])
        for s, t in ((0, 1), (1, 3)):
            q, k = (
                m(hidden[s]).unflatten(-1, (2, -1)).transpose(1, 2)
                for m in (attention.query, attention.key)
            )
            p, r, _ = attention_inputs(teacher, batch, t)[1]
            apart = (scores(q, k) - scores(p, r).detach()) ** 2
            of_keys = (apart * mask[:, None, None]).sum(-1, keepdim=True)
            total = total + over_maps(of_keys / mask.sum(1)[:, None, None, None], mask)
            total = total + squares(hidden[s + 1], states[t + 1])
        return total

    preset = presets.tinybert(student, teacher, prediction=False)
    assert [m.student for m in preset["mapping"][3:]] == [f"{layer}.attention@1", f"{layer}@1"]
    compared(student, teacher, preset, batch, expected)
    last = presets.minilm(teacher, student, teacher_layer=-2)["mapping"][0]
    assert last.teacher == f"{layer}.attention"


class Sharing(nn.Module):
    """A model that says how many layers it has, and does not run without its own inputs."""

    def __init__(self):
        super().__init__()
        self.config = hf.PreTrainedConfig(num_hidden_layers=3)
        self.layers = nn.ModuleList([bert(1).bert.encoder.layer[0]])

    def forward(self, own):
        for _ in range(3):
            own = self.layers[0](own)
        return own


def test_sharing_that_cannot_be_followed_is_said():
    with pytest.raises(StructureError, match=r"3 layers, and there are 1 .*share weights.*@1"):
        presets.tinybert(Sharing(), bert(4))


@pytest.mark.parametrize("heads", [None, 4])
def test_minilm_of_other_widths_and_heads(heads):
    student, teacher = bert(1, 16, 2), bert(3, 24, 3 if heads is None else 4)
    preset = presets.minilm(student, teacher, heads=heads, teacher_layer=1)
    batch, _ = text()
    mask = batch["attention_mask"].float()

    def expected(_):
        ours, theirs = (attention_inputs(m, batch, i)[1] for m, i in ((student, 0), (teacher, 1)))
        return sum(
            kl(relation(b, mask, heads or 2).detach(), relation(a, mask, heads or 2), mask)
            for a, b in zip(ours, theirs, strict=True)
        )

    compared(student, teacher, preset, batch, expected)


def test_minilm_of_the_first_version():
    student, teacher = bert(1), bert(3, 24)
    preset = presets.minilm(student, teacher, version=1)
    batch, _ = text()
    mask = batch["attention_mask"].float()

    def maps(q, k):
        return scores(q, k).masked_fill(mask[:, None, None] == 0, -torch.inf).softmax(-1)

    def expected(_):
        (q, k, v), (p, r, w) = (
            attention_inputs(m, batch, i)[1] for m, i in ((student, 0), (teacher, 2))
        )
        of_maps = kl(maps(p, r).detach(), maps(q, k), mask)
        return of_maps + kl(relation(w, mask, 2).detach(), relation(v, mask, 2), mask)

    compared(student, teacher, preset, batch, expected)


# ---- relations


def huber(x):
    return torch.where(x.abs() < 1, x**2 / 2, x.abs() - 0.5)


def distances(h):
    apart = torch.stack([(h - row).square().sum(-1) for row in h])
    apart = apart + torch.eye(len(h))  # no root of 0
    apart = apart.sqrt() * (1 - torch.eye(len(h)))
    return apart / (apart.sum() / (len(h) * (len(h) - 1)))


def angles(h):
    found = []
    for i, j, k in itertools.permutations(range(len(h)), 3):
        found.append(F.cosine_similarity(h[i] - h[j], h[k] - h[j], dim=0))
    return torch.stack(found)


@pytest.mark.parametrize("weights", [(25, 50), (3, 0), (0, 2.5)])
@pytest.mark.parametrize("label", [False, True])
def test_rkd(weights, label):
    # A shift of all samples changes nothing: in float32, rounding is all there is of that gradient.
    student, teacher = Cnn(3).double(), Cnn(6).double()
    x, y = torch.randn(4, 1, 5, 5).double(), torch.randint(4, (4,))
    preset = {**presets.rkd("conv", "conv", *weights), "task": "classification"}

    def expected(_):
        h, g = (m.conv(x).mean((2, 3)) for m in (student, teacher))
        g = g.detach()
        total = weights[0] * huber(distances(h) - distances(g)).mean()
        total = total + weights[1] * huber(angles(h) - angles(g)).mean()
        return total + F.cross_entropy(student(x), y) if label else total

    compared(student, teacher, preset, {"x": x}, expected, labels=y if label else None)


def test_rkd_of_several_modules_is_their_mean():
    def towers():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5)), nn.Sequential(
            nn.Linear(3, 6), nn.Linear(6, 2)
        )

    x, totals = torch.randn(5, 3), []
    for path in ("0", "1", "*"):
        preset = presets.rkd(path, path)
        totals.append(fxdistill.wrap(*towers(), compile=False, **preset)(x).loss)
    torch.testing.assert_close(totals[2], (totals[0] + totals[1]) / 2)


# ---- exits


class Exits(nn.Module):
    """Three sections of maps, whose sizes and widths differ."""

    def __init__(self):
        super().__init__()
        widths = (1, 3, 4, 6)
        self.parts = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, stride=2, padding=1), nn.ReLU())
            for a, b in itertools.pairwise(widths)
        )
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        for part in self.parts:
            x = part(x)
        return self.head(x.mean((2, 3)))


BLOCKS = ["parts.0", "parts.1", "parts.2"]


@pytest.mark.parametrize("feature", [0.03, 0])
@pytest.mark.parametrize("blocks", [(BLOCKS, None), (BLOCKS[:2], BLOCKS[2])])
def test_be_your_own_teacher(feature, blocks):
    student = Exits()
    x, y = torch.randn(5, 1, 16, 16), torch.randint(4, (5,))
    preset = presets.be_your_own_teacher(student, blocks[0], deepest=blocks[1], feature=feature)
    preset |= {"task": "classification", "example_inputs": {"x": x}}

    def expected(distiller):
        values, h = [], x
        for part in student.parts:
            h = part(h)
            values.append(h.mean((2, 3)))
        own = student.head(values[2])
        total = F.cross_entropy(own, y)
        for i in range(2):
            made = distiller.heads[f"exit{i}"].linear(values[i])
            total = total + 0.7 * F.cross_entropy(made, y)
            soft, target = (made / 3).log_softmax(-1), (own.detach() / 3).softmax(-1)
            total = total + 0.3 * 9 * F.kl_div(soft, target, reduction="batchmean")
            if feature:
                apart = distiller.projections[i](values[i]) - values[2].detach()
                total = total + feature * apart.square().sum(1).mean()
        return total

    compared(student, None, preset, {"x": x}, expected, labels=y)


def test_exits_of_a_transformer_have_modules_of_ones_own():
    config = hf.BertConfig(
        vocab_size=V, hidden_size=16, num_hidden_layers=3, num_attention_heads=2,
        intermediate_size=24, num_labels=4, **NO_DROPOUT,
    )  # fmt: skip
    student = spread(hf.BertForSequenceClassification(config))
    blocks = [f"bert.encoder.layer.{i}" for i in (0, 2)]

    class First(nn.Linear):
        def forward(self, value):
            return super().forward(value[:, 0])

    preset = presets.be_your_own_teacher(
        student, blocks, alpha=0.5, feature=0.1, temperature=2, module=lambda path: First(16, 4)
    )
    batch, _ = text()
    y, mask = torch.randint(4, (3,)), batch["attention_mask"].unsqueeze(-1)

    def expected(distiller):
        out = student(**batch, output_hidden_states=True)
        first, last = out.hidden_states[1], out.hidden_states[3].detach()
        made, own = distiller.heads["exit0"](first), out.logits.detach()
        soft = F.kl_div((made / 2).log_softmax(-1), (own / 2).softmax(-1), reduction="batchmean")
        h, g = ((x * mask).sum(1) / mask.sum(1) for x in (first, last))
        features = 0.1 * (h - g).square().sum(1).mean()
        total = F.cross_entropy(out.logits, y) + 0.5 * F.cross_entropy(made, y)
        return total + 0.5 * 4 * soft + features

    compared(student, None, preset, batch, expected, labels=y)


def test_blocks_that_do_not_fit_are_said():
    with pytest.raises(OptionError, match="an exit and a deeper block"):
        presets.be_your_own_teacher(Exits(), BLOCKS[:1])
    with pytest.raises(PathError, match=r"no block 'part\.0'. Nearest: 'parts.0'"):
        presets.be_your_own_teacher(Exits(), ["part.0", "parts.1"])
    with pytest.raises(OptionError, match="listed twice"):
        presets.be_your_own_teacher(Exits(), [*BLOCKS, "parts.0"])
    with pytest.raises(OptionError, match="alpha=2"):
        presets.be_your_own_teacher(Exits(), BLOCKS, alpha=2)
    with pytest.raises(OptionError, match="paths of modules"):
        presets.be_your_own_teacher(Exits(), "parts.0")
    with pytest.raises(OptionError, match="'auto', or a callable"):
        presets.be_your_own_teacher(Exits(), BLOCKS, module=nn.Linear(2, 2))


# ---- what a preset is


def test_a_preset_is_a_dict_that_prints_its_paper():
    student, teacher = bert(1), bert(2)
    preset = presets.minilm(student, teacher)
    assert isinstance(preset, dict)
    printed = repr(preset).splitlines()
    assert "Wang et al. (2021), MiniLMv2" in printed[0]
    path = "bert.encoder.layer.{}.attention:attention"
    line = f"    {path.format(0)} <- {path.format(1)} (relation_kl(of='q', heads=None))"
    assert printed[1:3] == ["  mapping =", line]
    assert "  feature_weight = 3" in printed
    again = pickle.loads(pickle.dumps(presets.hinton()))
    assert (again, repr(again)) == (presets.hinton(), repr(presets.hinton()))
    changed = presets.hinton() | {"temperature": 2.0}
    assert changed["temperature"] == 2.0
    assert "Hinton" in repr(changed)
    for made in (presets.rkd("a", "b"), presets.distilbert(), presets.tinybert(student, teacher)):
        assert "(20" in repr(made).splitlines()[0]


class Mixing(nn.Module):
    """Blocks that mix tokens without attention that could be tapped."""

    def __init__(self, depth, of):
        super().__init__()
        self.blocks = nn.ModuleList(of() for _ in range(depth))


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: presets.hinton(alpha=1.5), OptionError, "alpha=1.5: a number, 0 or more, 1 at"),
        (lambda: presets.hinton(temperature=0), OptionError, "temperature=0: a number, above 0"),
        (lambda: presets.distilbert(alpha_mlm=-1), OptionError, "alpha_mlm=-1"),
        (lambda: presets.distilbert(alpha_cos=1.0), OptionError, "student=None"),
        (lambda: presets.distilbert(bert(1), bert(1)), OptionError, "by keyword"),
        (
            lambda: presets.distilbert(alpha_cos=1, student=bert(1, 24), teacher=bert(1)),
            StructureError,
            "equal width, and the student has 24, the teacher 16",
        ),
        (lambda: presets.tinybert(bert(3), bert(2)), CountError, "has 3 layers, the teacher 2"),
        (lambda: presets.tinybert(bert(2, 24, 3), bert(2)), StructureError, "numbers of heads"),
        (lambda: presets.tinybert(Cnn(2), bert(2)), StructureError, r"student \(Cnn\) has 0"),
        (lambda: presets.tinybert(bert(2), None), OptionError, "teacher=None"),
        (lambda: presets.minilm(bert(2), bert(2), version=3), OptionError, "version=3: 1 or 2"),
        (lambda: presets.minilm(bert(2), bert(2), teacher_layer=2), OptionError, "2 layers"),
        (lambda: presets.minilm(bert(2), bert(2), heads=0), OptionError, "heads=0"),
        (
            lambda: presets.minilm(bert(2), bert(2), heads=2, version=1),
            OptionError,
            "heads=2 is of version 2",
        ),
        (
            lambda: presets.minilm(
                Mixing(2, lambda: nn.TransformerEncoderLayer(8, 2, 16)), bert(2)
            ),
            StructureError,
            "student block 'blocks.1' has none that can be tapped",
        ),
        (lambda: presets.rkd("a", "b", 0, 0), OptionError, "both 0"),
        (lambda: presets.rkd(nn.Linear(2, 2), "b"), OptionError, "path_s="),
        (lambda: presets.rkd("a", "b", angle=float("nan")), OptionError, "angle=nan"),
    ],
)
def test_what_does_not_fit_is_said(make, error, text):
    with pytest.raises(error, match=text):
        make()


def test_a_path_that_no_model_has_is_found_by_wrap():
    with pytest.raises(fxdistill.errors.PathError, match="cov"):
        fxdistill.wrap(Cnn(3), Cnn(4), **presets.rkd("cov", "conv"))
