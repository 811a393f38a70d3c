"""Checkpoints: runs go on bit for bit; refused loads change nothing; a full disk loses nothing."""

import copy
import json
import os
import random
import subprocess
import sys
import warnings
from collections import Counter, OrderedDict, deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fxdistill
from fxdistill import errors
from fxdistill.base import files
from fxdistill.training.checkpoint import tree
from fxdistill.training.checkpoint.contents import contents, run_of
from fxdistill.training.checkpoint.save import _write_document
from fxdistill.training.checkpoint.sealed import SEAL
from lives import Life, assert_equal
from toys import Toy, tokens

# ---------------------------------------------------------------------- going on


@pytest.mark.parametrize("mode", [False, {"backend": "aot_eager"}])
def test_a_run_goes_on_bit_for_bit(tmp_path: Path, mode: Any) -> None:
    """Dropout, CRD's queue, a projection, AdamW, its schedule, settings and batches go on."""
    run = Life(compile=mode)
    run.steps(3)
    run.distiller.set(temperature=2.0, weights={"blocks.1.mlp": 0.5})
    position = {"epoch": 1, "seen": [3, 4], "name": "ü", "share": 0.1, "none": None}
    place = run.save(tmp_path / "deep" / "run", step=3, data=position)
    wanted, state = run.steps(3), run.state()
    assert place == tmp_path / "deep" / "run" / "000001-step-3"
    other = Life(seed=5, compile=mode)
    assert other.steps(1) != wanted[:1]
    found = other.load(tmp_path / "deep" / "run")
    assert found == fxdistill.Checkpoint(3, position)
    assert other.distiller.settings["temperature"] == 2.0
    assert other.steps(3) == wanted
    assert_equal(other.state(), state)
    assert not any(path.suffix in (".pt", ".bin", ".pkl") for path in place.rglob("*"))
    kept = json.loads((place / "checkpoint.json").read_text("utf-8"))["tensors"]
    assert not [name for name in kept if "teacher" in name and "of_teacher" not in name]


