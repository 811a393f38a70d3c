"""An independent reference for the objective: hooks, tokens taken one by one, `nn.functional`.

Deliberately slow and plain. It shares no code and few building blocks with the library: weights are
Python floats per token, every token is compared alone, and every term is `sum(w * value) / count`.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IGNORED = -100
PairPath = tuple[str, str] | tuple[str, str, float]


@dataclasses.dataclass(frozen=True)
class Reference:
    loss: Tensor
    losses: dict[str, Tensor]
    gradients: dict[str, Tensor | None]


# ---- values of single tokens


def _l2(student: Tensor, teacher: Tensor) -> Tensor:
    return torch.linalg.vector_norm(student - teacher)


def _smooth_l1(student: Tensor, teacher: Tensor) -> Tensor:
    return F.smooth_l1_loss(student, teacher, beta=1.0)


def _cosine(student: Tensor, teacher: Tensor) -> Tensor:
    return 1 - F.cosine_similarity(student, teacher, dim=-1)


def _fitnet(student: Tensor, teacher: Tensor) -> Tensor:
    return F.mse_loss(F.normalize(student, dim=-1), F.normalize(teacher, dim=-1))


def _classes(student: Tensor, teacher: Tensor) -> Tensor:
    p, z = torch.sigmoid(teacher / 2), student / 2
    return -4 * (p * F.logsigmoid(z) + (1 - p) * F.logsigmoid(-z)).mean()


FEATURE_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": F.mse_loss,
    "l2": _l2,
    "smooth_l1": _smooth_l1,
    "l1": F.l1_loss,
    "cosine": _cosine,
    "fitnet": _fitnet,
    "detection_classification": _classes,
}


def logit_value(
    name: str, student: Tensor, teacher: Tensor, temperature: float, beta: float, real: int | None
) -> Tensor:
    """One token's divergence over the `real` columns, times the square of the temperature."""
    real = min(student.shape[-1], teacher.shape[-1]) if real is None else real
    student, teacher = student[:real] / temperature, teacher[:real] / temperature
    log_s, log_t = F.log_softmax(student, -1), F.log_softmax(teacher, -1)
    if name == "jsd" and beta in (0, 1):
        name = "reverse_kl" if beta else "forward_kl"
    if name == "forward_kl":
        value = F.kl_div(log_s, log_t, reduction="sum", log_target=True)
    elif name == "reverse_kl":
        value = F.kl_div(log_t, log_s, reduction="sum", log_target=True)
    elif name == "soft_cross_entropy":
        value = F.cross_entropy(student, F.softmax(teacher, -1))
    elif name == "jsd":
        p_s, p_t = F.softmax(student, -1), F.softmax(teacher, -1)
        log_m = (beta * p_t + (1 - beta) * p_s).log()
        value = beta * F.kl_div(log_m, p_t, reduction="sum")
        value = value + (1 - beta) * F.kl_div(log_m, p_s, reduction="sum")
    elif name == "total_variation":
        return (F.softmax(student, -1) - F.softmax(teacher, -1)).clamp(min=0).sum()
    elif name == "mse_logits":
        value = F.mse_loss(student, teacher)
    elif name == "sigmoid_kl":
        p = teacher.sigmoid()
        entropy = F.binary_cross_entropy_with_logits(teacher, p)
        value = F.binary_cross_entropy_with_logits(student, p) - entropy
    else:
        raise KeyError(name)
    return value * temperature**2


# ---- which tokens count


