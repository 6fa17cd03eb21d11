"""What the training loop hands from part to part: a batch before its step, and after."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torchrec.streamable import Pipelineable

from recsys_dist.batch import Batch
from recsys_dist.train.sampling import Use


@dataclass(frozen=True)
class Turn(Pipelineable):
    """A batch before its step, and what the workers agreed on about it.

    batch   this worker's, padded, on the host or where the model is
    rows    of the global batch; `weight` is theirs
    before  rows of this worker in the epoch's turns before
    save    whether to save before the step
    tables  how this worker's batch uses them, at a step that is sampled
    """

    number: int
    batch: Batch
    rows: float
    weight: float
    before: int
    save: bool
    tables: Use

    def to(self, device: torch.device, non_blocking: bool = True) -> "Turn":
        """With the batch on `device`; asynchronous where its memory is pinned, as in Batch."""
        del non_blocking
        return replace(self, batch=self.batch.to(device))

    def record_stream(self, stream: torch.Stream) -> None:
        """See Batch."""
        self.batch.record_stream(stream)


@dataclass
class Step:
    """A turn after its forward pass, whose loss is not yet known to all.

    loss_sum  of the rows' weighted losses, once it is on the host
    mean      what it learns from, until it did; None where it is left out
    """

    number: int
    row_id: torch.Tensor
    losses: torch.Tensor
    loss_sum: Callable[[], float]
    rows: float
    weight: float
    tables: Use
    mean: torch.Tensor | None = None
    gradients: dict[str, torch.Tensor] = field(default_factory=dict)
    ms: dict[str, float] = field(default_factory=dict)


def brought(number: torch.Tensor) -> Callable[[], float]:
    """Begin to bring a number to the host; the result waits for it alone, not for what a GPU does next."""
    if number.device.type == "cpu":
        return lambda: float(number)
    here, there = number.to("cpu", non_blocking=True), torch.cuda.Event()  # type: ignore[no-untyped-call]
    there.record()

    def wait() -> float:
        there.synchronize()
        return float(here)

    return wait