def test_nothing_is_unpickled_and_random_states_are_left_alone_where_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python tells of every name that is unpickled; torch has an unpickler of its own."""
    names, watching = [], True

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if watching and event == "pickle.find_class":
            names.append(args)

    sys.addaudithook(hook)  # for good: ``watching`` ends it
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("torch.load was called"))
    run, other = Life(), Life(seed=5)
    run.steps(2)
    run.save(tmp_path)
    np.random.rand()
    drawn = np.random.get_state()[2]
    state = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    other.load(tmp_path, rng=False)
    now = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    other.load(tmp_path)
    watching = False
    assert not names
    assert_equal(now, state)
    assert np.random.get_state()[2] != drawn  # and where not asked, they go back


def test_other_orders_dtypes_and_generators(tmp_path: Path) -> None:
    """States keep a dtype that torch would cast; groups may list parameters in another order."""
    run = Life(mapping=None)
    run.distiller.student.to(torch.bfloat16)
    run.distiller.teacher.to(torch.bfloat16)
    run.steps(1)
    parameters = list(run.distiller.parameters())
    for state in run.optimizer.state.values():
        state["exp_avg"] = state["exp_avg"].float() + 1e-5  # as optimizers of others keep it
    run.save(tmp_path, schedulers=[])
    other = Life(seed=5, mapping=None)
    other.distiller.student.to(torch.bfloat16)
    other.distiller.teacher.to(torch.bfloat16)
    backwards = list(other.distiller.parameters())[::-1]
    optimizer = torch.optim.AdamW(backwards, lr=1.0)
    before = torch.get_rng_state(), random.getstate()
    other.load(tmp_path, optimizer=optimizer, schedulers=[], rng=False)
    assert_equal((torch.get_rng_state(), random.getstate()), before)
    assert optimizer.param_groups[0]["lr"] == run.optimizer.param_groups[0]["lr"]
    for ours, theirs in zip(backwards[::-1], parameters, strict=True):
        assert_equal(dict(optimizer.state[ours]), dict(run.optimizer.state[theirs]))


def test_tied_parameters_are_saved_once_and_a_learning_teacher_is_saved(tmp_path: Path) -> None:
    def made() -> Any:
        student, teacher = Toy(2), Toy(3)
        student.head = nn.Linear(8, 50, bias=False)
        student.head.weight = student.embed.weight
        return fxdistill.wrap(
            student, teacher, task="causal_lm", compile=False, freeze_teacher=False
        )

    distiller, other = made(), made()
    place = fxdistill.save_checkpoint(tmp_path, distiller, data=[7])
    names = json.loads((place / "checkpoint.json").read_text("utf-8"))["tensors"]
    assert "model/student.embed.weight" in names
    assert "model/student.head.weight" not in names
    assert "model/teacher.embed.weight" in names
    fxdistill.load_checkpoint(tmp_path, other)
    assert other.student.head.weight is other.student.embed.weight
    assert_equal(other.state_dict(), distiller.state_dict())


def test_values_without_a_place_in_json_come_back() -> None:
    value = {
        "t": (1, (2.5, None)),
        "s": {1, 2},
        "i": {3: "x", (1, 2): -0.0},
        "$": "kept",
        "c": Counter([1, 1, 2]),
        "o": OrderedDict(a=1),
        "d": deque([1, 2], maxlen=3),
        "f": [float("inf"), -float("inf")],
        "b": b"\x00\xff",
        "y": torch.bfloat16,
        "x": [torch.arange(3)],
    }
    tensors: dict[str, torch.Tensor] = {}

    def keep(path: str, tensor: torch.Tensor) -> str:
        tensors[path] = tensor
        return path

    coded = json.loads(json.dumps(tree.encode(value, keep, "v"), allow_nan=False))
    assert list(tensors) == tree.tensors_in(coded) == ["v.x.0"]
    assert_equal(tree.decode(coded, tensors), value)
    nan = tree.decode(tree.encode([float("nan")], keep, "v"), {})
    assert np.isnan(nan[0])
    with pytest.raises(errors.OptionError, match=r"v\.a\.1 is a object"):
        tree.encode({"a": [1, object()]}, keep, "v")


# ---------------------------------------------------------------------- what is refused


def test_every_difference_is_listed_and_nothing_changes(tmp_path: Path) -> None:
    Life().save(tmp_path)
    torch.manual_seed(0)
    student = Toy(3)
    student.blocks[0].mlp = nn.Linear(8, 8, bias=False)
    student.blocks[1].mlp = nn.Linear(8, 8, dtype=torch.float64)
    student.embed = nn.Embedding(50, 8)
    other = Life(seed=5, mapping={"blocks.0.mixer": "blocks.1.mixer"})
    other.distiller = fxdistill.wrap(
        student,
        Toy(3),
        {"blocks.0.mixer": "blocks.1.mixer"},
        task="causal_lm",
        logit_loss="jsd",
        compile=False,
    )
    other.optimizer = torch.optim.SGD(other.distiller.parameters(), lr=1.0)
    other.scheduler = torch.optim.lr_scheduler.ConstantLR(other.optimizer)
    before = other.state()
    with pytest.raises(errors.ResumeError) as caught:
        other.load(tmp_path)
    assert_equal(other.state(), before)
    text = str(caught.value)
    for said in (
        "match 'blocks.0.mixer:output': the checkpoint has",
        "match 'blocks.1.mlp:output' is in the checkpoint, and not",
        "term 'logits': the checkpoint has 'forward_kl",
        "'student.blocks.2.mlp.weight' is in this run, and not",
        "'student.blocks.0.mlp.bias' is in the checkpoint, and not",
        "'student.blocks.1.mlp.weight': the checkpoint has dtype float32, this run float64",
        "'projections.0.weight' is in the checkpoint, and not",
        "'loss_modules.0.queue' is in the checkpoint, and not",
        "the checkpoint has AdamW, this run SGD",
        "groups of parameters",
        "schedulers: the checkpoint has MultiStepLR, this run ConstantLR",
    ):
        assert said in text, said
    assert len(caught.value.problems) == text.count("\n")
    wider = fxdistill.wrap(nn.Embedding(50, 9), nn.Embedding(50, 9), task="causal_lm")
    fxdistill.save_checkpoint(tmp_path / "wide", wider)
    narrow = fxdistill.wrap(nn.Embedding(50, 8), nn.Embedding(50, 8), task="causal_lm")
    with pytest.raises(errors.ResumeError, match=r"shape \[50, 9\], this run \[50, 8\]"):
        fxdistill.load_checkpoint(tmp_path / "wide", narrow)


def test_what_was_not_saved_or_is_not_asked_for(tmp_path: Path) -> None:
    run = Life()
    run.save(tmp_path / "all")
    with (
        pytest.warns(UserWarning, match="its optimizer .AdamW. was not asked for"),
        pytest.warns(UserWarning, match="its schedulers .MultiStepLR. was not asked for"),
    ):
        run.load(tmp_path / "all", optimizer=None, schedulers=())
    fxdistill.save_checkpoint(tmp_path / "bare", run.distiller, rng=False)
    with pytest.raises(errors.ResumeError, match="optimizer=AdamW was given"):
        run.load(tmp_path / "bare", schedulers=())
    with pytest.raises(errors.ResumeError, match="has none, this run MultiStepLR"):
        run.load(tmp_path / "bare", optimizer=None)
    with pytest.warns(UserWarning, match="no random states"):
        fxdistill.load_checkpoint(tmp_path / "bare", run.distiller)


def test_older_checkpoints_which_say_less_are_loaded(tmp_path: Path) -> None:
    """Without teachers, code, options, numbers of modules, or checksums."""
    place = Life(compile=False).save(tmp_path, step=0)
    file = place / "checkpoint.json"
    document = json.loads(file.read_text("utf-8"))
    for name in ("targets", "code", "kept_by_modules", "lazy", "crc32", SEAL):
        assert name in document
        del document[name]
    document["described"] = {k: document["described"][k] for k in ("model", "match", "term")}
    file.write_text(json.dumps(document), "utf-8")
    assert Life(compile=False).load(tmp_path).step == 0


def test_a_scheduler_that_fails_changes_nothing(tmp_path: Path) -> None:
    class Broken(torch.optim.lr_scheduler.MultiStepLR):
        broken = True

        def load_state_dict(self, state_dict: Any) -> None:
            super().load_state_dict(state_dict)
            if self.broken:
                self.broken = False  # undoing works
                raise RuntimeError("no")

    Broken.__name__ = "MultiStepLR"
    run = Life()
    run.steps(2)
    run.save(tmp_path)
    other = Life(seed=5)
    other.scheduler = Broken(other.optimizer, [9])
    other.steps(1)
    before = other.state()
    with pytest.raises(errors.ResumeError, match="could not be put in place: no"):
        other.load(tmp_path)
    other.scheduler.__dict__.pop("broken")
    before[2].pop("broken", None)
    assert_equal(other.state(), before)


class Versioned(Toy):
    """A model whose extra state may be of another version."""

    version = 1

    def get_extra_state(self) -> Any:
        return {"version": self.version}

    def set_extra_state(self, state: Any) -> None:
        if state["version"] != self.version:
            raise ValueError("of another version")


@pytest.mark.parametrize("what", ["a module", "a schedule"])
def test_a_part_that_fails_at_last_changes_nothing(tmp_path: Path, what: str) -> None:
    """Neither tensors, nor settings made by hand, nor the dtypes of an optimizer's state."""

    def made(version: int, **schedule: Any) -> Any:
        student = Versioned(2)
        student.version = version
        student.to(torch.bfloat16)
        teacher = Toy(3).to(torch.bfloat16)
        distiller = fxdistill.wrap(student, teacher, task="causal_lm", compile=False)
        optimizer = torch.optim.SGD(distiller.parameters(), lr=0.1, momentum=0.9)
        distiller(tokens(), labels=tokens()).loss.backward()
        optimizer.step()
        for state in optimizer.state.values():  # as optimizers of others keep it
            state["momentum_buffer"] = state["momentum_buffer"].float() + 1e-5
        return distiller, optimizer, fxdistill.Schedule(distiller, **schedule)

    curve = fxdistill.schedules.linear(4, 1, 10)
    saved = made(1, temperature=curve)
    here = made(2, temperature=curve) if what == "a module" else made(1, label_weight=curve)
    here[0].set(temperature=3.0, label_weight=0.25)
    fxdistill.save_checkpoint(
        tmp_path, saved[0], optimizer=saved[1], schedulers=saved[2:], rng=False
    )
    state = [here[0].state_dict(), *(each.state_dict() for each in here[1:]), here[0].settings]
    before = copy.deepcopy(state)
    said = "of another version" if what == "a module" else "lacks label_weight"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(?s).*another teacher")
        with pytest.raises(errors.ResumeError, match=said):
            fxdistill.load_checkpoint(
                tmp_path, here[0], optimizer=here[1], schedulers=here[2:], rng=False
            )
    state = [here[0].state_dict(), *(each.state_dict() for each in here[1:]), here[0].settings]
    assert_equal(state, before)


