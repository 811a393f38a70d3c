"""Losses while a model trains: collected without waiting, read in one transfer, written whole."""

import csv
import math
from pathlib import Path
from typing import Any

import pytest
import rich
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fxdistill
from architectures import ARCHITECTURES
from fxdistill import DistillOutput, LossLog, LossRow, errors
from fxdistill.training.loss_log import write_csv, write_scalars

pytestmark = pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")


class NoReading(TorchDispatchMode):
    """Fails where a value is read by the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        reads = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.item.default)
        assert func not in reads, f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


def output(total: float, device: str = "cpu", **terms: float) -> DistillOutput:
    losses = {name: torch.tensor(value, device=device) for name, value in terms.items()}
    return DistillOutput(loss=torch.tensor(total, device=device), losses=losses)


class TestCollecting:
    def test_add_does_not_read(self) -> None:
        log = LossLog(every=2)
        with NoReading():
            for weight in (1.0, torch.tensor(2), 3, torch.tensor([4.0])):
                log.add(output(1.0, logits=2.0), weight=weight)

    def test_add_reads_nothing_of_tensors_that_cannot_be_read(self) -> None:
        log = LossLog(every=1)
        assert log.add(output(1.0, "meta", logits=2.0), weight=torch.tensor(3.0))

    def test_values_that_are_overwritten_afterwards_are_kept(self) -> None:
        log, out = LossLog(), output(1.0, logits=2.0)
        log.add(out)
        out.loss.fill_(7.0)
        out.losses["logits"].fill_(7.0)
        (row,) = log.rows()
        assert row.losses == {"loss": 1.0, "logits": 2.0}

    def test_no_graph_is_held(self) -> None:
        log, weight = LossLog(every=5), torch.ones((), requires_grad=True)
        log.add(DistillOutput(loss=weight * 2, losses={}))
        assert not any(s.requires_grad for s in log._open.sums.values())

    @pytest.mark.parametrize("every", [0, -1, 2.0, True])
    def test_a_window_has_steps(self, every: Any) -> None:
        with pytest.raises(errors.OptionError, match="every="):
            LossLog(every)

    def test_one_transfer_reads_all_windows(self, monkeypatch: pytest.MonkeyPatch) -> None:
        log, read = LossLog(every=1), []
        for step in range(3):
            log.add(output(step, logits=step))
        tolist = Tensor.tolist
        monkeypatch.setattr(Tensor, "tolist", lambda t: (read.append(t.shape), tolist(t))[1])
        with NoReading():
            rows = log.rows()
        assert [row.losses["loss"] for row in rows] == [0, 1, 2]
        assert read == [(9,)]


class TestMeans:
    def test_windows_are_told_once_and_numbered(self) -> None:
        log = LossLog(every=2, first=10)
        assert [log.add(output(float(i))) for i in range(5)] == [False, True, False, True, False]
        rows = log.rows()
        assert [(r.first, r.last, r.losses["loss"]) for r in rows] == [(10, 11, 0.5), (12, 13, 2.5)]
        assert log.rows() == ()
        (rest,) = log.rows(partial=True)
        assert (rest.first, rest.last, rest.weight) == (14, 14, 1.0)

    def test_a_mean_is_by_weight(self) -> None:
        log = LossLog()
        log.add(output(1.0, labels=10.0), weight=3)
        log.add(output(5.0, labels=20.0), weight=torch.tensor(1))
        (row,) = log.rows()
        assert row.losses == {"loss": 2.0, "labels": 12.5}
        assert row.weight == 4.0

    def test_a_term_is_a_mean_over_the_steps_that_have_it(self) -> None:
        log = LossLog()
        log.add(output(1.0, labels=10.0))
        log.add(output(3.0))
        (row,) = log.rows()
        assert row.losses == {"loss": 2.0, "labels": 10.0}

    def test_a_window_without_weight_is_nan(self) -> None:
        log = LossLog()
        log.add(output(1.0), weight=0)
        assert math.isnan(log.rows()[0].losses["loss"])

    @pytest.mark.parametrize("mode", [False, {"backend": "aot_eager"}], ids=["eager", "graph"])
    def test_a_run_logs_what_eager_steps_return(self, mode: Any) -> None:
        llama = ARCHITECTURES["LlamaForCausalLM"]
        torch.manual_seed(0)
        student, teacher = llama.build(2, 32), llama.build(4, 32)
        mapping = fxdistill.match(student, teacher)
        distiller = fxdistill.wrap(student, teacher, mapping, compile=mode)
        eager = fxdistill.wrap(student, teacher, mapping, compile=False)
        log, wanted = LossLog(every=2), []
        for seed in range(4):
            ids = torch.randint(3, 90, (2, 7), generator=torch.Generator().manual_seed(seed))
            batch = {"input_ids": ids, "labels": ids}
            out = distiller(**batch)
            with NoReading():
                log.add(out)
            out = eager(**batch)
            wanted.append({"loss": out.loss.item(), **{k: v.item() for k, v in out.losses.items()}})
        for row, (a, b) in zip(log.rows(), (wanted[:2], wanted[2:]), strict=True):
            assert row.losses == pytest.approx({k: (a[k] + b[k]) / 2 for k in a}, rel=1e-5)


class TestShowing:
    def test_the_table_shows_what_was_read(self) -> None:
        log = LossLog(every=1)
        terms = {f"layers.{i}.mlp:output[0]": float(i) for i in range(20)}
        log.add(output(1.5, logits=0.25, **terms))
        assert "1.5" not in str(log)
        log.rows()
        text = str(log)
        assert "0–0" in text
        assert "layers.19.mlp:output[0]" in text
        assert "8 smaller terms are not shown" in text
        assert "layers.7.mlp" not in text
        rich.print(log)

    def test_nan_is_shown(self) -> None:
        log = LossLog(every=1)
        log.add(output(1.0, **{f"t{i}": float(i) for i in range(20)}, bad=float("nan")))
        log.rows()
        assert "bad" in str(log)


ROWS = (
    LossRow(0, 1, 2.0, {"loss": 0.1, "labels": 1 / 3}),
    LossRow(2, 3, 2.0, {"loss": float("nan")}),
)


class TestWriting:
    def test_lines_are_appended_under_one_header(self, tmp_path: Path) -> None:
        file = tmp_path / "losses.csv"
        write_csv(ROWS, file)
        write_csv((), file)
        write_csv([LossRow(4, 5, 1.0, {"labels": 2.0, "loss": 1.0})], file)
        lines = list(csv.reader(file.read_text("utf-8").splitlines()))
        assert lines == [
            ["first", "last", "weight", "loss", "labels"],
            ["0", "1", "2.0", "0.1", repr(1 / 3)],
            ["2", "3", "2.0", "nan", ""],
            ["4", "5", "1.0", "1.0", "2.0"],
        ]

    def test_a_new_term_is_an_error_that_writes_nothing(self, tmp_path: Path) -> None:
        file = tmp_path / "losses.csv"
        write_csv(ROWS, file)
        before = file.read_bytes()
        more = [*ROWS, LossRow(4, 5, 1.0, {"loss": 1.0, "layers.0": 2.0})]
        with pytest.raises(errors.LogError, match=r"steps 4 to 5 have layers\.0 as well"):
            write_csv(more, file)
        assert file.read_bytes() == before

    @pytest.mark.parametrize(
        ("content", "says"),
        [
            ("a,b\n1,2\n", "no table of losses"),
            ("first,last,weight,loss,labels\n0,1", "not whole"),
        ],
    )
    def test_a_file_of_another_kind_is_left_alone(
        self, tmp_path: Path, content: str, says: str
    ) -> None:
        file = tmp_path / "losses.csv"
        file.write_text(content)
        with pytest.raises(errors.LogError, match=says):
            write_csv(ROWS, file)
        assert file.read_text() == content

    def test_a_folder_that_is_not_there_is_an_error(self, tmp_path: Path) -> None:
        with pytest.raises(errors.LogError, match=r"nowhere.*cannot be written: No such file"):
            write_csv(ROWS, tmp_path / "nowhere" / "losses.csv")

    def test_tensorboard_gets_scalars_and_nothing_else(self) -> None:
        class Writer:
            def __init__(self) -> None:
                self.seen: list[tuple[str, float, int]] = []

            def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
                self.seen.append((tag, scalar_value, global_step))

        writer = Writer()
        write_scalars(ROWS[:1], writer, prefix="train/")
        assert writer.seen == [("train/loss", 0.1, 1), ("train/labels", 1 / 3, 1)]
