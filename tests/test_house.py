"""The house: a folder imports only from those below its own, and no file imports in a circle.

Read from the syntax trees, so imports inside functions and under TYPE_CHECKING count. A folder that
hands on its files when they are asked for (``parallel.setup``) imports none by itself: whoever asks
does, and counts as an importer of that file.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# From the top down. Those of one line do not import each other.
LEVELS = (
    ("recipes",),
    ("cli", "training"),
    ("distiller",),
    ("report",),
    ("compiler",),
    ("passes",),
    ("heads",),
    ("objective",),
    ("mapping",),
    ("graph",),
    ("store", "parallel", "taps", "losses"),
    ("models",),
    ("base",),
    ("errors",),
)
LEVEL = {folder: i for i, folders in enumerate(LEVELS) for folder in folders}
# The only ones that import torch.distributed.
ON_RANKS = (
    "base.placement",
    "losses.fused.sharded_",
    "losses.sharded.",
    "parallel.",
    "taps.placed_behind",
)


def module_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts[1:] if parts[0] == "fxdistill" else parts  # passes/ stands at the top
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {
    module_of(path): path
    for folder in ("fxdistill", "passes")
    for path in sorted((ROOT / folder).rglob("*.py"))
}
FOLDERS = {name for name, path in FILES.items() if path.name == "__init__.py"}


def imported(tree):
    """The modules of this package that a file imports, or asks a folder for."""
    found, folders = set(), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "fxdistill":
            base = node.module.removeprefix("fxdistill").removeprefix(".")
            for alias in node.names:
                inner = f"{base}.{alias.name}".removeprefix(".")
                found.add(inner if inner in FILES else base)
                if inner in FOLDERS:
                    folders[alias.asname or alias.name] = inner
        elif isinstance(node, ast.Import):
            names = [a.name.removeprefix("fxdistill.") for a in node.names if "." in a.name]
            found.update(name for name in names if name in FILES)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            asked = f"{folders.get(node.value.id, '?')}.{node.attr}"
            if asked in FILES:
                found.add(asked)
    return found - {""}


TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}
IMPORTS = {name: imported(tree) - {name} for name, tree in TREES.items() if name}


def folder_of(name):
    return name.split(".")[0]


def test_every_folder_has_its_line():
    assert {folder_of(name) for name in FILES if name} - {"__main__"} <= set(LEVEL)


@pytest.mark.parametrize("name", sorted(set(IMPORTS) - {"__main__"}))
def test_imports_go_down(name):
    own = folder_of(name)
    wrong = [
        other
        for other in IMPORTS[name]
        if folder_of(other) != own and LEVEL[folder_of(other)] <= LEVEL[own]
    ]
    assert not wrong, f"{name} imports {wrong}, which stand beside or above it (see LEVELS)"


def test_no_file_imports_in_a_circle():
    """Files without unvisited imports are taken away until none is left."""
    # A folder that is imported with a name of its own is its __init__: that is a file like others.
    left = {name: set(others) for name, others in IMPORTS.items()}
    while done := [name for name, others in left.items() if not others & left.keys()]:
        for name in done:
            del left[name]
    assert not left, f"a circle within: {sorted(left)}"


def imports_distributed(tree):
    """Whether a file imports torch.distributed when it runs: not only for its types."""
    typing = [
        n for n in ast.walk(tree) if isinstance(n, ast.If) and "TYPE_CHECK" in ast.dump(n.test)
    ]
    for_types = {id(inner) for block in typing for inner in ast.walk(block)}
    names = [
        name
        for node in ast.walk(tree)
        if id(node) not in for_types
        for name in (
            [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else []
        )
    ]
    return any(name.startswith("torch.distributed") for name in names)


def test_few_files_import_torch_distributed():
    found = {name for name, tree in TREES.items() if imports_distributed(tree)}
    assert found
    assert not [name for name in found if not name.startswith(ON_RANKS)]


def test_imports_inside_functions_are_few():
    """Each file says why: ``--help`` without torch, a library that is optional."""
    inside = {
        name
        for name, tree in TREES.items()
        for function in ast.walk(tree)
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef))
        for node in ast.walk(function)
        if isinstance(node, (ast.Import, ast.ImportFrom))
    }
    assert inside <= {"cli.main", "cli.console", "cli.loading"}, inside
