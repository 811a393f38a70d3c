"""Print the results of studies as Markdown tables, from the JSON that they left.

python examples/results.py runs/*.json
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from runs import show


def table(path: Path) -> str:
    """A row for each way, references last and in brackets; a column for each measure."""
    study = json.loads(path.read_text("utf-8"))
    labels = study["measures"]
    rows = ["| learned from | " + " | ".join(labels.values()) + " |"]
    rows.append("| --- |" + " ---: |" * len(labels))
    last = study["references"]
    for way in sorted(study["results"], key=lambda way: way in last):
        found = study["results"][way]
        figures = [show(found[measure]["seeds"]) for measure in labels if measure in found]
        rows.append(f"| {f'({way})' if way in last else way} | {' | '.join(figures)} |")
    return "\n".join(rows)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("paths", nargs="+", type=Path)
    for path in parser.parse_args(argv).paths:
        print(f"{path.stem}\n\n{table(path)}\n")


if __name__ == "__main__":
    main()
