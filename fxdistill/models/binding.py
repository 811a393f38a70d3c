"""Whether a model's ``forward`` can be called with what it is given, without calling it."""

from collections.abc import Iterable, Sequence
from inspect import Parameter, signature
from typing import Any, get_args, is_typeddict

from torch import nn

from fxdistill.errors import did_you_mean
from fxdistill.models.conventions import accepted_keywords, forward_parameters

_POSITIONAL = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
_NAMED = (*_POSITIONAL, Parameter.KEYWORD_ONLY)


def positional_limit(model: nn.Module) -> int | None:
    """How many inputs ``forward`` takes by position; ``None`` for any number."""
    parameters = forward_parameters(model)
    if not parameters or any(p.kind is Parameter.VAR_POSITIONAL for p in parameters):
        return None
    return sum(p.kind in _POSITIONAL for p in parameters)


def misfit(model: nn.Module, args: Sequence[Any], kwargs: Iterable[str]) -> str:
    """Why ``forward`` cannot be called with these, for "the student ..."; empty where it can."""
    kwargs = tuple(kwargs)
    key = type(model).forward, len(args), kwargs
    if key in _fits and "forward" not in vars(model):
        return ""
    parameters = forward_parameters(model)
    why = _misfit(model, parameters, args, kwargs)
    if not why and parameters and parameters[0].name in signature(type(model).forward).parameters:
        _fits.add(key)  # of the class itself, and not of a model within a wrapper
    return why


_fits: set[tuple[Any, ...]] = set()  # a step must not read signatures


def _misfit(
    model: nn.Module, parameters: Sequence[Parameter], args: Sequence[Any], kwargs: Sequence[str]
) -> str:
    by_place = [p.name for p in parameters if p.kind in _POSITIONAL][: len(args)]
    if twice := [name for name in by_place if name in kwargs]:
        return f"gets {twice[0]!r} twice, by position and by name"
    needed = [p.name for p in parameters if p.kind in _NAMED and p.default is Parameter.empty]
    if missing := [name for name in needed if name not in by_place and name not in kwargs]:
        named = ", ".join(map(repr, missing))
        return f"needs {named}: forward({_shown(parameters)}) has no default for it"
    takes = accepted_keywords(model)
    if takes is not None and (unknown := [name for name in kwargs if name not in takes]):
        return f"takes no {unknown[0]!r}. Nearest: {did_you_mean(unknown[0], sorted(takes))}"
    return ""


def _shown(parameters: Iterable[Parameter]) -> str:
    return ", ".join(p.name for p in parameters if p.kind in _NAMED)


# ---------------------------------------------------------------------- names behind **kwargs

# What transformers takes out of the keywords of any model, whatever these are annotated with; and
# what some tokenizers make for all models, where it says nothing.
_OF_ANY = frozenset({"return_dict", "use_cache", "cache_position", "is_causal", "token_type_ids"})
# Attention of these names is transformers' own; a function that somebody registered reads what
# it likes.
_ATTENTION = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")


def may_read(model: nn.Module, name: str) -> bool:
    """Whether a model of ``**kwargs`` may read the keyword ``name``.

    Where ``**kwargs`` is annotated with the names that it may have (``Unpack[SomeTypedDict]``),
    these are known, and what the modules within name themselves. Any other may read anything.
    """
    attention = getattr(getattr(model, "config", None), "_attn_implementation", None)
    if attention is not None and attention not in _ATTENTION:
        return True
    names = _annotated(forward_parameters(model))
    if names is None or name in names or name in _OF_ANY:
        return True
    return any(name in {p.name for p in forward_parameters(m)} for m in _one_of_a_kind(model))


def _one_of_a_kind(model: nn.Module) -> list[nn.Module]:
    return list({type(module): module for module in model.modules()}.values())


def _annotated(parameters: Iterable[Parameter]) -> frozenset[str] | None:
    """The names that ``**kwargs`` may have by its annotation; ``None`` where it says nothing."""
    kinds = [p.annotation for p in parameters if p.kind is Parameter.VAR_KEYWORD]
    for kind in (inner for annotation in kinds for inner in get_args(annotation)):
        if is_typeddict(kind):
            return frozenset(kind.__annotations__)
    return None