def test_a_flipped_bit_is_found_in_every_file(tmp_path: Path) -> None:
    """Sizes and forms stay as they were, so that only a checksum can tell."""
    run = Life()
    run.steps(1)
    place = run.save(tmp_path)
    before = run.state()
    there = [path for path in place.rglob("*") if path.is_file()]
    assert len(there) == 3
    for file in there:
        whole = file.read_bytes()
        for at in (len(whole) // 3, len(whole) - 9):
            flipped = bytearray(whole)
            flipped[at] ^= 1
            file.write_bytes(flipped)
            with pytest.raises(errors.ResumeError, match=r"damaged: |cannot be read"):
                run.load(tmp_path)
        file.write_bytes(whole)
    document = json.loads((place / "checkpoint.json").read_text("utf-8"))
    document["step"] = 7
    (place / "checkpoint.json").write_text(json.dumps(document), "utf-8")
    with pytest.raises(errors.ResumeError, match=r"checkpoint.json is not what was written"):
        run.load(tmp_path)
    assert_equal(run.state(), before)


def test_damaged_missing_and_newer_checkpoints(tmp_path: Path) -> None:
    run = Life()
    with pytest.raises(errors.ResumeError, match="is no folder"):
        run.load(tmp_path / "nowhere")
    with pytest.raises(errors.ResumeError, match="holds no checkpoint"):
        run.load(tmp_path)
    first, second = run.save(tmp_path, step=1), run.save(tmp_path, step=2)
    file = second / "tensors" / "plain.safetensors"
    whole = file.read_bytes()
    before = run.state()
    for content in (whole[:-1], b"\xff" * len(whole)):
        file.write_bytes(content)
        with pytest.raises(errors.ResumeError, match=r"damaged|cannot be read"):
            run.load(tmp_path)
    assert_equal(run.state(), before)
    assert run.load(first).step == 1  # by its path
    file.write_bytes(whole)
    document = json.loads((second / "checkpoint.json").read_text("utf-8"))
    (second / "checkpoint.json").write_text(json.dumps({**document, "format": 99}), "utf-8")
    with pytest.raises(errors.ResumeError, match="version 99"):
        run.load(tmp_path)
    (second / "checkpoint.json").write_text("{", "utf-8")
    with pytest.raises(errors.ResumeError, match="cannot be read"):
        run.load(tmp_path)
    (tmp_path / "latest").write_text("000009-step-9\n", "utf-8")
    with pytest.raises(errors.ResumeError, match=r"no checkpoint of this folder. Whole: 000001"):
        run.load(tmp_path)


def test_wrong_arguments_write_nothing(tmp_path: Path) -> None:
    run, foreign = Life(mapping=None), torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=1.0)
    for options, said in (
        ({"step": -1}, "step=-1"),
        ({"step": 1.5}, "step=1.5"),
        ({"keep": 0}, "keep=0"),
        ({"data": {"a": object()}}, r"data\.a is a object"),
        ({"data": torch.ones(2)}, "data is a tensor"),
        ({"optimizer": foreign}, "not among the distiller's"),
        ({"optimizer": 3}, "no state_dict"),
        ({"schedulers": run.scheduler}, "a list or a tuple"),
        ({"schedulers": [3]}, r"schedulers\[0\] is a int"),
    ):
        with pytest.raises(errors.OptionError, match=said):
            run.save(tmp_path / "run", **options)
    for act in (fxdistill.save_checkpoint, fxdistill.load_checkpoint):
        with pytest.raises(errors.OptionError, match="folder=None: the path of a folder"):
            act(None, run.distiller)
    with pytest.raises(errors.OptionError, match=r"its \.module"):
        fxdistill.save_checkpoint(tmp_path / "run", run.distiller.student)
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------- the folder


