"""The guide as a site: no warning, nothing from elsewhere, and each public name in one place."""

import inspect
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import fxdistill
import fxdistill.passes

ROOT = Path(__file__).resolve().parents[1]
# A heading of an object: its text, with the markup in it.
HEADING = re.compile(r'<h2 id="fxdistill\.[^"]*" class="doc doc-heading">(.*?)<a ', re.DOTALL)
# What a browser fetches to show a page: from another host, or by a whole address.
FETCHED = re.compile(r"""<(?:script|link|img|iframe)\b[^>]*?(?:src|href)=["'](?:https?:)?//""")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build it, as ``make docs`` does; mkdocs.yml says that a warning is an error."""
    # Not with -q: MkDocs counts only the warnings that it shows.
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "-d", str(folder)]
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def public_names() -> list[str]:
    """Each name that a user may write, once: ``fxdistill.wrap``, ``fxdistill.losses.mse``."""
    modules = {n: m for n in fxdistill.__all__ if inspect.ismodule(m := getattr(fxdistill, n))}
    modules["passes"] = fxdistill.passes  # the package itself, which no type checker is told of
    names = [f"fxdistill.{name}" for name in fxdistill.__all__ if name not in modules]
    of_top = [getattr(fxdistill, name) for name in fxdistill.__all__]
    for home, module in modules.items():
        own = {
            name: value
            for name, value in vars(module).items()
            if getattr(value, "__module__", "") == module.__name__ and not name.startswith("_")
        }
        if home == "errors":  # its functions are ours
            own = {name: value for name, value in own.items() if inspect.isclass(value)}
        listed = getattr(module, "__all__", own)
        names += [f"fxdistill.{home}.{n}" for n in listed if getattr(module, n) not in of_top]
    # Its module needs trl, so that it is not listed.
    return [*names, "fxdistill.trainers.trl.DistillationTrainer"]


def test_every_public_name_has_one_place(site: Path) -> None:
    pages = [page.read_text("utf-8") for page in site.rglob("*.html")]
    headings = [re.sub(r"<[^>]*>", "", text) for page in pages for text in HEADING.findall(page)]
    found = Counter(name.strip() for name in headings)
    beside = {
        "Report",
        "Fit",
        "Explanation",
        "Finding",
    }  # users get them, and write no name of theirs
    assert found == Counter([*public_names(), *beside])


def test_a_page_fetches_nothing_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        assert not FETCHED.findall(page.read_text("utf-8")), page.name
    for sheet in site.rglob("*.css"):
        assert not re.findall(r"url\(\W*(?:https?:)?//", sheet.read_text("utf-8")), sheet.name
