"""What a model asks of all workers at once, and how it is had: arithmetic of one worker becomes a collective.

A model holds `WorkerSum`, `WorkerMax` and `GlobalRows` modules, which in one process do next to nothing.
`connect` puts those of this file in their place.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.nn.functional import all_reduce

from recsys_dist.models.layers import WorkerMax, WorkerSum
from recsys_dist.models.recall import GlobalRows


def connect(model: nn.Module) -> None:
    """Have the model's sums, maxima and rows be those of the whole process group."""
    if dist.get_world_size() == 1:
        return
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) in _COLLECTIVE:
                setattr(module, name, _COLLECTIVE[type(child)]())


class _AllRows(GlobalRows):
    """`GlobalRows` of several workers, by rank; equally many rows on each, as the training loop pads them."""

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        gathered: torch.Tensor = _Gather.apply(rows)  # type: ignore[no-untyped-call]
        return gathered


class _Gather(torch.autograd.Function):
    """All-gather; its gradient is the sum of all workers' gradients in this worker's rows.

    (`torch.distributed.nn.functional.all_gather` does the same; it is deprecated for a private one.)
    """

    @staticmethod
    def forward(_ctx: Any, rows: torch.Tensor) -> torch.Tensor:
        theirs = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(theirs, rows.contiguous())
        return torch.cat(theirs)

    @staticmethod
    def backward(_ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        summed = gradients[0].clone(memory_format=torch.contiguous_format)  # others may read it
        dist.all_reduce(summed)
        return summed.chunk(dist.get_world_size())[dist.get_rank()]


class _AllSum(nn.Module):
    """`WorkerSum` over a process group. The gradient is summed as the value is: each worker's loss sees all.

    `train.loop` multiplies each worker's loss by their number and DDP averages, so the sums agree.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        total: torch.Tensor = all_reduce(x)  # type: ignore[no-untyped-call]
        return total


class _AllMax(nn.Module):
    """`WorkerMax` over a process group."""

    def forward(self, count: int, device: torch.device) -> int:
        most = torch.tensor(count, device=device)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        return int(most)


_COLLECTIVE: dict[type[nn.Module], type[nn.Module]] = {
    WorkerSum: _AllSum,
    WorkerMax: _AllMax,
    GlobalRows: _AllRows,
}
