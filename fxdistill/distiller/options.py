"""How a distiller runs, as ``wrap`` reads it from ``compile``, ``passes`` and ``outputs``."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

from fxdistill import passes as passes_by_name
from fxdistill.compiler.backend import Recipe
from fxdistill.compiler.lower import Lowering, check_lowering, mode_options
from fxdistill.distiller.towers import Towers
from fxdistill.errors import OptionError, did_you_mean
from fxdistill.graph.pipeline import pass_name
from fxdistill.graph.program import Pass
from fxdistill.passes.order import Wanted

Mode = Literal["one_graph", "regional", "eager"]
_COMPILE_KEYS = ("backend", "options", "mode", "dynamic", "fallback", "fuse_head", "disable")
CompileLike = bool | str | Mapping[str, Any]


@dataclass(frozen=True)
class Options:
    """The options of one distiller."""

    mode: Mode = "one_graph"
    lowering: Lowering = Lowering()
    dynamic: bool | None = None
    fallback: bool = False
    passes: tuple[Pass, ...] = ()
    fuse_head: bool = True
    disabled: tuple[str, ...] = ()  # passes that are left out
    gathers: bool = False  # whether the graph gathers parameters
    outputs: tuple[str, ...] | None = ()  # None: no logits in evaluation either
    notes: tuple[str, ...] = ()

    @property
    def falls_back(self) -> bool:
        """Whether a step that cannot be captured, or that fails when it is, runs regionally.

        Of what fails a model may catch some itself (a fast path that refuses its inputs).
        """
        return self.fallback and self.mode == "one_graph"

    def recipe(self, towers: Towers, terms: tuple[str, ...]) -> Recipe:
        """The backend's recipe, from these options, the models and the names of feature terms."""
        wanted = Wanted(
            user=self.passes,
            fuse_head=self.fuse_head,
            gathers=self.gathers,
            beside=tuple(tower for tower in towers.modules if tower != towers.main),
            frozen=tuple(tower for tower in towers.modules if tower in towers.frozen),
            terms=terms,
            disabled=self.disabled,
        )
        return Recipe(self.lowering, wanted)


def read_options(
    compile: CompileLike, outputs: str | Iterable[str] | None, passes: tuple[Pass, ...]
) -> Options:
    """Read the options of ``wrap``; raises OptionError for one that does not exist."""
    wanted = None if outputs is None else _names(outputs)
    if wanted is not None and any(name != "logits" for name in wanted):
        raise OptionError(f"outputs={outputs!r}: only 'logits' can be asked for")
    options: Mapping[str, Any] = compile if isinstance(compile, Mapping) else {}
    for key in options:
        if key not in _COMPILE_KEYS:
            near = did_you_mean(key, _COMPILE_KEYS)
            raise OptionError(f"compile={{{key!r}: ...}} is no option. Nearest: {near}.")
    if options.get("fallback") not in (None, "regional"):
        raise OptionError("compile's fallback can only be 'regional'")
    mode = _mode(compile)
    if passes and mode != "one_graph":
        raise OptionError(f"passes work on the one graph, and compile={compile!r} makes none")
    for p in passes:
        if (level := getattr(p, "level", "captured")) != "captured":
            raise OptionError(
                f"passes=: {pass_name(p)} works on the {level} level, and passes of your own run "
                "on the captured one, after compose"
            )
    lowering = Lowering(options.get("backend", "inductor"), _inductor_options(options))
    check_lowering(lowering)
    return Options(
        mode=mode,
        lowering=lowering,
        dynamic=options.get("dynamic"),
        fallback=options.get("fallback") is not None,
        passes=passes,
        fuse_head=bool(options.get("fuse_head", True)),
        disabled=_disabled(options.get("disable", ())),
        outputs=wanted,
    )


def _names(given: Any) -> tuple[Any, ...]:
    """Names, one or several: a text is one name, and no sequence of letters."""
    single = isinstance(given, str) or not isinstance(given, Iterable)
    return (given,) if single else tuple(given)


def _disabled(names: Any) -> tuple[str, ...]:
    """The passes to leave out; OptionError for a name that is none, or that a step needs."""
    given = _names(names)
    for name in given:
        if name == "ExposeOutputs":
            raise OptionError("ExposeOutputs cannot be disabled: the terms read what it exposes")
        if name not in passes_by_name.__all__:
            near = did_you_mean(str(name), passes_by_name.__all__)
            raise OptionError(f"compile={{'disable': ...}}: no pass {name!r}. Nearest: {near}.")
    return given


def _mode(compile: CompileLike) -> Mode:
    if isinstance(compile, str) and compile != "regional":
        raise OptionError(f"compile={compile!r}: True, False, 'regional', or a dict of options")
    if isinstance(compile, str):
        return cast(Mode, compile)
    return "one_graph" if compile or isinstance(compile, Mapping) else "eager"


def _inductor_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Inductor's options: those that ``mode`` names, as in ``torch.compile``, then ``options``."""
    backend, mode = options.get("backend", "inductor"), options.get("mode")
    named: dict[str, Any] = {}
    if mode is not None:
        if backend != "inductor":
            raise OptionError(f"mode={mode!r} names options of Inductor, not of {backend!r}")
        named = mode_options(mode, options.get("dynamic"))
    if backend == "aot_eager" and options.get("options"):
        raise OptionError(f"the backend 'aot_eager' takes no options: {options['options']!r}")
    return {**named, **options.get("options", {})}
