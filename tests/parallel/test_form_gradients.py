"""Feature terms form their gradient in the forward on several ranks, too."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

import fxdistill
from fxdistill import Match
from fxdistill.graph.program import all_nodes
from fxdistill.losses.formed import formed
from mesh_steps import MODES, aot, compare, gradients_of
from processes import run
from toys import Toy, tokens

pytestmark = pytest.mark.slow

HOW = {"ddp": ("one graph", "regional"), "dp": ("one graph",)}
MASK = torch.ones(4, 7)
MASK[0, 2:], MASK[3, :3] = 0, 0


def projection() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(8, 5), nn.GELU(), nn.Linear(5, 8))


def mean_of_samples(student: Tensor, teacher: Tensor, weights: Tensor) -> Tensor:
    """A loss of the user's own, which is traced."""
    each = (student - teacher).square().mean(-1) * weights
    return each.sum() / weights.sum()


def made(how: str, mode: str, *disabled: str) -> Any:
    torch.manual_seed(0)
    student, teacher = Toy(2), Toy(3)
    mapping = [
        Match("blocks.0.mixer", "blocks.1.mixer", project=projection()),
        Match("blocks.1.mlp", "blocks.2.mlp", loss="l2"),
        Match("blocks.0.mlp", "blocks.0.mlp", loss="gram"),
        Match("blocks.1.mlp", "blocks.1.mlp", loss=mean_of_samples),
    ]
    compile = MODES[mode]
    if disabled:
        compile = {**compile, "disable": disabled}
    options: dict[str, Any] = {"compile": compile, "task": "causal_lm"}
    if how == "dp":
        options["mesh"] = init_device_mesh("cpu", (2,), mesh_dim_names=("dp",))
    return aot(fxdistill.wrap(student, teacher, mapping, **options))


def stepped(call: Any, distiller: Any, rows: slice) -> Any:
    out = call(tokens(4)[rows], loss_mask=MASK[rows])
    out.loss.backward()
    found: dict[str, Tensor] = {"loss": out.loss.detach(), **out.losses}
    return found, gradients_of(distiller)


def parity(rank: int, how: str) -> None:
    for mode in HOW[how]:
        alone = made("", "eager")
        wanted = stepped(alone, alone, slice(None))
        together = made(how, mode)
        call = DistributedDataParallel(together) if how == "ddp" else together
        found = stepped(call, together, slice(2 * rank, 2 * rank + 2))
        count = sum(n.target is formed for n in all_nodes(together.program.gm))
        assert count == 4, (how, mode, count)
        compare(found, wanted, (how, mode))
        torch._dynamo.reset()


@pytest.mark.parametrize("how", HOW)
def test_values_and_gradients_are_those_of_one_process(how: str) -> None:
    run(2, parity, how)


def held(distiller: Any) -> int:
    """The bytes that taps and losses hold when the backward begins."""
    timeline = distiller.report(tokens(4)[:2]).memory.timeline
    last = [moment for moment in timeline if moment.phase == "forward"][-1].held
    return last.get("taps", 0) + last.get("losses", 0)


def memory(rank: int) -> None:
    kept, before = held(made("dp", "one graph")), held(made("dp", "one graph", "FormGradients"))
    tap, learnt = 2 * 7 * 8 * 4, sum(p.numel() for p in projection().parameters()) * 4
    # A gradient for each of four taps, one of which the student keeps too; those of the projection.
    assert kept <= 5 * tap + learnt + 500 < before, (kept, before, tap, learnt)


def test_a_term_keeps_its_gradients_alone() -> None:
    run(2, memory)
