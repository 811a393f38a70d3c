"""``DistillationTrainer``: TRL's data, generation and logging around the step of a distiller.

This file is imported as ``fxdistill.trainers.trl``. It extends what TRL's own trainer keeps to
itself, which may move in a later version (tried with 1.16): ``_generate_and_score_completions``
and ``_generate_single_turn``, the names in what the first returns, and ``_tokenizer``.
"""

import contextlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fxdistill.distiller.distiller import Distiller
from fxdistill.distiller.wrap import wrap
from fxdistill.errors import BatchError, OptionError
from fxdistill.losses import jsd
from fxdistill.mapping.matches import Mapped
from fxdistill.training.loss_log import LossLog
from fxdistill.training.schedule import Schedule
from fxdistill.training.trainers.needs import missing

try:
    import trl
except ImportError as error:
    raise missing("trl.DistillationTrainer", "trl", "trl") from error

# TRL imports its names when they are asked for, so that type checkers do not know them.
_TRL: Any = trl
_Base: Any = _TRL.DistillationTrainer
# What TRL hands on of images; the rest of its batch is read by name below.
_OF_IMAGES = (
    "pixel_values",
    "image_grid_thw",
    "pixel_attention_mask",
    "spatial_shapes",
    "image_sizes",
    "image_position_ids",
)
_OF_TOKENS = ("token_type_ids", "mm_token_type_ids")


