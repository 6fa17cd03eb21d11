"""What is measured at the sampled steps of an epoch: where their time goes, and how batches use tables.

Not torch.profiler, whose start, stop and events took 50 ms a step where this takes 1 to 2 (Wide & Deep, 20
tables, 4,096 rows, steps of 52 ms on one CPU core, 2026-11-23; every 5th step sampled: 0.8 % of CPU time).
"""

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.autograd import Variable

from recsys_dist.batch import Batch
from recsys_dist.schema import Schema

# Where the time of a step goes.
# loader      waiting for the next batch
# exchange    waiting for other workers: all-to-all, all-reduce, agreement, and DDP's averaging of gradients
# lookup      embedding kernels, forward and backward, with the optimizers that are fused into them
# dense       all else of forward and backward
# optimizer   the step of dense weights, and of tables without a fused kernel
# checkpoint  what saving stopped training for
# other       the loop itself: placing and padding the batch, telling progress
PARTS = ("loader", "exchange", "lookup", "dense", "optimizer", "checkpoint", "other")

Use = dict[str, tuple[int, int, int]]  # table -> ids looked up, of them unknown (row 0), distinct rows


class Stopwatch:
    """Splits a step's time among PARTS, each moment to the innermost one. It costs nothing between `timed`s.

    On a GPU it waits at every change of part until what was begun is done: a timed step overlaps nothing.

    lookups  the modules that look up a tensor of embeddings
    """

    def __init__(self, lookups: Sequence[nn.Module] = (), device: torch.device | None = None) -> None:
        self._lookups = lookups
        self._on_gpu = device is not None and device.type == "cuda"
        self._seconds: dict[str, float] | None = None
        self._part, self._since, self._before = "other", 0.0, "other"

    @contextmanager
    def timed(self, sampled: bool) -> Iterator[dict[str, float]]:
        """Gives a dict that holds the milliseconds of each part once the block is done, where `sampled`."""
        found: dict[str, float] = {}
        if not sampled:
            yield found
            return
        self._seconds = dict.fromkeys((*PARTS, "sampling"), 0.0)
        self._part, self._since = "other", self._now()
        self._threads = {threading.get_ident()}
        handles = [lookup.register_forward_pre_hook(self._looking_up) for lookup in self._lookups]
        handles += [lookup.register_forward_hook(self._looked_up) for lookup in self._lookups]
        unwatched: Any = dist.Work.wait
        dist.Work.wait = self._watched(unwatched)  # type: ignore[method-assign]
        try:
            yield found
        finally:
            self._switch("other")
            dist.Work.wait = unwatched  # type: ignore[method-assign]
            for handle in handles:
                handle.remove()
            found.update({part: 1e3 * self._seconds[part] for part in PARTS})
            self._seconds = None

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """The block is part `name` of the step; `sampling`, which no other step has, counts for nothing."""
        if self._seconds is None:
            yield
            return
        before = self._switch(name)
        try:
            yield
        finally:
            self._switch(before)

    def backward_of(self, loss: torch.Tensor) -> None:
        """Tell the waiting at the end of a backward pass, DDP's for its averages, from what goes before."""
        if self._seconds is None:
            return

        def done() -> None:
            self._switch("exchange")

        def began(_gradient: torch.Tensor) -> None:
            self._threads.add(threading.get_ident())  # on a GPU it is another
            # in the order of their queueing, so before DDP's own, which waits
            Variable._execution_engine.queue_callback(done)

        loss.register_hook(began)  # type: ignore[no-untyped-call]

    def _now(self) -> float:
        if self._on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter()

    def _switch(self, part: str) -> str:
        """From now on it is `part`; returns what it was."""
        assert self._seconds is not None
        now = self._now()
        self._seconds[self._part] += now - self._since
        before, self._part, self._since = self._part, part, now
        return before

    def _watched(self, unwatched: Any) -> Any:
        def wait(work: dist.Work, *timeout: Any) -> Any:
            if threading.get_ident() not in self._threads or self._part == "checkpoint":  # saving has its own
                return unwatched(work, *timeout)
            with self.part("exchange"):
                return unwatched(work, *timeout)

        return wait

    def _looking_up(self, _lookup: nn.Module, _inputs: Any) -> None:
        self._before = self._switch("lookup")

    def _looked_up(self, _lookup: nn.Module, _inputs: Any, output: torch.Tensor) -> None:
        """Its backward pass is all that the output was computed by: ids have no gradient."""
        self._switch(self._before)
        nodes, ahead = set(), [output.grad_fn]
        while ahead:
            node = ahead.pop()
            if node is None or node in nodes or not node.next_functions:  # leaves outlive the step
                continue
            nodes.add(node)
            ahead += [function for function, _ in node.next_functions]
            node.register_prehook(self._node_begins)
            node.register_hook(self._node_ends)

    def _node_begins(self, _gradients: Any) -> None:
        self._before = self._switch("lookup")

    def _node_ends(self, _theirs: Any, _ours: Any) -> None:
        self._switch(self._before)


def features_of_tables(schema: Schema) -> dict[str, list[str]]:
    """Table of `schema` -> the features that are looked up in it."""
    found: dict[str, list[str]] = {}
    for feature in schema.ids:
        found.setdefault(schema.table(feature), []).append(feature.name)
    return found


def added(one: Use, other: Use) -> Use:
    """The sums, table by table; tables that `other` lacks stay as they are."""
    total = dict(one)
    for table, (ids, unknown, distinct) in other.items():
        before = total.get(table, (0, 0, 0))
        total[table] = (before[0] + ids, before[1] + unknown, before[2] + distinct)
    return total


def table_use(batch: Batch, tables: Mapping[str, Sequence[str]]) -> Use:
    """What a batch on the host does with the tables, given as table -> the features looked up in it."""
    ids = batch.sparse.to_dict()
    found = {}
    for table, features in tables.items():
        sorted_V = np.sort(np.concatenate([ids[feature].values().numpy() for feature in features]))
        distinct = int((sorted_V[1:] != sorted_V[:-1]).sum()) + int(sorted_V.size > 0)
        found[table] = (sorted_V.size, int(np.searchsorted(sorted_V, 0, "right")), distinct)
    return found
