"""Logits that regional mode does not make: a head returns a stand-in for them.

In regional mode the models run as they are, and so would their heads. During a call, the
``forward`` of a plain linear head therefore returns a tensor without storage. It remembers the
hidden state and the weight, and follows the operators that heads end in (``heads.operators``). Any
other operation makes the logits at once, together with everything derived from them so far. Logits
that are still unmade at the losses enter their graph as ``curve.logits_from`` of their inputs,
which ``FuseHead`` reads.

Private to torch and used here only: ``_make_wrapper_subclass`` and
``_top_saved_tensors_default_hooks``. If they move, regional mode fails in the first call.
"""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_map

from fxdistill.errors import StepError
from fxdistill.heads.curve import Form, Unreadable
from fxdistill.heads.hold_back import DeferrableHead, Waiting
from fxdistill.heads.operators import Kind, classify, require_lossless, split_index
from fxdistill.taps.table import runs_frozen


class HeadInputs(NamedTuple):
    """The inputs of ``curve.logits_from``; ``spec`` is the text of a ``Form``."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    spec: str


@dataclass
class _Origin:
    """How to compute the logits of one stand-in: from hidden state and weight, or by ``make``."""

    source: tuple[Tensor, int] | None  # the head's input, and its version when the head ran
    hidden: Tensor
    weight: Tensor
    form: Form
    make: Callable[[], Tensor]
    head: DeferrableHead
    waiting: Waiting
    family: "list[UnmadeLogits]" = field(default_factory=list)

    def require_unwritten(self) -> None:
        """Raise StepError if hidden state or weight have changed since the head ran."""
        if self.head.gathered and self.weight.untyped_storage().nbytes() < self.weight.nbytes:
            raise StepError(
                "the weight of a model's head was sharded again before its logits were made. "
                'outputs=("logits",) makes them where the model does.'
            )
        if self.source is not None and self.source[0]._version != self.source[1]:
            raise StepError(
                "a model has written, in place, the hidden state that its head had taken, and its "
                'logits were not made yet. outputs=("logits",) makes them where the model does.'
            )


class UnmadeLogits(Tensor):
    """A tensor without storage that stands for logits; ``materialised`` holds them once made."""

    origin: _Origin
    materialised: Tensor | None
    modes: "_Modes"

    @staticmethod
    def __new__(cls: "type[UnmadeLogits]", origin: _Origin, like: Tensor) -> "UnmadeLogits":
        """Create a stand-in of the shape and dtype of ``like``."""
        sources = (origin.hidden, origin.weight, origin.form.bias)
        learns = any(x is not None and x.requires_grad for x in sources)
        learns = learns and torch.is_grad_enabled()
        self: UnmadeLogits = Tensor._make_wrapper_subclass(
            cls, like.shape, dtype=like.dtype, device=origin.hidden.device, requires_grad=learns
        )
        self.origin, self.materialised, self.modes = origin, None, _modes()
        if learns:
            with torch._C.DisableTorchFunctionSubclass():
                self.register_hook(_lost)  # type: ignore[no-untyped-call]
        origin.family.append(self)
        return self

    # A compiled part of a model calls this method instead of tracing through it.
    @classmethod
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Return a stand-in, answer what needs no numbers, or make the logits and call ``func``."""
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if func in _QUESTIONS:
                return func(*args, **kwargs)
            if func is Tensor.register_hook and _is_awaited(*args):
                return args[0].origin.waiting.add(*args)  # nobody reads the handle
            unmade = [x for x in args[:2] if isinstance(x, UnmadeLogits) and x.materialised is None]
            one = unmade[0] if len(unmade) == 1 and unmade[0].modes == _modes() else None
            followed = None if one is None else _followed(func, one, args, kwargs)
            if followed is not None:
                return followed
        args, kwargs = tree_map(_settled, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Make the logits for an operation that bypasses ``__torch_function__``."""
        args, kwargs = tree_map(_settled, (args, kwargs or {}))
        return func(*args, **kwargs)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"UnmadeLogits({list(self.shape)}, {self.dtype})"

    @property
    def inputs(self) -> HeadInputs:
        """The inputs from which the losses compute the logits."""
        origin = self.origin
        origin.require_unwritten()
        form = origin.form
        return HeadInputs(origin.hidden, origin.weight, form.bias, form.text)


def as_loss_input(value: Tensor) -> Tensor | HeadInputs:
    """A tapped value in the form that the losses take: the inputs of logits that are not made."""
    if not isinstance(value, UnmadeLogits):
        return value
    return value.inputs if value.materialised is None else value.materialised


def _settled(value: Any) -> Any:
    """The logits of a stand-in, which are made now; any other value as it is.

    All stand-ins that come from the same head's output are made together, in their order: then an
    in-place operator on one of them also changes its aliases, as it would without stand-ins.
    """
    if not isinstance(value, UnmadeLogits):
        return value
    for member in value.origin.family:
        if member.materialised is None:
            member.origin.require_unwritten()
            with _under(member.modes):
                member.materialised = member.origin.make()
            member.origin.waiting.move(member)
    return value.materialised


def _is_awaited(logits: Tensor, hook: Any) -> bool:
    """Whether a wrapper's hook is put on a stand-in, to run before the backward of its readers."""
    if not isinstance(logits, UnmadeLogits) or logits.materialised is not None:
        return False
    return logits.origin.head.awaits(hook)


def _lost(gradient: Tensor) -> None:
    """Raise StepError when autograd gives a stand-in a gradient: the head would not get it."""
    raise StepError(
        "a model hands its logits to what no stand-in can be followed through (an "
        "autograd.Function, a scripted function), and their gradient would be lost. "
        'outputs=("logits",) makes the logits where the model does.'
    )


_QUESTIONS = {
    *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "layout")),
    *(getattr(Tensor, name).__get__ for name in ("requires_grad", "is_cuda", "is_meta", "_base")),
    *(getattr(Tensor, name) for name in ("size", "dim", "numel", "is_floating_point", "__len__")),
    *(getattr(Tensor, name) for name in ("element_size", "__repr__", "__hash__", "__format__")),
    torch.is_floating_point,
}


