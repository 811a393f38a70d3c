"""DDP around a distiller, and FSDP2 inside of one: loss and gradients of one process."""

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import families
import fxdistill
from fxdistill import Match
from mesh_steps import MODES, Samples, compare, gradients_of, split
from processes import run


def accumulated(call: Any, samples: Samples, module: nn.Module, **items: Tensor) -> Any:
    """Micro-batches; gradients cross ranks with the last."""
    losses: dict[str, Tensor] = {}
    for i, (batch, labels) in enumerate(samples):
        quiet = getattr(call, "no_sync", contextlib.nullcontext)
        last = i == len(samples) - 1
        with contextlib.nullcontext() if last else quiet():
            out = call(**batch, labels=labels, **items)
            out.loss.backward()
        for name, value in {"loss": out.loss.detach(), **out.losses}.items():
            losses[name] = losses.get(name, 0) + value
    return losses, gradients_of(module)


def wrapped(compile: Any, how: str) -> tuple[Any, families.Family]:
    torch.manual_seed(2)
    family = families.shallow_llama()
    matches = [Match(s, t) for s, t in family.mapping.items()]
    first = matches.pop(0)
    matches.append(Match(first.student, first.teacher, loss="l2", project="linear"))
    if how == "fsdp":
        mesh = init_device_mesh("cpu", (2,))
        for model in (family.student, family.teacher):
            for layer in model.model.layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh)
    distiller = fxdistill.wrap(family.student, family.teacher, matches, compile=compile)
    return distiller, family


def parity(rank: int, modes: list[str], how: str) -> None:
    for mode in modes:
        alone, one = wrapped(False, "")
        wanted = accumulated(alone, [(one.batch, one.labels)], alone)
        distiller, _ = wrapped(MODES[mode], how)
        call = DistributedDataParallel(distiller) if how == "ddp" else distiller
        samples = split(one.batch, one.labels, 2)
        compare(accumulated(call, [samples[rank]], distiller), wanted, (mode, how))
        if how == "ddp":  # three micro-batches, two on one rank: the number of items is global
            for module in (alone, distiller):
                module.zero_grad()
            tokens = one.batch["attention_mask"].sum()
            items = {"num_items": (one.labels != -100).sum(), "num_feature_items": tokens}
            wanted = accumulated(alone, [(one.batch, one.labels)], alone, **items)
            each = split(one.batch, one.labels, 3)
            mine = [each[2], _nothing(each[2])] if rank else each[:2]
            found = accumulated(call, mine, distiller, **items)
            compare(found, wanted, (mode, how, "accumulated"))
        torch._dynamo.reset()


def pairs_apart(students: list[Tensor], teachers: list[Tensor], weights: list[Tensor]) -> Tensor:
    """The mean of squares over all pairs; a mean over tokens, so that ranks add up."""
    each = [
        ((s - t).square().mean(-1) * w).sum() / w.sum()
        for s, t, w in zip(students, teachers, weights, strict=True)
    ]
    return torch.stack(each).mean()


def of_items(rank: int) -> None:
    """What trainers give, the number of predictions alone, weighs features over all ranks."""

    def made(compile: Any) -> tuple[Any, families.Family]:
        torch.manual_seed(2)
        family = families.shallow_llama()
        matches = [Match(s, t) for s, t in family.mapping.items()]
        matches[0] = Match(matches[0].student, matches[0].teacher, loss="l2", project="linear")
        options = {"pairs_loss": pairs_apart, "compile": compile}
        return fxdistill.wrap(family.student, family.teacher, matches, **options), family

    for mode in ("eager", "one graph", "regional"):
        alone, one = made(False)
        items = {"num_items": 2 * (one.labels != -100).sum()}
        wanted = accumulated(alone, [(one.batch, one.labels)], alone, **items)
        distiller, _ = made(MODES[mode])
        call = DistributedDataParallel(distiller)
        mine = split(one.batch, one.labels, 2)[rank]
        compare(accumulated(call, [mine], distiller, **items), wanted, mode)
        torch._dynamo.reset()


def of_speech(rank: int) -> None:
    """CTC and frames: each rank has a sample, with its own numbers of frames and labels."""
    for compile in (False, MODES["one graph"]):
        for items in ({}, {"num_items": torch.tensor(12.0)})[bool(compile) :]:
            results = []
            for alone in (True, False):
                student, teacher = families.speech(1), families.speech(2)
                distiller = fxdistill.wrap(
                    student,
                    teacher,
                    {"wav2vec2.encoder.layers.0": "wav2vec2.encoder.layers.1"},
                    label_loss="ctc",
                    compile=False if alone else compile,
                )
                call = distiller if alone else DistributedDataParallel(distiller)
                rows = slice(0, 2) if alone else slice(rank, rank + 1)
                batch = {name: value[rows] for name, value in families.sound().items()}
                labels = batch.pop("labels")
                out = call(**batch, labels=labels, **items)
                out.loss.backward()
                # The softmax over keys makes the gradient of their bias 0, but for rounding.
                learning = {
                    name: p.grad
                    for name, p in student.named_parameters()
                    if p.requires_grad and not name.endswith("k_proj.bias")
                }
                results.append(({"loss": out.loss.detach(), **out.losses}, learning))
            compare(results[1], results[0], (compile, items))
            torch._dynamo.reset()


def _nothing(sample: tuple[dict[str, Tensor], Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """Padding only: every rank has as many micro-batches."""
    batch, labels = sample
    mask = torch.zeros_like(batch["attention_mask"])
    mask[:, 0] = 0
    return {**batch, "attention_mask": mask}, torch.full_like(labels, -100)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_wrappers(how: str) -> None:
    modes = ["eager", "one graph", "regional"] if how == "ddp" else ["eager", "regional"]
    run(2, parity, modes, how)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
@pytest.mark.parametrize("case", [of_items, of_speech])
def test_what_is_divided_over_ranks(case: Any) -> None:
    run(2, case)
