"""Losses between samples over ranks: all samples of all ranks, or each rank's own."""

import functools
from typing import Any

import pytest
import rich.console
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fxdistill
from fxdistill import Match, losses
from mesh_steps import MODES, compare, gradients_of
from processes import run

pytestmark = pytest.mark.slow

RELATIONS = ("gram", "distance_wise", "angle_wise", "similarity_preserving", "info_nce")
BANK = functools.partial(losses.CRD, width=3, size=10, in_batch=True)
HOW = {  # the modes in which each way to hold samples runs
    "ddp": ("eager", "one graph", "regional"),
    "dp": ("eager", "one graph"),
    "fsdp": ("eager", "regional"),
}


def net(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, width), nn.Tanh(), nn.Linear(width, 8), nn.Linear(8, 4))


def made(loss: Any, how: str, mode: str, **options: Any) -> Any:
    """A distiller with one loss, or with several of them at once."""
    torch.manual_seed(0)
    student, teacher = net(6), net(12)
    options |= {"compile": MODES[mode], "task": "classification"}
    if how == "dp":
        options["mesh"] = init_device_mesh("cpu", (2,), mesh_dim_names=("dp",))
    if how == "fsdp":
        mesh = init_device_mesh("cpu", (2,))
        for model in (student, teacher):
            fully_shard(model[2], mesh=mesh)
            fully_shard(model, mesh=mesh)
    # For the layers of a loss: a mesh makes those of its ranks alike, by itself.
    rank = torch.distributed.get_rank() if how in ("dp", "fsdp") else 0
    torch.manual_seed(1 + rank)
    matches = [
        Match("2", "2", loss=each) for each in (loss if isinstance(loss, tuple) else (loss,))
    ]
    return fxdistill.wrap(student, teacher, matches, **options)


INPUTS = torch.randn(3, 8, 5, generator=torch.Generator().manual_seed(2))
WEIGHTS = torch.tensor([1.0, 0.5, 0.0, 1.0, 2.0, 1.0, 1.0, 0.0])


def trained(call: Any, distiller: Any, rows: Any, items: float | None = None) -> Any:
    """Three steps, so that a queue is full; the losses and gradients of the last."""
    found: dict[str, Tensor] = {}
    for x in INPUTS:
        distiller.zero_grad()
        out = call(x[rows], token_weights=WEIGHTS[rows], num_feature_items=items)
        out.loss.backward()
        found = {"loss": out.loss.detach(), **out.losses}
    return found, gradients_of(distiller)


def parity(rank: int, how: str) -> None:
    for mode in HOW[how]:
        # Each alone, and in compiled modes all in one graph, which takes less time.
        for loss in (*RELATIONS, BANK) if mode == "eager" else ((*RELATIONS, BANK),):
            for items in (None,) if loss in RELATIONS[1:] else (None, 40.0):
                alone, together = made(loss, "", "eager"), made(loss, how, mode)
                wanted = trained(alone, alone, slice(None), items)
                call = DistributedDataParallel(together) if how == "ddp" else together
                mine = slice(4 * rank, 4 * rank + 4)
                found = trained(call, together, mine, items)
                compare(found, wanted, (how, mode, loss, items))
                banks = zip(
                    together.loss_modules.buffers(), alone.loss_modules.buffers(), strict=True
                )
                for a, b in banks:
                    torch.testing.assert_close(a, b)
                torch._dynamo.reset()


@pytest.mark.parametrize("how", HOW)
def test_samples_of_all_ranks_are_compared(how: str) -> None:
    run(2, parity, how)


def said(across: bool) -> list[str]:
    """How the report and the summary name the samples that are compared."""
    loss = functools.partial(losses.gram, across_ranks=across)
    found = []
    for how in ("ddp", "dp"):
        distiller = made(loss, how, "one graph")
        if how == "dp":
            console = rich.console.Console(width=200)
            with console.capture() as shown:
                console.print(distiller.summary())
            found += [line for line in shown.get().splitlines() if "gram" in line]
        report = distiller.report(INPUTS[0][:4])
        found += [pair.weighed_by for pair in report.pairs]
        torch._dynamo.reset()
    return found


def of_its_own(rank: int) -> None:
    for across, whose in ((True, "samples of all 2 ranks"), (False, "samples of each rank alone")):
        alone, table, mesh = said(across)
        assert alone == "samples"  # a report is not called within DDP
        assert whose in table
        assert mesh == f"samples; {whose}"
    loss = functools.partial(losses.gram, across_ranks=False)
    parts = [slice(0, 4), slice(4, 8)]
    for mode in ("eager", "one graph"):
        together = made(loss, "ddp", mode, logit_loss=None)
        call = DistributedDataParallel(together, find_unused_parameters=True)
        found = trained(call, together, parts[rank])
        means: dict[str, Tensor] = {}
        for part in parts:
            alone = made(loss, "", "eager", logit_loss=None)
            values, gradients = trained(alone, alone, part)
            for name, value in {**values, **gradients}.items():
                if value is not None:  # layers behind the match learn nothing
                    means[name] = means.get(name, torch.zeros(())) + value / 2
        for name, value in means.items():
            torch.testing.assert_close((found[0] | found[1])[name], value)
        torch._dynamo.reset()


def test_samples_of_its_own_give_the_mean_of_the_ranks_losses() -> None:
    run(2, of_its_own)


def own_queues(rank: int) -> list[Any]:
    loss = functools.partial(BANK, across_ranks=False)
    rows = slice(4 * rank, 4 * rank + 4)
    together, alone = made(loss, "ddp", "eager"), made(loss, "", "eager")
    trained(DistributedDataParallel(together), together, rows)
    trained(alone, alone, rows)
    state = together.state_dict()
    for name, value in alone.loss_modules.named_buffers():
        torch.testing.assert_close(state[f"loss_modules.{name}"], value)
    queue: list[Any] = state["loss_modules.0.queue"].tolist()
    return queue


def test_a_state_dict_has_the_queue_of_its_rank() -> None:
    one, other = run(2, own_queues)
    assert one != other


def uneven(rank: int) -> list[str]:
    said = []
    for mode in ("eager", "one graph"):
        distiller = made("gram", "ddp", mode)
        with pytest.raises(RuntimeError) as caught:
            DistributedDataParallel(distiller)(INPUTS[0][: 4 - rank])
        said.append(str(caught.value))
        torch._dynamo.reset()
    return said


def test_ranks_with_other_numbers_of_samples_are_told_so() -> None:
    """Gloo would write beyond the end of its buffer, and the process would die."""
    for said in run(2, uneven):
        assert all("give each rank as many" in text for text in said)
