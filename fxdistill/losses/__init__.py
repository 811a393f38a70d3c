"""Loss functions, one family per file.

A loss is a plain function of tensors. It is one node of a captured graph (``one_node``), so that
passes can read it; AOTAutograd traces through it.
"""

from fxdistill.losses.ctc import ctc
from fxdistill.losses.hidden import cosine, l1, l2, mse, smooth_l1
from fxdistill.losses.labels import cross_entropy
from fxdistill.losses.logits import (
    forward_kl,
    jsd,
    mse_logits,
    reverse_kl,
    sigmoid_kl,
    soft_cross_entropy,
    total_variation,
)
from fxdistill.losses.vocab import VocabLoss, vocab_loss, vocab_loss_topk

__all__ = [
    "VocabLoss",
    "cosine",
    "cross_entropy",
    "ctc",
    "forward_kl",
    "jsd",
    "l1",
    "l2",
    "mse",
    "mse_logits",
    "reverse_kl",
    "sigmoid_kl",
    "smooth_l1",
    "soft_cross_entropy",
    "total_variation",
    "vocab_loss",
    "vocab_loss_topk",
]
