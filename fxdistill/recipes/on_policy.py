"""``rollout``: a batch of texts that the student has written, to be distilled on (on-policy).

B prompts, P their length with padding, N generated tokens.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fxdistill.distiller.agreement import evaluating
from fxdistill.distiller.distiller import Distiller
from fxdistill.distiller.looking import averaging_ranks
from fxdistill.errors import BatchError, OptionError, ShapeError
from fxdistill.models.conventions import named_keywords
from fxdistill.models.devices import check_devices
from fxdistill.models.landmarks import asked

Generate = Callable[[Tensor, Tensor], Tensor]
_LEFT = 'pad on the left (tokenizer.padding_side = "left")'


def rollout(
    student: nn.Module,
    prompts: Tensor,
    attention_mask: Tensor | None = None,
    *,
    generator: torch.Generator | None = None,
    generate: Generate | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    pad_to: int | None = None,
    **generate_options: Any,
) -> dict[str, Tensor]:
    """Let the student go on writing after prompts, and return the batch to train on.

    ``distiller(**rollout(student, prompts, ...))`` compares student and teacher on what the student
    itself writes (Agarwal et al., 2024, GKD; Gu et al., 2024, MiniLLM). The student is in eval mode
    meanwhile; the mode of each of its modules is put back, after an error, too. There are no
    gradients, and a compiled training step stays compiled.

    Args:
        student: A model with a ``generate`` like that of transformers, or its distiller (of several
            students: the first). A student on a data parallel mesh is given as its distiller.
        prompts: ``[B, P]``, token ids, padded on the left.
        attention_mask: ``[B, P]``, 0 on padding; ``None``: there is none.
        generator: Where random numbers come from: each call draws one seed from it. The global
            random state is then as before. ``None``: the global state is used.
        generate: A callable ``(prompts, attention_mask) -> ids`` in place of ``student.generate``,
            such as an engine of your own. ``ids`` are ``[B, P + N]``: the prompts as they are, and
            behind them what follows; what stands after an end token is not read.
        eos_token_id: The token or tokens that end a text; ``None`` asks the student's
            ``generation_config`` and ``config``. Without any, all generated tokens count.
        pad_token_id: What stands after the end; ``None`` asks likewise, then takes an end token.
        pad_to: Pad the batch on the right to this length, so that all batches have one shape and
            the step compiles once.
        generate_options: For ``student.generate``: ``max_new_tokens``, ``do_sample``, ``top_p``...

    Returns:
        A dict of int64 tensors ``[B, P + N]`` (``[B, pad_to]``; B times ``num_return_sequences``):
        ``input_ids``; ``attention_mask``, 1 on prompts and generated tokens up to the first end
        token, included; ``loss_mask``, 1 on these generated tokens. With ``attention_mask``, also
        ``position_ids`` where a model's ``forward`` names them (any model of a distiller, else the
        student): 0 on padding and on the first token of a prompt, as ``generate`` counts them.
        Models with absolute positions would otherwise count the padding.

    Raises:
        OptionError: The student cannot generate, or the lengths exceed the student's positions or
            ``pad_to``.
        BatchError: Prompts or mask have a wrong type or shape, or are padded on the right.
        ShapeError: ``generate`` returns something else than prompts and tokens behind them.
        MeshError: ``wrap(mesh=...)`` has made the student tensor parallel; give ``generate``.
    """
    model, placed, reading = student, None, [student]
    if isinstance(student, Distiller):
        model, reading = student.models[student.main], list(student.models.values())
        placed = student if generate is None else None
    mask = _checked_mask(prompts, attention_mask)
    check_devices(model, "student", (), {"prompts": prompts, "attention_mask": mask})
    given = generate_options.get("generation_config")
    sources = (given, getattr(model, "generation_config", None), getattr(model, "config", None))
    ends = _ends(eos_token_id, sources)
    pad = _pad(pad_token_id, sources, ends)
    _check_lengths(model, prompts.shape[1], generate_options, sources, pad_to)
    if generate is None:
        options = {**generate_options, "pad_token_id": pad}
        options |= {} if eos_token_id is None else {"eos_token_id": eos_token_id}
        generate = _own(model, options, placed)
    elif generate_options:
        raise OptionError(
            f"generate= is called with prompts and mask alone, so {', '.join(generate_options)} "
            "would be lost: bind them with functools.partial"
        )
    with torch.no_grad(), evaluating([model]), _seeded(generator, prompts.device):
        made = generate(prompts, mask)
    copies = generate_options.get("num_return_sequences") or 1
    rows = _Rows(*(x.repeat_interleave(copies, 0) for x in (prompts, mask)))
    ids = _checked_ids(made, rows, model)
    _require_positions(model, ids.shape[1], "the texts that generate= returned")
    batch = _batch(ids, rows, ends, pad)
    _require_vocabulary(model, batch["input_ids"])
    # Where a mask is given, even of ones: all batches of a loop have the same inputs.
    if attention_mask is not None and any("position_ids" in named_keywords(m) for m in reading):
        attended = batch["attention_mask"].cumsum(1)
        batch["position_ids"] = (attended - 1).clamp(min=0)
    return batch if pad_to is None else _padded(batch, pad, pad_to)


class _Rows(NamedTuple):
    """Prompts and their mask, a row for each text."""

    prompts: Tensor
    mask: Tensor


def _batch(ids: Tensor, rows: _Rows, ends: tuple[int, ...], pad: int) -> dict[str, Tensor]:
    """The batch: everything behind the first generated end token is padding."""
    new = ids[:, rows.prompts.shape[1] :]
    ended = torch.isin(new, torch.tensor(ends, dtype=new.dtype, device=new.device))
    counted = ended.long().cumsum(1) - ended.long() == 0  # no end token before this one
    texts = torch.cat([rows.prompts.long(), torch.where(counted, new.long(), pad)], 1)
    loss_mask = torch.cat([torch.zeros_like(rows.mask), counted.long()], 1)
    attention_mask = torch.cat([rows.mask, counted.long()], 1)
    return {"input_ids": texts, "attention_mask": attention_mask, "loss_mask": loss_mask}


def _padded(batch: dict[str, Tensor], pad: int, pad_to: int) -> dict[str, Tensor]:
    more = pad_to - batch["input_ids"].shape[1]
    if more < 0:
        raise OptionError(f"pad_to={pad_to}, but the texts have {pad_to - more} tokens")
    fill = {"input_ids": pad}
    return {
        name: nn.functional.pad(x, (0, more), value=fill.get(name, 0)) for name, x in batch.items()
    }


def _own(model: nn.Module, options: dict[str, Any], distiller: Distiller | None) -> Generate:
    """The student's own ``generate``; OptionError if it has none that goes on after prompts.

    Of a ``distiller`` whose student lies on a mesh, the weights are gathered once for all tokens.
    """
    name = type(model).__name__
    own = getattr(model, "generate", None)
    able = getattr(model, "can_generate", None)
    if not callable(own) or (callable(able) and not able()):
        inside = getattr(model, "module", None)
        advice = " Pass the model inside of it." if isinstance(inside, nn.Module) else ""
        raise OptionError(
            f"the student ({name}) cannot generate: it has no generate() for a causal language "
            "model. Give generate=, a callable (prompts, attention_mask) -> ids."
            f"{advice}"
        )
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise OptionError(
            f"the student ({name}) is an encoder-decoder, whose texts do not begin with their "
            "prompts: rollout is for models that go on after them"
        )

    if averaging_ranks(model) is not None and "synced_gpus" in signature(own).parameters:
        options = {"synced_gpus": True, **options}  # FSDP2 gathers weights on all ranks at once
    weights = None if distiller is None else distiller._towers.gathered(distiller.main)

    def generate(prompts: Tensor, mask: Tensor) -> Tensor:
        given = {"attention_mask": mask, **options}
        if weights is None:
            made = own(prompts, **given)
        else:
            inside = {f"model.{name}": weight for name, weight in weights.items()}
            made = torch.func.functional_call(_Writing(model), inside, (prompts,), given)
        found: Tensor = getattr(made, "sequences", made)
        return found

    return generate


class _Writing(nn.Module):
    """``generate`` as ``forward``, for ``functional_call``: the whole text has the same weights."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model's ``generate``."""
        return self.model.generate(*args, **kwargs)


