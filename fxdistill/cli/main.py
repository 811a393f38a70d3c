"""The command line: arguments, messages and exit codes. ``commands.py`` holds the commands.

This file imports nothing heavy, so ``--help`` and wrong arguments are answered at once. Only
results go to standard output: whatever user code prints while a command runs goes to standard
error, like progress and messages.
"""

import argparse
import contextlib
import io
import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn, TextIO

import fxdistill
from fxdistill.base.figures import bytes_of
from fxdistill.cli.console import CLOSED, INTERNAL, INTERRUPTED, MISFIT, USAGE, working
from fxdistill.errors import CommandError, FxDistillError, MappingFileError, OptionError

MOST = 2**40  # largest number of samples, and of tokens


_CODES = """\
exit codes:
  0    fine
  1    the report is partial: it says what stopped it
  2    an argument, or a file that it names, is wrong
  3    the models or the mapping do not fit
  70   an error that fxdistill did not foresee; --debug shows where
  130  interrupted
  141  whoever read the output has gone
"""
_MODELS = """\
A model is file.py:factory or package.module:factory, where the factory is called without arguments
and returns an nn.Module. With --hf-config, what has no colon is a Hugging Face config.json, or a
folder with one: the model is made without weights, on the meta device, and nothing is downloaded.
"""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors take one line."""

    def __init__(self, **options: Any) -> None:
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, epilog=_CODES, **options)

    def error(self, message: str) -> NoReturn:
        """Print the error and where to find help, and exit with code 2."""
        self.exit(USAGE, f"{self.prog}: {message}. Help: {self.prog} --help\n")


def parser() -> argparse.ArgumentParser:
    """The parser for the arguments of all commands."""
    top = Parser(prog="fxdistill", description="Look at a distillation before it is run.")
    top.add_argument("--version", action="version", version=f"fxdistill {fxdistill.__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _report(commands)
    _modules(commands)
    _match(commands)
    _losses(commands)
    return top


def _command(commands: Any, name: str, does: str, models: Sequence[str]) -> Any:
    """Add a command, with the arguments that all commands share."""
    command = commands.add_parser(name, help=does, description=f"{does}.\n\n{_MODELS}")
    for model in models:
        command.add_argument(model.lower(), metavar=model)
    command.add_argument(
        "--hf-config", action="store_true", help="what has no colon is a config.json or its folder"
    )
    command.add_argument(
        "--dtype",
        choices=("bfloat16", "float32", "float16"),
        help="of the weights; default: bfloat16 with --hf-config, else as the factory makes them",
    )
    command.add_argument(
        "--json", metavar="FILE", help="write JSON; -: to standard output, in place of the tables"
    )
    command.add_argument("--debug", action="store_true", help="show tracebacks")
    command.add_argument("--force", action="store_true", help="files that exist may be replaced")
    return command


def _report(commands: Any) -> None:
    does = "Say what a distillation step will do, before any is run"
    command = _command(commands, "report", does, ("STUDENT", "TEACHER"))
    command.add_argument(
        "--mapping", metavar="FILE", help="a .toml or .json; default: what `match` proposes"
    )
    command.add_argument("--batch", type=_positive, help="samples (4)")
    command.add_argument(
        "--length", type=_positive, help="tokens a sample (2048, or as many as both models take)"
    )
    command.add_argument(
        "--inputs",
        metavar="FILE.py:FACTORY",
        help="returns a dict or a tuple of inputs; default: zeros of the shapes that forward takes",
    )
    command.add_argument(
        "--task",
        default="auto",
        choices=("auto", "causal_lm", "masked_lm", "seq2seq", "classification"),
        help="how labels line up with logits; default: as the student says",
    )
    mode = command.add_mutually_exclusive_group()
    mode.add_argument("--backend", help="lowers the one graph: inductor (the default), aot_eager")
    mode.add_argument("--regional", action="store_true", help='wrap(..., compile="regional")')
    mode.add_argument("--eager", action="store_true", help="wrap(..., compile=False)")
    command.add_argument("--html", metavar="FILE", help="write the report as one page, too")
    command.add_argument(
        "--memory",
        type=_bytes,
        metavar="SIZE",
        help="say whether the step fits, with AdamW, into so much: 80GB, 24GiB (exit code 4: no)",
    )


def _modules(commands: Any) -> None:
    does = "List the modules that a mapping can name"
    command = _command(commands, "modules", does, ("MODEL",))
    command.add_argument(
        "--pattern", default="**", help='which paths: "model.layers.*.mlp"; ** is any number of *'
    )


def _match(commands: Any) -> None:
    does = "Propose which layers to match, and say why"
    command = _command(commands, "match", does, ("STUDENT", "TEACHER"))
    command.add_argument(
        "--layers",
        default="uniform",
        choices=("uniform", "first", "last", "skip"),
        help="which of the teacher's blocks a student's block learns from (uniform)",
    )
    command.add_argument(
        "--roles",
        default="mixer,mlp",
        help="any of mixer, mlp, block, embedding, norm and logits, with commas (mixer,mlp)",
    )
    command.add_argument(
        "--output", metavar="FILE", help="write the mapping (.toml or .json), for --mapping"
    )


def _losses(commands: Any) -> None:
    does = "List the losses that have a name, with what each computes and its options"
    command = commands.add_parser("losses", help=does, description=f"{does}.")
    command.add_argument("--debug", action="store_true", help="show tracebacks")


def _positive(text: str) -> int:
    # int() refuses numbers of thousands of digits.
    if not text.isdecimal() or len(text) > 100 or not 1 <= int(text) <= MOST:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 to {MOST}")
    return int(text)


def _bytes(text: str) -> int:
    found = bytes_of(text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no size, such as 80GB or 24GiB")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code."""
    try:
        args = parser().parse_args(argv)
    except SystemExit as done:  # argparse has printed the reason
        return int(done.code or 0)
    out = sys.stdout
    if isinstance(out, io.TextIOWrapper):
        # Escape characters that the encoding lacks (arrows, α), as JSON does.
        out.reconfigure(errors="backslashreplace")
    try:
        with contextlib.redirect_stdout(sys.stderr), _warnings_on_one_line(), _path_kept():
            code = _run(args, out)
        out.flush()
    except BrokenPipeError:
        # The interpreter flushes standard output once more when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), out.fileno())
        return CLOSED
    return code


