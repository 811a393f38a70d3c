"""``LossCallback``: the terms of the loss among what ``transformers.Trainer`` logs."""

from typing import Any

import torch
from torch import nn

from fxdistill.distiller.output import DistillOutput
from fxdistill.errors import BatchError
from fxdistill.objective.call import SMOOTHING
from fxdistill.training.loss_log import LossLog
from fxdistill.training.trainers.distiller_of import distiller_of
from fxdistill.training.trainers.needs import missing

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise missing("LossCallback", "transformers", "hf") from error


class LossCallback(TrainerCallback):
    """Log every term of the loss, as ``Trainer(model=distiller, callbacks=[LossCallback()])`` does.

    Whenever Trainer logs its ``loss``, the weighted total, the record also has each term of
    ``out.losses`` under its own name (``logits``, ``labels``, ``features``, the student path of
    each match), unweighted. As Trainer's, a value is the mean over the optimizer steps since the
    last record, and over the micro-batches of each. The values are collected on the device and
    read once a record.

    Within ``train()``, an evaluation of rows without labels has its ``eval_loss`` too, which
    Trainer leaves out: the mean over the rows of the total, that of logits and features.

    The terms are in ``state.log_history``, in what Trainer prints, and in what later callbacks get.
    Trainer calls its own reporters (``report_to``) before the callbacks that it is given. To have
    the terms there too, put the callback in front:
    ``trainer.callback_handler.callbacks.insert(0, LossCallback())``.

    Raises:
        OptionError: In ``train()``, where Trainer's model is no distiller; transformers is absent.
        BatchError: In ``train()``, where ``label_smoothing_factor`` is set.
    """

    def __init__(self) -> None:
        self._log = LossLog()
        self._hook: Any = None
        self._shares = False
        self._first = 0
        self._evaluated: list[tuple[torch.Tensor, int]] = []  # losses, each of so many rows

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Listen to the distiller."""
        distiller = distiller_of(kwargs["model"], "LossCallback")
        if args.label_smoothing_factor:
            raise BatchError(f"label_smoothing_factor={args.label_smoothing_factor}: {SMOOTHING}")
        self._forget()
        self._log, self._first = LossLog(), state.global_step
        self._hook = distiller.register_forward_hook(self._listen, with_kwargs=True)

    def _listen(
        self, module: nn.Module, args: Any, kwargs: dict[str, Any], out: DistillOutput
    ) -> None:
        if module.training and torch.is_grad_enabled():
            self._shares = any(kwargs.get(name) is not None for name in _ITEMS)
            self._log.add(out)
        elif not module.training and not torch.is_grad_enabled():
            given = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor) and x.ndim]
            self._evaluated.append((out.loss.detach(), given[0].shape[0] if given else 1))

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Forget what has been evaluated."""
        self._evaluated = []

    def on_predict(
        self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any
    ) -> None:
        """Forget what has been predicted, which is no evaluation."""
        self._evaluated = []

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, Any] | None = None, **_: Any
    ) -> None:
        """Add the loss of rows without labels to the metrics, by which a checkpoint is chosen."""
        (metrics or {}).update(self._of_unlabelled(metrics or {}))
        self._evaluated = []

    def _of_unlabelled(self, metrics: dict[str, Any]) -> dict[str, float]:
        """The loss that a record of an evaluation lacks."""
        names = [key.removesuffix("_runtime") for key in metrics if key.endswith("_runtime")]
        missing = [name for name in names if name != "train" and f"{name}_loss" not in metrics]
        if not missing or not self._evaluated:
            return {}
        rows = sum(size for _, size in self._evaluated)
        mean = sum(loss.float() * size for loss, size in self._evaluated) / max(1, rows)
        return {f"{missing[0]}_loss": float(mean)}

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        """Add the terms to a record that has the loss of training steps."""
        logs = {} if logs is None else logs
        if of_evaluation := self._of_unlabelled(logs):
            for record in (logs, *state.log_history[-1:]):
                record.update(of_evaluation)
        if "loss" not in logs:
            return
        rows = self._log.rows()
        steps, self._first = state.global_step - self._first, state.global_step
        if not rows:
            return
        (row,) = rows
        # Micro-batches that know the items of all are shares, which add up to the loss of a step.
        scale = (row.last - row.first + 1) / steps if self._shares and steps else 1.0
        terms = {name: scale * value for name, value in row.losses.items() if name != "loss"}
        logs.update(terms)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(terms)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop listening."""
        self._forget()

    def _forget(self) -> None:
        self._evaluated = []
        if self._hook is not None:
            self._hook.remove()
            self._hook = None


_ITEMS = ("num_items", "num_items_in_batch")
