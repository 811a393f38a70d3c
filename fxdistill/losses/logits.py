"""Divergences between two vocabularies of logits.

``student_logits`` and ``teacher_logits`` are ``[..., V]``; ``weights`` is shaped like their leading
axes, or ``None``. p = softmax(z/τ) with temperature τ, a number or a 0-d tensor. The value of a
token is a sum over the vocabulary times τ², which keeps gradients comparable across temperatures
(Hinton et al., 2015, section 2; ``total_variation`` and ``mse_logits`` have no such factor); the
result is Σ w·value / Σ w. Logits of other predictions and weights of another shape raise
ShapeError, vocabularies of two sizes VocabularyError.

The forms are chosen so that equal logits give exactly 0 and exactly zero gradients (``jsd`` and the
gradient of ``sigmoid_kl``: up to rounding).
"""

import functools
import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from fxdistill.base.nodes import one_node
from fxdistill.base.tensors import is_placed, wide
from fxdistill.losses import sharded
from fxdistill.losses.reduce import counted, weighted_mean
from fxdistill.losses.shapes import of_predictions

FLOOR = -1e4


def _scaled(logits: Tensor, temperature: Tensor | float, weights: Tensor | None) -> Tensor:
    z = counted(wide(logits), weights)
    if isinstance(temperature, Tensor):
        return z / temperature.to(z.dtype)
    return z if temperature == 1.0 else z / temperature


def _result(values: Tensor, temperature: Tensor | float, weights: Tensor | None) -> Tensor:
    return weighted_mean(values, weights) * temperature**2


def on_mesh(
    name: str,
    student: Tensor,
    teacher: Tensor,
    temperature: Tensor | float,
    weights: Tensor | None,
    beta: float = 0.5,
) -> Tensor:
    """The divergence ``name`` between DTensors."""
    plain = functools.partial(jsd, beta=beta) if name == "jsd" else globals()[name]
    kind = (name, 1.0, beta)
    given = (student, teacher, temperature, weights)
    of_shards: Tensor = sharded.logits.divergence(kind, plain, *given)
    return of_shards


@one_node
@of_predictions
def forward_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: Tensor | float = 1.0,
    weights: Tensor | None = None,
) -> Tensor:
    """τ² KL(p_T ‖ p_S) = τ² [Σ p_T (z_T - z_S)/τ - lse_T + lse_S] (Hinton et al., 2015)."""
    if is_placed(student_logits) or is_placed(teacher_logits):
        return on_mesh("forward_kl", student_logits, teacher_logits, temperature, weights)
    s = _scaled(student_logits, temperature, weights)
    t = _scaled(teacher_logits, temperature, weights)
    lse_s, lse_t = s.logsumexp(-1), t.logsumexp(-1)
    p = (t - lse_t.unsqueeze(-1)).exp()
    # An entry that the teacher rules out (logit -inf) adds nothing, whatever the student's logit.
    gap = torch.where(p > 0, t - s, torch.zeros_like(s))
    return _result((p * gap).sum(-1) - lse_t + lse_s, temperature, weights)


@one_node
@of_predictions
def reverse_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: Tensor | float = 1.0,
    weights: Tensor | None = None,
) -> Tensor:
    """τ² KL(p_S ‖ p_T) = τ² Σ p_S (log p_S - log p_T) (MiniLLM, Gu et al., 2024)."""
    if is_placed(student_logits) or is_placed(teacher_logits):
        return on_mesh("reverse_kl", student_logits, teacher_logits, temperature, weights)
    s = _scaled(student_logits, temperature, weights)
    t = _scaled(teacher_logits, temperature, weights)
    log_q, log_p = s.log_softmax(-1), t.log_softmax(-1)
    q = (s - s.logsumexp(-1, keepdim=True)).exp()
    # Σ q ∂log q is 0, so the gradient through log q is left out: it would only add rounding.
    gap = torch.where(q > 0, log_q.detach() - log_p, torch.zeros_like(s))
    return _result((q * gap).sum(-1), temperature, weights)


