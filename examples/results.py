"""Print the results of studies as Markdown tables, from the JSON that they left.

python examples/results.py runs/*.json
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from figures import show


def table(path: Path) -> str:
    """A row for each way, references last and in brackets; a column for each measure."""
    study = json.loads(path.read_text("utf-8"))
    labels = study["measures"]
    rows = ["| learned from | " + " | ".join(labels.values()) + " |"]
    rows.append("| --- |" + " ---: |" * len(labels))
    last = study["references"]
    for way in sorted(study["results"], key=lambda way: way in last):
        found = study["results"][way]
        figures = [show(found[m]["seeds"]) if m in found else "" for m in labels]
        rows.append(f"| {f'({way})' if way in last else way} | {' | '.join(figures)} |")
    return "\n".join(rows)


def placed(page: str, name: str, rows: str) -> str:
    """The page with these rows behind ``<!-- table: name -->``, in the place of earlier ones."""
    before, mark, after = page.partition(f"<!-- table: {name} -->\n\n")
    if not mark:
        raise SystemExit(f"the page has no line <!-- table: {name} -->")
    lines = after.splitlines(keepends=True)
    while lines and lines[0].startswith("|"):
        del lines[0]
    gap = "" if lines and lines[0] == "\n" else "\n"
    return f"{before}{mark}{rows}\n{gap}{''.join(lines)}"


def main(argv: Sequence[str] | None = None) -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("paths", nargs="+", type=Path)
    parser.add_argument("--into", type=Path, metavar="PAGE", help="write them into this page")
    options = parser.parse_args(argv)
    for path in options.paths:
        if options.into is None:
            print(f"{path.stem}\n\n{table(path)}\n")
        else:
            page = placed(options.into.read_text("utf-8"), path.stem, table(path))
            options.into.write_text(page, "utf-8")


if __name__ == "__main__":
    main()