def _followed(func: Any, x: UnmadeLogits, args: Any, kwargs: dict[str, Any]) -> UnmadeLogits | None:
    """The stand-in for ``func`` applied to ``x``; ``None`` if no stand-in can follow it."""
    kind, others = classify(func), [value for value in args if value is not x]

    def make() -> Tensor:
        real, options = tree_map(_made, (args, kwargs))
        return func(*real, **options)  # type: ignore[no-any-return]

    new = replace(x.origin, make=make)
    try:
        if kind == "cast":
            like = _cast(func, x, others, kwargs)
            return None if like is None else UnmadeLogits(new, like)
        if kind is None or kwargs or (kind == "sliced" and not _is_plain_index(others)):
            return None
        like = _like(func, x, args)
        found = _with_operator(kind, x, new, args, others, like)
    except Unreadable:
        return None
    return None if found is None else UnmadeLogits(found, like)


def _with_operator(
    kind: Kind, x: UnmadeLogits, new: _Origin, args: Any, others: Any, like: Tensor
) -> _Origin | None:
    """``new``, followed by one more operator; ``None`` or Unreadable if no ``Form`` covers it."""
    form = new.form
    if kind in ("times", "divided") and len(others) == 1 and args[0] is x:
        return replace(new, form=form.scaled(others[0], kind, divided=kind == "divided"))
    if kind == "tanh" and not others:
        return replace(new, form=form.bent())
    if kind == "plus" and len(others) == 1 and isinstance(others[0], Tensor) and others[0].ndim:
        bias = others[0]
        return replace(new, form=form.with_bias(bias.reshape(-1), bias, x, kind))
    if kind == "reshaped" and like.shape[-1] == x.shape[-1]:
        hidden = new.hidden.reshape(*like.shape[:-1], new.hidden.shape[-1])
        return replace(new, hidden=hidden)
    if kind == "sliced":
        index, columns = split_index(others[0], x.ndim, x.shape[-1])
        new = replace(new, form=form.cut(columns, x.shape[-1]))
        return replace(new, hidden=new.hidden[index]) if index else new
    return None


