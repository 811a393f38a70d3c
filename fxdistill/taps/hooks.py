"""Hooks that tap the modules of a model during one call."""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from fxdistill.base.saved import apart
from fxdistill.errors import TapError
from fxdistill.models.tap import Reader, Tap, Tower
from fxdistill.taps import attention
from fxdistill.taps.markers import note_localised, raw, reject, tap
from fxdistill.taps.ports import elements, first_tensor, select, tensors_at
from fxdistill.taps.table import capturing


def _take(value: Any, tower: Tower, path: str, port: str, required: bool) -> None:
    try:
        value_at = select(value, port)
    except (IndexError, KeyError, AttributeError):
        value_at = None
    found = first_tensor(value_at)
    # "output" and "input" mean the first tensor; a port that goes on has to name one.
    named = port not in ("output", "input") and not isinstance(value_at, Tensor)
    several = tensors_at(value_at, port) if named else []
    if len(several) > 1 and required:
        reject(tower, path, port, _of_several(several, tower, path, port))
    elif found is not None:
        tap(found, tower, path, port)
    elif required:
        reject(tower, path, port, _no_port(value, tower, path, port))


def _compute(
    tower: Tower, path: str, port: str, reads: Reader, module: nn.Module, *call: Any
) -> None:
    """Tap what a function makes of a module, its arguments and its output."""
    value = reads(module, *call)
    if isinstance(value, Tensor):
        tap(value, tower, path, port)
        return
    text = f"the port {port} of {tower} module {path!r} returned a {type(value).__name__}: a tensor"
    reject(tower, path, port, text)


def _of_several(several: list[str], tower: Tower, path: str, port: str) -> str:
    shown = ", ".join(map(repr, several[:8])) + (", ..." if len(several) > 8 else "")
    return (
        f"{tower} module {path!r} has {len(several)} tensors at port {port!r}: name one of {shown}"
    )


def _no_port(value: Any, tower: Tower, path: str, port: str) -> str:
    side = "takes" if port.startswith("input") else "returns"
    if isinstance(value, Mapping):
        there = f"it {side} {', '.join(map(str, value)) or 'nothing'}"
    elif isinstance(value, (tuple, list)):
        there = f"it {side} {len(value)} values"
    else:
        there = f"it {side} a {type(value).__name__}"
    return (
        f"{tower} module {path!r} has no tensor at port {port!r}: {there}. Ports are 'output', "
        "'output[i]', 'output.field', 'input', 'input[i]' and 'input.name'."
    )


@contextlib.contextmanager
def hooked(
    model: nn.Module,
    tower: Tower,
    taps: Iterable[Tap],
    *,
    required: bool = True,
    styles: bool = False,
    plan: "HookPlan | None" = None,
) -> Iterator[None]:
    """Put a hook on every tapped module of ``model`` for as long as the context lasts.

    Unless ``required``, a module that has no tensor at its port is skipped. ``styles``: the model
    has parameters on a mesh, so hooks of parallel styles are looked for. ``plan`` keeps the hooks
    of traced steps for the next one.
    """
    handles: list[Any] = []
    traced = capturing()
    try:
        handles += _watch_styles(model) if styles else []
        wanted = tuple(dict.fromkeys((tap.path, tap.port, tap.reads) for tap in taps))
        if any(attention.is_of_attention(port) for _, port, _ in wanted):
            paths = {path for path, port, _ in wanted if attention.is_of_attention(port)}
            handles.append(attention.StandIn(map(model.get_submodule, paths)))
        if traced and plan is not None:
            plan = plan if plan.is_for(model, wanted) else plan.made(model, tower, wanted)
            handles.append(plan)
            plan.put()
        else:
            for path, ports, computes in _by_module(wanted):
                module, port = model.get_submodule(path), ports[0]
                reads = computes if traced or computes is None else apart(computes)
                if not traced:
                    _reject_compiled_parents(model, tower, path)
                if traced or not compiles_itself(module):
                    hooks = _hooks(module, tower, path, ports, reads, required)
                    handles += [_register(module, hook, before) for hook, before in hooks]
                elif attention.is_of_attention(port):
                    raise attention.compiled(tower, path)
                else:
                    handles.append(_CompiledCall(module, tower, path, port, reads, required))
        yield
    finally:
        for handle in handles:
            handle.remove()


