"""``DistillOutput``: the output of a distiller."""

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.utils._pytree import register_pytree_node

from fxdistill.objective.objective import Losses


class _NoOutput(KeyError):
    """A key that is not there; its message is plain text, where KeyError's own is quoted."""

    def __str__(self) -> str:
        return str(self.args[0])


class DistillOutput(OrderedDict[str, Any]):
    """An ordered mapping with attribute access: ``out.loss``, ``out["loss"]``, ``out[0]``.

    ``loss`` is the total, a 0-d tensor with gradients. ``losses`` maps the name of every term to
    its unweighted value, a detached 0-d tensor on the device: reading one waits for the device.
    ``metrics`` has "kept", the share of predictions that ``importance`` leaves in the logit term (1
    where nothing is dropped), and "finite", whether the total is (a 0-d bool), on the device too.
    ``logits`` are the student's, detached: in an
    evaluation (eval mode, without gradients) where it has any, and elsewhere if
    ``wrap(..., outputs=("logits",))`` asked for them.
    """

    loss: Tensor
    losses: Mapping[str, Tensor]
    metrics: Mapping[str, Tensor]
    logits: Tensor

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError as error:
            raise AttributeError(*error.args) from None

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    def __getitem__(self, key: str | int | slice) -> Any:
        if isinstance(key, (int, slice)):
            return self.to_tuple()[key]
        return super().__getitem__(key)

    def __missing__(self, key: str) -> Any:
        there = f"no output {key!r}; there are {', '.join(self)}"
        if key == "logits":
            there += '. wrap(..., outputs=("logits",)) adds the student\'s logits'
        raise _NoOutput(there)

    def to_tuple(self) -> tuple[Any, ...]:
        """The values in order."""
        return tuple(super(DistillOutput, self).__getitem__(key) for key in self)


def output_of(losses: Losses, logits: Tensor | None) -> DistillOutput:
    """The output of a step; logits keep their place behind the losses."""
    out = DistillOutput(loss=losses.total, losses=losses.terms)
    if logits is not None:
        out["logits"] = logits
    total = losses.total.detach()
    out["metrics"] = {"kept": total.new_ones(()), "finite": total.isfinite(), **losses.metrics}
    return out


register_pytree_node(
    DistillOutput,
    lambda out: (list(out.to_tuple()), list(out)),
    lambda values, names: DistillOutput(zip(names, values, strict=True)),
    serialized_type_name="fxdistill.DistillOutput",
)
