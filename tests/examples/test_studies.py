"""The studies of ``examples/``: each runs to its end, and what they share does what it says."""

import importlib
import json
import math
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
# By what they learn from: those of digits, then those of texts, which share one.
STUDIES = (
    "born_again",
    "detection",
    "early_exits",
    "features_and_logits",
    "mutual_learning",
    "progressive",
    "relations",
    "temperature",
    "two_teachers",
    "vision",
    "encoder",
    "mixer",
    "on_policy",
    "tokens_ahead",
)
WITH_RESULTS = sorted(path.stem for path in (ROOT / "docs" / "examples").glob("*.json"))


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch):
    """Import a file of ``examples/`` as its neighbours do."""
    monkeypatch.syspath_prepend(str(EXAMPLES))

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    return load


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the studies leave their results, and keep texts and teachers."""
    return tmp_path_factory.mktemp("studies")


def finite(value: object) -> bool:
    if isinstance(value, dict):
        return all(map(finite, value.values()))
    if isinstance(value, list):
        return all(map(finite, value))
    return not isinstance(value, float) or math.isfinite(value)


@pytest.mark.parametrize("name", STUDIES)
def test_a_quick_run_leaves_a_picture_and_figures_of_every_way(
    name: str, example, folder: Path
) -> None:
    example(name).main(["--quick", "--out", str(folder)])

    assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    saved = json.loads((folder / f"{name}.json").read_text())
    assert saved["settings"]["seeds"] == [0]
    assert len(saved["results"]) > 2
    assert len(saved["sentences"]) >= 2
    assert finite(saved)


@pytest.mark.parametrize("name", WITH_RESULTS)
def test_the_guide_has_the_figures_of_a_whole_run(name: str, example) -> None:
    results, page = example("results"), (ROOT / "docs" / "which-method.md").read_text("utf-8")
    path = ROOT / "docs" / "examples" / f"{name}.json"
    assert json.loads(path.read_text())["settings"]["seeds"] == [0, 1, 2]
    assert results.placed(page, name, results.table(path)) == page
    assert path.with_suffix(".png").stat().st_size < 80_000


def test_means_spreads_and_gains_are_those_of_the_seeds(example, tmp_path: Path) -> None:
    runs = example("runs")
    options = runs.options("", ["--seeds", "0", "1", "--out", str(tmp_path)], steps=1)
    with runs.Study("toy", options, {"loss": "loss", "right": "%"}, less=["loss"]) as study:
        for first, second in ((1.0, 0.5), (3.0, 4.5)):
            study.note("teacher", reference=True, right=90)
            study.note("plain", loss=first, right=50)
            study.note("better", loss=second, right=60)

    found = json.loads((tmp_path / "toy.json").read_text())["results"]
    assert found["plain"]["loss"] == {"mean": 2.0, "spread": math.sqrt(2), "seeds": [1.0, 3.0]}
    assert study.ways == ["plain", "better"]
    assert study.gains("better", "loss") == [0.5, -1.5]  # less is better
    assert study.gains("better", "right") == [10, 10]
    assert study.sentences() == [
        "better: loss worse than that of plain, by 0.5 ± 1.4; better in 1 of 2 seeds."
    ]


def test_no_digit_is_on_two_sides_and_a_seed_repeats_its_batches(example) -> None:
    digits = example("digits")
    split = digits.load(3)
    sizes = [len(part.digits) for part in split]
    assert sizes == [1000, 100, 697]
    everything = torch.cat([part.pixels for part in split]).flatten(1)
    from_scratch = torch.cat([part.pixels for part in digits.load(4)]).flatten(1)
    assert torch.equal(everything.unique(dim=0), from_scratch.unique(dim=0))  # all, each seed

    def first(seed: int):
        return next(digits.batches(split.student, 8, 1, seed))

    assert torch.equal(first(0)[0], first(0)[0])
    assert not torch.equal(first(0)[0], first(1)[0])


def test_a_scene_says_where_its_digits_are_and_finding_them_all_is_a_precision_of_100(
    example,
) -> None:
    scenes_of, digits = example("digit_scenes"), example("digits")
    scenes = scenes_of.compose(digits.load(0).student, 20, seed=0)
    there = scenes.digits != scenes_of.NOTHING
    for i, truth in enumerate(scenes.truth):  # each digit has a place, and each place its box
        assert {(d, *b.tolist()) for d, b in truth} == {
            (int(d), *b.int().tolist())
            for d, b in zip(scenes.digits[i][there[i]], scenes.boxes[i][there[i]], strict=True)
        }

    sure = torch.full((20, 80, 10), -9.0)
    sure[there] += 18.0 * torch.nn.functional.one_hot(scenes.digits[there], 10)
    assert scenes_of.average_precision(scenes, sure, scenes.boxes) == pytest.approx(100)
    moved = scenes.boxes + 6.0  # of 8 to 16 pixels: no small digit, few large ones overlap by half
    assert scenes_of.average_precision(scenes, sure, moved) < 20
    assert scenes_of.overlap(torch.tensor([0, 0, 2, 2]), torch.tensor([1, 0, 3, 2])) == (
        pytest.approx(1 / 3)
    )
