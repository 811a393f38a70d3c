"""What trainers ask a model about itself: a distiller answers for its student.

Hugging Face's ``Trainer`` chooses the columns of a data set by the signature of ``forward``, counts
items by ``loss_type``, leaves out of predictions what ``config`` names, and calls methods such as
``gradient_checkpointing_enable``. Plain modules have none of these, and then a distiller has none
either: ``hasattr`` tells the truth.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from fxdistill.distiller.towers import Towers
from fxdistill.models.conventions import forward_parameters
from fxdistill.models.tap import Tower
from fxdistill.objective.call import CALL_KEYWORDS
from fxdistill.objective.objective import Objective

# Attributes of the student that are read through the distiller. Not among them: what says that the
# model is quantized or has adapters, because trainers then expect the methods of those classes.
OF_STUDENT = frozenset(
    (
        "activation_checkpointing_disable",
        "activation_checkpointing_enable",
        "add_model_tags",
        "can_generate",
        "device",
        "disable_input_require_grads",
        "dtype",
        "enable_input_require_grads",
        "generate",
        "generation_config",
        "get_input_embeddings",
        "get_output_embeddings",
        "gradient_checkpointing_disable",
        "gradient_checkpointing_enable",
        "is_activation_checkpointing",
        "is_gradient_checkpointing",
        "main_input_name",
        "name_or_path",
        "num_parameters",
        "prepare_decoder_input_ids_from_labels",
        "supports_gradient_checkpointing",
        "tie_weights",
    )
)


class StudentFace(nn.Module):
    """What a distiller tells trainers, of its student and of itself."""

    _towers: Towers
    objective: Objective

    # Trainer reads it where a checkpoint lacks keys; a distiller saves all of its keys.
    _keys_to_ignore_on_save = None

    def __getattr__(self, name: str) -> Any:
        if name in OF_STUDENT:
            return getattr(self._towers.main_module, name)
        return super().__getattr__(name)

    @property
    def accepts_loss_kwargs(self) -> bool:
        """Whether Trainer passes the items of all accumulated batches, and leaves us the division.

        On several processes it would multiply the loss by their number too, to undo the averaging
        of gradients, of which a distiller has taken care: then it takes means of micro-batches.
        """
        ranks = torch.distributed
        alone = not (ranks.is_available() and ranks.is_initialized())
        return alone or ranks.get_world_size() == 1

    @property
    def config(self) -> Any:
        """The student's config; what is set there is set in the student."""
        return config_of(self._towers.main_module)

    @property
    def loss_type(self) -> str | None:
        """The name by which Trainer knows that the first token of a text is not predicted."""
        return "ForCausalLM" if self.objective.task == "causal_lm" else None


class StudentForward:
    """The ``forward`` of a distiller, whose signature names what this distiller's models take.

    On the class it is the plain function; on a distiller it is called like a bound method.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        function.__signature__ = with_loss(inspect.signature(function))  # type: ignore[attr-defined]

    def __get__(self, distiller: Any, owner: Any = None) -> Callable[..., Any]:
        return self.function if distiller is None else BoundForward(self.function, distiller)


class BoundForward:
    """``forward`` of one distiller. It keeps the distiller alive only while it is held itself."""

    def __init__(self, function: Callable[..., Any], distiller: Any) -> None:
        self.function, self.__self__ = function, distiller
        self.__name__, self.__doc__ = function.__name__, function.__doc__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call ``forward`` on the distiller."""
        return self.function(self.__self__, *args, **kwargs)

    @property
    def __func__(self) -> Callable[..., Any]:
        """The function without its distiller, which wrappers (autocast) are put around."""
        function = self.function

        @functools.wraps(function)
        def forward(distiller: Any, *args: Any, **kwargs: Any) -> Any:
            return function(distiller, *args, **kwargs)

        # Without this, who unwraps it would go on to the function that names no inputs.
        del forward.__wrapped__
        own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
        given = self.__signature__
        forward.__signature__ = given.replace(  # type: ignore[attr-defined]
            parameters=[own, *given.parameters.values()]
        )
        return forward

    @property
    def __signature__(self) -> inspect.Signature:
        return signature_of(self.__self__.models, self.__self__.main)


def with_loss(signature: inspect.Signature) -> inspect.Signature:
    """The signature, with ``return_loss=True`` among its keywords.

    Trainer knows by it, of the class, that rows without labels have a loss: told
    ``label_names=[]``, it evaluates them. A call need not bring it, and one that does gives it to
    the models, of which CLIP's take it.
    """
    named = list(signature.parameters.values())
    told = inspect.Parameter("return_loss", inspect.Parameter.KEYWORD_ONLY, default=True)
    at = len(named) - any(p.kind is inspect.Parameter.VAR_KEYWORD for p in named)
    return signature.replace(parameters=[*named[:at], told, *named[at:]])


def signature_of(models: Mapping[Tower, nn.Module], main: Tower) -> inspect.Signature:
    """The parameters of ``main``, then the distiller's own keywords and those of other models."""
    empty = inspect.Parameter.empty
    given = [p.replace(annotation=empty) for p in forward_parameters(models[main])]
    first = [p for p in given if p.kind in _POSITIONAL]
    by_name = {p.name: p for p in given if p.kind is inspect.Parameter.KEYWORD_ONLY}
    others = [p for m in models.values() for p in forward_parameters(m) if p.kind in _BY_NAME]
    own = (*CALL_KEYWORDS, *(f"{tower}_inputs" for tower in models), *(p.name for p in others))
    for name in own:
        if name not in (p.name for p in first):
            by_name.setdefault(
                name, inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None)
            )
    rest = [p for p in given if p.kind is inspect.Parameter.VAR_POSITIONAL]
    anything = inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD)
    return inspect.Signature([*first, *rest, *by_name.values(), anything])


_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def config_of(student: nn.Module) -> Any:
    """The student's config, which also names losses and metrics as no prediction.

    Trainer leaves out ``loss`` itself where a batch has labels, and without labels a distiller has
    one too: that of its logits and matches.
    It shares all its values with the student's: what a trainer sets there is set in the student.
    Raises AttributeError where the student has none.
    """
    config: Any = student.config
    kind: Any = type(config)
    if not (hasattr(kind, "model_type") and hasattr(kind, "to_diff_dict")):
        return config  # not one of transformers'
    view: Any = object.__new__(_without_losses(kind))
    object.__setattr__(view, "__dict__", config.__dict__)
    return view


@functools.cache
def _without_losses(kind: Any) -> type:
    # Many configs, such as BERT's, name none; this is what Trainer ignores then.
    keys: Any = getattr(kind, "keys_to_ignore_at_inference", ["past_key_values"])
    return type(
        kind.__name__,
        (kind,),
        {"keys_to_ignore_at_inference": [*keys, "loss", "losses", "metrics"]},
    )
