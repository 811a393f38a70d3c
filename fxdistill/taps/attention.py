"""Taps inside of attention: what ``scaled_dot_product_attention`` takes, and what it returns.

For the time of a step another function stands in its place, in ``torch.nn.functional``. It calls
the original with the very same arguments, and then taps them for the modules that run and are to be
tapped: hooks say which these are. So it is with ``flex_attention`` (see ``flex.py``). A module that
makes its map itself, and returns it as its second output, is tapped there.

A hook alone would not see the call, and dynamo lets no code in a checkpointed region enter a
``TorchFunctionMode``. What is no tensor (the scale, whether it is causal) becomes one, so that
it reaches the terms as other values do.
"""

import functools
import threading
import types
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxdistill.base.attention import Attention, of_queries
from fxdistill.base.figures import shown
from fxdistill.base.saved import apart
from fxdistill.base.tensors import wide
from fxdistill.errors import PortError, TapError
from fxdistill.models.tap import ATTENTION, Tap, Tower
from fxdistill.taps import flex
from fxdistill.taps.markers import check, tap, tapped
from fxdistill.taps.table import TapTable, active

_PARTS = tuple(f"{ATTENTION}:{name}" for name in Attention._fields)
_MAP = f"{ATTENTION}:map"
_original: Any = F.scaled_dot_product_attention  # what stood there when a step began
_one_operator = True  # whether nn.MultiheadAttention was allowed one operator then


def is_of_attention(port: str) -> bool:
    """Whether a port is ``"attention"``, or one of its parts."""
    return port.partition(".")[0] == ATTENTION


# ---- hooks


def hooks_of(tower: Tower, path: str, ports: tuple[str, ...]) -> tuple[Any, Any]:
    """The hooks before and after a module that tap its attention."""

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        _enter(tower, path, *ports)

    def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        made = _map_in(output)
        if made is not None and ATTENTION in ports:
            tap(made, tower, path, _MAP)
        _leave(tower, path, _makes(module, made), *ports)

    return enter, leave


def _makes(module: nn.Module, made: Tensor | None) -> str:
    """What a module makes of its own: ``"map"``, ``"mean"`` of a map over heads, or ``""``."""
    if made is not None:
        return "map"
    return "mean" if isinstance(module, nn.MultiheadAttention) else ""


def _map_in(output: Any) -> Tensor | None:
    """The map ``[B, H, Q, K]`` that a module returns, behind what it computes.

    T5 returns its position bias, which has the same axes, between the two, and ``None`` for a map
    that it does not make.
    """
    if not isinstance(output, (tuple, list)) or len(output) < 2:
        return None
    found = [x for x in output[1:3] if isinstance(x, Tensor) and x.ndim == 4]
    if not found or (len(output) > 2 and output[2] is None):
        return None
    return found[-1]


@check
def _enter(tower: Tower, path: str, *ports: str) -> None:
    table = active()
    if table is not None and table.section == tower:
        table.attending.append((tower, path, ports))


@check
def _leave(tower: Tower, path: str, makes: str, *ports: str) -> None:
    table = active()
    if table is None or table.section != tower:
        return
    table.attending.remove((tower, path, ports))
    for port in ports:
        first = Tap(path, port)
        if value_of(table, tower, first) is None and not _hidden(table, tower, first):
            error = PortError(_no_attention(tower, path, makes))
            table.problems.setdefault((tower, path, port), error)


def _hidden(table: TapTable, tower: Tower, of: Tap) -> bool:
    """Whether it runs inside a transform, where there are no values."""
    return any((tower, Tap(of.path, port)) in table.hidden for port in (of.port, _PARTS[0], _MAP))


def compiled(tower: Tower, path: str) -> TapError:
    """The error for a module that ``module.compile()`` has compiled."""
    return TapError(
        f"the attention of {tower} module {path!r} lies inside a part that torch.compile compiles "
        "by itself. Do not compile the parts of the models that hold taps (compile=True compiles "
        "all as one graph)."
    )


