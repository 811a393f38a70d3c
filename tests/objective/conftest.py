"""Pairs of small models that tests of a file share."""

import pytest
from torch import nn

from one_step import Handwritten, llama


@pytest.fixture(scope="module")
def llamas() -> tuple[nn.Module, nn.Module]:
    return llama(1, seed=0), llama(3, seed=1)


@pytest.fixture(scope="module")
def written() -> tuple[nn.Module, nn.Module]:
    return Handwritten(2, 0), Handwritten(3, 1)
