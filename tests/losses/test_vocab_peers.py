"""Fused heads of students that teach each other, against float64 autograd of logits that exist."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fxdistill import errors
from fxdistill.losses import Peer, vocab_loss_of_peers
from fxdistill.losses.fused.call import HeadSide
from fxdistill.losses.fused.chunk import ChunkSpec
from fxdistill.losses.fused.peer_chunk import PeerSpec
from fxdistill.losses.fused.peer_operator import peer_operator
from fxdistill.losses.fused.teachers import packed

TOKENS, V = 37, 53
WIDTHS = (12, 8, 16)
COLUMNS = (V, V + 3, V + 1)  # padding beyond what is compared
CURVES = ((1.0, None), (0.5, None), (1.5, 4.0))
TAU = 1.7


def students(count: int, pooled: str, dtype: torch.dtype = torch.float32) -> list[Peer]:
    g = torch.Generator().manual_seed(0)
    found = []
    for i, (width, columns, (scale, cap)) in enumerate(
        list(zip(WIDTHS, COLUMNS, CURVES, strict=True))[:count]
    ):
        labels = torch.randint(0, V, (TOKENS,), generator=g)
        labels[i::5] = -100
        weights = torch.rand(TOKENS, generator=g)
        weights[i::7] = 0
        peer = Peer(
            torch.randn(TOKENS, width, generator=g),
            torch.randn(columns, width, generator=g) * 0.4,
            None if i == 1 else torch.randn(columns, generator=g),
            scale,
            cap,
            peers=tuple(j for j in range(count) if j != i),
            shares=torch.tensor([1.0, 2.0])[: count - 1],
            divergence="jsd" if i == 2 else "forward_kl",
            logit_weight=0.5 + i,
            logit_weights=torch.rand(TOKENS, generator=g),
            temperature=torch.tensor(TAU),
            vocab_size=V,
            labels=labels,
            label_weight=0.3,
            weights=weights,
            num_items=None if i else 20.0,
            label_smoothing=0.1 if i == 2 else 0.0,
        )
        real = {
            k: v.to(dtype)
            for k, v in peer._asdict().items()
            if isinstance(v, Tensor) and v.is_floating_point()
        }
        found.append(peer._replace(**real))
    return [learning(peer) for peer in found]


def learning(peer: Peer) -> Peer:
    leaves = {"hidden": peer.hidden, "weight": peer.weight, "bias": peer.bias}
    made = {k: None if v is None else v.detach().requires_grad_() for k, v in leaves.items()}
    return peer._replace(**made)


def leaves_of(peers: list[Peer]) -> list[Tensor]:
    return [x for peer in peers for x in peer[:3] if x is not None]


def mean_probabilities(logits: list[Tensor], share: Tensor, pooled: str) -> Tensor:
    share = share / share.sum()
    if pooled == "logits":
        mixed: Any = sum(w * z for w, z in zip(share, logits, strict=True))
        return (mixed / TAU).softmax(-1)
    return sum(w * (z / TAU).softmax(-1) for w, z in zip(share, logits, strict=True))  # type: ignore[return-value]


def weighted(values: Tensor, weights: Tensor, items: float | None) -> Tensor:
    return (values * weights).sum() / (weights.sum() if items is None else items)


def divergence_of(name: str, log_q: Tensor, p: Tensor) -> Tensor:
    if name == "forward_kl":
        return F.kl_div(log_q, p, reduction="none").sum(-1)
    log_m = ((p + log_q.exp()) / 2).log()
    return sum(F.kl_div(log_m, x, reduction="none").sum(-1) for x in (p, log_q.exp())) / 2  # type: ignore[return-value]


def oracle(peers: list[Peer], pooled: str) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Total and terms, by torch's own functions."""
    logits = []
    for peer in peers:
        z = F.linear(peer.hidden, peer.weight, peer.bias) * peer.scale
        logits.append(z if peer.softcap is None else peer.softcap * torch.tanh(z / peer.softcap))
    of_logits, of_labels, total = [], [], torch.zeros(())
    for peer, z in zip(peers, logits, strict=True):
        others = [logits[j].detach()[:, :V] for j in peer.peers]
        log_q = (z[:, :V] / TAU).log_softmax(-1)
        targets = [(other / TAU).softmax(-1) for other in others]
        if pooled != "each":
            targets = [mean_probabilities(others, peer.shares, pooled)]
        each = sum(divergence_of(str(peer.divergence), log_q, p) for p in targets) / len(targets)
        of_logits.append(weighted(TAU**2 * each, peer.logit_weights, None))
        counts = peer.weights * (peer.labels != -100)
        ce = F.cross_entropy(z, peer.labels, reduction="none", label_smoothing=peer.label_smoothing)
        of_labels.append(weighted(ce, counts, peer.num_items))
        total = total + peer.logit_weight * of_logits[-1] + peer.label_weight * of_labels[-1]
    return total, of_logits, of_labels