def _no_attention(tower: Tower, path: str, makes: str) -> str:
    module = f"{tower} module {path!r}"
    calls = "torch.nn.functional.scaled_dot_product_attention"
    if makes == "mean":
        return (
            f"{module} is torch's nn.MultiheadAttention, called with need_weights=True: it makes "
            "its map itself, and returns a mean over heads. Call it with need_weights=False, so "
            "that its queries and keys can be read, or with average_attn_weights=False, so that "
            "its map can be."
        )
    if makes == "map":
        return (
            f"{module} makes its map of attention itself, without {calls}: there are no queries "
            "and keys to read. Compare the map by the port 'attention', or load the model with "
            "attn_implementation='sdpa'."
        )
    return (
        f"{module} has no attention to tap: it does not call {calls}, and its second output is no "
        "map [B, heads, queries, keys]. Name the module that attends (fxdistill.module_names lists "
        "them); with Hugging Face load the model with attn_implementation='sdpa', or with 'eager', "
        "whose attention returns its map. A call of flex_attention is read where Hugging Face's "
        "models make it, and in the file of the module's class, not in other files."
    )


# ---- the function that stands in


@torch._dynamo.assume_constant_result  # type: ignore[untyped-decorator]
def _attending() -> tuple[tuple[Tower, str, tuple[str, ...]], ...]:
    """The modules that run now and are to be tapped; a trace takes them as constants."""
    table = active()
    return () if table is None else tuple(table.attending)


@functools.wraps(_original)
def _standing_in(*args: Any, **kwargs: Any) -> Tensor:
    output: Tensor = _original(*args, **kwargs)
    for tower, path, ports in _attending():
        _tap_call(tower, path, ports, output, *args, **kwargs)
    return output


