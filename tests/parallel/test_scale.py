"""The plan at scale: a step is captured on ranks that do not exist, and its cost is linear."""

import pytest

from benchmarks import scale

TINY = scale.Setup(
    student=scale.Size(64, 128, 5, 8, 4),
    teacher=scale.Size(128, 256, 9, 8, 4),
    vocabulary=256,
    tokens=32,
)
# Deeper in both models than what the prediction is made of; the benchmark proves more layers.
DEEPER = scale.Depth(2, 3)


@pytest.mark.slow
@pytest.mark.timeout(600)  # four captures
def test_cost_is_linear_in_layers() -> None:
    with scale.ranks(2, 4) as mesh:
        model = scale.predicted(TINY, mesh)
        found = scale.captured(TINY, DEEPER, mesh)
    wanted = model.at(DEEPER)
    assert scale.differences(wanted, found) == []
    # Over "tp" one sum of all matches; over "dp" one of the denominators, then one of all values.
    layers = DEEPER.student
    kind = "all_reduce of numbers"
    times = {axis: found.of("times", "terms", axis, kind) for axis in ("dp", "tp")}
    assert times == {"dp": 2, "tp": 1}
    assert found.of("bytes", "terms", "tp", kind) == 4 * layers
    # Of every layer what its shapes say: T = 32, seven products of 4 ranks' weights, and attention.
    size, more = TINY.teacher, model.teacher.of("flops", "teacher")
    head = size.width // size.heads
    weights = size.width * (2 * size.width + 2 * size.key_value_heads * head + 3 * size.inner)
    attention = 2 * 2 * 32 * 32 * size.width
    assert more - model.base.of("flops", "teacher") == (2 * 32 * weights + attention) // 4
    # The student's weights lie once on the eight ranks, but for norms, which "tp" replicates.
    norms = TINY.student.width * (2 * layers + 1)
    own = (found.of("parameters", "student") - norms) // 8 + norms // 2
    assert found.of("weights", "student") == 2 * own
    assert found.of("optimizer", "student") == 8 * own
