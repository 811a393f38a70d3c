"""The student alone: from_pretrained, load_state_dict, torch.export; copies of a distiller."""

import copy
import io
import json
import os
import pickle
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import fxdistill
from fxdistill import Match, errors
from toys import Toy, tokens

pytestmark = pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
AOT = {"backend": "aot_eager"}
MAPPING = {"blocks.0.mixer": "blocks.1.mixer", "blocks.1.mlp": Match(teacher="blocks.2.mlp")}


def llama(layers: int, **options: Any) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        use_cache=False,
        **options,
    )
    return LlamaForCausalLM(config)


def trained(student: nn.Module, teacher: nn.Module, mapping: Any = None, mode: Any = AOT) -> Any:
    """A distiller after two steps."""
    distiller = fxdistill.wrap(student, teacher, mapping, task="causal_lm", compile=mode)
    optimizer = torch.optim.AdamW(distiller.parameters(), lr=1e-2)
    for _ in range(2):
        distiller(tokens(), labels=tokens()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return distiller


def loss_of(distiller: Any) -> float:
    return float(distiller(tokens(), labels=tokens()).loss.detach())


@pytest.mark.parametrize("tied", [False, True])
def test_from_pretrained_gives_the_trained_student(tmp_path: Path, tied: bool) -> None:
    torch.manual_seed(0)
    teacher = llama(3)
    mapping = {"model.layers.0.mlp": Match(teacher="model.layers.1.mlp", project="linear")}
    student = llama(2, tie_word_embeddings=tied)
    distiller = trained(student, teacher, mapping, mode=False)
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "tokenizer.json").write_text("{}")
    (folder / "model-00001-of-00002.safetensors").write_bytes(b"old")
    distiller.save_pretrained(folder, projections=True)
    loaded = LlamaForCausalLM.from_pretrained(folder)
    assert list(loaded.state_dict()) == list(student.state_dict())
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, student.state_dict()[name]), name
    assert torch.equal(loaded.eval()(tokens()).logits, student.eval()(tokens()).logits)
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "model.safetensors", "projections.safetensors"} <= names
    assert "tokenizer.json" in names
    assert "model-00001-of-00002.safetensors" not in names
    beside = load_file(folder / "projections.safetensors")
    own = distiller.projections.state_dict()
    assert sorted(beside) == sorted(own)
    assert all(torch.equal(beside[name], own[name]) for name in own)
    with safe_open(folder / "projections.safetensors", "pt") as file:
        assert file.metadata()["0"] == "model.layers.0.mlp"
    distiller.save_pretrained(folder)
    assert not (folder / "projections.safetensors").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_plain_model_is_saved_with_its_own_keys(tmp_path: Path) -> None:
    """Tied parameters stand under both names, as in the state dict of the unwrapped model."""

    def made() -> nn.Module:
        model = Toy(2)
        model.head = nn.Linear(8, 50, bias=False)
        model.head.weight = model.embed.weight
        model.register_buffer("table", torch.arange(12).view(3, 4)[:, 1:])
        return model

    student = made()
    keys = list(student.state_dict())
    distiller = trained(student, Toy(3), MAPPING, mode=False)
    distiller.save_pretrained(str(tmp_path / "deep" / "out"))
    state = load_file(tmp_path / "deep" / "out" / "model.safetensors")
    assert sorted(state) == sorted(keys)
    other = made()
    other.load_state_dict(state)
    assert other.head.weight is other.embed.weight
    assert torch.equal(other(tokens())["logits"], student(tokens())["logits"])


class Counting(Toy):
    """A model with a state that is no tensor."""

    kept: Any = {"calls": 3}

    def get_extra_state(self) -> Any:
        return self.kept

    def set_extra_state(self, state: Any) -> None:
        self.got = state