def _run(args: argparse.Namespace, out: TextIO) -> int:
    try:
        with working("importing torch"):
            from fxdistill.cli import commands, losses

        run = {
            "report": commands.report,
            "modules": commands.modules,
            "match": commands.match,
            "losses": losses.losses,
        }
        return run[args.command](args, out)
    except KeyboardInterrupt:
        return _failed(args, "interrupted", INTERRUPTED)
    except BrokenPipeError:
        raise
    except FxDistillError as error:
        wrong = isinstance(error, (CommandError, MappingFileError, OptionError))
        return _failed(args, str(error), USAGE if wrong else MISFIT)
    except Exception as error:
        what = f"unforeseen {type(error).__name__}: {error} (--debug shows where)"
        return _failed(args, what, INTERNAL)


def _failed(args: argparse.Namespace, message: str, code: int) -> int:
    if args.debug:
        traceback.print_exc()
    print(f"fxdistill {args.command}: {message}", file=sys.stderr)
    return code


@contextlib.contextmanager
def _warnings_on_one_line() -> Iterator[None]:
    """Show the text of warnings only: the line of code that gave them is not the user's."""

    def show(message: Warning | str, category: type[Warning], *rest: Any, **more: Any) -> None:
        print(f"{category.__name__}: {message}", file=sys.stderr)

    before = warnings.showwarning
    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = before


@contextlib.contextmanager
def _path_kept() -> Iterator[None]:
    """Restore the import path, to which commands add folders."""
    before = list(sys.path)
    try:
        yield
    finally:
        sys.path[:] = before