@dataclasses.dataclass(frozen=True)
class Tokens:
    """What a call says about its tokens, asked token by token."""

    task: str
    labels: Tensor | None
    loss_mask: Tensor | None
    token_weights: Tensor | None
    attention_mask: Tensor | None
    ids: Tensor | None  # of the tokens that labels index: the decoder's, in an encoder-decoder

    decoder_mask: Tensor | None = None

    def attended(self, *index: int) -> float:
        mask = self.attention_mask
        if self.task == "seq2seq":  # that mask is the encoder's; the decoder has its own, or labels
            mask = self.decoder_mask
            if mask is None and self.labels is not None:
                return float(self.labels[index] != IGNORED)
        if mask is None or mask.dim() != 2:
            return 1.0
        return float(mask[index] != 0)

    def asked(self, *index: int) -> float:
        weight = 1.0
        for given in (self.loss_mask, self.token_weights):
            weight *= 1.0 if given is None else float(given[index])
        return weight

    def target(self, *index: int) -> int | None:
        return None if self.labels is None else int(self.labels[index])

    def predictions(self, logits: Tensor) -> Iterator[tuple[tuple[int, ...], int | None, float]]:
        """(where the prediction is made, its target, its weight) for all that count."""
        for where, token, weight in self._all_predictions(logits.shape):
            target = None if token is None else self.target(*token)
            if weight and target != IGNORED:
                yield where, target, weight

    def _all_predictions(self, shape: torch.Size) -> Iterator[tuple[Any, Any, float]]:
        if self.task == "classification":
            yield from (((b,), (b,), self.asked(b)) for b in range(shape[0]))
            return
        nothing_said = self.labels is None and self.loss_mask is None and self.token_weights is None
        for b in range(shape[0]):
            for j in range(shape[1]):
                if self.task != "causal_lm":
                    yield (b, j), (b, j), self.asked(b, j) * self.attended(b, j)
                elif j > 0:
                    weight = self.asked(b, j) * self.attended(b, j) * self.attended(b, j - 1)
                    yield (b, j - 1), (b, j), weight
            if self.task == "causal_lm" and nothing_said:
                yield (b, shape[1] - 1), None, self.attended(b, shape[1] - 1)

    def features(self, value: Tensor, encoder: bool) -> tuple[Tensor, list[float]]:
        """The compared units, one a row, and their weights."""
        per_token = self.token_grid(encoder)
        if per_token is not None:
            flat = [w for row in per_token for w in row]
            if value.dim() == 3 and value.shape[:2] == (len(per_token), len(per_token[0])):
                value = value.flatten(0, 1)
            if value.dim() == 2 and value.shape[0] == len(flat):
                return value, flat
        if self.task == "classification":
            return value, [self.asked(b) for b in range(value.shape[0])]
        return value, [1.0] * value.shape[0]

    def token_grid(self, encoder: bool) -> list[list[float]] | None:
        mask = self.attention_mask
        if self.task == "classification" or (self.task == "seq2seq" and encoder):
            if mask is None or mask.dim() != 2:
                return None
            asked = [
                self.asked(b) if self.task == "classification" else 1.0 for b in range(len(mask))
            ]
            return [[asked[b] * float(m != 0) for m in row] for b, row in enumerate(mask)]
        like = (self.loss_mask, self.token_weights, self.labels, self.ids)
        known = next((t for t in like if t is not None), None)
        if known is None:
            return None
        rows, length = known.shape
        return [
            [self.asked(b, j) * self.attended(b, j) for j in range(length)] for b in range(rows)
        ]


# ---- taps


