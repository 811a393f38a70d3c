"""Which values have tokens: never because sizes happen to agree in a batch."""

import io

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import nn
from transformers import CLIPConfig, CLIPModel

import fxdistill
from fxdistill import Match, Matches, errors

AOT = {"backend": "aot_eager"}
MODES = pytest.mark.parametrize("compile", [False, AOT], ids=["eager", "graph"])
LENGTHS = (7, 8, 9, 16)  # 8 channels, heads and patches; 2 · 8 packed ones
PIXELS = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


class Maps(nn.Module):
    """Values ``[2, 8, ...]`` of an image beside a text of any length."""

    def __init__(self):
        super().__init__()
        self.image = nn.Conv2d(3, 8, 3)  # [2, 8, 4, 4]
        self.patches = nn.Conv2d(3, 8, 3)
        self.text = nn.Embedding(20, 8)
        self.head = nn.Linear(8, 5)
        self.kept = nn.Identity()

    def value(self, image):
        return image

    def forward(self, input_ids, pixel_values, attention_mask=None):
        image = self.kept(self.value(self.image(pixel_values)))
        pooled = image.reshape(2, -1).mean(1, keepdim=True)
        return self.head(self.text(input_ids).mean(1) + pooled)


class Attention(Maps):
    """As many heads as the text may have tokens: ``[2, 8, 4, 4]``."""

    def value(self, image):
        return image.softmax(-1)


class Patches(Maps):
    """Image tokens ``[2, 8, 16]``, as many as the text may have."""

    def value(self, image):
        return image.flatten(2)


class Packed(Maps):
    """Patches of all images in one row ``[2 · 8, 16]``: as many as B · L of a text of 8."""

    def value(self, image):
        return image.flatten(2).flatten(0, 1)


def towers(kind):
    torch.manual_seed(0)
    return kind(), kind()