def test_numbers_pointer_and_leftovers(tmp_path: Path) -> None:
    run = Life(mapping=None)
    for step in range(4):
        run.save(tmp_path, step=step)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["000003-step-2", "000004-step-3", "latest"]
    assert (tmp_path / "latest").read_text("utf-8").strip() == "000004-step-3"
    # A kill between the rename and the pointer, and one while files were written.
    (tmp_path / "latest").write_text("000003-step-2", "utf-8")
    dead, pointer = (tmp_path / f".{digit * 32}.part" for digit in "af")
    dead.mkdir()
    (dead / "half").write_text("x")
    pointer.write_text("x")
    (tmp_path / ".mine.part").write_text("stays")
    (tmp_path / "mine.txt").write_text("stays")
    assert run.load(tmp_path).step == 2
    run.save(tmp_path, step=9, keep=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".mine.part",
        "000004-step-9",
        "latest",
        "mine.txt",
    ]
    # A kill in the very first save, before there was a pointer.
    (tmp_path / "latest").unlink()
    assert run.load(tmp_path).step == 9


@pytest.mark.parametrize("kind", [KeyboardInterrupt, OSError])
def test_an_end_in_the_last_wait_for_the_disk_leaves_what_latest_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[BaseException]
) -> None:
    """Behind the move of ``latest``: the checkpoint that it names must stay."""
    run, real = Life(mapping=None), files.sync
    run.save(tmp_path, step=1)

    def interrupted(path: Path) -> None:
        real(path)
        if path == tmp_path:
            raise kind("at last")

    monkeypatch.setattr(files, "sync", interrupted)
    with pytest.raises(kind, match=r"at last(\. The latest checkpoint there, 000002-step-2|$)"):
        run.save(tmp_path, step=2)
    monkeypatch.setattr(files, "sync", real)
    assert run.load(tmp_path).step == 2
    run.save(tmp_path, step=3)
    assert len(list(tmp_path.iterdir())) == 3


