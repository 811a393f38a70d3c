"""The commands. Each takes its arguments and the stream for its result, and returns a code."""

import argparse
import json
import os
import stat
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import nn

import fxdistill
from fxdistill.base.files import write_whole
from fxdistill.base.text import text
from fxdistill.cli.console import FINE, PARTIAL, TOO_LARGE, working
from fxdistill.cli.example_inputs import example_inputs, on_device_of
from fxdistill.cli.loading import call_factory, load_model
from fxdistill.errors import (
    CommandError,
    PatternError,
    ProjectionError,
    StructureError,
    did_you_mean,
)
from fxdistill.mapping.match_file import FORMAT, kind_of, text_of
from fxdistill.mapping.matches import Matches
from fxdistill.mapping.patterns import Pattern
from fxdistill.models.landmarks import roles_in
from fxdistill.models.tap import module_names
from fxdistill.report.report import Report

MODULES_SCHEMA = "1.0"
_WIDE = 1000  # columns of output that other programs read line by line


def report(args: argparse.Namespace, out: TextIO) -> int:
    """Run ``fxdistill report``."""
    _check_targets({"--json": args.json, "--html": args.html}, args.force, args.mapping)
    if args.inputs is not None and (args.batch or args.length):
        raise CommandError(
            "--batch and --length are for inputs that are made; --inputs brings its own"
        )
    mapping = None if args.mapping is None else Matches.load(args.mapping)
    student, teacher = _towers(args, args.task)
    if mapping is None:
        mapping = _proposed(student, teacher)
    if args.inputs is None:
        inputs = example_inputs(student, teacher, args.batch, args.length, args.task)
    else:
        inputs = on_device_of(student, call_factory(args.inputs))
    with working("capturing the step"):
        found = _reported(_wrapped(args, student, teacher, mapping, inputs), inputs)
    if args.html is not None:
        _write_page(found, args.html)
    if args.json is not None:
        _write(found.to_json() + "\n", args.json, out)
    if args.json != "-":
        _show(found, out, plain=str(found))
    if found.stopped is None:
        return FINE if args.memory is None else _fits(found, args.memory)
    print(f"fxdistill report: partial: {found.stopped.splitlines()[0]}", file=sys.stderr)
    return PARTIAL


def _fits(found: Report, memory: int) -> int:
    """Say whether the step fits; the code says it too."""
    fit = found.fit(memory)
    print(f"fxdistill report: {fit}", file=sys.stderr)
    return FINE if fit else TOO_LARGE


def _reported(distiller: fxdistill.Distiller, inputs: Any) -> Report:
    """Ask the distiller for its report on these inputs."""
    args, kwargs = (inputs, {}) if isinstance(inputs, tuple) else ((), inputs)
    return distiller.report(*args, **kwargs)


def _proposed(student: nn.Module, teacher: nn.Module) -> Matches:
    """The mapping that ``match`` proposes; where it fails, the error also advises a file."""
    try:
        with working("matching"):
            return fxdistill.match(student, teacher)
    except StructureError as error:
        raise StructureError(
            f"{error} In a file, for --mapping FILE; a file without matches (format = "
            f"{FORMAT} alone in a .toml) compares logits and labels only."
        ) from error


def _wrapped(
    args: argparse.Namespace, student: nn.Module, teacher: nn.Module, mapping: Matches, inputs: Any
) -> fxdistill.Distiller:
    compile: Any = not args.eager if args.backend is None else {"backend": args.backend}
    compile = "regional" if args.regional else compile
    try:
        return fxdistill.wrap(student, teacher, mapping, task=args.task, compile=compile)
    except ProjectionError:
        # Read widths that the structure does not tell from a capture, which then must succeed.
        return fxdistill.wrap(
            student, teacher, mapping, task=args.task, compile=compile, example_inputs=inputs
        )


def match(args: argparse.Namespace, out: TextIO) -> int:
    """Run ``fxdistill match``."""
    if args.output is not None:
        kind_of(Path(args.output))
    _check_targets({"--json": args.json, "--output": args.output}, args.force)
    student, teacher = _towers(args, "auto")
    roles = [role.strip() for role in args.roles.split(",") if role.strip()]
    with working("matching"):
        found = fxdistill.match(student, teacher, roles=roles, layers=args.layers)
    if args.output is not None:
        found.save(args.output)
    if args.json is not None:
        _write(text_of(found, found.notes, "json"), args.json, out)
    if args.json != "-":
        _show(found, out)
    return FINE


