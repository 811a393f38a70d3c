"""Whether a step fits, and what is advised where it does not."""

import dataclasses

import pytest

from fxdistill import errors
from fxdistill.base.figures import bytes_of
from fxdistill.report.data import Memory, Moment
from fxdistill.report.fit import advice_of, fit_of, of_losses
from report_samples import small

GIB = 2**30


def memory(**held):
    total = sum(held.values())
    return Memory(
        weights={"student": held.get("weights", 0)},
        gradients=0,
        optimizers={"Adam, AdamW": 2 * GIB, "SGD": 0},
        saved=0,
        taps=0,
        head=0,
        transient=0,
        peak=total,
        peak_at="forward",
        timeline=(Moment("forward", "a", {"weights": GIB}), Moment("forward", "b", held)),
    )


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("80GB", 80 * 10**9),
        ("24 GiB", 24 * GIB),
        ("1.5tib", 3 * 2**39),
        ("512b", 512),
        ("640 kB", 640_000),
        ("80", None),
        ("GB", None),
        ("-1GB", None),
        ("many", None),
    ],
)
def test_sizes_are_read(text, count):
    assert bytes_of(text) == count


def test_the_states_of_the_optimizer_count():
    report = dataclasses.replace(small(), memory=memory(weights=4 * GIB, student=2 * GIB))
    assert fit_of(report, 8 * GIB, "AdamW")
    assert not fit_of(report, 8 * GIB - 1, "AdamW")
    assert fit_of(report, "6GiB", "SGD")
    assert str(fit_of(report, "16GiB", "AdamW")) == (
        "fits: the step needs 8.00 GiB with AdamW, 16.0 GiB are there (50 %)"
    )
    assert "student, 2.00 GiB: checkpoint the student's layers" in str(
        fit_of(report, "1GiB", "AdamW")
    )


def test_the_advice_is_about_what_holds_most():
    held = {"weights": 9 * GIB, "losses": 4 * GIB, "head": 3 * GIB, "student": GIB}
    advice = advice_of(memory(**held))
    assert advice.startswith("losses, 4.00 GiB: match fewer layers")
    assert "head, 3.00 GiB: let the head be fused" in advice
    assert "checkpoint" not in advice


def heavy(dtype="torch.float32", **held):
    """A report whose teacher holds most: 20 GiB of weights, 16 of them a frozen teacher's."""
    given = dataclasses.replace(
        memory(weights=20 * GIB, **held), weights={"student": 4 * GIB, "teacher": 16 * GIB}
    )
    towers = [
        dataclasses.replace(t, name=name, trainable=count, dtypes=(dtype,))
        for t, name, count in zip(small().towers, ("student", "teacher"), (1, 0), strict=False)
    ]
    return dataclasses.replace(small(), memory=given, towers=tuple(towers))


@pytest.mark.parametrize(
    ("dtype", "says"),
    [
        ("torch.float32", "hold the teacher in bfloat16, or quantize it"),
        ("torch.bfloat16", "quantize the teacher, or take a smaller one"),
    ],
)
def test_weights_that_dominate_are_advised_on_and_losses_are_not(dtype, says):
    fit = fit_of(heavy(dtype, losses=2 * GIB, gradients=2 * GIB), 24 * GIB, "AdamW")
    assert not fit
    assert fit.advice == (
        "weights and what follows them, 24.0 GiB (student 4.00 GiB, teacher 16.0 GiB, gradients "
        "2.00 GiB, states of AdamW 2.00 GiB): train fewer parameters (freeze some, or LoRA), "
        f"shard the models over a mesh (mesh=), {says}"
    )
    # SGD has no states, and at this peak there are no gradients.
    alone = fit_of(heavy(dtype, losses=2 * GIB), 20 * GIB, "SGD").advice
    assert alone.startswith(
        "weights and what follows them, 20.0 GiB (student 4.00 GiB, teacher 16.0 GiB): shard the"
    )


def test_what_holds_much_beside_the_weights_is_still_advised_on():
    advice = fit_of(heavy(student=8 * GIB, losses=GIB), 24 * GIB, "SGD").advice
    assert "; student, 8.00 GiB: checkpoint the student's layers" in advice
    assert "losses" not in advice
    # Where the losses hold most, they come alone, unless the weights are too much by themselves.
    advice = fit_of(heavy(losses=40 * GIB), 24 * GIB, "SGD").advice
    assert advice.startswith("losses, 40.0 GiB: match fewer layers")
    advice = fit_of(heavy(losses=40 * GIB), 16 * GIB, "SGD").advice
    assert advice.startswith("weights and what follows them, 20.0 GiB")
    assert "; losses, 40.0 GiB: match fewer layers" in advice


def test_losses_that_dominate_are_noted():
    assert of_losses(memory(weights=GIB, losses=GIB, taps=GIB, student=GIB)).startswith(
        "losses and matched values hold 2.00 GiB of the peak's 4.00 GiB: match fewer layers"
    )
    assert of_losses(memory(weights=GIB, losses=GIB, student=9 * GIB)) == ""
    assert of_losses(memory(weights=100, losses=100)) == ""  # nobody minds


def test_mistakes_say_what_there_is():
    report = dataclasses.replace(small(), memory=memory(weights=GIB))
    with pytest.raises(errors.OptionError, match="a text such as '80GB'"):
        fit_of(report, "eighty", "AdamW")
    with pytest.raises(errors.OptionError, match=r"Nearest: .*'AdamW'"):
        fit_of(report, GIB, "adamw")
    stopped = dataclasses.replace(small(), memory=None, stopped="CaptureError: no graph\nmore")
    with pytest.raises(errors.OptionError, match=r"what the step needs: CaptureError: no graph$"):
        fit_of(stopped, GIB, "AdamW")
