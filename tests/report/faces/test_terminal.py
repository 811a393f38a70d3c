"""The report in 80 columns."""

import io
import os
import re
import shutil
import sys
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from torch import nn

import fxdistill
import report_samples as samples


def shown(report, width=80):
    console = Console(width=width, color_system=None, file=io.StringIO())
    console.print(report)  # by __rich__
    return console.file.getvalue()


@pytest.mark.parametrize("name", samples.ALL)
@pytest.mark.parametrize("width", [80, 120])
def test_every_report_fits(name, width):
    lines = shown(samples.ALL[name](), width).splitlines()
    assert max(map(len, lines)) <= width


def test_what_matters_comes_first():
    lines = shown(samples.large()).splitlines()
    assert lines[0].startswith("LlamaForCausalLM ← Llama4ForCausalLM")
    top = "\n".join(lines[:8])
    assert re.search(r"peak memory 2\d\d GiB, \d\.\d\d × plain training", top)
    assert re.search(r"\d+ TFLOP a step", top)
    assert "64 pairs, 2 warnings" in top


def test_repeated_pairs_are_told_once_with_their_layers():
    text = shown(samples.large())
    assert text.count("model.layers.{0..31}.mlp") == 1
    assert text.count("0←1 1←4 2←6") == 1
    assert "the same layers as above" in text
    assert "model.layers.17" not in text
    assert "[1, 4096, 4096] bfloat16 ← [1, 4096, 8192] bfloat16" in text
    assert "Linear 4096 → 8192" in text


def test_towers_face_each_other():
    text = shown(samples.small())
    assert re.search(r"layers\.\{0\.\.2\} ×3 +── 6 ── +model\.layers\.\{0\.\.5\} ×6", text)
    assert re.search(r"lm_head +lm_head", text)


def test_rows_that_are_not_on_one_line_are_named():
    report = samples.small()
    crossed = replace(report.pairs[0], student="lm_head", teacher="model.embed_tokens")
    text = shown(replace(report, pairs=(*report.pairs, crossed)))
    assert re.search(r"lm_head +1 → model\.embed_tokens", text)


def test_costs():
    text = shown(samples.small())
    assert re.search(r"teacher +15\.0 GFLOP +█+.? +46 %", text)
    assert "again" not in text  # of which there is none
    assert re.search(r"peak with AdamW +[\d.]+ MiB +states", text)
    assert re.search(r"peak with SGD +73\.3 MiB +no states", text)
    assert re.search(r"▁.*█.*\nforward +│backward", text)
    assert re.search(r"peak memory +65\.1 MiB +73\.3 MiB +1\.13 ×", text)


def test_passes_and_what_crosses_ranks():
    text = shown(samples.mesh())
    assert re.search(r"FuseHead  joint +436 +2\.41 GFLOP +96\.0 MiB +34", text)
    assert "→ 31.0 MiB" in text
    assert "nothing to do" in text
    assert "6 outputs exposed:" in text
    assert "model.layers.{1, 3, 5}.mlp" in text
    assert re.search(r"terms +all_reduce +1 +32 B", text)
    assert "recompile: L['input_ids'].size()[1] is 96" in text
    assert "Partial(sum)" in text


def test_a_partial_report_says_first_what_stopped_it():
    text = shown(samples.partial())
    assert text.startswith("stopped: CaptureError")
    assert "Memory" not in text
    assert "model.layers.{0..2}.mlp" in text


def test_names_are_not_markup():
    text = shown(samples.nasty(), 200)
    assert samples.NASTY in text
    assert "No pairs" in text


def test_casts_warnings_and_notes():
    text = shown(samples.large(), 120)
    assert re.search(r"student +bfloat16 +float32 +65", text)
    assert "warning: Token weights do not reach" in text
    assert "note: head fused" in text


# ------------------------------------------------------------------ as text


LONG = "base_model.model.language_model.decoder.layers.feed_forward.down_proj"


class Deep(nn.Module):
    """One layer behind a long path, as wrappers make them."""

    def __init__(self):
        super().__init__()
        here = self
        for name in LONG.split(".")[:-1]:
            here.add_module(name, nn.Module())
            here = here.get_submodule(name)
        here.down_proj = nn.Linear(4, 3)

    def forward(self, x):
        return self.get_submodule(LONG)(x)


@pytest.mark.parametrize(("columns", "whole"), [(None, True), ("180", True), ("90", False)])
def test_paths_are_whole_where_the_text_goes_to_no_terminal(columns, whole, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    if columns is not None:
        monkeypatch.setenv("COLUMNS", columns)
    options = {"task": "classification", "compile": False}
    distiller = fxdistill.wrap(Deep(), Deep(), {LONG: LONG}, **options)
    lines = str(distiller.summary()).splitlines()
    assert any(line.count(LONG) == 2 for line in lines) is whole
    assert max(map(len, lines)) <= int(columns or 200)
    lines = str(distiller.report(torch.randn(2, 4))).splitlines()
    assert f"← {LONG}" in lines  # a line of its own, which 90 columns have
    assert max(map(len, lines)) <= int(columns or 200)


def test_a_terminal_is_the_limit(monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(shutil, "get_terminal_size", lambda *_: os.terminal_size((90, 20)))
    assert max(map(len, str(samples.large()).splitlines())) <= 90
