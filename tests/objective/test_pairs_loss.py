"""A loss over all pairs: it gets lists of values, and is one term."""

import pytest
import torch
from torch import nn

import fxdistill
from fxdistill import Match, errors
from toys import tokens, toy_pair

REGIONAL = pytest.param("regional", marks=pytest.mark.slow)
MODES = pytest.mark.parametrize("compile", [False, REGIONAL, {"backend": "aot_eager"}])
MAPPING = {"blocks.0": "blocks.1", "blocks.1": "blocks.2"}


def shares(students, teachers, weights):
    """The layers' norms, as shares of their sum, compared: no layer has a value of its own."""

    def share(values):
        norms = [
            (x.square().mean(-1) * w).sum() / w.sum() for x, w in zip(values, weights, strict=True)
        ]
        return torch.stack(norms) / torch.stack(norms).sum()

    return (share(students) - share(teachers)).square().sum()


MASK = torch.ones(3, 7).index_fill(1, torch.tensor([4, 6]), 0.0)


def by_hand(student, teacher):
    seen = {}
    hooks = [
        model.get_submodule(path).register_forward_hook(
            lambda module, args, out, key=(side, path): seen.update({key: out})
        )
        for side, model, paths in (
            ("s", student, MAPPING),
            ("t", teacher, MAPPING.values()),
        )
        for path in paths
    ]
    student(tokens())
    with torch.no_grad():
        teacher.eval()(tokens())
    for hook in hooks:
        hook.remove()
    lists = [[seen["s", p] for p in MAPPING], [seen["t", p] for p in MAPPING.values()]]
    return shares(*lists, [MASK] * 2)


@MODES
def test_the_loss_gets_all_pairs_with_their_weights(compile):
    student, teacher = toy_pair()
    wanted = by_hand(student, teacher)
    named = [(n, p) for n, p in student.named_parameters() if p.requires_grad]
    slopes = torch.autograd.grad(wanted, [p for _, p in named], allow_unused=True)
    distiller = fxdistill.wrap(
        student,
        teacher,
        MAPPING,
        pairs_loss=shares,
        logit_loss=None,
        task="causal_lm",
        compile=compile,
    )
    out = distiller(tokens(), loss_mask=MASK)
    assert list(out.losses) == ["features", "pairs"]
    torch.testing.assert_close(out.losses["pairs"], wanted)
    torch.testing.assert_close(out.loss, wanted)
    out.loss.backward()
    for (name, p), slope in zip(named, slopes, strict=True):
        got = torch.zeros_like(p) if p.grad is None else p.grad
        torch.testing.assert_close(got, torch.zeros_like(p) if slope is None else slope, msg=name)


def test_matches_with_a_loss_of_their_own_stay_terms_of_their_own():
    student, teacher = toy_pair()
    mapping = [
        Match("blocks.0", "blocks.1"),
        Match("blocks.1", "blocks.2"),
        Match("blocks.1", "blocks.1", loss="l1", weight=0.5),
    ]
    options = {"logit_loss": None, "task": "causal_lm", "compile": False}
    distiller = fxdistill.wrap(student, teacher, mapping, pairs_loss=shares, **options)
    assert distiller.settings["pairs"] == 1.0
    distiller.set(weights={"pairs": 3.0})
    out = distiller(tokens(), loss_mask=MASK)
    assert list(out.losses) == ["features", "blocks.1#2", "pairs"]
    wanted = (0.5 * out.losses["blocks.1#2"] + 3.0 * out.losses["pairs"]) / 2
    torch.testing.assert_close(out.loss.detach(), wanted)
    report = distiller.report(tokens(), loss_mask=MASK)
    assert [pair.loss for pair in report.pairs] == ["shares", "shares", "l1"]
    assert [pair.weight for pair in report.pairs] == [3.0, 3.0, 0.5]


def test_pairs_may_have_projections_and_other_shapes():
    student, teacher = nn.Sequential(nn.Linear(4, 3)), nn.Sequential(nn.Linear(4, 5))

    def grams(students, teachers, weights):
        s, t = (torch.cat(values) for values in (students, teachers))
        return (s @ s.T - t @ t.T).square().mean()

    options = {"logit_loss": None, "task": "classification", "compile": False}
    distiller = fxdistill.wrap(student, teacher, {"0": "0"}, pairs_loss=grams, **options)
    with pytest.raises(errors.ShapeError):
        distiller(torch.ones(2, 4))
    grams.compares_shapes = "any"
    out = fxdistill.wrap(student, teacher, {"0": "0"}, pairs_loss=grams, **options)(
        torch.ones(2, 4)
    )
    assert out.loss > 0
    match = {"0": Match(teacher="0", project="linear")}
    distiller = fxdistill.wrap(student, teacher, match, pairs_loss=grams, **options)
    distiller(torch.ones(2, 4)).loss.backward()
    assert distiller.projections[0].weight.grad is not None


def test_micro_batches_add_up_to_one_mean():
    student, teacher = toy_pair()
    options = {"logit_loss": None, "label_weight": 0.0, "task": "causal_lm", "compile": False}
    distiller = fxdistill.wrap(student, teacher, MAPPING, pairs_loss=shares, **options)
    ids = tokens()
    whole = distiller(ids, labels=ids).losses["pairs"]
    half = distiller(ids, labels=ids, num_items=2 * ids[:, 1:].numel()).losses["pairs"]
    torch.testing.assert_close(2 * half, whole)


@pytest.mark.parametrize(
    ("mapping", "loss", "message"),
    [
        ({"blocks.0": Match(teacher="blocks.1", weight=2.0)}, shares, "weighs them itself"),
        ({"blocks.0": "blocks.1"}, "mse", "a callable \\(students, teachers, weights\\)"),
    ],
)
def test_mistakes_are_told_at_wrap(mapping, loss, message):
    with pytest.raises(errors.OptionError, match=message):
        fxdistill.wrap(*toy_pair(), mapping, pairs_loss=loss, task="causal_lm")
