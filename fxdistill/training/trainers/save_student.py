"""``SaveStudent``: the student beside the checkpoints of ``transformers.Trainer``."""

from pathlib import Path
from typing import Any

from fxdistill.base.tensors import is_placed
from fxdistill.training.trainers.distiller_of import distiller_of
from fxdistill.training.trainers.needs import missing

try:
    from transformers import TrainerCallback
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
except ImportError as error:
    raise missing("SaveStudent", "transformers", "hf") from error

STUDENT = "student"


class SaveStudent(TrainerCallback):
    """Write the student into ``student/`` of each checkpoint, for ``from_pretrained``.

    ``Trainer(model=distiller, callbacks=[SaveStudent()])`` saves the state dict of the distiller,
    with which it resumes; ``checkpoint-N/student`` beside it is what
    ``distiller.save_pretrained`` writes: the student alone (of a PEFT model, its adapters), with
    the tokenizer or processor that Trainer was given.

    Raises:
        OptionError: In ``train()``, where Trainer's model is no distiller; transformers is absent.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Find out before the first step whether there is a student to save.

        A run that was killed between Trainer's save and ours goes on from a checkpoint without a
        student: it is written now. (Ranks that hold parts would have to agree on it first.)
        """
        distiller = distiller_of(kwargs["model"], "SaveStudent")
        folder = _folder(args, state)
        lacks = state.global_step > 0 and folder.parent.is_dir() and not folder.exists()
        if lacks and args.should_save and not any(map(is_placed, distiller.parameters())):
            self.on_save(args, state, control, **kwargs)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the student of the checkpoint that was just saved."""
        distiller = distiller_of(kwargs["model"], "SaveStudent")
        folder = _folder(args, state)
        # Where ranks hold parts of the weights, all of them gather; the first one writes.
        if args.should_save or any(map(is_placed, distiller.parameters())):
            distiller.save_pretrained(folder)
        processor = kwargs.get("processing_class")
        if args.should_save and processor is not None:
            processor.save_pretrained(folder)


def _folder(args: Any, state: Any) -> Path:
    """The student's place in the checkpoint of this step."""
    return Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}" / STUDENT
