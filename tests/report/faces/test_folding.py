"""Numbers as they are written, and what is told once because it is repeated."""

from dataclasses import replace

import pytest

import report_samples as samples
from fxdistill.base.figures import amount, operations, ratio, share, size
from fxdistill.report.data import BlockLine
from fxdistill.report.faces.bars import bar, sparkline
from fxdistill.report.faces.folding import block_index, folded, folds, gathered, ranges, rows


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (1536, "1.50 KiB"),
        (10239, "10.0 KiB"),
        (999 * 2**20, "999 MiB"),
        (2**30 - 1, "1.00 GiB"),
        (3 * 2**40, "3.00 TiB"),
    ],
)
def test_sizes(count, text):
    assert size(count) == text


def test_other_numbers():
    assert operations(999) == "999 FLOP"
    assert operations(1_500_000_000_000) == "1.50 TFLOP"
    assert operations(999_600) == "1.00 MFLOP"
    assert amount(8_030_000_000) == "8.03 B"
    assert amount(12) == "12"
    assert (ratio(3, 2), ratio(1, 0)) == ("1.50 ×", "–")
    assert (share(1, 3), share(1, 1000), share(0, 5)) == ("33 %", "<1 %", "0 %")


def test_a_bar_has_eighths():
    assert bar(1, 2, 4) == "██"
    assert bar(1, 16, 1) == "▏"  # what is there is seen
    assert bar(3, 16, 2) == "▍"
    assert bar(0, 16, 8) == ""


def test_a_sparkline_keeps_the_peak():
    numbers = [0] * 500
    numbers[311] = 7
    line = sparkline(numbers, 20)
    assert len(line) == 20
    assert line.count("█") == 1
    assert sparkline([5, 5], 20) == "▁▁"
    assert sparkline([], 20) == ""


def test_ranges():
    assert ranges([0, 1, 2, 3, 7]) == "0..3, 7"
    assert ranges([0, 1]) == "0, 1"
    assert ranges(range(1, 80, 2)) == "1, 3, 5, …, 79"
    assert folded(["a.1.b.0", "a.2.b.0", "a.3.b.0"]) == "a.{1..3}.b.0"
    assert folded(["a.b"]) == "a.b"


def test_outputs_are_gathered_by_layer():
    names = [f"layers.{i}.{part}" for i in range(4) for part in ("attn", "mlp")]
    assert gathered([*names, ":logits"]) == ("layers.{0..3}.attn", "layers.{0..3}.mlp", ":logits")
    assert gathered(["a.0.b.0", "a.1.b.1"]) == ("a.0.b.0", "a.1.b.1")
    assert gathered([]) == ()


def test_pairs_of_every_layer_are_two_folds():
    report = samples.large()
    attention, mlp = folds(report.pairs)
    assert attention.student == "model.layers.{0..31}.self_attn"
    assert mlp.teacher == "model.layers.{1, 4, 6, …, 79}.mlp"
    assert sorted(attention.members + mlp.members) == list(range(64))
    assert attention.numbers[:3] == ((0, 1), (1, 4), (2, 6))


def test_pairs_that_differ_are_apart():
    one, two, *rest = samples.small().pairs
    heavy = replace(one, weight=2.0)
    assert [len(fold.members) for fold in folds([heavy, two, *rest])] == [1, 3, 2]
    ported = replace(one, student=f"{one.student}:output[1]")
    assert folds([ported])[0].student == "model.layers.0.self_attn:output[1]"
    assert folds([]) == ()


def test_pairs_with_two_numbers_fold_by_the_one_that_varies_most():
    one = samples.small().pairs[0]
    paths = [f"stages.{s}.blocks.{b}" for s in range(2) for b in range(4)]
    found = folds([replace(one, student=path, teacher=path) for path in paths])
    assert [fold.student for fold in found] == [
        "stages.0.blocks.{0..3}",
        "stages.1.blocks.{0..3}",
    ]


def test_runs_of_alike_blocks():
    blocks = samples.large().towers[0].blocks
    assert [(row.label, row.count) for row in rows(blocks)] == [
        ("model.embed_tokens", 1),
        ("model.layers.{0..79}", 80),
        ("model.norm", 1),
        ("lm_head", 1),
    ]
    assert sum(row.parameters for row in rows(blocks)) == sum(b.parameters for b in blocks)
    assert rows(()) == ()


def test_blocks_that_do_something_else_end_a_run():
    def block(i, kind="attention", parameters=8, forward=100):
        path = f"layers.{i}"
        return BlockLine(path, ((f"{path}.mixer", kind),), parameters, forward)

    def counts(blocks):
        return [row.count for row in rows(blocks)]

    assert counts([block(0), block(1), block(2, "state space"), block(3)]) == [2, 1, 1]
    assert counts([block(0), block(1, parameters=9)]) == [1, 1]
    assert counts([block(0), block(1), block(2, forward=0)]) == [2, 1]  # pruned above
    assert counts([block(0), block(1, forward=101)]) == [2]


def test_the_block_of_a_path():
    blocks = samples.small().towers[1].blocks
    assert block_index(blocks, "model.layers.1.mlp:input@1") == 2
    assert block_index(blocks, "model.layers.1") == 2
    assert block_index(blocks, "model.layers.10.mlp") is None
    assert block_index(blocks, "lm_head") == 5