_Wanted = tuple[str, str, Reader | None]  # a path, a port, and what computes it


def _by_module(
    wanted: Iterable[_Wanted],
) -> Iterator[tuple[str, tuple[str, ...], Reader | None]]:
    """Each path with one port; the ports of attention of one module go together."""
    inside: dict[str, tuple[str, ...]] = {}
    for path, port, reads in wanted:
        if attention.is_of_attention(port):
            inside[path] = (*inside.get(path, ()), port)
        else:
            yield path, (port,), reads
    for path, ports in inside.items():
        yield path, ports, None


def _hooks(
    module: nn.Module,
    tower: Tower,
    path: str,
    ports: tuple[str, ...],
    reads: Reader | None,
    required: bool,
) -> list[tuple[Any, bool]]:
    """The hooks that tap ``ports``, each with whether it runs before the module."""
    port = ports[0]
    if reads is not None:
        return [(_computing_hook(tower, path, port, reads), False)]
    if attention.is_of_attention(port):
        enter, leave = attention.hooks_of(tower, path, ports)
        return [(enter, True), (leave, False)]
    if port.startswith("input"):
        return [(_input_hook(tower, path, port, required, _names(module)), True)]
    return [(_output_hook(tower, path, port, required), False)]


def _register(module: nn.Module, hook: Any, before: bool) -> Any:
    if before:
        return module.register_forward_pre_hook(hook, with_kwargs=True)
    return module.register_forward_hook(hook, with_kwargs=True)


class HookPlan:
    """The hooks of a model's taps, made once and put into the modules for each step.

    Registering costs ten times as much as a step of hooks does. Private to torch and used here
    only: the tables ``_forward_hooks`` and ``_forward_pre_hooks`` of a module, and those with the
    same names and ``_with_kwargs``. If they move, the first step fails.
    """

    def __init__(self) -> None:
        self._model: nn.Module | None = None
        self._wanted: tuple[_Wanted, ...] = ()
        self._steps: list[tuple[dict[str, Any], str, nn.Module]] = []  # how each path is walked
        self._entries: list[tuple[dict[int, Any], int, Any]] = []  # table, key, value

    def is_for(self, model: nn.Module, wanted: tuple[_Wanted, ...]) -> bool:
        """Whether the plan is of these taps, and the modules still stand where they stood."""
        return (
            self._model is model
            and self._wanted == wanted
            and all(table.get(name) is child for table, name, child in self._steps)
        )

    def made(self, model: nn.Module, tower: Tower, wanted: tuple[_Wanted, ...]) -> "HookPlan":
        """Make the plan anew, for these taps."""
        self._model, self._wanted, self._steps, self._entries = model, wanted, [], []
        for path, ports, reads in _by_module(wanted):
            module: Any = model
            for name in path.split(".") if path else ():
                self._steps.append((module._modules, name, module.get_submodule(name)))
                module = self._steps[-1][2]
            for hook, before in _hooks(module, tower, path, ports, reads, True):
                handle = _register(module, hook, before)
                tables = [module._forward_hooks, module._forward_hooks_with_kwargs]
                if before:
                    tables = [module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs]
                self._entries += [(table, handle.id, table[handle.id]) for table in tables]
                handle.remove()
        return self

    def put(self) -> None:
        """Put the hooks into their modules."""
        for table, key, hook in self._entries:
            table[key] = hook

    def remove(self) -> None:
        """Take the hooks out of their modules."""
        for table, key, _ in self._entries:
            table.pop(key, None)


