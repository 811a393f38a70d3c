"""A small language model, and plans that make it tensor parallel, with and without sequences."""

import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.up = nn.Linear(width, 2 * width, bias=False)
        self.down = nn.Linear(2 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.silu(self.up(self.norm(x))))


class LM(nn.Module):
    def __init__(self, vocabulary: int, width: int, layers: int, bias: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.norm = nn.RMSNorm(width)
        self.lm_head = nn.Linear(width, vocabulary, bias=bias)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.lm_head(self.norm(x))


def parallel(
    model: LM, mesh: DeviceMesh, *, sequence: bool, head: object = None, local: bool = False
) -> LM:
    """Tensor parallel, with the vocabulary sharded; ``sequence``: tokens sharded in between.

    ``local``: what stands between layers are plain tensors, of this rank's part.
    """
    layout = Shard(1) if sequence else Replicate()
    plan: dict[str, ParallelStyle] = {
        "lm_head": ColwiseParallel(
            input_layouts=layout, output_layouts=head or Shard(-1), use_local_output=False
        )
    }
    if sequence:
        plan["embed"] = RowwiseParallel(
            input_layouts=Replicate(), output_layouts=layout, use_local_output=local
        )
        plan["norm"] = SequenceParallel()
    for i in range(len(model.blocks)):
        plan[f"blocks.{i}.up"] = ColwiseParallel(input_layouts=layout)
        plan[f"blocks.{i}.down"] = RowwiseParallel(
            output_layouts=layout, use_local_output=local or not sequence
        )
        if sequence:
            if not local:
                plan[f"blocks.{i}"] = PrepareModuleInput(
                    input_layouts=(layout,), desired_input_layouts=(layout,)
                )
            plan[f"blocks.{i}.norm"] = SequenceParallel()
    return parallelize_module(model, mesh, plan)  # type: ignore[return-value]