def call(length, padded=True):
    ids = torch.zeros(2, length, dtype=torch.long)
    mask = torch.ones_like(ids)
    if padded:
        mask[0, length // 2 :] = 0
    return {"input_ids": ids, "pixel_values": PIXELS, "attention_mask": mask}


class Latents(Maps):
    """Eight latent vectors ``[2, 8, 16]`` that attend to patches and text alike."""

    def value(self, image):
        return image.flatten(2).softmax(-1) @ torch.arange(256.0).sin().reshape(16, 16)


CASES = [
    *((kind, "auto") for kind in (Maps, Attention, Patches, Packed, Latents)),
    *(pytest.param(kind, None, marks=pytest.mark.slow) for kind in (Maps, Patches, Packed)),
]


@pytest.mark.parametrize(
    ("loss", "compile"),
    [
        *((loss, False) for loss in ("mse", "l2", "cosine")),
        ("mse", AOT),
        *(pytest.param(loss, AOT, marks=pytest.mark.slow) for loss in ("l2", "cosine")),
    ],
)
@pytest.mark.parametrize(("kind", "tokens"), CASES)
def test_a_text_does_not_weigh_an_image(kind, tokens, loss, compile):
    student, teacher = towers(kind)
    match = {"kept": Match(teacher="kept", loss=loss, tokens=tokens)}
    distiller = fxdistill.wrap(student, teacher, match, logit_loss=None, compile=compile)
    lengths = LENGTHS if compile is False else LENGTHS[:2]
    found = [float(distiller(**call(length)).losses["kept"]) for length in lengths]
    s, t = (model.value(model.image(PIXELS)) for model in (student, teacher))
    if s.ndim == 4:  # the channels are the vector of each place
        s, t = s.movedim(1, -1), t.movedim(1, -1)
    want = {
        "mse": (s - t).square().mean(),
        "l2": (s - t).norm(dim=-1).mean(),
        "cosine": (1 - F.cosine_similarity(s, t, dim=-1)).mean(),
    }
    assert found == pytest.approx([float(want[loss].detach())] * len(found), rel=1e-5)


def test_samples_weigh_their_maps():
    student, teacher = towers(Maps)
    match = {"kept": Match(teacher="kept", loss="l2")}
    options = {"task": "classification", "logit_loss": None, "compile": False}
    distiller = fxdistill.wrap(student, teacher, match, **options)
    weights = torch.tensor([1.0, 3.0])
    out = distiller(input_ids=call(8)["input_ids"], pixel_values=PIXELS, token_weights=weights)
    s, t = (model.image(PIXELS) for model in (student, teacher))
    each = (s - t).norm(dim=1).mean((1, 2))
    torch.testing.assert_close(out.loss, (each * weights).sum() / 4)


# ---- said


class Heads(nn.Module):
    """A value of tokens with heads, ``[B, L, 2, 4]``."""

    def __init__(self):
        super().__init__()
        self.text, self.split = nn.Embedding(20, 8), nn.Unflatten(-1, (2, 4))
        self.head = nn.Linear(8, 20)

    def forward(self, input_ids, attention_mask=None):
        return self.head(self.split(self.text(input_ids)).flatten(-2))


@MODES
def test_tokens_that_are_said_are_taken(compile):
    student, teacher = towers(Heads)
    ids = torch.arange(10).reshape(2, 5)
    mask = torch.ones_like(ids)
    mask[1, 3:] = 0
    match = {"split": Match(teacher="split", tokens="input")}
    options = {"task": "masked_lm", "logit_loss": None, "compile": compile}
    out = fxdistill.wrap(student, teacher, match, **options)(input_ids=ids, attention_mask=mask)
    out.loss.backward()
    found, student.text.weight.grad = student.text.weight.grad, None
    s, t = (model.text(ids) for model in (student, teacher))
    want = (s - t).square().mean(-1)[mask.bool()].mean()
    want.backward()
    torch.testing.assert_close(out.loss, want)
    torch.testing.assert_close(found, student.text.weight.grad)


@MODES
@pytest.mark.parametrize("task", ["auto", "classification"])
def test_a_value_without_the_axes_that_were_said_is_an_error(task, compile):
    student, teacher = towers(Maps)
    match = {"kept": Match(teacher="kept", tokens="input")}
    options = {"task": task, "logit_loss": None, "compile": compile}
    distiller = fxdistill.wrap(student, teacher, match, **options)
    with pytest.raises(errors.BatchError, match=r"is \[2, 8, 4, 4\]: neither \[2, 7, ...\] nor"):
        distiller(**call(7))


@MODES
def test_tokens_that_a_call_does_not_have_are_an_error(compile):
    student, teacher = towers(Maps)
    match = {"kept": Match(teacher="kept", tokens="decoder")}
    distiller = fxdistill.wrap(student, teacher, match, logit_loss=None, compile=compile)
    with pytest.raises(errors.BatchError, match="the call has none"):
        distiller(**call(7))


def test_an_unknown_option_is_named():
    match = {"kept": Match(teacher="kept", tokens="decoders")}
    with pytest.raises(errors.OptionError, match="tokens='decoders' for 'kept'"):
        fxdistill.wrap(*towers(Maps), match)


@pytest.mark.parametrize("kind", ["toml", "json"])
@pytest.mark.parametrize("tokens", [None, "decoder", "auto"])
def test_files_keep_it(tmp_path, kind, tokens):
    matches = Matches([Match("a", "b", tokens=tokens)])
    matches.save(tmp_path / f"m.{kind}")
    assert Matches.load(tmp_path / f"m.{kind}") == matches


# ---- told by running the models on texts of other lengths


class Reads(Maps):
    """The text beside an image, ``[2, L, 8]``."""

    def forward(self, input_ids, pixel_values, attention_mask=None):
        image = self.image(pixel_values).flatten(2).mean(-1)
        return self.head(self.kept(self.text(input_ids) + image.unsqueeze(1)).mean(1))


@MODES
@pytest.mark.parametrize("length", [3, 8, 16])
def test_a_text_beside_an_image_is_weighed(length, compile):
    student, teacher = towers(Reads)
    options = {"logit_loss": None, "compile": compile}
    given = call(length)
    out = fxdistill.wrap(student, teacher, {"kept": "kept"}, **options)(**given)
    s, t = (
        m.text(given["input_ids"]) + m.image(PIXELS).flatten(2).mean(-1).unsqueeze(1)
        for m in (student, teacher)
    )
    mask = given["attention_mask"]
    torch.testing.assert_close(out.loss, ((s - t).square().mean(-1) * mask).sum() / mask.sum())


def test_asking_changes_nothing():
    """Buffers and random numbers are as before, and no fake tensor stays behind."""

    class Counts(Reads):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(8)
            self.register_buffer("length", torch.zeros(()))
            self.drop = nn.Dropout(0.5)

        def forward(self, input_ids, pixel_values, attention_mask=None):
            self.length = torch.full((), float(input_ids.shape[1])) + input_ids.sum() * 0
            self.norm(self.image(pixel_values).flatten(2).mean(-1))
            return self.drop(super().forward(input_ids, pixel_values, attention_mask))

    student, teacher = towers(Counts)
    distiller = fxdistill.wrap(student, teacher, {"kept": "kept"}, logit_loss=None, compile=False)
    given = call(8)
    state = torch.random.get_rng_state()
    distiller._sorted((), given)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert int(student.norm.num_batches_tracked) == 0
    assert float(student.length) == 0.0
    distiller(**given)
    assert int(student.norm.num_batches_tracked) == 1
    assert float(student.length) == 8.0


def test_models_whose_sizes_depend_on_data_leave_it_to_sizes_and_say_so():
    """What follows from them is warned of, too: that a mask of another length weighs nothing."""

    class Chooses(Patches):
        def forward(self, input_ids, pixel_values, attention_mask=None):
            assert int(input_ids.max()) >= 0
            return super().forward(input_ids, pixel_values, attention_mask)

    student, teacher = towers(Chooses)
    distiller = fxdistill.wrap(student, teacher, {"kept": "kept"}, logit_loss=None, compile=False)
    with pytest.warns(errors.MatchWarning, match="nothing weighs kept, so that padding in it"):
        distiller(**call(7))
    (note,) = (n for n in distiller.report(**call(7)).notes if "whose tokens" in n)
    assert "cannot be run on inputs of another length" in note
    assert "Match(tokens=...)" in note


def test_what_a_model_keeps_for_itself_stays_real():
    class Keeps(Reads):
        scale = None

        def forward(self, input_ids, pixel_values, attention_mask=None):
            if self.scale is None:
                self.scale = torch.ones(())
            return super().forward(input_ids, pixel_values, attention_mask) * self.scale

    student, teacher = towers(Keeps)
    distiller = fxdistill.wrap(student, teacher, {"kept": "kept"}, logit_loss=None, compile=False)
    distiller(**call(8)).loss.backward()
    assert type(student.scale) is torch.Tensor
    assert type(student(**call(8))) is torch.Tensor


def test_a_call_that_fails_settles_nothing():
    student, teacher = towers(Patches)
    distiller = fxdistill.wrap(student, teacher, {"kept": "kept"}, logit_loss=None, compile=False)
    with pytest.raises(Exception, match="pixel_values"):
        distiller(input_ids=call(8)["input_ids"])
    s, t = (model.value(model.image(PIXELS)) for model in (student, teacher))
    wanted = (s - t).square().mean().detach()
    torch.testing.assert_close(distiller(**call(8)).loss.detach(), wanted)


def test_a_teacher_with_another_text_is_pooled_by_its_own_mask():
    student, teacher = towers(Reads)
    match = {"kept": Match(teacher="kept", reduce=("b l d -> b d", "mean"))}
    distiller = fxdistill.wrap(student, teacher, match, logit_loss=None, compile=False)
    ours, theirs = call(8), call(5)

    def pooled(model, given):
        value = model.text(given["input_ids"])
        value = value + model.image(PIXELS).flatten(2).mean(-1).unsqueeze(1)
        mask = given["attention_mask"].unsqueeze(-1)
        return (value * mask).sum(1) / mask.sum(1)

    wanted = (pooled(student, ours) - pooled(teacher, theirs)).square().mean().detach()
    own = {name: theirs[name] for name in ("input_ids", "attention_mask")}
    found = distiller(**ours, teacher_inputs=own).loss.detach()
    torch.testing.assert_close(found, wanted)
    shared = {"pixel_values": PIXELS, **own}
    mine = {name: ours[name] for name in ("input_ids", "attention_mask")}
    torch.testing.assert_close(distiller(**shared, student_inputs=mine).loss.detach(), wanted)


def clip(layers):
    torch.manual_seed(layers)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    text = {"vocab_size": 30, "max_position_embeddings": 40, "eos_token_id": 29, **sizes}
    vision = {"image_size": 12, "patch_size": 4, **sizes}  # 9 patches and a class token
    config = CLIPConfig(
        text_config={"num_hidden_layers": layers, **text},
        vision_config={"num_hidden_layers": layers, **vision},
        projection_dim=8,
    )
    return CLIPModel(config)


@pytest.mark.parametrize("length", [7, 10])
def test_two_towers(length):
    """The image's ten tokens are weighed by nothing, the text's by its mask."""
    student, teacher = clip(1), clip(2)
    mapping = {
        "vision_model.encoder.layers.0": "vision_model.encoder.layers.1",
        "text_model.encoder.layers.0": "text_model.encoder.layers.1",
    }
    given = call(length) | {"pixel_values": torch.randn(2, 3, 12, 12)}
    given["input_ids"][:, -1] = 29
    seen = {}
    for model, paths in ((student, mapping), (teacher, mapping.values())):
        for path in paths:
            model.get_submodule(path).register_forward_hook(
                lambda module, args, out, key=path: seen.update(
                    {key: out[0] if isinstance(out, tuple) else out}
                )
            )
        model(**given)
    mask = given["attention_mask"]
    each = {s: (seen[s] - seen[t]).square().mean(-1) for s, t in mapping.items()}
    image, text = each.values()
    options = {"logit_loss": None, "label_loss": None, "compile": False}
    found = fxdistill.wrap(student, teacher, mapping, **options)(**given).losses
    wanted = [image.mean(), (text * mask).sum() / mask.sum()]
    for name, value in zip(mapping, wanted, strict=True):
        torch.testing.assert_close(found[name], value.detach())


# ---- listed


@pytest.mark.parametrize(
    ("kind", "options", "wanted"),
    [
        (Reads, {}, "tokens"),
        (Reads, {"tokens": None}, "nothing"),
        (Reads, {"tokens": "teacher"}, "the teacher's tokens"),
        (Reads, {"reduce": ("b l d -> b d", "mean")}, "tokens, in pooling"),
        (Patches, {}, "nothing"),
        (Maps, {}, "nothing"),
        (Maps, {"task": "classification"}, "samples"),
        (Reads, {"task": "classification"}, "samples and tokens"),
    ],
)
def test_the_report_and_the_summary_list_what_weighs_a_match(kind, options, wanted):
    student, teacher = towers(kind)
    task = options.pop("task", "masked_lm")
    match = {"kept": Match(teacher="kept", **options)}
    distiller = fxdistill.wrap(
        student, teacher, match, logit_loss=None, task=task, compile={"backend": "aot_eager"}
    )
    report = distiller.report(**call(8))
    assert [pair.weighed_by for pair in report.pairs] == [wanted]
    shown = io.StringIO()
    Console(file=shown, width=120).print(distiller.summary())
    assert wanted in shown.getvalue()