@contextlib.contextmanager
def _seeded(generator: torch.Generator | None, device: torch.device) -> Iterator[None]:
    """Draw random numbers by a seed from ``generator``, and restore the global state behind it."""
    if generator is None:
        yield
        return
    seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    on_cuda = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if on_cuda else []):
        torch.default_generator.manual_seed(seed)
        if on_cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


# ------------------------------------------------------------------ tokens with a meaning


def _ends(said: int | Sequence[int] | None, sources: Sequence[Any]) -> tuple[int, ...]:
    found = said if said is not None else _first("eos_token_id", sources)
    if found is None:
        return ()
    return (found,) if isinstance(found, int) else tuple(map(int, found))


def _pad(said: int | None, sources: Sequence[Any], ends: tuple[int, ...]) -> int:
    found = said if said is not None else _first("pad_token_id", sources)
    return int(found) if found is not None else (*ends, 0)[0]


def _first(name: str, sources: Sequence[Any]) -> Any:
    """The first value of this name that is not ``None``."""
    return next((x for s in sources if (x := getattr(s, name, None)) is not None), None)


# ------------------------------------------------------------------ checks


def _checked_mask(prompts: Tensor, mask: Tensor | None) -> Tensor:
    """The mask of the prompts as int64; BatchError where these are not padded on the left."""
    if not isinstance(prompts, Tensor) or prompts.is_floating_point() or prompts.ndim != 2:
        what = f"{prompts.dtype} {list(prompts.shape)}" if isinstance(prompts, Tensor) else prompts
        raise BatchError(f"prompts are token ids [B, P], one row a prompt, and not {what}")
    if 0 in prompts.shape:
        raise BatchError(f"prompts are {list(prompts.shape)}: there is nothing to go on after")
    if mask is None:
        return torch.ones_like(prompts, dtype=torch.long)
    if not isinstance(mask, Tensor) or mask.shape != prompts.shape:
        shape = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise BatchError(f"attention_mask is {shape}, and the prompts are {list(prompts.shape)}")
    attended = mask != 0
    if not attended.any(1).all():
        raise BatchError("attention_mask has a row of zeros: a prompt has a token at least")
    if not attended[:, -1].all():
        raise BatchError(
            f"the prompts are padded on the right: a text goes on after its last place, so {_LEFT}"
        )
    if (attended[:, :-1] & ~attended[:, 1:]).any():
        raise BatchError(f"attention_mask has zeros between ones: padding comes first, {_LEFT}")
    return attended.long()


