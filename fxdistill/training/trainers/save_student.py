"""``SaveStudent``: the student beside the checkpoints of ``transformers.Trainer``."""

import tempfile
from pathlib import Path
from typing import Any

from fxdistill.base.folders import has_weights, whole_folder
from fxdistill.base.tensors import is_placed
from fxdistill.distiller.saved import places
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
    the tokenizer or processor that Trainer was given. It appears when all of it is written.

    Raises:
        OptionError: In ``train()``, where Trainer's model is no distiller; transformers is absent.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Find out before the first step whether there is a student to save.

        A run that was killed between Trainer's save and ours goes on from a checkpoint without a
        student, or with a part of what belongs to it: it is written now. (Ranks that hold parts
        would have to agree on it first.)
        """
        distiller = distiller_of(kwargs["model"], "SaveStudent")
        folder = _folder(args, state)
        resumes = state.global_step > 0 and folder.parent.is_dir() and args.should_save
        if not resumes or any(map(is_placed, distiller.parameters())):
            return
        if not _is_whole(folder, distiller, kwargs.get("processing_class")):
            self.on_save(args, state, control, **kwargs)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the student of the checkpoint that was just saved."""
        distiller = distiller_of(kwargs["model"], "SaveStudent")
        folder = _folder(args, state)
        processor = kwargs.get("processing_class") if args.should_save else None
        if any(map(is_placed, distiller.parameters())):
            # Ranks hold parts of the weights: all of them gather, and the first one writes.
            distiller.save_pretrained(folder)
            if processor is not None:
                processor.save_pretrained(folder)
        elif args.should_save:
            with whole_folder(folder) as part:
                distiller.save_pretrained(part)
                if processor is not None:
                    processor.save_pretrained(part)


def _is_whole(folder: Path, distiller: Any, processor: Any) -> bool:
    """Whether all that ``on_save`` writes is there: every student, and the processor's files."""
    if not all(has_weights(place) for place, _ in places(distiller, folder)):
        return False
    if processor is None:
        return True
    with tempfile.TemporaryDirectory() as asked:  # which files those are, only it can tell
        processor.save_pretrained(asked)
        names = [path.relative_to(asked) for path in Path(asked).rglob("*") if path.is_file()]
    return all((folder / name).is_file() for name in names)


def _folder(args: Any, state: Any) -> Path:
    """The student's place in the checkpoint of this step."""
    return Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}" / STUDENT