class DistillationTrainer(_Base):  # type: ignore[misc]
    """``trl.DistillationTrainer`` with a distiller's step: features, importance, one graph.

    TRL reads the data (a column ``prompt``), lets the student write completions, and logs; the loss
    of a batch is that of ``distiller(input_ids, attention_mask, loss_mask)``, which counts the
    completions' tokens. The records have every term under its own name, as those of
    ``LossCallback``.

    ```python
    trainer = fxdistill.trainers.trl.DistillationTrainer(
        distiller, args=trl.DistillationConfig(...), train_dataset=..., processing_class=tokenizer
    )
    ```

    Args:
        model: A distiller, whose losses and temperature are used as they are (``args.temperature``
            is that of generation then, and ``args.beta`` is not read). Or a student; the trainer
            wraps it.
        teacher_model: The teacher of a student that is not wrapped yet.
        args: A ``trl.DistillationConfig``.
        train_dataset: With a column ``prompt``, and ``completion`` for ``on_policy`` below 1.
        eval_dataset: Likewise.
        processing_class: The tokenizer, or processor.
        callbacks: Further callbacks of transformers.
        optimizers: An optimizer and its scheduler, as transformers' Trainer takes them.
        tools: Functions that the student may call, as TRL takes them.
        mapping: For a student and a teacher, what ``fxdistill.wrap`` takes.
        schedule: A ``Schedule`` of this distiller; it follows the optimizer steps, and goes on
            where a resumed run does.
        on_policy: The share of batches that the student writes, the λ of GKD (Agarwal et al.,
            2024). The others are the completions of the data set. All ranks draw alike.
        pad_to: Pad prompts and completions on the right to this length, so that the step compiles
            once whatever their lengths. ``None``: lengths are TRL's.
        options: For a student and a teacher, further options of ``fxdistill.wrap``. Unless they
            are among them, ``logit_loss`` is the divergence of ``args.beta`` and ``temperature``
            is ``args.temperature``. At τ other than 1, KL and JSD are τ² times TRL's.

    Raises:
        OptionError: Options contradict each other, or TRL's way cannot be gone with a distiller.
        BatchError: A completion is missing or does not go on after its prompt, or a text is longer
            than ``pad_to``.
    """

    def __init__(
        self,
        model: nn.Module,
        teacher_model: nn.Module | None = None,
        args: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        callbacks: list[Any] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        tools: list[Callable[..., Any]] | None = None,
        *,
        mapping: Mapped = None,
        schedule: Schedule | None = None,
        on_policy: float = 1.0,
        pad_to: int | None = None,
        **options: Any,
    ) -> None:
        args = _TRL.DistillationConfig("distillation") if args is None else args
        _check(on_policy, pad_to, train_dataset, args)
        given = {**options, **({} if mapping is None else {"mapping": mapping})}
        distiller = _distiller(model, teacher_model, given, args)
        if schedule is not None and schedule.distiller is not distiller:
            raise OptionError("schedule is one of another distiller than the one to be trained")
        self.schedule, self.on_policy, self.pad_to = schedule, on_policy, pad_to
        self._taken: list[list[int]] | None = None  # completions of the data, in place of written
        self._terms = {"train": LossLog(), "eval": LossLog()}
        super().__init__(
            model=distiller,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
            tools=tools,
        )

    # ------------------------------------------------------------------ texts

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """TRL's batch, with completions of the data where they are due."""
        self._taken = None if self._writes() else [self._completion(row) for row in inputs]
        try:
            made: dict[str, Any] = super()._generate_and_score_completions(inputs)
        finally:
            self._taken = None
        return made

    def _writes(self) -> bool:
        """Whether the student writes this batch; in an evaluation it always does."""
        draw = random.Random(f"{self.args.seed} {self.state.global_step}").random()
        return not self.model.training or draw < self.on_policy

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> list[list[int]]:
        if self._taken is not None:
            return self._taken
        with _keeping_activations(self.model):
            written: list[list[int]] = super()._generate_single_turn(*args, **kwargs)
        return written

    def _completion(self, row: Mapping[str, Any]) -> list[int]:
        """The tokens of a row's completion, with the end, in the places that there are."""
        prompt, completion = row["prompt"], row.get("completion")
        if completion is None:
            raise BatchError(
                f"on_policy={self.on_policy} takes completions of the data set, and there are "
                f"{', '.join(row)}: add a column completion, or set on_policy=1"
            )
        ids: list[int]
        if isinstance(completion, str):
            ids = self._tokenizer(completion, add_special_tokens=False)["input_ids"]
            ids = [*ids, self._tokenizer.eos_token_id]
        else:
            ids = self._after(prompt, completion)
        return ids[: self.max_completion_length]

    def _after(self, prompt: list[Any], completion: list[Any]) -> list[int]:
        """What the chat template puts behind a prompt of messages."""
        apply: Any = partial(
            self._tokenizer.apply_chat_template,
            tools=self.tools or None,
            chat_template=self.chat_template,
            tokenize=True,
            return_dict=True,
            **self.chat_template_kwargs,
        )
        before: list[int] = apply(prompt, add_generation_prompt=True)["input_ids"]
        whole: list[int] = apply([*prompt, *completion])["input_ids"]
        if whole[: len(before)] != before:
            raise BatchError(
                "the chat template does not put the completion behind its prompt as it is "
                "generated: use a template whose text of all messages begins with the prompt's"
            )
        return whole[len(before) :]

    # ------------------------------------------------------------------ the step

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The distiller's loss of prompts and completions, in place of TRL's divergence."""
        training = self.model.training
        if training and self.schedule is not None:
            while self.schedule.last_step < self.state.global_step:
                self.schedule.step()
        batch = batch_of(inputs, self._tokenizer.pad_token_id, self.pad_to)
        if training:  # of all micro-batches and ranks, counted by TRL
            batch["num_items"] = inputs["num_items_in_batch"].clamp(min=1)
        out = model(**batch)
        self._terms["train" if training else "eval"].add(out)
        return (out.loss, None) if return_outputs else out.loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the terms to what TRL logs."""
        training = self.model.training
        prefix = "" if training else "eval_"
        for row in self._terms["train" if training else "eval"].rows():
            # Micro-batches are shares of a step, which add up.
            scale = self.args.gradient_accumulation_steps if training else 1
            terms = {f"{prefix}{name}": scale * value for name, value in row.losses.items()}
            logs = {**terms, **logs}
        super().log(logs, start_time)


