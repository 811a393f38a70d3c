"""The loss terms of one chunk of tokens, and their gradient by the student's logits.

The formulas of divergences are in ``formulas.py``, those of labels in ``losses/labels.py``. With z
the student's logits, s = z/τ and v the value of a token before the factor τ²,
∂(τ²v)/∂z = τ ∂v/∂s. Cross entropy with smoothing ε and z-loss c has the gradient
q₁ (1 + 2c·lse) - (1-ε)·onehot - ε/V, with q₁ = softmax(z).
"""

import ast
import functools
import math
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

from fxdistill.base.tensors import wide
from fxdistill.losses.fused.formulas import Compared, Divergence, Mix
from fxdistill.losses.fused.score_formulas import score_of

Slope = tuple[Tensor, Tensor]  # for each token: the value [c], and its gradient [c, V]


@dataclass(frozen=True)
class ChunkSpec:
    """The constants of a compiled chunk.

    The divergence compares the first ``columns`` entries of the vocabulary; the label loss takes
    the student's whole vocabulary. For the output x of its weight, a head returns
    ``softcap·tanh(scale·x / softcap)``, or ``scale·x`` without a cap. ``scales`` and ``softcaps``
    are the student's and the teacher's. With a ``score``, which is for a divergence alone, each
    token's share is multiplied by it, and the second term is the sum of these shares.
    """

    divergences: tuple[Divergence, ...] = ()
    columns: int = 0
    scales: tuple[float, float] = (1.0, 1.0)
    softcaps: tuple[float | None, float | None] = (None, None)
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    labelled: bool = False
    score: str = ""

    def mix(self, tau: Tensor) -> Mix:
        """The mix of divergences at the temperature ``tau``."""
        return Mix(self.divergences, self.columns, tau)

    @property
    def text(self) -> str:
        """The spec as text, which an operator can take as an argument."""
        return repr(tuple(getattr(self, field.name) for field in fields(self)))

    @classmethod
    @functools.cache
    def read(cls, text: str) -> "ChunkSpec":
        """Read a spec from its ``text``."""
        return cls(*ast.literal_eval(text))


class Chunk(NamedTuple):
    """Some tokens with their logits.

    ``student`` ``[c, V]`` and ``teacher`` ``[c, V_T]`` are the outputs of the heads' weights,
    before scale and softcap; without a divergence there is no teacher. With ``ids`` ``[c, k]``,
    ``teacher`` holds the log-probabilities of those entries at τ. ``labels`` ``[c]`` are valid
    indices (any index where ``label_share`` is 0). The shares ``[c]`` are w / Σw in each term.
    ``settings`` ``[3]``: the weights of the two terms in the gradient, and τ.
    """

    student: Tensor
    teacher: Tensor | None
    ids: Tensor | None
    labels: Tensor | None
    logit_share: Tensor
    label_share: Tensor
    settings: Tensor

    @property
    def live(self) -> Tensor:
        """``[c, 1]``: whether a token counts in at least one term."""
        return ((self.logit_share != 0) | (self.label_share != 0))[:, None]

    def rows(self, start: int, stop: int) -> "Chunk":
        """The tokens from ``start`` to ``stop``."""
        *by_token, settings = self
        cut = [None if x is None else x[start:stop] for x in by_token]
        return Chunk._make([*cut, settings])


def through_head(raw: Tensor, scale: float, softcap: float | None) -> tuple[Tensor, Tensor | None]:
    """Scale and cap the output of a head's weight; also return the slope, ``None`` if it is 1."""
    x = wide(raw) if scale == 1.0 else wide(raw) * scale
    if softcap is None:
        return x, None if scale == 1.0 else torch.full((), scale, device=x.device, dtype=x.dtype)
    bent = torch.tanh(x / softcap)
    return softcap * bent, scale * (1 - bent.square())


def chunk_terms(c: Chunk, shape: ChunkSpec, want_gradient: bool) -> Tensor:
    """What each token adds to the two terms, ``[2, c]``; the gradient overwrites ``c.student``.

    The tokens are not summed here: each sum would make all threads wait for one, once a body.
    """
    logit_weight, label_weight, tau = c.settings.unbind()
    z, slope = through_head(c.student, shape.scales[0], shape.softcaps[0])
    z = torch.where(c.live, z, 0.0)
    terms = [torch.zeros_like(c.logit_share), torch.zeros_like(c.logit_share)]
    gradient = torch.zeros_like(z)
    if c.teacher is not None and shape.divergences:
        value, by_s, score = _divergence(z, c.teacher, c.ids, c.live, tau, shape)
        share = c.logit_share
        if score is not None:
            share = torch.where(share != 0, share * score, 0.0)
            terms[1] = share
        terms[0] = tau.square() * shared(value, share)
        gradient = (logit_weight * tau * share)[:, None] * by_s
    if c.labels is not None and shape.labelled:
        value, by_z = _cross_entropy(z, c.labels, shape)
        terms[1] = shared(value, c.label_share)
        gradient = gradient + (label_weight * c.label_share)[:, None] * by_z
    if want_gradient:
        write_gradient(c, gradient, slope)
    return torch.stack(terms)


