"""Norms of terms' gradients against autograd.grad by hand; weights in the ratio that was asked."""

import copy
import math
import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxdistill
from fxdistill import Match, errors, losses
from toys import Toy, tokens

MAPPING = {
    "blocks.0.mixer": Match(teacher="blocks.1.mixer", weight=2.0),
    "blocks.1.mlp": Match(teacher="blocks.2.mlp", project="linear", loss="l1"),
}


def made(**options: Any) -> fxdistill.Distiller:
    torch.manual_seed(0)
    options = {"mapping": MAPPING, "task": "causal_lm", "compile": False, **options}
    return fxdistill.wrap(Toy(2, dropout=0.3), Toy(3), temperature=2.0, **options)


def by_hand(distiller: fxdistill.Distiller, ids: Tensor) -> dict[str, float]:
    """Hooks, torch's own losses, and autograd.grad."""
    taps: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            taps[name] = output[0] if isinstance(output, tuple) else output

        return hook

    student, teacher = distiller.student, distiller.teacher
    hooks = [
        model.get_submodule(path).register_forward_hook(keep(f"{tower}.{path}"))
        for tower, model in (("s", student), ("t", teacher))
        for path in ("blocks.0.mixer", "blocks.1.mixer", "blocks.1.mlp", "blocks.2.mlp")
        if path.split(".")[1] < str(len(model.blocks))
    ]
    with torch.no_grad():
        target = teacher(ids)["logits"]
    logits = student(ids)["logits"]
    for hook in hooks:
        hook.remove()
    p, q = ((x / 2).log_softmax(-1)[:, :-1] for x in (target, logits))
    first = F.mse_loss(taps["s.blocks.0.mixer"], taps["t.blocks.1.mixer"].detach())
    mapped = distiller.projections[0](taps["s.blocks.1.mlp"])
    second = F.l1_loss(mapped, taps["t.blocks.2.mlp"].detach())
    terms = {
        "logits": 4 * (p.exp() * (p - q)).sum(-1).mean(),
        "labels": F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()),
        "features": (2 * first + second) / 2,
        "blocks.0.mixer": first,
        "blocks.1.mlp": second,
    }
    found = {}
    for name, term in terms.items():
        given = torch.autograd.grad(
            term, list(student.parameters()), retain_graph=True, allow_unused=True
        )
        found[name] = float(torch.cat([g.flatten() for g in given if g is not None]).norm())
    return found


@pytest.mark.parametrize("mode", [False, "regional", {"backend": "aot_eager"}])
def test_norms_are_those_of_autograd_by_hand(mode: Any) -> None:
    distiller, ids = made(compile=mode), tokens()
    distiller.set(logit_weight=0.0, label_weight=3.0)  # norms are unweighted
    distiller.student.embed.weight.grad = torch.ones(50, 8)
    before = copy.deepcopy(distiller.state_dict()), torch.get_rng_state(), random.getstate()
    norms = fxdistill.gradient_norms(distiller, {"ids": ids, "labels": ids})
    state = torch.get_rng_state()
    wanted = by_hand(distiller, ids)  # with the same dropout
    assert list(norms) == list(wanted)
    assert norms == pytest.approx(wanted, rel=1e-4)
    assert torch.equal(state, before[1])
    assert random.getstate() == before[2]
    for name, value in distiller.state_dict().items():
        assert torch.equal(value, before[0][name])
    assert torch.equal(distiller.student.embed.weight.grad, torch.ones(50, 8))
    assert distiller.student.blocks[0].mlp.weight.grad is None


def test_terms_that_a_call_lacks_are_left_out() -> None:
    ids = tokens()
    assert set(fxdistill.gradient_norms(made(mapping=None), (ids,))) == {"logits"}
    only = made(logit_loss=None)
    assert set(fxdistill.gradient_norms(only, {"ids": ids})) == {"features", *MAPPING}
    pairs = {k: v.teacher for k, v in MAPPING.items()}
    together = made(
        mapping=pairs, pairs_loss=lambda s, t, w: F.mse_loss(s[0], t[0]) + s[1].square().mean()
    )
    assert "pairs" in fxdistill.gradient_norms(together, {"ids": ids})
    bank = losses.CRD(width=4, size=8)
    bank.embedding.build(8, 8, torch.device("cpu"))
    queue = made(mapping={"blocks.0.mixer": Match(teacher="blocks.1.mixer", loss=bank)})
    assert "blocks.0.mixer" in fxdistill.gradient_norms(queue, {"ids": ids})
    assert bank.filled == 0  # what it wrote was taken back