@pytest.mark.parametrize(
    ("count", "pooled", "compile"),
    [
        (2, "logits", False),
        (3, "logits", False),
        (3, "probabilities", False),
        (3, "each", False),
        pytest.param(
            3, "logits", True, marks=pytest.mark.slow
        ),  # Inductor's body overwrites logits
    ],
)
def test_values_and_gradients(count: int, pooled: Any, compile: bool) -> None:
    peers = students(count, pooled)
    exact = [learning(peer) for peer in students(count, pooled, torch.float64)]
    got = vocab_loss_of_peers(peers, pooled=pooled, chunk_tokens=32, compile=compile)
    total, of_logits, of_labels = oracle(exact, pooled)
    torch.testing.assert_close(got.loss, total.float())
    torch.testing.assert_close(got.logits, torch.stack(of_logits).detach().float())
    torch.testing.assert_close(got.labels, torch.stack(of_labels).detach().float())
    (3 * got.loss).backward()
    (3 * total).backward()
    for mine, wanted in zip(leaves_of(peers), leaves_of(exact), strict=True):
        torch.testing.assert_close(mine.grad.double(), wanted.grad, rtol=1e-4, atol=1e-6)


def test_without_labels_and_of_one_student_that_is_frozen() -> None:
    """A frozen student teaches, and gets no gradient; what is NaN and does not count is ignored."""
    peers = [peer._replace(labels=None) for peer in students(2, "logits")]
    frozen = peers[1]._replace(hidden=peers[1].hidden.detach(), weight=peers[1].weight.detach())
    got = vocab_loss_of_peers([peers[0], frozen], chunk_tokens=16, compile=False)
    exact = [peer._replace(label_weight=0.0) for peer in students(2, "logits", torch.float64)]
    total, *_ = oracle(exact, "logits")
    torch.testing.assert_close(got.loss, total.float())
    got.loss.backward()
    total.backward()
    for mine, wanted in zip(peers[0][:3], exact[0][:3], strict=True):
        torch.testing.assert_close(mine.grad.double(), wanted.grad, rtol=1e-4, atol=1e-6)
    assert peers[1].weight.grad is None


def test_nan_that_does_not_count() -> None:
    peers = students(2, "logits")
    for peer in peers:
        peer.weights[3] = peer.logit_weights[3] = 0
    wanted = vocab_loss_of_peers(peers, compile=False)
    broken = [learning(p._replace(hidden=p.hidden.detach().clone())) for p in peers]
    for peer in broken:
        peer.hidden.data[3] = torch.nan
    got = vocab_loss_of_peers(broken, compile=False)
    torch.testing.assert_close(got.loss, wanted.loss)
    wanted.loss.backward()
    got.loss.backward()
    for mine, clean in zip(leaves_of(broken), leaves_of(peers), strict=True):
        torch.testing.assert_close(mine.grad, clean.grad)


def test_operator() -> None:
    """Shapes, aliases and gradients are as promised."""
    peers = students(2, "logits")
    spec = ChunkSpec((("forward_kl", 1.0, 0.5),), V, labelled=True)
    share = torch.rand(TOKENS)
    lists = ([p.labels.clamp_min(0) for p in peers], [share, share], [share, share])
    of_both = PeerSpec((spec, spec), ((1,), (0,)), "logits")
    heads = packed([HeadSide(*p[:3]) for p in peers])
    rest = (torch.ones(2, 3), [torch.ones(1)] * 2, of_both.text, 32, "hwb,hw", False)
    torch.library.opcheck(peer_operator, (heads, *lists, *rest))


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"peers": (0,)}, errors.OptionError, "student 0 has peers=(0,): the numbers of other"),
        ({"peers": (2,)}, errors.OptionError, "of 2"),
        ({"vocab_size": V + 1}, errors.VocabularyError, f"there are {V} columns"),
        ({"labels": None}, errors.OptionError, "some students have labels and others not"),
        ({"hidden": torch.zeros(5, 12)}, errors.ShapeError, "labels has [37] tokens"),
        ({"logit_weights": torch.zeros(1)}, errors.ShapeError, "logit_weights has [1] tokens"),
        ({"bias": torch.zeros(5)}, errors.ShapeError, "student 0's bias is [5]"),
        ({"divergence": "forward_k"}, errors.OptionError, "Nearest: 'forward_kl'"),
        ({"weight": torch.zeros(V, 12).half()}, errors.OptionError, "float16"),
    ],
)
def test_bad_input(change: dict[str, Any], error: type[Exception], says: str) -> None:
    first, second = students(2, "logits")
    if change.get("weight") is not None:
        change = {**change, "hidden": torch.zeros(TOKENS, 12).half()}
    with pytest.raises(error) as caught:
        vocab_loss_of_peers([first._replace(**change), second], compile=False)
    assert says in str(caught.value)