def first_tensor(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        return next(v for v in output.values() if isinstance(v, Tensor))
    if dataclasses.is_dataclass(output):
        fields = (getattr(output, f.name) for f in dataclasses.fields(output))
        return next(v for v in fields if isinstance(v, Tensor))
    return next(v for v in output if isinstance(v, Tensor))


@contextlib.contextmanager
def tapped(model: nn.Module, paths: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    values: dict[str, Tensor] = {}

    def keeper(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if path not in values:  # a bare path means the first call
                values[path] = first_tensor(output).clone()  # it may be written into later

        return hook

    handles = [
        model.get_submodule(p).register_forward_hook(keeper(p)) for p in dict.fromkeys(paths)
    ]
    try:
        yield values
    finally:
        for handle in handles:
            handle.remove()


def logits_of(output: Any) -> Tensor | None:
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        return output.get("logits")
    return getattr(output, "logits", None)


def run(
    model: nn.Module, paths: Sequence[str], inputs: Mapping[str, Any]
) -> tuple[Any, dict[str, Tensor]]:
    with tapped(model, paths) as values:
        output = model(**inputs)
    return logits_of(output), values


def with_decoder_inputs(model: nn.Module, inputs: dict[str, Any], labels: Tensor) -> dict[str, Any]:
    """An encoder-decoder makes its decoder's inputs from labels: see what it makes."""
    seen: dict[str, Any] = {}

    def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
        seen.update(kwargs)

    handle = model.get_decoder().register_forward_pre_hook(hook, with_kwargs=True)
    with torch.no_grad():
        model(**inputs, labels=labels)
    handle.remove()
    return {**inputs, "decoder_input_ids": seen["input_ids"]}


@contextlib.contextmanager
def evaluated(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


# ---- the objective


def average(values: Sequence[Tensor], weights: Sequence[float], count: float | None) -> Tensor:
    kept = [(value, weight) for value, weight in zip(values, weights, strict=True) if weight]
    if not kept:
        return torch.zeros(())
    total = torch.stack([value * weight for value, weight in kept]).sum()
    return total / (sum(weight for _, weight in kept) if count is None else count)


def feature_term(
    name: str, student: Tensor, teacher: Tensor, weights: Sequence[float], count: float | None
) -> Tensor:
    if (
        student.dim() > 3
    ):  # [B, C, H, W]: no axis is the width of a token, so only plain means are meant
        assert name in ("mse", "l1", "smooth_l1"), name
    if student.dim() == 3 and name in (
        "l2",
        "cosine",
        "fitnet",
    ):  # per sample, over tokens that have no weights
        units = zip(student, teacher, strict=True)
        values = [
            torch.stack([FEATURE_LOSSES[name](a, b) for a, b in zip(s, t, strict=True)]).mean()
            for s, t in units
        ]
    else:
        values = [FEATURE_LOSSES[name](s, t) for s, t in zip(student, teacher, strict=True)]
    return average(values, weights, count)


def reference(
    student: nn.Module,
    teacher: nn.Module,
    pairs: Sequence[PairPath],
    batch: Mapping[str, Any],
    *,
    task: str,
    labels: Tensor | None = None,
    feature_loss: str = "mse",
    logit_loss: str | None = "forward_kl",
    label_loss: str | None = "cross_entropy",
    feature_weight: float = 1.0,
    logit_weight: float = 1.0,
    label_weight: float = 1.0,
    temperature: float = 1.0,
    beta: float = 0.5,
    vocab_size: int | None = None,
    loss_mask: Tensor | None = None,
    token_weights: Tensor | None = None,
    num_items: float | None = None,
    num_feature_items: float | None = None,
    teacher_inputs: Mapping[str, Any] | None = None,
    encoder_paths: Sequence[str] = (),
    autocast: bool = False,
) -> Reference:
    """Total, named terms and the student's gradients.

    `encoder_paths` are the student's taps inside the encoder of an encoder-decoder.
    """
    ids = batch.get("decoder_input_ids" if task == "seq2seq" else "input_ids")
    masks = batch.get("attention_mask"), ids, batch.get("decoder_attention_mask")
    tokens = Tokens(task, labels, loss_mask, token_weights, *masks)
    shown, asked = dict(batch), {**batch, **(teacher_inputs or {})}
    if task == "seq2seq" and ids is None and labels is not None:
        shown = with_decoder_inputs(student, shown, labels)
        asked = with_decoder_inputs(teacher, asked, labels)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        with torch.no_grad(), evaluated(teacher):
            teacher_logits, teacher_values = run(teacher, [p[1] for p in pairs], asked)
        logits, values = run(student, [p[0] for p in pairs], shown)

    losses: dict[str, Tensor] = {}
    total = torch.zeros(())
    if logit_loss is not None:
        counted = list(tokens.predictions(logits))
        compared = ((logits[at].float(), teacher_logits[at].float()) for at, _, _ in counted)
        options = (temperature, beta, vocab_size)
        divergences = [logit_value(logit_loss, s, t, *options) for s, t in compared]
        losses["logits"] = average(divergences, [w for _, _, w in counted], num_items)
        total = total + logit_weight * losses["logits"]
    if label_loss is not None and labels is not None:
        counted = list(tokens.predictions(logits))
        entropies = [
            F.cross_entropy(logits[at].float(), torch.tensor(target)) for at, target, _ in counted
        ]
        losses["labels"] = average(entropies, [w for _, _, w in counted], num_items)
        total = total + label_weight * losses["labels"]
    if pairs:
        summed = torch.zeros(())
        for ours, theirs, *weight in pairs:
            s, weights = tokens.features(values[ours].float(), ours in encoder_paths)
            t, _ = tokens.features(teacher_values[theirs].float(), ours in encoder_paths)
            losses[ours] = feature_term(feature_loss, s, t, weights, num_feature_items)
            if num_items is not None and num_feature_items is None:
                # This batch is one of several, and weighs by its share of the predictions.
                share = sum(w for _, _, w in tokens.predictions(logits)) / num_items
                losses[ours] = losses[ours] * share
            summed = summed + (weight[0] if weight else 1.0) * losses[ours]
        losses["features"] = summed / len(pairs)
        total = total + feature_weight * losses["features"]

    named = {name: p for name, p in student.named_parameters() if p.requires_grad}
    gradients: dict[str, Tensor | None] = dict.fromkeys(named)
    if total.requires_grad:
        found = torch.autograd.grad(total, list(named.values()), allow_unused=True)
        gradients = dict(zip(named, found, strict=True))
    return Reference(total.detach(), {k: v.detach() for k, v in losses.items()}, gradients)


# ---- comparing


def check_losses(out: Any, expected: Reference, rtol: float = 1e-5, atol: float = 1e-7) -> None:
    assert set(out.losses) == set(expected.losses)
    for name, value in expected.losses.items():
        got = torch.as_tensor(out.losses[name]).float()
        torch.testing.assert_close(
            got, value, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )
    torch.testing.assert_close(out.loss.detach().float(), expected.loss, rtol=rtol, atol=atol)


def check_gradients(
    student: nn.Module, expected: Reference, rtol: float = 1e-5, floor: float = 1e-6
) -> None:
    """Some gradients, like a key bias, are zero in exact arithmetic: hence the floor."""
    norms = [g.norm().item() for g in expected.gradients.values() if g is not None]
    largest = max(norms, default=0.0)
    wrong = []
    for name, parameter in student.named_parameters():
        wanted = expected.gradients.get(name)
        wanted = torch.zeros_like(parameter) if wanted is None else wanted
        got = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        difference, norm = (got - wanted).norm().item(), wanted.norm().item()
        if not difference <= rtol * norm + floor * largest:
            wrong.append(f"{name}: |difference| {difference:.3e}, |gradient| {norm:.3e}")
    assert not wrong, f"largest gradient {largest:.3e}; " + "; ".join(wrong)
