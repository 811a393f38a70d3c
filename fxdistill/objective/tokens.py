"""Token weights: one rule says for every term which tokens count, and how much.

``labels``, ``loss_mask`` and ``token_weights`` are indexed by token. The weight of token j scales
the features at j, and the label and logit terms of the prediction *of* j, which a causal model
makes at j - 1 and any other model at j. A prediction counts only if the position that makes it is
attended, too.

B batch, L sequence, D width, V vocabulary.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from fxdistill.base.figures import shown
from fxdistill.errors import BatchError
from fxdistill.losses.reduce import IGNORE
from fxdistill.models.conventions import Stream, Task
from fxdistill.models.tap import Tower
from fxdistill.taps.markers import check

TOKEN_FIELDS = ("labels", "loss_mask", "token_weights")


class Grid(NamedTuple):
    """The tokens of one model's own inputs, and their attention mask; its decoder's likewise.

    ``frames`` are masks of further frames of sound, inside of a model that makes others at its end.
    """

    tokens: Tensor | None
    attention_mask: Tensor | None
    decoder_tokens: Tensor | None = None
    decoder_mask: Tensor | None = None
    frames: tuple[Tensor, ...] = ()


class Batch(NamedTuple):
    """The token-indexed tensors and the item counts of a call; every field is optional.

    ``num_items_in_batch`` counts labels, as trainers do, where ``num_items`` counts predictions.
    Only the first two sizes of ``tokens`` and ``decoder_tokens`` are read. ``others`` has the
    models whose own inputs (``teacher_inputs``) are of other tokens. ``named`` are the weights that
    ``Match(weights=...)`` asks for, ``head_items`` the numbers of items of heads by name.
    """

    labels: Tensor | None = None
    loss_mask: Tensor | None = None
    token_weights: Tensor | None = None
    attention_mask: Tensor | None = None
    num_items: Tensor | None = None
    num_items_in_batch: Tensor | None = None
    num_feature_items: Tensor | None = None
    tokens: Tensor | None = None
    decoder_tokens: Tensor | None = None
    decoder_mask: Tensor | None = None
    frames: tuple[Tensor, ...] = ()
    others: Mapping[Tower, Grid] | None = None
    named: Mapping[str, Tensor] | None = None
    head_items: Mapping[str, Tensor] | None = None

    def of(self, tower: Tower) -> "Batch":
        """The batch as ``tower`` sees it: with the tokens of its own inputs, if it has others.

        What is said of the main model's tokens has no part in another number of tokens.
        """
        if self.others is None or tower not in self.others:
            return self
        grid = self.others[tower]
        batch = self._replace(**grid._asdict())
        ours, theirs = self.tokens, grid.tokens
        if grid.decoder_tokens is not None:
            ours, theirs = self.decoder_tokens, grid.decoder_tokens
        if ours is not None and theirs is not None and ours.shape[:2] == theirs.shape[:2]:
            return batch
        return batch._replace(loss_mask=None, token_weights=None, labels=None)

    def under(self, stream: Stream, feature: Tensor, *, said: bool = False) -> "Batch":
        """The batch whose tokens and mask are those that a feature lies over, if any are.

        A speech model may have several: the frames of its logits, and those in front of an adapter.
        """
        if stream == "decoder" or not self.frames or self.tokens is None:
            return self
        if lies_over(feature, self.tokens, said):
            return self
        found = next((mask for mask in self.frames if lies_over(feature, mask, said)), None)
        if found is None:
            return self
        batch = self._replace(tokens=found, attention_mask=found, frames=())
        chosen = chosen_weights(self)
        if chosen is None or chosen.ndim == 1 or chosen.shape == found.shape:
            return batch
        return batch._replace(loss_mask=None, token_weights=None)  # said of the logits' frames

    def weighed(self, factors: Tensor) -> "Batch":
        """The batch with ``token_weights`` times ``factors``, by position."""
        given = self.token_weights
        return self._replace(token_weights=factors if given is None else given.float() * factors)

    @property
    def grids(self) -> tuple[tuple[int, int], ...]:
        """The (batch, length) of the tokens, of further frames, and of the decoder's tokens."""
        every = (self.tokens, *self.frames, self.decoder_tokens)
        given = [x for x in every if x is not None and x.ndim > 1]
        return tuple((x.shape[0], x.shape[1]) for x in given)