def ratios(distiller: fxdistill.Distiller, batch: Any, names: list[str]) -> list[float]:
    """Weighted norms, relative to the first, by the gradients of the weighted total itself."""
    settings, found = distiller.settings, []
    terms = {"logits": "logit_weight", "labels": "label_weight", "features": "feature_weight"}
    for name in names:
        other = copy.deepcopy(distiller)
        if name in terms:
            other.set(**{w: settings[w] if w == terms[name] else 0.0 for w in terms.values()})
        else:
            off = dict.fromkeys(other.objective.weighed, 0.0)
            other.set(logit_weight=0.0, label_weight=0.0)
            other.set(weights={**off, name: settings[name]})
        torch.manual_seed(3)
        other(**batch).loss.backward()
        gradients = [p.grad.flatten() for p in other.student.parameters() if p.grad is not None]
        found.append(float(torch.cat(gradients).norm()))
    return [value / found[0] for value in found]


def test_weighted_norms_stand_in_the_ratio_of_the_targets() -> None:
    ids = tokens()
    batch = {"ids": ids, "labels": ids}
    for target in (
        {"logits": 1.0, "features": 0.3, "labels": 2},
        {"labels": 1.0, "blocks.0.mixer": 0.5, "blocks.1.mlp": 0.25},
        {"logits": 2.0, "labels": 0.0},
    ):
        distiller = made()
        distiller.set(feature_weight=0.7)
        norms = fxdistill.gradient_norms(distiller, batch)
        torch.manual_seed(3)
        chosen = fxdistill.balance(distiller, batch, target)
        assert list(chosen) == list(target)
        for name, weight in chosen.items():
            kind = {"logits": "logit_weight", "labels": "label_weight"}
            key = "feature_weight" if name == "features" else kind.get(name, name)
            assert distiller.settings[key] == weight
        first = next(iter(target.values()))
        wanted = [value / first for value in target.values()]
        assert ratios(distiller, batch, list(target)) == pytest.approx(wanted, rel=1e-3)
        assert all(map(math.isfinite, norms.values()))


def test_the_sum_of_weighted_norms_stays() -> None:
    distiller, ids = made(), tokens()
    distiller.eval()
    norms = fxdistill.gradient_norms(distiller, {"ids": ids, "labels": ids})
    before = norms["logits"] + norms["labels"]
    chosen = fxdistill.balance(
        distiller, {"ids": ids, "labels": ids}, target={"logits": 1, "labels": 3}
    )
    pulls = [chosen[name] * norms[name] for name in ("logits", "labels")]
    assert sum(pulls) == pytest.approx(before, rel=1e-5)
    assert pulls[1] / pulls[0] == pytest.approx(3, rel=1e-5)


def test_what_cannot_be_balanced_changes_nothing() -> None:
    ids = tokens()
    batch = {"ids": ids, "labels": ids}
    distiller = made()
    before = distiller.settings
    for target, said in (
        ({"features": 0.3}, "two terms"),
        (0.3, "two terms"),
        ({"features": 0.3, "logit": 1}, "no term 'logit'. Nearest: 'logits'"),
        ({"features": 0.3, "logits": -1.0}, "a number from 0"),
        ({"features": 0.3, "logits": float("nan")}, "a number from 0"),
        ({"labels": 0, "logits": 0}, "all are 0"),
        ({"features": 1, "blocks.1.mlp": 1}, "Name either"),
    ):
        with pytest.raises(errors.OptionError, match=said):
            fxdistill.balance(distiller, batch, target)
    with pytest.raises(errors.OptionError, match="a dict of the keywords"):
        fxdistill.gradient_norms(distiller, [ids])
    with pytest.raises(errors.OptionError, match="'labels' is not in the total"):
        fxdistill.balance(distiller, {"ids": ids}, {"labels": 1, "logits": 1})
    with torch.no_grad():
        distiller.student.embed.weight[0, 0] = torch.nan
    with pytest.raises(errors.OptionError, match="has the norm nan"):
        fxdistill.balance(distiller, batch, {"labels": 1, "logits": 1})
    assert distiller.settings == before
