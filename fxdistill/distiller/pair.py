"""What ``wrap`` asks of a student and its teacher before anything else."""

from collections.abc import Iterable

from torch import nn

from fxdistill.base.warn import warn
from fxdistill.errors import FrozenStudentError, MatchWarning, OptionError
from fxdistill.models.adapters import adapters_of, merged_in
from fxdistill.models.landmarks import vocabulary_of
from fxdistill.models.tap import Tower
from fxdistill.objective.vocabulary import named_model, require_padding_only


def check_trainable(student: nn.Module) -> None:
    """Raise FrozenStudentError if the student has nothing to train, or adapters that do not run."""
    parameters = list(student.parameters())
    if not any(p.requires_grad for p in parameters):
        raise FrozenStudentError(
            f"none of the student's {len(parameters)} parameters requires a gradient: there is "
            "nothing to train. student.requires_grad_(True), or unfreeze the part to train."
        )
    if merged := merged_in(student):
        raise FrozenStudentError(
            f"the student's adapters {', '.join(map(repr, merged))} are merged into its weights: "
            "they do not run, and would learn nothing. student.unmerge_adapter()"
        )


def check_targets(student: nn.Module, teacher: nn.Module) -> None:
    """Look for a frozen teacher that holds what the student learns.

    Raises OptionError where that is adapters, with which the teacher is the student; else warns.
    """
    if teacher is student:
        return
    learning = {id(p): name for name, p in student.named_parameters() if p.requires_grad}
    shared = [learning[id(p)] for p in teacher.parameters() if id(p) in learning]
    adapters = adapters_of(teacher) if shared else {}
    ours = set(map(id, adapters_of(student).values())) if adapters else set()
    if both := [path for path, layer in adapters.items() if id(layer) in ours]:
        raise OptionError(
            f"the teacher is the student's own base with the adapters on ({both[0]!r} and "
            f"{len(both) - 1} more): it would be the student. fxdistill.base_of(student) is the "
            "base with its adapters off, and needs no memory of its own. For a model that teaches "
            "itself from other inputs, pass the student as the teacher too."
        )
    if shared:
        warn(
            f"the frozen teacher holds {len(shared)} parameters that the student learns "
            f"({shared[0]}, ...): its targets change with every step. Give it a copy.",
            MatchWarning,
        )


def check_vocabularies(
    pairs: Iterable[tuple[tuple[Tower, nn.Module], tuple[Tower, nn.Module]]],
    vocab_size: int | None,
) -> None:
    """Raise VocabularyError now and not in the first step, where the heads tell their widths.

    ``pairs`` are the models whose logits are compared, by their towers, a student first.
    """
    for (learning, student), (teaching, teacher) in pairs:
        ours, theirs = vocabulary_of(student), vocabulary_of(teacher)
        if ours is not None and theirs is not None:
            names = (named_model(learning), named_model(teaching))
            require_padding_only(ours, theirs, vocab_size, names)