def _checked_ids(made: Any, rows: _Rows, model: nn.Module) -> Tensor:
    """What was generated, if it is the prompts and tokens of the student behind them."""
    count, length = rows.prompts.shape
    if not isinstance(made, Tensor) or made.is_floating_point() or made.ndim != 2:
        what = f"{made.dtype} {list(made.shape)}" if isinstance(made, Tensor) else type(made)
        raise ShapeError(f"generate returned {what}: token ids [{count}, {length} + N]")
    if made.shape[0] != count or made.shape[1] <= length:
        raise ShapeError(
            f"generate returned {list(made.shape)} for prompts {[count, length]}: one row a "
            f"prompt, which stands in front of what was generated, [{count}, {length} + N]"
        )
    ids: Tensor = made.to(rows.prompts.device)
    if ((ids[:, :length] != rows.prompts) & (rows.mask != 0)).any():
        raise ShapeError(
            "what generate returned does not begin with the prompts: return the prompts and what "
            "follows, torch.cat([prompts, new], 1)"
        )
    return ids


def _check_lengths(
    model: nn.Module,
    length: int,
    options: dict[str, Any],
    sources: Sequence[Any],
    pad_to: int | None,
) -> None:
    """Raise OptionError where prompts and new tokens need more places than there are."""
    new = options.get("max_new_tokens", getattr(sources[0], "max_new_tokens", None))
    if new is None and "max_length" in options:
        new = options["max_length"] - length
    if new is None:
        new = getattr(sources[1], "max_new_tokens", None)
    total = length + (1 if new is None else max(int(new), 1))
    what = f"prompts of {length} tokens and {'some' if new is None else new} new ones"
    _require_positions(model, total, what)
    if pad_to is not None and pad_to < total:
        raise OptionError(f"pad_to={pad_to}, and {what} may need {total} places")


def _require_positions(model: nn.Module, total: int, what: str) -> None:
    config = getattr(model, "config", None)
    text = getattr(config, "get_text_config", lambda: config)()
    limit = getattr(text, "max_position_embeddings", None)
    if isinstance(limit, int) and limit > 0 and total > limit:
        raise OptionError(
            f"{what} need {total} places, and the student has {limit} "
            "(max_position_embeddings): shorten the prompts or max_new_tokens"
        )


def _require_vocabulary(model: nn.Module, ids: Tensor) -> None:
    """Raise ShapeError for ids that the student has no embedding for: of another tokenizer, say."""
    table = asked(model, "get_input_embeddings")
    size = table.num_embeddings if isinstance(table, nn.Embedding) else None
    least, most = int(ids.min()), int(ids.max())
    if least < 0 or (size is not None and most >= size):
        raise ShapeError(
            f"the texts have token ids from {least} to {most}, and the student's vocabulary has "
            f"{size if size is not None else 'none below 0'}"
        )
