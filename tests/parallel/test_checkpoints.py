"""Checkpoints of sharded runs go on with other ranks and plans; a rank that fails fails all."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import fxdistill
from fxdistill import Match, errors, losses
from fxdistill.training.checkpoint import tensors as stored
from placed_models import LM, parallel
from processes import run

VOCABULARY = 61  # sharded unevenly


class Run:
    """A run on one process, tensor parallel, on a mesh of ``dp``, or with FSDP2."""

    def __init__(self, plan: str, seed: int = 0) -> None:
        torch.manual_seed(1)
        teacher = LM(VOCABULARY, 16, 2)
        torch.manual_seed(seed)
        student = LM(VOCABULARY, 16, 2)
        options: dict[str, Any] = {"task": "causal_lm", "compile": False}
        self.part = slice(None)
        ranks = dist.get_world_size() if dist.is_initialized() else 1
        if plan == "tp":
            mesh = init_device_mesh("cpu", (ranks,))
            student, teacher = (parallel(m, mesh, sequence=True) for m in (student, teacher))
        elif plan == "dp":
            options["mesh"] = init_device_mesh("cpu", (ranks,), mesh_dim_names=("dp",))
        elif plan == "fsdp2":
            for block in student.blocks:
                fully_shard(block)
            fully_shard(student)
        if plan in ("dp", "fsdp2"):
            self.part = slice(dist.get_rank(), None, ranks)
        mapping = [Match("blocks.0.down", "blocks.1.down", project="linear")]
        if plan == "dp":  # a queue of each rank's own samples
            bank = losses.CRD(width=4, size=16, across_ranks=False)
            bank.embedding.build(16, 16, torch.device("cpu"))
            mapping.append(Match("blocks.1.down", "blocks.1.down", loss=bank))
        torch.manual_seed(seed)
        self.distiller = fxdistill.wrap(student, teacher, mapping, **options)
        self.optimizer = torch.optim.AdamW(
            self.distiller.parameters(), lr=1e-2, foreach=False, fused=False
        )

    def steps(self, first: int, count: int) -> list[float]:
        found = []
        for i in range(first, first + count):
            ids = torch.randint(VOCABULARY, (4, 8), generator=torch.Generator().manual_seed(i))
            out = self.distiller(ids[self.part], labels=ids[self.part])
            out.loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            found.append(float(out.loss.detach()))
        return found

    def load(self, path: str) -> Any:
        return fxdistill.load_checkpoint(path, self.distiller, optimizer=self.optimizer)


def saved(rank: int, path: str, plan: str) -> Any:
    """Two steps, a checkpoint, two more; and each random number that would come next."""
    first = Run(plan)
    first.steps(0, 2)
    random.seed(rank)
    place = fxdistill.save_checkpoint(
        path, first.distiller, optimizer=first.optimizer, step=2, data={"rank": rank}
    )
    wanted, drawn = first.steps(2, 2), random.random()
    kept = {name: whole(x) for name, x in first.distiller.state_dict().items()}
    again = Run(plan, seed=5)
    found = again.load(str(place))
    assert found == fxdistill.Checkpoint(2, {"rank": rank})
    assert random.random() == drawn  # each rank its own
    assert again.steps(2, 2) == wanted  # bit for bit
    for name, value in again.distiller.state_dict().items():
        assert torch.equal(whole(value), kept[name]), name
    return wanted


def whole(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def resumed(rank: int, path: str, plan: str, wanted: list[float]) -> None:
    again = Run(plan, seed=5)
    assert again.load(path).data == {"rank": rank}
    torch.testing.assert_close(again.steps(2, 2), wanted, rtol=1e-5, atol=0)


@pytest.mark.slow
def test_two_ranks_save_and_one_or_two_go_on(tmp_path: Path) -> None:
    path = str(tmp_path / "tp")
    wanted = run(2, saved, path, "tp")[0]
    files = sorted(file.name for file in (tmp_path / "tp").glob("*/tensors/*"))
    assert [name.split("-")[0] for name in files] == ["plain.safetensors", "shard", "shard"]
    resumed(0, path, "plain", wanted)
    run(2, resumed, path, "fsdp2", wanted)
    wanted = run(2, saved, str(tmp_path / "fsdp2"), "fsdp2")[0]
    resumed(0, str(tmp_path / "fsdp2"), "plain", wanted)
    # and back: one process saves, two go on
    one = Run("plain", seed=3)
    one.steps(0, 2)
    place = tmp_path / "one"
    fxdistill.save_checkpoint(place, one.distiller, optimizer=one.optimizer, data={"rank": 0})
    run(2, widened, str(place), one.steps(2, 2))


def widened(rank: int, path: str, wanted: list[float]) -> None:
    again = Run("tp", seed=5)
    if rank == 0:
        found = again.load(path)
    else:
        with pytest.warns(UserWarning, match="no random states for this rank"):
            found = again.load(path)
    assert found.data == {"rank": 0}
    torch.testing.assert_close(again.steps(2, 2), wanted, rtol=1e-5, atol=0)


def full(*_: Any) -> None:
    raise OSError(28, "No space left on device")


def failing(rank: int, path: str) -> None:
    """Queues of each rank come back; what one rank cannot write, load or match, all say."""
    saved(rank, path, "dp")
    again = Run("dp", seed=5)
    again.steps(0, 1)  # the second rank has samples of its own in its queue, and writes them
    names = sorted(file.name for file in Path(path).iterdir())
    plain = stored.write_file
    for broken in (0, 1):  # whose disk is full
        stored.write_file = full if rank == broken else plain
        with pytest.raises(errors.SaveError, match="No space left"):
            fxdistill.save_checkpoint(path, again.distiller)
        dist.barrier()
        assert sorted(file.name for file in Path(path).iterdir()) == names
    stored.write_file = plain
    before = {name: whole(x).clone() for name, x in again.distiller.state_dict().items()}
    other = torch.optim.SGD if rank else torch.optim.AdamW
    again.optimizer = other(again.distiller.parameters(), lr=1.0)
    with pytest.raises(errors.ResumeError, match="has AdamW, this run SGD"):
        again.load(path)
    shard = next(Path(path).glob("*/tensors/shard-00002*"))
    dist.barrier()
    if rank == 1:
        shard.write_bytes(b"\0" * shard.stat().st_size)
    dist.barrier()
    again.optimizer = torch.optim.AdamW(again.distiller.parameters(), lr=1.0)
    with pytest.raises(errors.ResumeError, match=r"shard-00002.* is not what was written"):
        again.load(path)
    for name, value in again.distiller.state_dict().items():
        assert torch.equal(whole(value), before[name]), name


def exported(rank: int, path: str, wanted: dict[str, float]) -> None:
    """The student as files of plain tensors, and norms of whole gradients."""
    ids = torch.randint(VOCABULARY, (4, 8), generator=torch.Generator().manual_seed(0))
    for plan in ("tp", "dp"):
        other = Run(plan)
        del other.optimizer
        batch = {"ids": ids[other.part], "labels": ids[other.part]}
        norms = fxdistill.gradient_norms(other.distiller, batch)
        for name, norm in wanted.items():
            # A mesh of dp has another match beside, in the mean of the features.
            if name != "features" or plan == "tp":
                assert norms[name] == pytest.approx(norm, rel=1e-4), (plan, name)
        assert other.distiller.explain(batch).finite
        other.distiller.save_pretrained(f"{path}/{plan}")


@pytest.mark.slow
def test_norms_and_files_of_a_sharded_student_are_those_of_one_process(tmp_path: Path) -> None:
    alone = Run("plain")
    ids = torch.randint(VOCABULARY, (4, 8), generator=torch.Generator().manual_seed(0))
    wanted = fxdistill.gradient_norms(alone.distiller, {"ids": ids, "labels": ids})
    run(2, exported, str(tmp_path), wanted)
    for plan in ("tp", "dp"):
        state = load_file(tmp_path / plan / "model.safetensors")
        for name, value in alone.distiller.student.state_dict().items():
            assert torch.equal(state[name], value), name


@pytest.mark.slow
def test_what_fails_on_one_rank_fails_on_all(tmp_path: Path) -> None:
    run(2, failing, str(tmp_path / "run"))
