"""Feature terms form their gradient in the forward on several ranks, too."""

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

import fxdistill
from fxdistill import Match
from fxdistill.graph.program import all_nodes
from fxdistill.losses.formed import formed
from mesh_steps import AOT, MODES, compare, gradients_of
from processes import run
from toys import Toy, tokens

pytestmark = pytest.mark.slow

HOW = {"ddp": ("eager", "one graph", "regional"), "dp": ("eager", "one graph")}
MASK = torch.ones(4, 7)
MASK[0, 2:], MASK[3, :3] = 0, 0


def mean_of_samples(student: Tensor, teacher: Tensor, weights: Tensor) -> Tensor:
    """A loss of the user's own, which is traced."""
    each = (student - teacher).square().mean(-1) * weights
    return each.sum() / weights.sum()


def made(how: str, mode: str) -> Any:
    torch.manual_seed(0)
    student, teacher = Toy(2), Toy(3)
    projection = nn.Sequential(nn.Linear(8, 5), nn.GELU(), nn.Linear(5, 8))
    mapping = [
        Match("blocks.0.mixer", "blocks.1.mixer", project=projection),
        Match("blocks.1.mlp", "blocks.2.mlp", loss="l2"),
        Match("blocks.0.mlp", "blocks.0.mlp", loss="gram"),
        Match("blocks.1.mlp", "blocks.1.mlp", loss=mean_of_samples),
        Match("blocks.0", "blocks.1", loss="attention_transfer"),
        Match("blocks.1", "blocks.2", loss="fpn"),
    ]
    options: dict[str, Any] = {"compile": MODES[mode], "task": "causal_lm"}
    if how == "dp":
        options["mesh"] = init_device_mesh("cpu", (2,), mesh_dim_names=("dp",))
    return fxdistill.wrap(student, teacher, mapping, **options)


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
        compare(found, wanted, (how, mode))
        if mode == "eager":
            continue
        count = sum(n.target is formed for n in all_nodes(together.program.gm))
        assert count == 5, (how, mode, count)
        record = next(r for r in together.program.history if r.name == "FormGradients")
        assert "as they were: blocks.0.mlp (samples of all ranks)" in str(record)
        torch._dynamo.reset()


@pytest.mark.parametrize("how", HOW)
def test_values_and_gradients_are_those_of_one_process(how: str) -> None:
    run(2, parity, how)


class Cost(NamedTuple):
    """What a step costs."""

    reduced: int  # all-reduces of the terms
    taps: int  # bytes of matched values at the worst moment of the forward
    held: int  # bytes of taps and losses when the backward begins


def cost(count: int) -> Cost:
    """The step of models of four blocks with ``count`` matches."""
    torch.manual_seed(0)
    student, teacher = Toy(4, dropout=0.1), Toy(4)  # no sum moves across dropout to be packed
    paths = [f"blocks.{i}{part}" for i in range(4) for part in (".mixer", ".mlp", "")]
    options: dict[str, Any] = {"feature_loss": "cosine", "compile": AOT}
    options["mesh"] = init_device_mesh("cpu", (2,), mesh_dim_names=("dp",))
    mapping = {path: path for path in paths[:: 12 // count]}
    report = fxdistill.wrap(student, teacher, mapping, **options).report(tokens(4)[:2])
    reduced = [c.times for c in report.collectives if c.owner == "terms" and c.kind == "all_reduce"]
    forward = [moment for moment in report.memory.timeline if moment.phase == "forward"]
    taps = [moment.held.get("taps", 0) for moment in forward]
    held = taps[-1] + forward[-1].held.get("losses", 0)
    torch._dynamo.reset()
    return Cost(sum(reduced), max(taps), held)


def costs(rank: int) -> None:
    few, many = cost(2), cost(12)
    assert few.reduced == many.reduced == 2  # of all denominators, then of all values
    tap = 2 * 7 * 8 * 4
    # Of 24 matched values, those that the student keeps anyway, and those of one layer.
    assert many.taps <= 10 * tap, many
    # A gradient for each of twelve, and those that the student keeps: both values would be 24.
    assert 12 * tap <= many.held <= 20 * tap, many


def test_more_terms_take_no_more_collectives_and_keep_their_gradients_alone() -> None:
    run(2, costs)
