"""Every loss that has a name is compared with an oracle, and on meshes: no list forgets one."""

import re
from functools import partial
from pathlib import Path

import pytest
from torch import nn

import fxdistill
import matrix
import oracle
from fxdistill import Match, errors, losses
from fxdistill.losses.fused.formulas import DIVERGENCES
from fxdistill.losses.names import FEATURE_LOSSES, LABEL_LOSSES, LOGIT_LOSSES, OF_PLACES

ROOT = Path(__file__).parents[2]


def test_every_loss_of_places_is_in_the_oracle_and_in_the_matrix_of_placements():
    of_places = {f.__name__ for f in OF_PLACES} - {"detection_box"}  # smooth_l1, of boxes
    assert set(oracle.FEATURE_LOSSES) == of_places
    assert {name.partition("/")[0] for name in matrix.FEATURES} == of_places


def test_every_divergence_is_in_the_matrix_of_placements_and_in_the_fused_head():
    names = {name.partition("/")[0] for name in matrix.LOGITS}
    assert names == set(LOGIT_LOSSES) == set(DIVERGENCES)


def test_every_loss_by_name_is_public():
    names = {*FEATURE_LOSSES, *LOGIT_LOSSES, *LABEL_LOSSES}
    assert names <= set(losses.__all__)
    assert all(getattr(losses, name).__doc__ for name in names)


def code_of(page: str, anchor: str) -> str:
    """The Python that runs in one section of the guide (see ``tests/test_docs.py``)."""
    found, inside, runs = [], False, False
    for line in (ROOT / "docs" / page).read_text("utf-8").splitlines():
        if line.startswith("## "):
            title = re.sub(r"[^\w -]", "", line[3:]).lower()
            inside = re.sub(r"[ -]+", "-", title) == anchor
        elif line.startswith("```"):
            runs = line == "```python"
        elif inside and runs:
            found.append(line)
    return "\n".join(found)


def test_every_row_of_methods_has_a_script_or_code_of_the_guide_that_names_it():
    text = (ROOT / "docs" / "methods.md").read_text("utf-8")
    rows = [line.split("|") for line in text.splitlines() if "`tests/" in line and line[0] == "|"]
    assert len(rows) > 40
    for _, _, said, _, _, example, _ in rows:
        linked = re.findall(r"\]\(([\w/-]+\.md)#([\w-]+)\)", example)
        assert linked or ".py`" in example, said
        names = re.findall(r'`(?:presets\.)?(\w+)`|Importance\("(\w+)"', said)
        for page, anchor in linked:
            code = code_of(page, anchor)
            for name in filter(None, (a or b for a, b in names)):
                assert re.search(rf"\b{name}\b", code), (name, page, anchor)


def test_every_loss_stands_in_the_table_of_methods_with_a_test_and_a_place_in_the_guide():
    """Links are held by the build of the site; paths by this."""
    text = (ROOT / "docs" / "methods.md").read_text("utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| ") and "---" not in line]
    for name in {**FEATURE_LOSSES, **LOGIT_LOSSES, **LABEL_LOSSES}:
        (row,) = (row for row in rows if f"`{name}`" in row and "`schedules." not in row)
        _, _, _, test, guide, example, _ = row.split("|")
        assert "`tests/" in test, name
        assert ".md#" in guide, name
        scripts = re.findall(r"`(\w+\.py)`", example)
        for script in scripts:
            used = (ROOT / "examples" / script).read_text("utf-8")
            assert name in used or name in ("forward_kl", "cross_entropy"), (name, script)
    for path in re.findall(r"`(tests/[\w/]+\.py)`", text):
        assert (ROOT / path).is_file(), path
    for script in re.findall(r"`(\w+\.py)`", text):
        known = [*(ROOT / "examples").glob(script), *(ROOT / "tests").rglob(script)]
        assert known, script


def test_every_loss_has_its_formula_source_and_use_on_the_page_of_its_family():
    """A row of the first table of a page: the loss, its formula, its source, when to take it."""
    rows: dict[str, list[str]] = {}
    for page in sorted((ROOT / "docs" / "losses").glob("*.md")):
        table = page.read_text("utf-8").partition("## The losses")[2].partition("\n## ")[0]
        for line in table.splitlines():
            cells = [cell.strip() for cell in line.strip("|").split(" | ")]
            if (name := re.match(r"\|? ?`(\w+)`$", cells[0])) and page.stem != "index":
                rows.setdefault(name[1], cells)
    named = {*FEATURE_LOSSES, *LOGIT_LOSSES, *LABEL_LOSSES, "vocab_loss_topk"}
    assert set(rows) == named
    for name, cells in rows.items():
        assert len(cells) == 4, name
        assert all(cells), name


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"logit_loss": partial(losses.jsd, bete=0.1)}, r"logit_loss=.*jsd, bete=0.1.*'beta'; all"),
        ({"logit_loss": partial(losses.jsd, temperature=2.0)}, r"option of wrap, temperature="),
        ({"label_loss": partial(losses.cross_entropy, ignore_index=0)}, "all of them: label_smoo"),
        ({"feature_loss": partial(losses.mse, scale=1)}, r"feature_loss=.*mse has no options"),
        ({"mapping": partial(losses.distance_wise, normalise="max")}, r"loss=.*'normalize'"),
        ({"mapping": partial(losses.gram, weights=None)}, "the step gives a loss its weights"),
        ({"mapping": partial(losses.CRD, sizes=3)}, r"CRD, sizes=3.*'size'.*temperature, in_batch"),
    ],
)
def test_an_option_that_a_loss_lacks_is_an_error_of_wrap(given, said):
    """The heads have the losses of ``wrap``; what a step gives a loss would overwrite an option."""
    loss = given.pop("mapping", None)
    mapping = {"0": Match(teacher="0", loss=loss)}
    with pytest.raises(errors.OptionError, match=said):
        fxdistill.wrap(*(nn.Sequential(nn.Linear(4, 3)) for _ in range(2)), mapping, **given)