def shared(value: Tensor, share: Tensor) -> Tensor:
    """share·value, ``[c]``; a value whose share is 0 does not count, even if it is NaN."""
    return torch.where(share != 0, share * value, 0.0)


def write_gradient(c: Chunk, by_z: Tensor, slope: Tensor | None) -> None:
    """Overwrite the student's logits with the gradient ``by_z`` times the head's ``slope``."""
    c.student.copy_(by_z if slope is None else torch.where(c.live, by_z * slope, 0.0))


def _divergence(
    z: Tensor, teacher: Tensor, ids: Tensor | None, live: Tensor, tau: Tensor, shape: ChunkSpec
) -> tuple[Tensor, Tensor, Tensor | None]:
    """For each token the value, the gradient by s, and the score if there is one."""
    if ids is not None:
        # A token that does not count needs finite values: all buckets alike.
        top = torch.where(live, teacher, -math.log(ids.shape[-1] + 1))
        return *bucket_slopes(z, ids, top, shape.mix(tau)), None
    y, _ = through_head(teacher, shape.scales[1], shape.softcaps[1])
    s = z[:, : shape.columns] / tau
    t = torch.where(live, y, 0.0)[:, : shape.columns] / tau
    mix = shape.mix(tau)
    logs = (s.log_softmax(-1), t.log_softmax(-1)) if mix.reads_logs or shape.score else None
    x = Compared(logs, (s, t))
    value, by_s = _value_and_slope(mix, x)
    score = score_of(shape.score, x, value, tau) if shape.score else None
    beyond = z.shape[-1] - shape.columns
    return value, torch.nn.functional.pad(by_s, (0, beyond)) if beyond else by_s, score


def _value_and_slope(mix: Mix, x: Compared) -> Slope:
    value, *inner = mix.sums(x)
    return value, mix.slope(x, inner)


def bucket_slopes(z: Tensor, ids: Tensor, top: Tensor, mix: Mix) -> Slope:
    """Divergences of distributions over the teacher's k best entries and a bucket for the rest.

    ``ids`` and ``top`` ``[c, k]`` are the teacher's best entries and their log-probabilities at τ.
    Q are the student's probabilities of the k + 1 buckets, and g = ∂v/∂S for S = log Q (as if S
    were free logits of k + 1 classes). The gradient by s is g at the k best entries, and
    g_rest · q / Q_rest at every other entry.
    """
    log_q = (z / mix.tau).log_softmax(-1)
    best = log_q.gather(-1, ids)
    rest = log_q.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
    kept = top.to(z.dtype)
    left = 1 - kept.exp().sum(-1, keepdim=True)
    if ids.shape[-1] == z.shape[-1]:  # then ``left`` is only rounding
        left = torch.zeros_like(left)
    tail = left.clamp_min(0).log()
    log_s, log_t = torch.cat([best, rest], -1), torch.cat([kept, tail], -1)
    value, by_bucket = _value_and_slope(mix, Compared((log_s, log_t)))
    spread = by_bucket[:, -1:] * (log_q - rest).exp()
    return value, spread.scatter(-1, ids, by_bucket[:, :-1])


def _cross_entropy(z: Tensor, labels: Tensor, shape: ChunkSpec) -> Slope:
    lse = z.logsumexp(-1)
    epsilon, size = shape.label_smoothing, z.shape[-1]
    hit = torch.arange(size, device=z.device) == labels[:, None]
    # No gather: Inductor of torch 2.11 moves it behind the gradient's write over the logits.
    value = lse - (1 - epsilon) * torch.where(hit, z, 0.0).sum(-1)
    q = (z - lse[:, None]).exp()
    if epsilon:
        value = value - epsilon * z.sum(-1) / size
    by_z = q * (1 + 2 * shape.z_loss * lse[:, None]) if shape.z_loss else q
    by_z = by_z - torch.where(hit, 1 - epsilon, 0.0) - (epsilon / size if epsilon else 0.0)
    if shape.z_loss:
        value = value + shape.z_loss * lse.square()
    return value, by_z
