"""Load models for the command line, from a factory in a file or package or a configuration."""

import ast
import contextlib
import functools
import importlib
import importlib.util
import inspect
import itertools
import json
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from fxdistill.errors import CommandError, did_you_mean

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_FORM = "file.py:factory or package.module:factory"


def load_model(
    asked: str, is_config: bool, dtype: str | None, task: str, *, train: bool = True
) -> nn.Module:
    """The model that an argument names; see the help of ``fxdistill``.

    A model from a configuration is put in train or eval mode; a factory's model keeps its mode.
    """
    if is_config and ":" not in asked:
        return from_config(Path(asked), DTYPES[dtype or "bfloat16"], task).train(train)
    if ":" not in asked and (asked.endswith(".json") or Path(asked).is_dir()):
        raise CommandError(f"{asked} names no factory ({_FORM}): for a configuration, --hf-config")
    found = call_factory(asked)
    if not isinstance(found, nn.Module):
        raise CommandError(f"{asked} returns a {type(found).__name__}, not an nn.Module")
    return found if dtype is None else found.to(DTYPES[dtype])


# ---- factories


def call_factory(asked: str) -> Any:
    """Import and call ``file.py:factory`` or ``package.module:factory``.

    An ``nn.Module`` in place of a factory is returned as it is. Raises CommandError for a factory
    that does not exist, needs arguments or raises.
    """
    where, _, name = asked.rpartition(":")
    if not where or not name:
        raise CommandError(f"{asked!r} is not {_FORM}{_defined_in(Path(asked))}")
    if where.endswith(".py"):
        module = _from_file(Path(where).resolve(), where)
    else:
        module = _from_package(where)
    factory = getattr(module, name, None)
    if factory is None:
        names = [n for n, value in vars(module).items() if callable(value) and n[0] != "_"]
        near = did_you_mean(name, names)
        raise CommandError(f"{where} has no {name!r}. Nearest: {near}.")
    if isinstance(factory, nn.Module):
        return factory
    if not callable(factory):
        raise CommandError(f"{asked} is a {type(factory).__name__}, not a function that makes one")
    return _called(factory, asked)


def _called(factory: Callable[..., Any], asked: str) -> Any:
    if needed := _needed(factory):
        raise CommandError(
            f"{asked} needs {', '.join(needed)}: a factory is called without arguments; give them "
            "defaults"
        )
    with _told(f"{asked} raised"):
        return factory()


def _needed(factory: Callable[..., Any]) -> list[str]:
    """The arguments without defaults; none where Python cannot tell: then the call will fail."""
    try:
        parameters = inspect.signature(factory).parameters.items()
    except (TypeError, ValueError):  # many callables written in C, such as dict
        return []
    return [
        name
        for name, p in parameters
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]


@contextlib.contextmanager
def _told(what: str) -> Iterator[None]:
    """Turn an exception of user code into a one-line CommandError; its sys.exit() too."""
    try:
        yield
    except (Exception, SystemExit) as error:
        text = " ".join(str(error).split())
        raise CommandError(f"{what} {type(error).__name__}: {text} (--debug: where)") from error


def _defined_in(file: Path) -> str:
    """The names that a file defines, for a message; the file is parsed and not run."""
    if file.suffix != ".py" or not file.is_file():
        return ""
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):
        return "; it is no Python"
    names = [n.name for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef))]
    return f"; it defines {', '.join(names) or 'nothing'}"


@functools.cache
def _from_file(file: Path, asked: str) -> ModuleType:
    """Import a file as a module, once, so that student and teacher may share classes."""
    if not file.is_file():
        near = did_you_mean(file.name, [f.name for f in file.parent.glob("*.py")])
        raise CommandError(f"there is no file {asked}. Nearest in its folder: {near}.")
    names = (file.stem if i == 1 else f"{file.stem}_{i}" for i in itertools.count(1))
    name = next(name for name in names if name not in sys.modules)
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(file.parent))
    sys.modules[name] = module
    try:
        with _told(f"importing {asked} raised"):
            spec.loader.exec_module(module)
    except CommandError:
        del sys.modules[name]
        raise
    return module


def _from_package(name: str) -> ModuleType:
    parts = name.split(".")
    if not all(parts):
        raise CommandError(f"there is no module {name!r}: between two dots there is a name")
    sys.path.insert(0, str(Path.cwd()))
    try:
        with _told(f"importing {name} raised"):
            return importlib.import_module(name)
    except CommandError as error:
        missing = error.__cause__
        parents = [".".join(parts[: i + 1]) for i in range(len(parts))]
        if isinstance(missing, ModuleNotFoundError) and missing.name in parents:
            raise CommandError(
                f"there is no module {missing.name!r}, neither installed nor in the current folder"
            ) from None
        raise


