"""The bare training loop of the "matched" setting: our optimizers' kinds in torch, batches in memory."""

import time
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import nn

Run = Callable[[], int]  # trains on all rows once and tells how many there were
B = TypeVar("B")
_TRIAL_BATCHES = 3


def matched(
    make: Callable[[], nn.Module],
    loss: Callable[[Any, B], torch.Tensor],
    batches: Sequence[B],
    rows: int,
) -> Run:
    """Adagrad for embeddings, Adam for the rest; the tables' gradients are dense or sparse, as is faster."""
    trained = {sparse: _Training(make(), loss, sparse) for sparse in (False, True)}
    seconds = {sparse: training.seconds(batches[:_TRIAL_BATCHES]) for sparse, training in trained.items()}
    faster = trained[min(seconds, key=lambda sparse: seconds[sparse])]

    def run() -> int:
        faster.run(batches)
        return rows

    return run


class _Training(Generic[B]):
    def __init__(self, model: nn.Module, loss: Callable[[Any, B], torch.Tensor], sparse: bool) -> None:
        self.model, self.loss = model.train(), loss
        tables = [m for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)]
        for table in tables:
            table.sparse = sparse
        embedded = [table.weight for table in tables]
        of_tables = {id(weight) for weight in embedded}
        dense = [weight for weight in model.parameters() if id(weight) not in of_tables]
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.Adagrad(embedded, lr=0.05, fused=None if sparse else True)
        ]
        if dense:
            self.optimizers.append(torch.optim.Adam(dense, lr=1e-3, fused=True))

    def run(self, batches: Sequence[B]) -> None:
        for batch in batches:
            torch.autograd.backward(self.loss(self.model, batch))
            for optimizer in self.optimizers:
                optimizer.step()
                optimizer.zero_grad()

    def seconds(self, batches: Sequence[B]) -> float:
        """Time of these batches, the first of which warmed up before."""
        self.run(batches[:1])
        began = time.perf_counter()
        self.run(batches)
        return time.perf_counter() - began