def chosen_weights(batch: Batch) -> Tensor | None:
    """loss_mask × token_weights; ``None`` if neither is given."""
    mask, weights = batch.loss_mask, batch.token_weights
    if mask is None:
        return None if weights is None else weights.float()
    return mask.float() if weights is None else mask.float() * weights.float()


def attended(batch: Batch) -> Tensor | None:
    """The 2-D attention mask as weights; ``None`` if there is none."""
    mask = batch.attention_mask
    return mask.float() if mask is not None and mask.ndim == 2 else None


def is_weighed(batch: Batch, stream: Stream) -> bool:
    """Whether the call says that tokens of a stream weigh less than others, or nothing."""
    mask = decoder_attended(batch) if stream == "decoder" else attended(batch)
    return mask is not None or (stream != "encoder" and chosen_weights(batch) is not None)


def decoder_attended(batch: Batch) -> Tensor | None:
    """The decoder's tokens that count, as weights ``[B, L]``; ``None`` where all of them do.

    The call's ``decoder_attention_mask`` says which; without one, padding is what has no label.
    """
    mask = batch.decoder_mask
    if mask is not None and mask.ndim == 2:
        return mask.float()
    return None if batch.labels is None else (batch.labels != IGNORE).float()


def _times(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return a if b is None else b
    return a * b


def align_labels(labels: Tensor, task: Task, shift: int = 1) -> Tensor:
    """Move labels to the positions that predict them: ``shift`` to the left in a causal model."""
    if task != "causal_lm":
        return labels
    ends = torch.full_like(labels[:, :shift], IGNORE)
    return torch.cat([labels[:, shift:], ends], dim=1)


def prediction_weights(batch: Batch, task: Task | None, logits: Tensor, shift: int = 1) -> Tensor:
    """The weight of every prediction, in the shape of ``logits`` without the vocabulary axis.

    A causal model predicts ``shift`` places ahead. Of a text without labels its last prediction
    counts, whose token is not in the batch; one further ahead has no target there.
    """
    chosen = chosen_weights(batch)
    mask = attended(batch) if task in ("causal_lm", "masked_lm") else None
    if task == "seq2seq":
        mask = decoder_attended(batch)
    if task == "masked_lm" and mask is not None and chosen is not None:
        # The logits have a grid of their own, such as a speech model's frames; only what is said
        # of this grid weighs them.
        mask = mask if mask.shape == logits.shape[:-1] else None
    _check(batch, logits, mask, "decoder_attention_mask" if task == "seq2seq" else "attention_mask")
    if task != "causal_lm":
        counted = None if batch.labels is None else (batch.labels != IGNORE).float()
        weights = _times(_times(chosen, mask), counted)
        return _ones(logits) if weights is None else weights
    if batch.labels is None and chosen is None:
        here = _ones(logits) if mask is None else mask
        if mask is None and shift == 1:
            return here
        # The token behind the last one is not in the batch; those further on, nobody has predicted.
        behind, beyond = torch.ones_like(here[:, :1]), torch.zeros_like(here[:, : shift - 1])
        told = torch.cat([torch.cat([here, behind], dim=1)[:, shift:], beyond], dim=1)
        told = told[:, : here.shape[1]]
        return told if mask is None else mask * told
    of_token = _times(chosen, mask)
    if batch.labels is not None:
        of_token = _times(of_token, (batch.labels != IGNORE).float())
    assert of_token is not None
    predicted = torch.cat([of_token[:, shift:], torch.zeros_like(of_token[:, :shift])], dim=1)
    return predicted if mask is None else predicted * mask


def _ones(logits: Tensor) -> Tensor:
    """One for each prediction; only the shape of the logits is read, so they need not exist."""
    return torch.ones(logits.shape[:-1], dtype=torch.float32, device=logits.device)


def _check(batch: Batch, logits: Tensor, mask: Tensor | None, name: str) -> None:
    """Raise BatchError where a token-indexed tensor does not have the shape of the predictions."""
    require_grid("labels", batch.labels, logits)
    require_grid("loss_mask", batch.loss_mask, logits)
    require_grid("token_weights", batch.token_weights, logits)
    require_grid(name, mask, logits)


_ELSEWHERE = (
    "Where logits have a grid of their own (a speech model's frames), a loss_mask of its shape "
    "says which of them count."
)
_ADVICE = {
    "labels": "A label_loss of your own takes labels of any grid (CTC).",
    "attention_mask": _ELSEWHERE,
    "decoder_attention_mask": _ELSEWHERE,
    "loss_mask": "",
    "token_weights": "",
}


@check
def require_grid(name: str, tensor: Tensor | None, logits: Tensor) -> None:
    """Raise BatchError unless ``tensor`` is shaped like ``logits`` without the vocabulary axis."""
    grid = logits.shape[:-1]
    if tensor is not None and tensor.shape != grid:
        raise BatchError(
            f"{name} has shape {shown(tensor.shape)}, but the student's logits are {shown(grid)} "
            f"predictions over the vocabulary. {name} is indexed by token (by sample in "
            f"classification). {_ADVICE[name]}"
        )


@check
def require_tokens(weights: Tensor, tokens: Tensor) -> None:
    """Raise BatchError unless ``weights`` have the shape ``[B, L]`` of the tokens."""
    if weights.shape != tokens.shape[:2]:
        raise BatchError(
            "loss_mask, token_weights and attention_mask make weights of shape "
            f"{shown(weights.shape)}, but there are {shown(tokens.shape[:2])} tokens."
        )


def feature_weights(
    batch: Batch,
    task: Task | None,
    stream: Stream,
    feature: Tensor,
    *,
    said: bool = False,
    numbers: bool = False,
) -> Tensor | None:
    """The weights of a feature's leading axes; ``None`` where these are not tokens or samples.

    A feature has tokens if it is ``[B, L, D]``, or flattened ``[B·L, D]``. One of more axes (a map
    ``[B, C, H, W]``, heads) has none, however its sizes agree with the tokens': unless that was
    ``said`` by ``Match(tokens=...)``; then a feature without their axes is an error. One of fewer,
    ``[B, L]``, has them where that was said, or is known (``numbers``). In
    classification, and ``[B]`` where there are no tokens, loss_mask × token_weights is per sample,
    and scales all positions of the sample, in all of its choices.
    """
    batch = batch.under(stream, feature, said=said)
    tokens = batch.decoder_tokens if stream == "decoder" else batch.tokens
    chosen = None if stream == "encoder" else chosen_weights(batch)
    mask = decoder_attended(batch) if stream == "decoder" else attended(batch)
    if said:
        require_axes_of_tokens(feature, tokens)
    if task == "classification":
        return _sample_feature_weights(chosen, mask, tokens, feature, said, numbers)
    if tokens is None:  # then a mask can only be that of samples
        require_samples(chosen, feature)
        of_samples = chosen if chosen is not None and chosen.ndim == 1 else None
        return _sample_feature_weights(of_samples, None, None, feature, said)
    if _on_its_own_grid(chosen, tokens, feature):
        return chosen
    if not lies_over(feature, tokens, said, numbers):
        return None
    if chosen is not None:
        require_tokens(chosen, tokens)
    weights = _times(chosen, mask)
    if weights is None:
        weights = torch.ones(tokens.shape[:2], device=feature.device)
    else:
        require_tokens(weights, tokens)
    return _lay_over(weights, feature)


def _on_its_own_grid(chosen: Tensor | None, tokens: Tensor, feature: Tensor) -> bool:
    """Whether ``chosen`` was said of another grid than the tokens', and the feature is on that."""
    if chosen is None or feature.ndim != 3:
        return False
    return chosen.shape != tokens.shape[:2] and chosen.shape == feature.shape[:2]


def _lay_over(weights: Tensor, feature: Tensor) -> Tensor:
    """Weights ``[B, L]`` in the shape of the leading axes of a feature that lies over them."""
    return weights if feature.shape[:2] == weights.shape else weights.reshape(-1)


def lies_over(feature: Tensor, tokens: Tensor, said: bool, numbers: bool = False) -> bool:
    """Whether the leading axes of a feature are ``tokens`` ``[B, L]``, or ``[B·L]`` flattened."""
    axes, size = feature.ndim, tuple(tokens.shape[:2])
    # With one axis less than a feature has, a pooled [B, D] would look like it by chance.
    least = 1 if said or numbers else 2
    if (least + 1 <= axes <= 3 or (said and axes > 3)) and tuple(feature.shape[:2]) == size:
        return True
    return (least <= axes <= 2 or (said and axes > 2)) and feature.shape[0] == size[0] * size[1]


def of_choices(sample: Tensor | None, tokens: Tensor | None, feature: Tensor) -> Tensor | None:
    """The weights ``[B]`` of samples for a feature that has a row for each of their choices."""
    if sample is None or tokens is None or sample.ndim != 1 or sample.shape[0] == 0:
        return sample
    rows = tokens.shape[0]
    flat = feature.shape[0] in (rows, rows * tokens.shape[1])
    if rows == sample.shape[0] or not flat or rows % sample.shape[0] != 0:
        return sample
    return sample.repeat_interleave(rows // sample.shape[0])


@check
def require_samples(weights: Tensor | None, feature: Tensor) -> None:
    """Raise BatchError where weights ``[B]`` are of other samples than a feature's."""
    if weights is None or weights.ndim != 1 or feature.shape[0] % max(1, weights.shape[0]) == 0:
        return
    raise BatchError(
        f"loss_mask and token_weights make weights of shape {shown(weights.shape)}, and a value "
        f"that they weigh is {shown(feature.shape)}: they are per sample, [B], where a call has "
        "no tokens"
    )


@check
def require_axes_of_tokens(feature: Tensor, tokens: Tensor | None) -> None:
    """Raise BatchError where a feature that was said to have tokens does not have their axes."""
    if tokens is None:
        raise BatchError(
            f"Match(tokens=...) says that a value {shown(feature.shape)} has tokens, and the call "
            "has none. Pass them (input_ids, or labels for a decoder), or say tokens=None."
        )
    batch, length = tokens.shape[:2]
    if tuple(feature.shape[:2]) != (batch, length) and feature.shape[0] != batch * length:
        batch, length = shown((batch, length))
        raise BatchError(
            f"Match(tokens=...) says that a value has tokens, and it is {shown(feature.shape)}: "
            f"neither [{batch}, {length}, ...] nor [{batch * length}, ...]. rearrange= brings "
            "the tokens to its second axis (where reduce= follows, a port of your own does: a "
            "callable (module, args, kwargs, output) -> tensor); tokens=None says that it has none."
        )


def _sample_feature_weights(
    sample: Tensor | None,
    mask: Tensor | None,
    tokens: Tensor | None,
    feature: Tensor,
    said: bool,
    numbers: bool = False,
) -> Tensor | None:
    sample = of_choices(sample, tokens, feature)
    if tokens is not None and lies_over(feature, tokens, said, numbers):
        grid = tokens.shape[:2]
        of_token = torch.ones(grid, device=feature.device) if mask is None else mask
        of_token = of_token if sample is None else of_token * sample.unsqueeze(1)
        return _lay_over(of_token, feature)
    if sample is None or sample.shape[0] != feature.shape[0]:
        return None
    if feature.ndim == 3:  # [B, N, D]: the sample's weight, spread over its N positions
        return (sample.unsqueeze(1) / feature.shape[1]).expand(feature.shape[:2])
    return sample
