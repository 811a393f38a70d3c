"""The code of the guide runs as it stands, page by page: what is marked ``python``, not ``py``."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest

import fxdistill

DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted([*DOCS.glob("*.md"), *DOCS.glob("losses/*.md")])


def code(page: Path) -> str:
    """The Python of a page, at the lines where it stands, so that a traceback points there."""
    lines, inside = [], False
    for line in page.read_text("utf-8").splitlines():
        fence = line.startswith("```")
        inside = line == "```python" if fence else inside
        lines.append(line if inside and not fence else "")
    return "\n".join(lines)


@pytest.mark.slow  # a page is several models, each traced
@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(DOCS)) for page in PAGES])
# transformers asks for versions in forward(), through a cache that dynamo warns about.
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
# Trainer pins memory by default, and torch warns where there is no accelerator.
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")
def test_the_code_of_a_page_runs(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    # Readers get Inductor by default; here it would take minutes, and other tests cover it. Steps
    # are captured all the same, but for those of Matching, whose state-space mixers take a minute.
    traced = page.name != "matching.md"
    lowered = partial(fxdistill.wrap, compile={"backend": "eager"} if traced else False)
    monkeypatch.setattr(fxdistill, "wrap", lowered)
    namespace: dict[str, Any] = {}
    exec(compile(code(page), str(page), "exec"), namespace)
