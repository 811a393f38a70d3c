"""More than one device: the only folder that imports ``torch.distributed``."""

from fxdistill.parallel.vocab import sharded_vocab_loss

__all__ = ["sharded_vocab_loss"]