def _tap_call(
    tower: Tower,
    path: str,
    ports: tuple[str, ...],
    output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> None:
    if query.ndim != 4:
        _reject_axes(tower, path, ports, query)
        return
    if ATTENTION in ports:
        mask = query.new_ones((1, 1, 1, 1), dtype=torch.bool) if attn_mask is None else attn_mask
        causal = query.new_full((), is_causal, dtype=torch.bool)
        of_width = query.shape[-1] ** -0.5 if scale is None else scale
        by = wide(query.new_empty(())).new_full((), of_width)
        for part, x in zip(_PARTS, (query, key, value, mask, causal, by), strict=True):
            tap(x, tower, path, part)
    for name, x in (("q", query), ("k", key), ("v", value), ("heads", output)):
        if f"{ATTENTION}.{name}" in ports:
            tap(x.transpose(1, 2).flatten(2), tower, path, f"{ATTENTION}.{name}")


@functools.cache
def _flexible(original: Any) -> Any:
    """What stands in for ``flex_attention``, or for a function that takes the same arguments."""

    @functools.wraps(original, updated=())  # dynamo goes by what torch.compile writes on a function
    def standing_in(*args: Any, **kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        for tower, path, ports in _attending():
            _tap_flex(tower, path, ports, output, *args, **kwargs)
        return output

    return standing_in


def _tap_flex(
    tower: Tower,
    path: str,
    ports: tuple[str, ...],
    output: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: Any = None,
    block_mask: Any = None,
    scale: float | None = None,
    *_: Any,
    **__: Any,
) -> None:
    """Tap a call of ``flex_attention``; its queries are always ``[B, heads, queries, width]``."""
    output = output if isinstance(output, Tensor) else output[0]
    of_parts, mask = ports, None
    if ATTENTION in ports:
        mask = flex.mask_of(block_mask, query, key)
        if not flex.leaves_scores(score_mod, query):
            made = flex.map_of if torch.compiler.is_compiling() else apart(flex.map_of)
            tap(made(query, key, mask, scale, score_mod), tower, path, _MAP)
            of_parts = tuple(port for port in ports if port != ATTENTION)
    _tap_call(tower, path, of_parts, output, query, key, value, mask, scale=scale)


@check
def _reject_axes(tower: Tower, path: str, ports: tuple[str, ...], query: Tensor) -> None:
    if (table := active()) is not None and table.section == tower:
        for port in ports:
            table.problems[tower, path, port] = PortError(
                f"{tower} module {path!r} attends with queries {shown(query.shape)}: the port "
                f"{port!r} is of queries [B, heads, queries, width]"
            )


def _check_padding(mask: Tensor, keys: int, batch: int) -> None:
    """Torch's own check of a mask ``[B, K]``, whose message dynamo cannot trace."""
    if tuple(mask.shape) != (batch, keys):
        raise RuntimeError(f"key_padding_mask is {shown(mask.shape)}, not [{batch}, {keys}]")


# Dynamo knows this function by its identity and its file, and makes it one node of the graph. It
# traces a copy of it from here, which calls what stands in.
_multi_head: Any = F.multi_head_attention_forward
_seen_through: Any = types.FunctionType(
    _multi_head.__code__.replace(co_filename=__file__),
    {
        **vars(F),
        "scaled_dot_product_attention": _standing_in,
        "_check_key_padding_mask": _check_padding,
    },
    "multi_head_attention_forward",
    _multi_head.__defaults__,
)
_seen_through.__kwdefaults__ = _multi_head.__kwdefaults__

_lock = threading.Lock()
_steps = [0]  # how many steps have it stand in, in all threads
_flex: dict[tuple[int, str], tuple[int, flex.Place, Any]] = {}  # steps, where, and what stood there


def _bend(place: flex.Place) -> flex.Place:
    """Let what stands at ``place`` be tapped, once more."""
    names, key = place
    steps, _, before = _flex.get((id(names), key), (0, place, names[key]))
    _flex[id(names), key] = steps + 1, place, before
    names[key] = _flexible(before)
    return place


def _straighten(place: tuple[int, str]) -> None:
    """Put back what stood there, unless another step still needs it."""
    steps, (names, key), before = _flex.pop(place)
    if steps > 1:
        _flex[place] = steps - 1, (names, key), before
    else:
        names[key] = before


class StandIn:
    """Lets calls of ``F.scaled_dot_product_attention`` be tapped until it is removed.

    Threads whose step taps nothing go through to the original. ``nn.MultiheadAttention`` calls it
    too, unless it may take one operator for all that it does: frozen, in eval mode. That is
    switched off. ``modules`` are those whose attention is tapped.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        global _original, _one_operator
        with _lock:
            places = list(flex.bound_to(modules))  # all of them, before any is changed
            self._places = [(id(names), key) for names, key in map(_bend, places)]
            if _steps[0] == 0:
                _original = F.scaled_dot_product_attention
                _one_operator = torch.backends.mha.get_fastpath_enabled()
                torch.backends.mha.set_fastpath_enabled(False)
                if F.multi_head_attention_forward is _multi_head:
                    F.multi_head_attention_forward = _seen_through
            _steps[0] += 1
            F.scaled_dot_product_attention = _standing_in

    def remove(self) -> None:
        """Put the original back, unless another step still needs it."""
        with _lock:
            for place in self._places:
                _straighten(place)
            _steps[0] -= 1
            if _steps[0] == 0:
                F.scaled_dot_product_attention = _original
                if F.multi_head_attention_forward is _seen_through:
                    F.multi_head_attention_forward = _multi_head
                torch.backends.mha.set_fastpath_enabled(_one_operator)


# ---- reading


def value_of(table: TapTable, tower: Tower, of: Tap) -> Tensor | Attention | None:
    """The value in ``table`` of any tap; ``None`` if there is none."""
    if of.port != ATTENTION:
        return table.values.get((tower, of))
    parts = [table.values.get((tower, Tap(of.path, part, of.call))) for part in _PARTS]
    found = [part for part in parts if part is not None]
    if len(found) == len(parts):
        return Attention(*found)
    return table.values.get((tower, Tap(of.path, _MAP, of.call)))


def lookup(tower: Tower, of: Tap) -> Any:
    """Look up a tapped value through its markers, in traced and eager runs alike.

    It is a tensor; of the port ``"attention"`` it is ``Attention``, or the map that a model makes.
    """
    if of.port != ATTENTION:
        return tapped(tower, of.path, of.port, of.call_text)
    if not _is_called(tower, of.path, of.call_text):
        return tapped(tower, of.path, _MAP, of.call_text)
    return Attention(*[tapped(tower, of.path, part, of.call_text) for part in _PARTS])


@torch._dynamo.assume_constant_result  # type: ignore[untyped-decorator]
def _is_called(tower: Tower, path: str, call: str) -> bool:
    table = active()
    return table is not None and (tower, Tap(path, _PARTS[0], int(call))) in table.values


def values_of(table: TapTable) -> dict[tuple[Tower, Tap], Tensor]:
    """All values of ``table``; of attention, a value whose first axes are those of its queries."""
    found = {end: value for end, value in table.values.items() if ":" not in end[1].port}
    for tower, part in table.values:
        if part.port in (_PARTS[0], _MAP):
            whole = Tap(part.path, ATTENTION, part.call)
            if (value := value_of(table, tower, whole)) is not None:
                found[tower, whole] = of_queries(value)
    return found