# ---- configurations


def from_config(path: Path, dtype: torch.dtype, task: str) -> nn.Module:
    """The model of a Hugging Face configuration, on the meta device; nothing is downloaded.

    ``architectures`` names its class, or else ``task`` selects one of transformers' own classes.
    The model keeps no cache, because a distillation does not generate.
    """
    try:
        import transformers
    except ModuleNotFoundError:
        raise CommandError("--hf-config needs transformers: pip install fxdistill[hf]") from None
    file = path / "config.json" if path.is_dir() else path
    data = _read(file)
    classes = _classes_in(data, path)
    kind = data.get("model_type")
    known: Any = transformers.CONFIG_MAPPING
    if kind not in list(known):
        near = did_you_mean(str(kind), known)
        raise CommandError(
            f"{path}: transformers {transformers.__version__} knows no model_type {kind!r}. "
            f"Nearest: {near}. A model with code of its own: {_FORM}."
        )
    if "quantization_config" in data:
        warnings.warn(f"{path}: weights are {dtype}, quantization_config is left out", stacklevel=1)
    with _told(f"{path} is refused by transformers:"):
        # transformers reads the file once more, as it has its own form for infinite numbers.
        data, _ = transformers.PreTrainedConfig.get_config_dict(str(file), local_files_only=True)
        config = known[kind].from_dict({**_without_types(data), "architectures": classes})
    inner = (c for c in vars(config).values() if isinstance(c, transformers.PreTrainedConfig))
    for each in (config, *inner):
        if hasattr(each, "use_cache"):
            each.use_cache = False
    make = _class_of(config, path, task)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with _told(f"{path} is refused by transformers:"), torch.device("meta"):
            model: nn.Module = make(config)
    finally:
        torch.set_default_dtype(before)
    return model


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        folder = path.parent
        beside = folder.iterdir() if folder.is_dir() else ()
        near = did_you_mean(
            path.name, [f.name for f in beside if f.is_dir() or f.suffix == ".json"]
        )
        raise CommandError(f"there is no file {path}. Nearest in its folder: {near}.")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CommandError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(data, dict):
        raise CommandError(f"{path} holds a {type(data).__name__}, not the fields of a model")
    return data


def _classes_in(data: dict[str, Any], path: Path) -> list[str] | None:
    """The class names in ``architectures``, which may be a list or one text."""
    named = data.get("architectures")
    if named is None:
        return None
    names = [named] if isinstance(named, str) else named
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CommandError(
            f"{path}: architectures is {json.dumps(named)}: a list of names of classes of "
            'transformers, as in ["LlamaForCausalLM"]'
        )
    return names


def _without_types(data: dict[str, Any]) -> dict[str, Any]:
    """The fields without those that give the dtype of weights, which ``--dtype`` gives."""
    left_out = ("dtype", "torch_dtype", "quantization_config")
    return {
        key: _without_types(value) if isinstance(value, dict) else value
        for key, value in data.items()
        if key not in left_out
    }


def _class_of(config: Any, path: Path, task: str) -> Callable[[Any], nn.Module]:
    """The callable that makes the model: the configuration's class, or else one for the task."""
    import transformers

    for name in config.architectures or ():
        if (named := getattr(transformers, name, None)) is None:
            near = did_you_mean(name, (n for n in dir(transformers) if n[0].isupper()))
            raise CommandError(f"{path}: transformers has no class {name!r}. Nearest: {near}.")
        made: Callable[[Any], nn.Module] = named
        return made
    wanted: dict[str, list[Any]] = {
        "causal_lm": [transformers.AutoModelForCausalLM],
        "masked_lm": [transformers.AutoModelForMaskedLM],
        "seq2seq": [
            transformers.AutoModelForSeq2SeqLM,
            transformers.AutoModelForSpeechSeq2Seq,
        ],
        "classification": [
            transformers.AutoModelForImageClassification,
            transformers.AutoModelForSequenceClassification,
        ],
    }
    order = ["classification", "causal_lm", "masked_lm"] if hasattr(config, "image_size") else []
    order = order or ["causal_lm", "masked_lm", "classification"]
    if getattr(config, "is_encoder_decoder", False):
        order = ["seq2seq", *order]
    elif not getattr(config, "is_decoder", True):
        # An encoder has a causal class as well, which is meant for is_decoder=True.
        order = ["masked_lm", *order]
    for name in order if task == "auto" else [task]:
        for auto in wanted[name]:
            if type(config) in auto._model_mapping:
                return auto.from_config  # type: ignore[no-any-return]
    raise CommandError(
        f"{path} names no class (architectures), and transformers has none of a {type(config)} for "
        f"{'any task' if task == 'auto' else task}: add architectures, or choose another --task"
    )