@one_node
@of_predictions
def jsd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: Tensor | float = 1.0,
    weights: Tensor | None = None,
    beta: float = 0.5,
) -> Tensor:
    """τ² [β KL(p_T ‖ m) + (1-β) KL(p_S ‖ m)] with m = β p_T + (1-β) p_S.

    The source is GKD (Agarwal et al., 2024). At β = 0 and 1, where the formula is 0, the loss is
    forward and reverse KL, as users of GKD expect.
    """
    if beta in (0, 1):
        kl = reverse_kl if beta else forward_kl
        return kl(student_logits, teacher_logits, temperature=temperature, weights=weights)
    if not 0 < beta < 1:
        raise ValueError(f"jsd takes beta between 0 and 1, not {beta}")
    if is_placed(student_logits) or is_placed(teacher_logits):
        return on_mesh("jsd", student_logits, teacher_logits, temperature, weights, beta)
    # The floor avoids -inf - -inf in columns that are -inf on both sides; e^FLOOR is exactly 0.
    log_q = _scaled(student_logits, temperature, weights).log_softmax(-1).clamp_min(FLOOR)
    log_p = _scaled(teacher_logits, temperature, weights).log_softmax(-1).clamp_min(FLOOR)
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    of_teacher = (log_p.exp() * (log_p - log_m)).sum(-1)
    of_student = (log_q.exp() * (log_q - log_m)).sum(-1)
    return _result(beta * of_teacher + (1 - beta) * of_student, temperature, weights)


@one_node
@of_predictions
def soft_cross_entropy(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: Tensor | float = 1.0,
    weights: Tensor | None = None,
) -> Tensor:
    """-τ² Σ p_T log p_S: forward KL plus the teacher's entropy, with the same student gradient."""
    if is_placed(student_logits) or is_placed(teacher_logits):
        return on_mesh("soft_cross_entropy", student_logits, teacher_logits, temperature, weights)
    s = _scaled(student_logits, temperature, weights)
    t = _scaled(teacher_logits, temperature, weights)
    p = t.softmax(-1)
    surprise = torch.where(p > 0, s.logsumexp(-1, keepdim=True) - s, torch.zeros_like(s))
    values = (p * surprise).sum(-1)
    return _result(values, temperature, weights)


@one_node
@of_predictions
def total_variation(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: Tensor | float = 1.0,
    weights: Tensor | None = None,
) -> Tensor:
    """½ Σ abs(p_T - p_S), between 0 and 1, without the factor τ² (f-distill, Wen et al., 2023).

    Entries whose probabilities are equal have the subgradient 0.
    """
    if is_placed(student_logits) or is_placed(teacher_logits):
        return on_mesh("total_variation", student_logits, teacher_logits, temperature, weights)
    q = _scaled(student_logits, temperature, weights).softmax(-1)
    p = _scaled(teacher_logits, temperature, weights).softmax(-1)
    return weighted_mean((q - p).abs().sum(-1) / 2, weights)


@one_node
@of_predictions
def mse_logits(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: Tensor | float = 1.0,
    weights: Tensor | None = None,
) -> Tensor:
    """The mean over the vocabulary of (z_S - z_T)² (Ba and Caruana, 2014); no τ has a part in it.

    Unlike the divergences of probabilities, it changes if all logits of a token are shifted. An
    entry that a model rules out (logit -inf) adds 0 to the mean.
    """
    if is_placed(student_logits) or is_placed(teacher_logits):
        return on_mesh("mse_logits", student_logits, teacher_logits, temperature, weights)
    s, t = _scaled(student_logits, 1.0, weights), _scaled(teacher_logits, 1.0, weights)
    ruled_out = (s == -torch.inf) | (t == -torch.inf)
    gap = torch.where(ruled_out, torch.zeros_like(s), s - t)
    return weighted_mean(gap.square().sum(-1) / s.shape[-1], weights)


@one_node
@of_predictions
def sigmoid_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: Tensor | float = 1.0,
    weights: Tensor | None = None,
) -> Tensor:
    """τ² times the mean over classes of KL(Bernoulli σ(z_T/τ) ‖ Bernoulli σ(z_S/τ)).

    For classes that do not exclude each other (several labels, detection): each has a sigmoid of
    its own, and binary cross entropy minus the teacher's entropy as its value (Yang et al., 2023,
    "Bridging Cross-task Protocol Inconsistency"). Everything is computed from logits, never from
    probabilities. A class whose logit is -inf in both models adds 0.
    """
    if is_placed(student_logits) or is_placed(teacher_logits):
        return on_mesh("sigmoid_kl", student_logits, teacher_logits, temperature, weights)
    s = _scaled(student_logits, temperature, weights)
    t = _scaled(teacher_logits, temperature, weights)
    values = (_of_outcome(s, t) + _of_outcome(-s, -t)).sum(-1) / s.shape[-1]
    return _result(values, temperature, weights)


def _of_outcome(s: Tensor, t: Tensor) -> Tensor:
    """σ(t) log(σ(t) / σ(s)); an outcome that the teacher rules out adds nothing."""
    p = t.sigmoid()
    return p * torch.where(p > 0, logsigmoid(t) - logsigmoid(s), torch.zeros_like(s))
