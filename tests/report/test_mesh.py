"""A report of models on a mesh: one rank's bytes, placements, and what crosses ranks."""

import pytest
from torch.distributed.device_mesh import init_device_mesh

import families
import fxdistill
from fxdistill.report.report import Report
from mesh_steps import AOT
from processes import run


def reported(rank: int, axis: str) -> Report:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=(axis,))
    family = families.shallow_llama()
    distiller = fxdistill.wrap(
        family.student, family.teacher, family.mapping, mesh=mesh, compile=AOT
    )
    inputs = {**family.batch, "labels": family.labels}
    report = distiller.report(**inputs)
    if axis == "dp":  # the axis does not matter to events, and this one compiles sooner
        distiller(**inputs)
        distiller(**{name: value[:, :-2] for name, value in inputs.items()})
        (first, _), (second, reason) = distiller.journal.events  # what reports list
        assert (first, second) == ("capture", "recompile")
        assert "size mismatch" in reason
    return report


@pytest.mark.slow
@pytest.mark.parametrize("axis", ["tp", "dp"])
def test_one_ranks_step(axis: str) -> None:
    family = families.shallow_llama()
    alone = fxdistill.wrap(family.student, family.teacher, family.mapping, compile=AOT)
    whole = alone.report(**family.batch, labels=family.labels)
    first, second = run(2, reported, axis)
    assert first.stopped is None
    # Eleven tokens on two ranks are six and five.
    assert second.memory.peak == pytest.approx(first.memory.peak, rel=0.15)
    assert first.mesh == {axis: 2}
    if axis == "tp":
        assert first.flops.total < 0.7 * whole.flops.total
    assert first.memory.weights["teacher"] < 0.7 * whole.memory.weights["teacher"]
    assert first.memory.gradients < 0.7 * whole.memory.gradients
    terms = {c.kind: c for c in first.collectives if c.owner == "terms"}
    assert terms["all_reduce"].times == (1 if axis == "tp" else 2)
    assert terms["all_reduce"].bytes < 100
    assert {c.owner for c in first.collectives} == {"student", "teacher", "terms"}
    assert [c.times for c in first.collectives] == [c.times for c in second.collectives]
    placed = first.pairs[0].student_value.placements
    assert placed == (("S(1)",) if axis == "tp" else ())
    assert first.pairs[0].student_value.shape == whole.pairs[0].student_value.shape