@contextlib.contextmanager
def _keeping_activations(model: nn.Module) -> Iterator[None]:
    """Write without activation checkpointing, which is then on again as it was.

    TRL would switch it off and on by the model's methods. Those of transformers 5.23 leave a
    further hook on the embedding each time, for which the step would be compiled again.
    """
    on: list[Any] = [
        m for m in model.modules() if getattr(m, "gradient_checkpointing", None) is True
    ]
    for module in on:
        module.gradient_checkpointing = False
    try:
        yield
    finally:
        for module in on:
            module.gradient_checkpointing = True


def batch_of(inputs: Mapping[str, Any], pad: int, pad_to: int | None) -> dict[str, Tensor]:
    """A distiller's batch of TRL's: prompts ``[B, P]`` padded left, completions ``[B, N]`` right.

    ``loss_mask`` is 1 on the completions' tokens that the student has written, and not a tool.
    """
    written = inputs["completion_mask"]
    counted = written * inputs["tool_mask"] if "tool_mask" in inputs else written
    parts = {
        "input_ids": (inputs["prompt_ids"], inputs["completion_ids"]),
        "attention_mask": (inputs["prompt_mask"], written),
        "loss_mask": (torch.zeros_like(inputs["prompt_mask"]), counted),
    }
    batch = {name: torch.cat(pair, 1) for name, pair in parts.items()}
    batch |= {name: inputs[name] for name in _OF_TOKENS if name in inputs}
    if pad_to is not None:
        more = pad_to - batch["input_ids"].shape[1]
        if more < 0:
            raise BatchError(
                f"pad_to={pad_to}, and prompts and completions have {pad_to - more} tokens: raise "
                "it, shorten the prompts, or lower max_completion_length"
            )
        fill = {"input_ids": pad}
        batch = {
            name: nn.functional.pad(x, (0, more), value=fill.get(name, 0))
            for name, x in batch.items()
        }
    return {**batch, **{name: inputs[name] for name in _OF_IMAGES if name in inputs}}


def _check(on_policy: float, pad_to: int | None, dataset: Any, args: Any) -> None:
    """Raise OptionError for what would fail, or do nothing, in a later step."""
    if not 0 <= on_policy <= 1:
        raise OptionError(f"on_policy={on_policy!r}: a share of the batches, from 0 to 1")
    columns = getattr(dataset, "column_names", None) or ["completion"]
    if on_policy < 1 and "completion" not in columns:
        raise OptionError(
            f"on_policy={on_policy} takes completions of the data set, whose columns are "
            f"{', '.join(columns)}: add a column completion, or set on_policy=1"
        )
    if pad_to is not None and pad_to <= (args.max_completion_length or 0):
        raise OptionError(
            f"pad_to={pad_to} has no place for a prompt before the max_completion_length="
            f"{args.max_completion_length} tokens of a completion"
        )
    if args.use_vllm:
        raise OptionError(
            "use_vllm=True: TRL sends vLLM the weights by the distiller's names, student.…; "
            "generate with transformers, or use fxdistill.rollout(generate=...) in a loop"
        )


def _distiller(
    model: Any, teacher: nn.Module | None, options: Mapping[str, Any], args: Any
) -> Distiller:
    """``model``, or the distiller of a student and its teacher."""
    for what in (model, teacher):
        if isinstance(what, str):
            raise OptionError(
                f"{what!r} is a name: load the model, AutoModelForCausalLM.from_pretrained(...)"
            )
    if isinstance(model, Distiller):
        _require_nothing_else(teacher, options)
        return model
    if teacher is None:
        raise OptionError("give teacher_model, or a distiller of student and teacher as model")
    of_trl = {"logit_loss": partial(jsd, beta=args.beta), "temperature": args.temperature}
    return wrap(model, teacher, **{"outputs": None, "task": "causal_lm", **of_trl, **options})


def _require_nothing_else(teacher: nn.Module | None, options: Mapping[str, Any]) -> None:
    also: Sequence[str] = [*options, *([] if teacher is None else ["teacher_model"])]
    if also:
        raise OptionError(
            f"the model is a distiller already, so {', '.join(also)} would change nothing: give "
            "them to fxdistill.wrap"
        )
