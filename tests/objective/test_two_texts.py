"""A second text, an image of bytes, a sequence-first value: as long as the text by chance."""

import contextlib

import pytest
import torch
from torch import nn

import fxdistill
from fxdistill import errors
from toys import AOT, same_step

OPTIONS = {"logit_loss": None, "label_loss": None, "task": "masked_lm"}
MODES = pytest.mark.parametrize("compile", [False, AOT], ids=["eager", "graph"])
LENGTHS = pytest.mark.parametrize("length", [6, 5, 7])  # the document has 6 words


def read(layer, ids):
    return layer(ids).tanh()


class Pair(nn.Module):
    """A query and a document, each with a mask of its own."""

    def __init__(self):
        super().__init__()
        self.words, self.doc_words = nn.Embedding(20, 8), nn.Embedding(20, 8)
        self.query, self.doc = nn.Tanh(), nn.Tanh()

    def forward(self, input_ids, attention_mask, doc_ids, doc_mask):
        query = self.query(self.words(input_ids)) * attention_mask.unsqueeze(-1)
        doc = self.doc(self.doc_words(doc_ids)) * doc_mask.unsqueeze(-1)
        return query.mean(1) @ doc.mean(1).T


def two(kind):
    torch.manual_seed(0)
    return kind(), kind()


def text(length, batch=2):
    ids = torch.randint(0, 20, (batch, length), generator=torch.Generator().manual_seed(length))
    mask = torch.ones_like(ids)
    mask[-1, length // 2 :] = 0
    return ids, mask


def weighed(s, t, mask=None):
    each = (s - t.detach()).square().mean(-1)
    return each.mean() if mask is None else (each * mask).sum() / mask.sum()


@MODES
@LENGTHS
@pytest.mark.parametrize("given", ["names", "positions", "teacher's own"])
def test_the_query_does_not_weigh_the_document(given, length, compile):
    student, teacher = two(Pair)
    (ids, mask), (doc_ids, doc_mask) = text(length), text(6)
    distiller = fxdistill.wrap(
        student, teacher, {"query": "query", "doc": "doc"}, **OPTIONS, compile=compile
    )
    call = {"input_ids": ids, "attention_mask": mask, "doc_ids": doc_ids, "doc_mask": doc_mask}
    args = ()
    if given == "positions":
        args, call = tuple(call.values()), {}
    if given == "teacher's own":
        call = {**call, "teacher_inputs": {"input_ids": ids.clone(), "attention_mask": mask}}
    out = distiller(*args, **call)
    query = weighed(*(read(m.words, ids) for m in (student, teacher)), mask)
    doc = weighed(*(read(m.doc_words, doc_ids) for m in (student, teacher)))
    torch.testing.assert_close(out.losses["query"], query.detach())
    torch.testing.assert_close(out.losses["doc"], doc.detach())
    same_step(student, out.loss, (query + doc) / 2)


def test_a_document_that_is_not_weighed_is_listed_so():
    (ids, mask), (doc_ids, doc_mask) = text(6), text(6)
    distiller = fxdistill.wrap(
        *two(Pair), {"query": "query", "doc": "doc"}, **OPTIONS, compile=False
    )
    distiller(input_ids=ids, attention_mask=mask, doc_ids=doc_ids, doc_mask=doc_mask)
    assert [pair.weighed_by for pair in distiller.report().pairs] == ["tokens", "nothing"]


class Whole(Pair):
    """The same, of a model that takes the batch as one mapping."""

    def forward(self, batch):
        return super().forward(**batch)


@LENGTHS
def test_a_batch_that_is_one_mapping(length):
    student, teacher = two(Whole)
    (ids, mask), (doc_ids, doc_mask) = text(length), text(6)
    batch = {"input_ids": ids, "attention_mask": mask, "doc_ids": doc_ids, "doc_mask": doc_mask}
    distiller = fxdistill.wrap(student, teacher, {"doc": "doc"}, **OPTIONS, compile=False)
    wanted = weighed(*(read(m.doc_words, doc_ids) for m in (student, teacher)))
    same_step(student, distiller(batch).loss, wanted)


class Boxed(nn.Module):
    """Each word has a place on the page, which goes with it: as long, and never a text alone."""

    def __init__(self):
        super().__init__()
        self.words, self.places = nn.Embedding(20, 8), nn.Embedding(20, 8)
        self.kept, self.head = nn.Identity(), nn.Linear(8, 20)

    def forward(self, input_ids, attention_mask, columns):
        return self.head(self.kept(self.words(input_ids) + self.places(columns)))


def test_what_goes_with_the_words_has_their_length():
    student, teacher = two(Boxed)
    (ids, mask), (columns, _) = text(6), text(6)
    distiller = fxdistill.wrap(student, teacher, {"kept": "kept"}, **OPTIONS, compile=False)
    out = distiller(input_ids=ids, attention_mask=mask, columns=columns)
    s, t = (m.words(ids) + m.places(columns) for m in (student, teacher))
    same_step(student, out.loss, weighed(s, t, mask))
    assert not [note for note in distiller.report().notes if "whose tokens" in note]


class Bytes(nn.Module):
    """An image of bytes, of 16 patches, beside a text."""

    def __init__(self):
        super().__init__()
        self.patch, self.mix = nn.Linear(12, 8), nn.Identity()
        self.words, self.head = nn.Embedding(20, 8), nn.Linear(8, 5)

    def patches(self, pixels):
        return self.patch((pixels.float() / 255).reshape(len(pixels), -1, 12))

    def forward(self, input_ids, pixels, attention_mask=None):
        return self.head(self.words(input_ids).mean(1) + self.mix(self.patches(pixels)).mean(1))


@pytest.mark.parametrize("length", [16, 15, 3])  # 16 patches, 3 channels
def test_a_text_does_not_weigh_an_image_of_bytes(length):
    student, teacher = two(Bytes)
    pixels = torch.arange(2 * 192).reshape(2, 3, 8, 8).remainder(256).to(torch.uint8)
    ids, mask = text(length)
    distiller = fxdistill.wrap(student, teacher, {"mix": "mix"}, **OPTIONS, compile=False)
    out = distiller(input_ids=ids, attention_mask=mask, pixels=pixels)
    same_step(student, out.loss, weighed(student.patches(pixels), teacher.patches(pixels)))


class SequenceFirst(nn.Module):
    """Inside, values are ``[L, B, D]``."""

    def __init__(self):
        super().__init__()
        self.words, self.kept, self.head = nn.Embedding(20, 8), nn.Tanh(), nn.Linear(8, 20)

    def forward(self, input_ids, attention_mask):
        return self.head(self.kept(self.words(input_ids).transpose(0, 1)).transpose(0, 1))


@MODES
def test_as_many_samples_as_tokens(compile):
    """A value that has its batch second is weighed by nothing; turned and said, by the mask."""
    student, teacher = two(SequenceFirst)
    ids, mask = text(5, batch=5)
    s, t = (read(m.words, ids) for m in (student, teacher))
    turned = fxdistill.Match("kept", "kept", rearrange="l b d -> b l d", tokens="input")
    for mapping, weights in (({"kept": "kept"}, None), ([turned], mask)):
        distiller = fxdistill.wrap(student, teacher, mapping, **OPTIONS, compile=compile)
        warned = contextlib.nullcontext()
        if weights is None:
            warned = pytest.warns(errors.MatchWarning, match="'l b d -> b l d' with tokens='input'")
        with warned:
            found = distiller(input_ids=ids, attention_mask=mask).loss
        same_step(student, found, weighed(s, t, weights))
        s, t = (read(m.words, ids) for m in (student, teacher))
