"""What a model says about itself: its task, its inputs, its logits, its encoder."""

import inspect
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, cast

from torch import Tensor, nn

from fxdistill.errors import OptionError
from fxdistill.models.tap import Tap

Task = Literal["causal_lm", "masked_lm", "seq2seq", "classification"]
Stream = Literal["tokens", "encoder", "decoder"]  # the sequence that indexes a value
TASKS: tuple[Task, ...] = ("causal_lm", "masked_lm", "seq2seq", "classification")

# Endings of Hugging Face class names (transformers' auto classes name models by their head).
_CLASS_ENDINGS: dict[str, Task] = {
    "XLMWithLMHeadModel": "masked_lm",  # their own losses do not shift labels
    "FlaubertWithLMHeadModel": "masked_lm",
    "ForCausalLM": "causal_lm",
    "LMHeadModel": "causal_lm",
    "DoubleHeadsModel": "causal_lm",
    "ForConditionalGeneration": "causal_lm",  # without an encoder: vision-language models
    "ForMaskedLM": "masked_lm",
    "ForTokenClassification": "masked_lm",
    "ForCTC": "masked_lm",  # frames predict themselves; a loss of the user's own aligns the labels
    "ForAudioFrameClassification": "masked_lm",
    "ForSequenceClassification": "classification",
    "ForImageClassification": "classification",
    "ForAudioClassification": "classification",
    "ForMultipleChoice": "classification",
}


def find_task(model: nn.Module, task: str) -> Task | None:
    """Return ``task``, or for ``"auto"`` what class name and config tell; ``None`` if unknown."""
    if task in TASKS:
        return task
    if task != "auto":
        raise OptionError(f"task={task!r}: a task is 'auto', {', '.join(map(repr, TASKS))}")
    models = [model, *_wrapped(model)]
    configs = [config for m in models if (config := getattr(m, "config", None)) is not None]
    for found in map(_by_ending, (type(m).__name__ for m in models)):
        if found is not None and found != "causal_lm":
            return found
    # Before "causal_lm": an encoder-decoder's generation class has that ending too.
    if any(getattr(config, "is_encoder_decoder", False) for config in configs):
        return "seq2seq"
    # The architectures of the checkpoint come last: their head may be another than this model's.
    names = [type(m).__name__ for m in models]
    names += [name for c in configs for name in (getattr(c, "architectures", None) or ())]
    return next((found for name in names if (found := _by_ending(name)) is not None), None)


_OF_SOUND = frozenset(("input_values", "input_features"))


def predicts_frames(model: nn.Module, given: Iterable[str]) -> bool:
    """Whether a model predicts letters at the frames of sound, by its class or the inputs' names.

    Labels of frames themselves, which a class for these takes, are no transcript.
    """
    names = [type(m).__name__ for m in (model, *_wrapped(model))]
    if any(name.endswith("ForAudioFrameClassification") for name in names):
        return False
    return any(name.endswith("ForCTC") for name in names) or not _OF_SOUND.isdisjoint(given)


def _by_ending(name: str) -> Task | None:
    if name.startswith("XLNet"):  # it predicts what its permutation masks: only its user knows
        return None
    return next((task for ending, task in _CLASS_ENDINGS.items() if name.endswith(ending)), None)


def _wrapped(model: nn.Module) -> list[nn.Module]:
    """The models inside wrappers such as DDP, OptimizedModule or PeftModel."""
    inner = [getattr(model, name, None) for name in ("module", "_orig_mod", "base_model", "model")]
    return [m for m in inner if isinstance(m, nn.Module)]


def _parameters(model: nn.Module) -> tuple[inspect.Parameter, ...]:
    """The parameters of ``forward``, without ``self``."""
    if "forward" in vars(model):  # replaced on the instance
        return tuple(inspect.signature(model.forward).parameters.values())
    forward = type(model).forward
    if forward not in _read:
        _read[forward] = tuple(inspect.signature(forward).parameters.values())[1:]
    return _read[forward]


# Read once for a class, because a step must not read signatures. No functools.cache: dynamo warns
# of it where a user compiles the distiller.
_read: dict[Callable[..., Any], tuple[inspect.Parameter, ...]] = {}


def forward_parameters(model: nn.Module) -> tuple[inspect.Parameter, ...]:
    """The parameters of ``forward``; of the model inside, where a wrapper's names none."""
    for m in (model, *_wrapped(model)):
        parameters = _parameters(m)
        if any(p.kind in _POSITIONAL or p.kind in _BY_NAME for p in parameters):
            return parameters
    return ()


def input_names(model: nn.Module) -> tuple[str, ...]:
    """The names of the positional parameters of ``forward``, looking through wrappers."""
    for m in (model, *_wrapped(model)):
        parameters = _parameters(m)
        names = tuple(p.name for p in parameters if p.kind in _POSITIONAL)
        if names:
            return names
    return ()


def accepted_keywords(model: nn.Module) -> frozenset[str] | None:
    """The keywords that ``forward`` takes, looking through wrappers; ``None`` where it takes any.

    A forward of ``*args`` and ``**kwargs`` alone is a wrapper's, which hands them on.
    """
    for m in (model, *_wrapped(model)):
        parameters = _parameters(m)
        named = [p for p in parameters if p.kind in _BY_NAME]
        anything = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
        if anything and named:
            return None
        if not anything:
            return frozenset(p.name for p in named)
    return None


def named_keywords(model: nn.Module) -> frozenset[str]:
    """The keywords that ``forward`` names, looking through wrappers; it may take others too."""
    for m in (model, *_wrapped(model)):
        named = frozenset(p.name for p in _parameters(m) if p.kind in _BY_NAME)
        if named:
            return named
    return frozenset()


_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def logits_of(output: Any) -> Tensor | None:
    """The model's tensor output, or its ``logits`` field or key."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        return output.get("logits")
    return getattr(output, "logits", None)


def stream_of(model: nn.Module, tap: Tap, task: Task | None) -> Stream:
    """The token sequence that indexes a tapped value."""
    if task != "seq2seq":
        return "tokens"
    encoder = encoder_of(model)
    module = model.get_submodule(tap.path)
    if encoder is not None:
        return "encoder" if any(m is module for m in encoder.modules()) else "decoder"
    return "encoder" if "encoder" in tap.path.split(".") else "decoder"


def encoder_of(model: nn.Module) -> nn.Module | None:
    """The encoder of an encoder-decoder: ``get_encoder()``, or the attribute ``encoder``."""
    get = getattr(model, "get_encoder", None)
    encoder = get() if callable(get) else getattr(model, "encoder", None)
    return encoder if isinstance(encoder, nn.Module) and encoder is not model else None


def decoder_inputs(model: nn.Module, labels: Tensor) -> Tensor | None:
    """Make the decoder's input tokens from labels as the model's own code does; else ``None``."""
    for name in ("prepare_decoder_input_ids_from_labels", "_shift_right"):
        if callable(make := getattr(model, name, None)):
            return cast(Tensor, make(labels))
    # Whisper and similar models shift with a function of their Python module.
    make = getattr(sys.modules[type(model).__module__], "shift_tokens_right", None)
    config: Any = getattr(model, "config", None)
    if make is None or config is None:
        return None
    return cast(Tensor, make(labels, config.pad_token_id, config.decoder_start_token_id))