def modules(args: argparse.Namespace, out: TextIO) -> int:
    """Run ``fxdistill modules``."""
    _check_targets({"--json": args.json}, args.force)
    with working("making the model"):
        model = load_model(args.model, args.hf_config, args.dtype, "auto")
    paths = module_names(model)
    chosen = _chosen(args, paths)
    roles = roles_in(model)
    rows = [_module(model, path, roles) for path in paths if path in chosen]
    if args.json is not None:
        name = type(model).__name__
        data = {"schema": MODULES_SCHEMA, "model": name, "modules": rows}
        _write(json.dumps(data, indent=2, ensure_ascii=False) + "\n", args.json, out)
    if args.json != "-":
        _show(_table(rows), out)
    return FINE


def _chosen(args: argparse.Namespace, paths: Sequence[str]) -> set[str]:
    """The paths that ``--pattern`` matches."""
    try:
        found = Pattern.parse(args.pattern, "model").found(paths, {})
    except PatternError as error:
        raise CommandError(f"--pattern: {error}") from error
    if not found:
        near = did_you_mean(args.pattern, paths)
        raise CommandError(
            f"no module of {args.model} is called {args.pattern!r}. Nearest: {near}."
        )
    return {path for group in found.values() for path in group}


def _module(model: nn.Module, path: str, roles: dict[str, tuple[str, str]]) -> dict[str, Any]:
    module = model.get_submodule(path)
    role, kind = roles.get(path, ("", ""))
    parameters = sum(p.numel() for p in module.parameters())
    name = type(module).__name__
    return {"path": path, "class": name, "parameters": parameters, "role": role, "kind": kind}


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("path", no_wrap=True)
    table.add_column("class", overflow="fold")
    table.add_column("parameters", justify="right", no_wrap=True)
    table.add_column("role", overflow="fold")
    for row in rows:
        role = ": ".join(part for part in (row["role"], row["kind"]) if part)
        cells = (row["path"], row["class"], f"{row['parameters']:,}", role)
        table.add_row(*(Text(cell) for cell in cells))
    return table


# ---- what commands share


def _towers(args: argparse.Namespace, task: str) -> tuple[nn.Module, nn.Module]:
    with working("making the student"):
        student = load_model(args.student, args.hf_config, args.dtype, task)
    with working("making the teacher"):
        teacher = load_model(args.teacher, args.hf_config, args.dtype, task, train=False)
    return student, teacher


def _check_targets(targets: dict[str, str | None], force: bool, mapping: str | None = None) -> None:
    """Raise CommandError, before the work, for files that cannot be written or are the same.

    A file that exists is replaced with ``force`` only.
    """
    places = {} if mapping is None else {os.path.realpath(mapping): f"--mapping {mapping}"}
    for option, target in targets.items():
        if target is None or (option, target) == ("--json", "-"):
            continue
        _check_target(target, option)
        asked, place = f"{option} {target}", os.path.realpath(target)
        if place in places:
            raise CommandError(f"{places[place]} and {asked} name one file: give each its own")
        places[place] = asked
        if Path(target).exists() and not force:
            raise CommandError(f"{target} exists: --force replaces it")


def _check_target(target: str, option: str) -> None:
    if target == "-":
        raise CommandError(
            f"{option} -: only --json can go to standard output; {option} needs the name of a file"
        )
    # A link is followed: the file that it names is written.
    path = Path(os.path.realpath(target) if os.path.islink(target) else target)
    if not os.path.isdir(path.parent):
        raise CommandError(f"{option} {target}: there is no folder {path.parent}")
    if _is_no_file(path, f"{option} {target}") or not os.access(path.parent, os.W_OK):
        raise CommandError(f"{option} {target}: cannot be written")


def _is_no_file(path: Path, asked: str) -> bool:
    """Whether ``path`` exists and is not a regular file: a folder or a device."""
    try:
        return not stat.S_ISREG(path.stat().st_mode)
    except FileNotFoundError:
        return False
    except OSError as error:  # a name that is too long, for one
        raise CommandError(f"{asked}: cannot be written: {error.strerror}") from error


def _show(what: Any, out: TextIO, *, plain: str | None = None) -> None:
    """Print to a terminal; to a pipe or a file, write ``plain`` text, or lines of any width."""
    console = Console(file=out)
    if console.is_terminal:
        console.print(what)
    else:
        out.write((text(what, _WIDE) if plain is None else plain) + "\n")


def _write_page(found: Report, target: str) -> None:
    try:
        found.to_html(target)
    except OSError as error:
        raise CommandError(f"--html {target}: cannot be written: {error.strerror}") from error


def _write(content: str, target: str, out: TextIO) -> None:
    """Write ``content`` to standard output, or to a file, whole or not at all."""
    if target == "-":
        out.write(content)
        return
    try:
        write_whole(Path(target), content)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise CommandError(f"{target} cannot be written: {reason}") from error