def test_a_disk_that_ranks_do_not_share_is_told(tmp_path: Path) -> None:
    found = contents(run_of(Life(mapping=None).distiller, None, ()))
    with pytest.raises(OSError, match=r"what rank 1 wrote \(ranks/1.json\).*all ranks share"):
        _write_document(tmp_path, found, [{}, {"ranks/1.json": 3}], [])


def mounted(folder: Path, options: str) -> None:
    """Mount a tmpfs; skip where this user may not."""
    folder.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, check=False)
    except FileNotFoundError:
        pytest.skip("no mount command")
    if done.returncode:
        pytest.skip(f"may not mount: {done.stderr.decode()}")


def saved(run: Life, folder: Path) -> str:
    """What went wrong; empty if nothing did."""
    try:
        run.save(folder, step=2)
    except errors.SaveError as error:
        return str(error)
    return ""


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    """A real disk (a tmpfs of 256 KiB), full at every place in a save that a file's end can meet.

    What fills it leaves 4 KiB more in each round, until a save fits.
    """
    disk = tmp_path / "disk"
    mounted(disk, "size=256k")
    try:
        run = Life()
        run.steps(1)
        run.save(disk / "run", step=1)
        wanted = run.state()
        free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_bsize
        failed = 0
        for left in range(0, free, 4096):
            (disk / "filler").write_bytes(b"x" * (free - left))
            said = saved(run, disk / "run")
            if not said:
                break
            failed += 1
            for part in (str(disk / "run"), "bytes", "No space left", "000001-step-1, is whole"):
                assert part in said
            names = sorted(path.name for path in (disk / "run").iterdir())
            assert names == ["000001-step-1", "latest"]
            if left % 32768 == 0:
                other = Life(seed=5)
                assert other.load(disk / "run").step == 1
                assert_equal(other.state()[:4], wanted[:4])
        assert failed >= 5
        assert run.load(disk / "run").step == 2
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_read_only_disk_says_so(tmp_path: Path) -> None:
    """A real one: for root, folders without permissions are writable."""
    disk = tmp_path / "disk"
    mounted(disk, "size=1m")
    run = Life(mapping=None)
    try:
        run.save(disk, step=1)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        with pytest.raises(errors.SaveError, match=r"bytes.*Read-only file system") as caught:
            run.save(disk, step=2)
        assert str(disk) in str(caught.value)
        assert isinstance(caught.value, OSError)
        assert run.load(disk).step == 1
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(errors.SaveError, match="no checkpoint before"):
        run.save(tmp_path / "file" / "run")