def test_what_modules_keep_beside_tensors_is_saved_as_json(tmp_path: Path) -> None:
    student = Counting(2)
    distiller = trained(student, Toy(3), mode=False)
    distiller.save_pretrained(tmp_path)
    other = Counting(2)
    extra = json.loads((tmp_path / "extra_state.json").read_text("utf-8"))
    other.load_state_dict({**load_file(tmp_path / "model.safetensors"), **extra})
    assert other.got == {"calls": 3}
    before = (tmp_path / "model.safetensors").read_bytes()
    student.kept = {"calls": object()}
    with pytest.raises(errors.SaveError, match=r"_extra_state.*get_extra_state.*JSON cannot hold"):
        distiller.save_pretrained(tmp_path)
    student.kept = {}
    student.late = nn.LazyLinear(2)
    with pytest.raises(errors.SaveError, match=r"late\.weight.*have no shape yet"):
        distiller.save_pretrained(tmp_path)
    with pytest.raises(errors.OptionError, match="folder=None: the path of a folder"):
        distiller.save_pretrained(None)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 2


def test_a_full_disk_leaves_what_was_there(tmp_path: Path) -> None:
    """A real disk, a tmpfs, on which one copy fits and two do not."""
    distiller = trained(Toy(12), Toy(3), mode=False)
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("may not mount")
    try:
        distiller.save_pretrained(disk / "out")
        before = (disk / "out" / "model.safetensors").read_bytes()
        left = os.statvfs(disk).f_bavail * os.statvfs(disk).f_bsize
        (disk / "filler").write_bytes(b"x" * (left - 4096))
        with pytest.raises(errors.SaveError, match=r"bytes.*No space left") as caught:
            distiller.save_pretrained(disk / "out")
        assert str(disk / "out") in str(caught.value)
        assert (disk / "out" / "model.safetensors").read_bytes() == before
        assert sorted(path.name for path in disk.iterdir()) == ["filler", "out"]
    finally:
        subprocess.run(["umount", str(disk)], check=True)

    class Failing(Toy):
        def save_pretrained(self, folder: str) -> None:
            (Path(folder) / "half").write_text("x")
            raise RuntimeError("its own")

    other = fxdistill.wrap(Failing(2), Toy(3), task="causal_lm", compile=False)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(RuntimeError, match="its own"):
        other.save_pretrained(tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "out"]


@pytest.mark.parametrize("mode", [False, AOT])
def test_the_trained_student_is_exported(mode: Any) -> None:
    """No hook of ours is left in it: torch.export sees the model as it was."""
    for student, teacher in ((Toy(2), Toy(3)), (llama(2), llama(3))):
        trained(student, teacher, mode=mode)
        student.eval()
        program = torch.export.export(student, (tokens(),), strict=False)
        found, wanted = program.module()(tokens()), student(tokens())
        torch.testing.assert_close(found["logits"], wanted["logits"])


@pytest.mark.parametrize("mode", [False, AOT])
def test_copies_are_independent_and_train(mode: Any) -> None:
    torch.manual_seed(0)
    distiller = trained(Toy(2), Toy(3), MAPPING, mode=mode)
    file = io.BytesIO()
    torch.save(distiller, file)
    file.seek(0)
    copies = [copy.deepcopy(distiller), torch.load(file, weights_only=False)]
    copies.append(pickle.loads(pickle.dumps(distiller)))
    before = copy.deepcopy(distiller.state_dict())
    wanted = loss_of(distiller)
    for other in copies:
        own = {p.data_ptr() for m in distiller.models.values() for p in m.parameters()}
        theirs = {p.data_ptr() for m in other.models.values() for p in m.parameters()}
        assert not own & theirs
        assert loss_of(other) == pytest.approx(wanted, rel=1e-6)
        optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
        other(tokens(), labels=tokens()).loss.backward()
        optimizer.step()
        assert loss_of(other) != pytest.approx(wanted, rel=1e-6)
        assert not torch.equal(
            other.state_dict()["student.embed.weight"], before["student.embed.weight"]
        )
    for name, value in distiller.state_dict().items():
        assert torch.equal(value, before[name])
    torch.save(distiller.state_dict(), file := io.BytesIO())
    file.seek(0)
    copies[0].load_state_dict(torch.load(file))
    assert loss_of(copies[0]) == pytest.approx(wanted, rel=1e-6)
