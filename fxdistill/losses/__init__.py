"""Loss functions, one family per file.

A loss is a plain function of tensors. It is one node of a captured graph (``one_node``), so that
passes can read it; AOTAutograd traces through it.
"""

from fxdistill.base.attention import Attention
from fxdistill.losses.attention import (
    attention_kl,
    attention_mse,
    relation_kl,
    transfer_matrix,
)
from fxdistill.losses.contrastive import info_nce
from fxdistill.losses.ctc import ctc
from fxdistill.losses.detection import detection_box, detection_classification
from fxdistill.losses.hidden import cosine, fitnet, l1, l2, mse, smooth_l1
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
from fxdistill.losses.maps import attention_transfer, fpn
from fxdistill.losses.memory_bank import CRD
from fxdistill.losses.mixture import mean_of_teachers
from fxdistill.losses.relational import (
    angle_wise,
    distance_wise,
    gram,
    similarity_preserving,
)
from fxdistill.losses.vocab import VocabLoss, vocab_loss, vocab_loss_topk
from fxdistill.losses.vocab_peers import Peer, PeerLosses, vocab_loss_of_peers

__all__ = [
    "CRD",
    "Attention",
    "Peer",
    "PeerLosses",
    "VocabLoss",
    "angle_wise",
    "attention_kl",
    "attention_mse",
    "attention_transfer",
    "cosine",
    "cross_entropy",
    "ctc",
    "detection_box",
    "detection_classification",
    "distance_wise",
    "fitnet",
    "forward_kl",
    "fpn",
    "gram",
    "info_nce",
    "jsd",
    "l1",
    "l2",
    "mean_of_teachers",
    "mse",
    "mse_logits",
    "relation_kl",
    "reverse_kl",
    "sigmoid_kl",
    "similarity_preserving",
    "smooth_l1",
    "soft_cross_entropy",
    "total_variation",
    "transfer_matrix",
    "vocab_loss",
    "vocab_loss_of_peers",
    "vocab_loss_topk",
]