def test_a_loss_that_gives_no_warning_of_its_own(tmp_path: Path) -> None:
    """A save and a load are silent, and draw no random numbers."""
    run = Life(mapping=None)
    state = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run.save(tmp_path)
        run.load(tmp_path)
    now = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    assert_equal(now, state)


# ---------------------------------------------------------------------- what others keep

OPTIMIZERS: dict[str, Any] = {
    "SGD": {"lr": 0.1, "momentum": 0.9},
    "Adam": {"lr": 0.1, "amsgrad": True},
    "AdamW": {"lr": torch.tensor(0.1), "foreach": False},
    "Adafactor": {},
    "ASGD": {},
    "LBFGS": {"max_iter": 2, "history_size": 3},
    "NAdam": {},
    "RAdam": {},
    "RMSprop": {"centered": True},
    "Rprop": {},
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_goes_on(name: str, tmp_path: Path) -> None:
    """States of lists, of 0-d tensors, of factors of another shape than the parameter."""

    def made() -> tuple[Any, Any]:
        torch.manual_seed(0)
        distiller = fxdistill.wrap(Toy(2), Toy(3), task="causal_lm", compile=False)
        made = getattr(torch.optim, name)(list(distiller.parameters()), **OPTIMIZERS[name])
        return distiller, made

    def steps(distiller: Any, optimizer: Any) -> list[float]:
        def closure() -> Any:
            optimizer.zero_grad()
            loss = distiller(tokens(), labels=tokens()).loss
            loss.backward()
            return loss.detach()

        return [float(optimizer.step(closure)) for _ in range(2)]

    one, other = made(), made()
    steps(*one)
    fxdistill.save_checkpoint(tmp_path, one[0], optimizer=one[1])
    fxdistill.load_checkpoint(tmp_path, other[0], optimizer=other[1])
    assert_equal(other[1].state_dict(), one[1].state_dict())
    assert steps(*other) == steps(*one)


def test_every_scheduler_comes_back(tmp_path: Path) -> None:
    """And a GradScaler, which has a state of plain numbers too."""
    kinds = torch.optim.lr_scheduler

    def made(count: int) -> tuple[Any, list[Any]]:
        run = Life(mapping=None)
        optimizer = torch.optim.SGD(run.distiller.parameters(), lr=0.1, momentum=0.9)
        first = kinds.ConstantLR(optimizer, total_iters=2)
        schedulers = [
            kinds.SequentialLR(optimizer, [first, kinds.ExponentialLR(optimizer, 0.9)], [2]),
            kinds.ReduceLROnPlateau(optimizer, patience=0),
            kinds.OneCycleLR(optimizer, 0.3, total_steps=9),
            kinds.CyclicLR(optimizer, 0.1, 0.3),
            kinds.LambdaLR(optimizer, lambda step: 1 / (1 + step)),
            kinds.CosineAnnealingWarmRestarts(optimizer, 3),
            torch.amp.GradScaler("cpu"),
        ]
        optimizer.step()
        for i in range(count):
            for scheduler in schedulers[:-1]:
                plateau = isinstance(scheduler, kinds.ReduceLROnPlateau)
                scheduler.step(*([float(i)] if plateau else []))
        return run.distiller, [optimizer, *schedulers]

    distiller, (optimizer, *schedulers) = made(3)
    fxdistill.save_checkpoint(tmp_path, distiller, optimizer=optimizer, schedulers=schedulers)
    other, (again, *others) = made(1)
    fxdistill.load_checkpoint(tmp_path, other, optimizer=again, schedulers=others)
    assert again.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
    for ours, theirs in zip(others, schedulers, strict=True):
        assert ours.state_dict() == theirs.state_dict(), type(ours)
