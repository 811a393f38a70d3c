"""A folder with models and configurations, and a command to run in it."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fxdistill.cli.main import main

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "dtype": "float16",
}
MODELS = """
import warnings
import torch
from torch import nn

print("printed by the file")

class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm, self.up = nn.LayerNorm(width), nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x):
        return x + self.down(self.up(self.norm(x)).relu())

class Tower(nn.Module):
    def __init__(self, blocks=2, width=8):
        super().__init__()
        self.embedding = nn.Embedding(10, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        self.head = nn.Linear(width, 10)

    def forward(self, input_ids):
        x = self.embedding(input_ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)

def student():
    import beside
    return Tower(beside.BLOCKS)

def teacher():
    print("printed by a factory")
    return Tower(4, 16)

ready = Tower()
def inputs(): return {"input_ids": torch.zeros(3, 5, dtype=torch.long)}
def positional(): return (torch.zeros(3, 5, dtype=torch.long),)
def number(): return 3
def needs(width): pass
def broken(): raise ValueError("no\\nway")
def stopped(): raise KeyboardInterrupt
def leaving(): raise SystemExit(0)
def wordless(): return nn.Linear(2, 2)
def frozen(): return Tower().requires_grad_(False)
def warning():
    warnings.warn("look out")
    return Tower()
text = "no function"
big = dict
def odd(): return {1: 2}
def nothing(): return ()
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with models and configurations, which is the current one."""
    (tmp_path / "towers.py").write_text(MODELS)
    (tmp_path / "beside.py").write_text("BLOCKS = 2")
    (tmp_path / "unreadable.py").write_text("def (")
    for name, layers, width in (("small", 2, 32), ("large", 4, 64)):
        sizes = {"hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": layers}
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({**LLAMA, **sizes}))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def llama() -> dict[str, Any]:
    """A configuration without the sizes that ``here`` gives its two."""
    return dict(LLAMA)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., SimpleNamespace]:
    """Run a command in this process: its code, and both streams."""

    def command(*argv: str) -> SimpleNamespace:
        code = main(argv)
        out, err = capsys.readouterr()
        return SimpleNamespace(code=code, out=out, err=err)

    return command
