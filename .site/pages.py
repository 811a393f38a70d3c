"""A hook of MkDocs: pages outside of docs/, links between all pages, and the API's sources.

In the checkout a link names a file, as GitHub wants it: ``docs/matching.md``, ``../README.md``. In
the site it names a page. A file of the checkout that is no page (a source) leaves its text alone.
"""

import posixpath
import re
import tempfile
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
# File of the checkout → page of the site. All else that is a page lies in docs/.
OUTSIDE = {
    "README.md": "index.md",
    "passes/README.md": "writing-a-pass.md",
    "benchmarks/README.md": "benchmarks.md",
    "CONTRIBUTING.md": "contributing.md",
}
LINK = re.compile(
    r"(?P<image>!?)\[(?P<text>[^\]]*)\]\((?P<path>[^\s()#:]+)(?P<anchor>#[^\s()]*)?\)"
)

_sources: tempfile.TemporaryDirectory[str] | None = None


@event_priority(100)  # before mkdocstrings, which reads the paths once
def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Lay passes/ inside of fxdistill/, as the wheel has it, where mkdocstrings reads sources."""
    global _sources
    _sources = tempfile.TemporaryDirectory(prefix="fxdistill-sources-")
    package = Path(_sources.name, "fxdistill")
    package.mkdir()
    for path in [*(ROOT / "fxdistill").iterdir(), ROOT / "passes"]:
        (package / path.name).symlink_to(path)
    python: dict[str, Any] = config.plugins["mkdocstrings"].config["handlers"]["python"]
    python["paths"] = [_sources.name]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that lie outside of docs/."""
    for source, page in OUTSIDE.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links to files of the checkout into links to pages."""
    sources = _checkout(files)
    pages = {source: files.src_uris[name] for name, source in sources.items()}
    here = page.file.src_uri
    folder = posixpath.dirname(sources[here])

    def link(found: re.Match[str]) -> str:
        text, source = found["text"], posixpath.normpath(posixpath.join(folder, found["path"]))
        if source not in pages:
            # A source: its name is enough. No file: code, or a mistake, which MkDocs will tell.
            told = f"`{source}`" if text == found["path"] else text
            return told if (ROOT / source).is_file() else found[0]
        target = pages[source]
        named = {posixpath.normpath(path) for path in (text, posixpath.join(folder, text))}
        if named & {source, posixpath.dirname(source)} and target.page:
            text = target.page.title  # a path says nothing here
        path = posixpath.relpath(target.src_uri, posixpath.dirname(here) or ".")
        return f"{found['image']}[{text}]({path}{found['anchor'] or ''})"

    return LINK.sub(link, markdown)


def on_post_build(config: MkDocsConfig) -> None:
    """Remove the folder of links."""
    if _sources is not None:
        _sources.cleanup()


def _checkout(files: Files) -> dict[str, str]:
    """For each file of the site, the path in the checkout."""
    outside = {page: source for source, page in OUTSIDE.items()}
    docs = {file.src_uri: f"docs/{file.src_uri}" for file in files if file.src_uri not in outside}
    return docs | outside
