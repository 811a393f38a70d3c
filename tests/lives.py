"""A small run with everything that a checkpoint restores."""

import copy
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

import fxdistill
from fxdistill import Match
from fxdistill.base.tensors import is_lazy
from toys import Toy

MAPPING = {"blocks.1.mlp": Match(teacher="blocks.2.mlp", project="linear")}


class Life:
    """A run with everything that a checkpoint restores: dropout, a queue, AdamW, a schedule."""

    def __init__(self, seed: int = 0, **options: Any) -> None:
        torch.manual_seed(0)
        teacher = Toy(3)  # frozen, and so not in a checkpoint: it comes from elsewhere
        torch.manual_seed(seed)
        student = Toy(2, dropout=0.2)
        mapping = options.pop("mapping", MAPPING)
        options = {"task": "causal_lm", "compile": False, **options}
        if mapping is MAPPING:
            bank = fxdistill.losses.CRD(width=4, size=32)
            bank.embedding.build(8, 8, torch.device("cpu"))  # so wrap need not look for widths
            mapping = {"blocks.0.mixer": Match(teacher="blocks.1.mixer", loss=bank), **MAPPING}
        self.distiller = fxdistill.wrap(student, teacher, mapping, **options)
        groups = self.distiller.param_groups(lr=3e-3)
        self.optimizer = torch.optim.AdamW(groups, lr=1e-2)
        self.scheduler = torch.optim.lr_scheduler.MultiStepLR(self.optimizer, [2, 4], gamma=0.5)

    def steps(self, count: int) -> list[float]:
        """Losses; the batches come from all generators, so that their states matter."""
        losses = []
        for _ in range(count):
            shift = random.randrange(7) + int(np.random.randint(7))
            ids = (torch.randint(0, 50, (3, 7)) + shift) % 50
            out = self.distiller(ids, labels=ids)
            out.loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.scheduler.step()
            losses.append(float(out.loss.detach()))
        return losses

    def save(self, folder: Any, **options: Any) -> Path:
        beside = {"optimizer": self.optimizer, "schedulers": [self.scheduler]}
        return fxdistill.save_checkpoint(folder, self.distiller, **{**beside, **options})

    def load(self, folder: Any, **options: Any) -> fxdistill.Checkpoint:
        beside = {"optimizer": self.optimizer, "schedulers": [self.scheduler]}
        return fxdistill.load_checkpoint(folder, self.distiller, **{**beside, **options})

    def state(self) -> Any:
        """All that a load may change, as copies."""
        found = [self.distiller.state_dict(), self.optimizer.state_dict()]
        found += [self.scheduler.state_dict(), self.distiller.settings]
        found += [torch.get_rng_state(), random.getstate()]
        return copy.deepcopy(found)


def assert_equal(a: Any, b: Any) -> None:
    """Bit for bit: tensors, and whatever holds them."""
    assert type(a) is type(b)
    if is_lazy(a):
        return  # there are no bits yet
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert list(a) == list(b)
        assert_equal(list(a.values()), list(b.values()))
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_equal(x, y)
    else:
        assert a == b
