"""The package as it is installed: names, metadata, and the files of the wheel."""

import ast
import os
import subprocess
import sys
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import torch

import fxdistill
import fxdistill.passes

ROOT = Path(__file__).resolve().parents[1]
MAX_LINES = 400

# Source folder → where it is installed.
FOLDERS = {ROOT / "fxdistill": Path("fxdistill"), ROOT / "passes": Path("fxdistill/passes")}
PAGE = ("*.css", "*.html", "*.js")  # of the HTML report


def library_files():
    """Yield (file in the checkout, path in the wheel)."""
    for folder, target in FOLDERS.items():
        for pattern in ("*.py", *PAGE):
            for file in sorted(folder.rglob(pattern)):
                yield file, target / file.relative_to(folder)


def test_passes_come_from_the_top_level_folder():
    assert Path(fxdistill.passes.__file__) == ROOT / "passes" / "__init__.py"


def test_no_module_is_imported_under_the_name_of_its_folder():
    assert "passes" not in sys.modules, "import it as fxdistill.passes"


def test_version_is_the_one_in_the_metadata():
    assert metadata.version("fxdistill") == fxdistill.__version__, "reinstall: touch pyproject.toml"


def test_public_names_are_imported_when_asked_for():
    """Every one is there, is what type checkers are told, and is hidden by no submodule."""
    tree = ast.parse((ROOT / "fxdistill" / "__init__.py").read_text(encoding="utf-8"))
    (block,) = (n for n in tree.body if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.dump(n))
    imports = [n for n in block.body if isinstance(n, ast.ImportFrom)]
    told = {alias.name: node.module for node in imports for alias in node.names}
    homes = {name: f"fxdistill.{home}" for name, home in fxdistill._HOMES.items()}
    of_folders = {"errors": "fxdistill", "losses": "fxdistill", "presets": "fxdistill.recipes"}
    of_folders |= dict.fromkeys(("loss_log", "schedules"), "fxdistill.training")
    assert told == {**homes, **of_folders}
    assert {"live" if name == "loss_log" else name for name in told} == set(fxdistill.__all__)
    submodules = {file.stem for file, _ in library_files() if file.parent.name == "fxdistill"}
    assert not submodules & set(homes), "importing the submodule would replace the public name"
    assert set(fxdistill.__all__) <= set(dir(fxdistill))
    for name in {*fxdistill.__all__} - {"live"}:
        assert getattr(fxdistill, name).__name__.split(".")[-1] == name
    with pytest.raises(AttributeError, match="no attribute 'wrapp'"):
        fxdistill.wrapp  # noqa: B018 - what is asked for is the point


def test_the_package_alone_imports_no_torch():
    program = "import sys, fxdistill.errors; sys.exit('torch' in sys.modules)"
    run(sys.executable, "-c", program)


def test_backend_is_registered():
    (entry,) = metadata.entry_points(group="torch_dynamo_backends", name="fxdistill")
    assert callable(entry.load())
    assert "fxdistill" in torch._dynamo.list_backends()


def test_pyproject_lists_every_package():
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {path.parent for _, path in library_files() if path.suffix == ".py"}
    assert sorted(listed) == sorted(".".join(path.parts) for path in found)


@pytest.mark.parametrize("file", [pytest.param(f, id=str(p)) for f, p in library_files()])
def test_file_is_short_enough_to_read(file):
    lines = len(file.read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_LINES, f"{file.relative_to(ROOT)} has {lines} lines: split it by idea"


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Build an sdist, and from it a wheel, with the installed setuptools: no network."""
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ROOT)
    return out


def run(*command, **kwargs):
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, check=False, **kwargs
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_wheel_holds_the_library_and_nothing_else(built):
    (wheel,) = built.glob("*.whl")
    names = {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n}
    assert names == {"fxdistill/py.typed", *(path.as_posix() for _, path in library_files())}


@pytest.mark.slow
def test_sdist_keeps_the_folders_of_the_checkout(built):
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    sources = {file.relative_to(ROOT).as_posix() for file, _ in library_files()}
    assert sources | {"pyproject.toml", "LICENSE", "README.md"} <= names


@pytest.mark.slow
def test_wheel_works_away_from_the_checkout(built, tmp_path):
    (wheel,) = built.glob("*.whl")
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--target", tmp_path, wheel)
    program = """
import fxdistill, fxdistill.compiler.capture, fxdistill.passes
places = (fxdistill.passes.__file__, fxdistill.compiler.capture.__file__)
print(*fxdistill.__path__, *places, sep="\\n")
"""
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    places = run(sys.executable, "-c", program, cwd=tmp_path, env=env).splitlines()
    package = tmp_path / "fxdistill"
    assert places == [
        str(package),
        f"{package}/passes/__init__.py",
        f"{package}/compiler/capture.py",
    ]