def _made(value: Any) -> Any:
    return value.materialised if isinstance(value, UnmadeLogits) else value


def _like(func: Any, x: UnmadeLogits, args: Any) -> Tensor:
    """A meta tensor of the shape and dtype that ``func`` returns."""
    meta = torch.empty(x.shape, dtype=x.dtype, device="meta")
    given = [meta if value is x else value for value in args]
    given = [v.to("meta") if isinstance(v, Tensor) and v is not meta else v for v in given]
    return func(*given)  # type: ignore[no-any-return]


def _cast(func: Any, x: UnmadeLogits, others: Any, kwargs: dict[str, Any]) -> Tensor | None:
    """A meta tensor of a cast's result; ``None`` if the cast may move to another device.

    Raises Unreadable for a lossy cast.
    """
    given = [*others, *kwargs.values()]
    if any(isinstance(value, (str, torch.device, Tensor)) for value in given):
        return None
    like: Tensor = func(torch.empty(x.shape, dtype=x.dtype, device="meta"), *others, **kwargs)
    require_lossless(x.dtype, like.dtype)
    return like


def _is_plain_index(others: Any) -> bool:
    """Whether an index consists of numbers, slices and ellipses only."""
    index = others[0] if len(others) == 1 else None
    parts = index if isinstance(index, tuple) else (index,)
    return all(isinstance(p, slice) or type(p) is int or p is Ellipsis for p in parts)


@contextlib.contextmanager
def deferring(heads: Iterable[DeferrableHead]) -> Iterator[Waiting]:
    """Make the heads return stand-ins within the context. Models may share a head."""
    modes, waiting = _modes(), Waiting()
    changed: list[nn.Linear] = []

    def put(head: DeferrableHead) -> None:
        def forward(x: Tensor) -> Tensor:
            here = _modes()
            # A frozen teacher runs without gradients, and the losses read it as a constant.
            same = here[1:] == modes[1:] and (here[0] == modes[0] or runs_frozen())
            own = is_traceable_wrapper_subclass(head.module.weight)
            if x.ndim < 2 or not same or own or _saves_elsewhere():
                return nn.Linear.forward(head.module, x)
            return _defer(x, head, waiting)

        head.module.__dict__["forward"] = forward
        changed.append(head.module)

    try:
        for head in heads:
            if head.module not in changed:
                put(head)
        yield waiting
    finally:
        for module in changed:
            del module.__dict__["forward"]


_Modes = tuple[Any, ...]


def _modes() -> _Modes:
    """The modes that a linear layer depends on; the losses must run under the same ones."""
    autocast = [
        (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
        for kind in ("cpu", "cuda")
    ]
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *autocast


@contextlib.contextmanager
def _under(modes: _Modes) -> Iterator[None]:
    """Enter the modes under which the head ran, whatever modes hold where logits are needed."""
    grad, inference, *autocasts = modes
    with contextlib.ExitStack() as stack:
        if inference != torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(inference))
        stack.enter_context(torch.set_grad_enabled(grad))
        for given, (kind, enabled, dtype) in zip(_modes()[2:], autocasts, strict=True):
            if given != (kind, enabled, dtype):
                stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled))
        yield


def _saves_elsewhere() -> bool:
    """Whether hooks take the tensors that autograd saves: checkpoints rely on their order."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


def _defer(x: Tensor, head: DeferrableHead, waiting: Waiting) -> UnmadeLogits:
    weights: list[Tensor | None] = [head.module.weight, head.module.bias]
    if head.freed():
        # A copy takes as much memory as keeping the weights would, and saves gathering them again.
        weights = [None if value is None else value.clone() for value in weights]
    weight, bias = weights
    assert weight is not None
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    like = torch.empty(*x.shape[:-1], weight.shape[0], dtype=dtype, device="meta")
    inference = x.is_inference()  # inference tensors have no version counter
    source = None if inference else (x, x._version)
    x = x.clone() if inference else x
    made = functools.partial(F.linear, x, weight, bias)
    origin = _Origin(source, x, weight, Form(bias=bias), made, head, waiting)
    return UnmadeLogits(origin, like)