def _watch_styles(model: nn.Module) -> list[Any]:
    """Put hooks around those of parallel styles, which may replace a DTensor by its local tensor.

    A style is a hook on a module: a hook before it sees the DTensor, one after it the local tensor.
    """
    handles: list[Any] = []
    for module in model.modules():
        if module._forward_hooks:
            handles.append(module.register_forward_hook(_see_output(raw), prepend=True))
            handles.append(module.register_forward_hook(_see_output(note_localised)))
        if module._forward_pre_hooks:
            see = _see_inputs(raw), _see_inputs(note_localised)
            handles += [
                module.register_forward_pre_hook(see[0], with_kwargs=True, prepend=True),
                module.register_forward_pre_hook(see[1], with_kwargs=True),
            ]
    return handles


def _see_output(marker: Callable[..., None]) -> Any:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        values = (output,) if isinstance(output, Tensor) else elements(output)
        marker(*[value for value in values if isinstance(value, Tensor)])

    return hook


def _see_inputs(marker: Callable[..., None]) -> Any:
    def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
        marker(*[value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)])

    return hook


def compiles_itself(module: nn.Module) -> bool:
    """Whether ``module.compile()`` has compiled the module."""
    return module._compiled_call_impl is not None


class _CompiledCall:
    """Tap a module that ``module.compile()`` has compiled: hooks on it would be compiled too.

    The compiled call is an attribute of the module. For the time of a step, this object replaces it
    with a call that taps the inputs or the output. Private to torch and used here only:
    ``_compiled_call_impl``.
    """

    def __init__(
        self,
        module: nn.Module,
        tower: Tower,
        path: str,
        port: str,
        reads: Reader | None,
        required: bool,
    ) -> None:
        self.module, self.original = module, module._compiled_call_impl
        module._compiled_call_impl = self.call
        self.take = functools.partial(_take, tower=tower, path=path, port=port, required=required)
        self.compute = reads and functools.partial(_compute, tower, path, port, reads)
        self.takes_input = reads is None and port.startswith("input")
        self.port = port
        self.names = _names(module)

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """Run the compiled call, and tap."""
        if self.takes_input:
            self.take(_inputs(args, kwargs, self.port, self.names))
        assert self.original is not None
        result = self.original(*args, **kwargs)
        if self.compute is not None:
            self.compute(self.module, args, kwargs, result)
        elif not self.takes_input:
            self.take(result)
        return result

    def remove(self) -> None:
        """Put the compiled call back."""
        self.module._compiled_call_impl = self.original


def _reject_compiled_parents(model: nn.Module, tower: Tower, path: str) -> None:
    """Raise TapError inside a compiled module: a hook there would be compiled, or never run."""
    parents = path.split(".")[:-1]
    for end in range(len(parents) + 1):
        parent = model.get_submodule(".".join(parents[:end]))
        if parent is not model.get_submodule(path) and compiles_itself(parent):
            raise TapError(
                f"{tower} tap {path!r} lies inside {'.'.join(parents[:end]) or 'a model'!r}, "
                "which torch.compile compiles by itself. Do not compile the parts of the models "
                "that hold taps (compile=True compiles all as one graph), or tap the part itself."
            )


def _names(module: nn.Module) -> tuple[str, ...]:
    """The names of the parameters of ``forward``."""
    try:
        return tuple(inspect.signature(module.forward).parameters)
    except ValueError:
        return ()


def _inputs(args: Any, kwargs: dict[str, Any], port: str, names: tuple[str, ...]) -> Any:
    if port.startswith("input."):
        return {**dict(zip(names, args, strict=False)), **kwargs}
    return (*args, *kwargs.values())


def _output_hook(tower: Tower, path: str, port: str, required: bool) -> Any:
    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        _take(output, tower, path, port, required)

    return hook


def _computing_hook(tower: Tower, path: str, port: str, reads: Reader) -> Any:
    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        _compute(tower, path, port, reads, module, args, kwargs, output)

    return hook


def _input_hook(tower: Tower, path: str, port: str, required: bool, names: tuple[str, ...]) -> Any:
    def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
        _take(_inputs(args, kwargs, port, names), tower, path, port, required)

    return hook
