"""Training shards → each worker's rows, through Ray Data: in an order that is known, none lost, none twice.

`deal` cuts the rows of a split into one share per worker, equal to a row. `Feed` streams a worker's pieces
in the very order in which they are listed: one Ray Data reader task at a time runs ahead of training, across
the borders of epochs, as far as a few blocks in the object store. (`streaming_split(equal=True)` drops the
remainder, and a new Dataset per epoch costs seconds of start-up each.)
"""

import logging
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray.data
from ray.data import ExecutionResources, TaskPoolStrategy
from ray.data._internal.execution.execution_callback import ExecutionCallback

from recsys_dist.config import rng_for
from recsys_dist.errors import DataError

_AHEAD_BYTES = 128 << 20  # of blocks read ahead, per worker
_TIME_BINS = 4096
_ROUND_S = 0.05


@dataclass(frozen=True)
class Piece:
    """Rows `start:stop` of a parquet file, in stored order or in one drawn from (seed, epoch).

    `columns` that the file lacks are left out (`weight` is in some splits only); none named reads all.
    `since`, in microseconds: only rows from then on are there, and `start` and `stop` count among them.
    """

    file: str
    start: int
    stop: int
    columns: tuple[str, ...] = ()
    seed: int = 0
    epoch: int = -1  # -1: stored order
    since: int | None = None

    @property
    def rows(self) -> int:
        return self.stop - self.start


def newest_rows(files: Iterable[tuple[str, int]], fraction: float) -> tuple[list[tuple[str, int]], int]:
    """(file, rows) of at least that fraction of the rows, the newest ones; and `since` when they are.

    Reads the files' `timestamp` column twice. Time is cut as finely as a 1/4096 of what the rows span.
    """
    names = [file for file, _ in files]
    ends = [(int(times.min()), int(times.max())) for times in map(_timestamps, names) if len(times)]
    first, last = min(low for low, _ in ends), max(high for _, high in ends)
    edges = first + np.arange(_TIME_BINS) * (last - first + 1) // _TIME_BINS
    later = np.array([len(t) - np.searchsorted(np.sort(t), edges) for t in map(_timestamps, names)])
    enough = np.flatnonzero(later.sum(axis=0) >= fraction * later[:, 0].sum())[-1]
    return list(zip(names, later[:, enough].tolist(), strict=True)), int(edges[enough])


def deal(
    files: Iterable[tuple[str, int]], columns: Sequence[str], workers: int, since: int | None = None
) -> list[list[Piece]]:
    """Cut (file, rows) pairs into a consecutive share per worker; shares differ by a row at most."""
    sizes = list(files)
    total = sum(rows for _, rows in sizes)
    shares: list[list[Piece]] = []
    for worker in range(workers):
        first, last = (
            total * worker // workers,
            total * (worker + 1) // workers,
        )  # shares meet: no row is lost
        share, before = [], 0
        for file, rows in sizes:
            start, stop = max(first - before, 0), min(last - before, rows)
            if start < stop:
                share.append(Piece(file, start, stop, tuple(columns), since=since))
            before += rows
        shares.append(share)
    return shares


def shuffled(share: Sequence[Piece], seed: int, epoch: int) -> list[Piece]:
    """A share in the order of an epoch: its pieces permuted, and (when read) the rows within each."""
    order = rng_for(seed, "pieces", epoch).permutation(len(share))
    return [replace(share[i], seed=seed, epoch=epoch) for i in order]


class Feed:
    """The rows of a list of pieces, in order; `take` one stretch of them after the other."""

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self._blocks = _stream(pieces)
        self._left: pa.Table | None = None

    def take(self, pieces: Iterable[Piece], batch_rows: int) -> Iterator[pa.Table]:
        """The next pieces as tables of exactly `batch_rows` rows, the last one shorter.

        Raises DataError where a file has not the rows that it should have.
        """
        missing = sum(piece.rows for piece in pieces)
        held: list[pa.Table] = []
        while missing:
            block = self._next()
            wanted = min(missing, batch_rows - sum(map(len, held)))
            held.append(block.slice(0, wanted))
            missing -= len(held[-1])
            self._left = block.slice(wanted) if len(block) > wanted else None
            if sum(map(len, held)) == batch_rows or not missing:
                yield pa.concat_tables(held) if len(held) > 1 else held[0]
                held = []

    def close(self) -> None:
        """Stop reading ahead; what was not taken is dropped."""
        self._blocks.close()

    def _next(self) -> pa.Table:
        if self._left is not None:
            return self._left
        block = next(self._blocks, None)
        if block is None:
            raise DataError("the training shards ended early; the manifest promises more rows: prepare again")
        return block


class _Paced(ExecutionCallback):
    """Lets the executor, a thread of the training process, rest between its rounds.

    It goes round without a pause while what it has read waits to be taken, holding the interpreter's lock
    that training needs: epochs of two workers on two cores took 1.7 times as long.
    """

    def on_execution_step(self, executor: Any) -> None:  # noqa: ARG002, as Ray Data calls it
        time.sleep(_ROUND_S)


def _stream(pieces: Sequence[Piece]) -> Generator[pa.Table, None, None]:
    if not pieces:
        return
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.custom_execution_callback_classes = [_Paced]
    context.execution_options.preserve_order = True
    context.execution_options.resource_limits = ExecutionResources(object_store_memory=_AHEAD_BYTES)
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    items: list[Any] = [asdict(piece) for piece in pieces]
    blocks = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        _read,
        batch_size=1,
        batch_format="pyarrow",
        zero_copy_batch=True,
        compute=TaskPoolStrategy(size=1),
        num_cpus=0,  # workers hold all CPUs of a small cluster; a reader that waits for one would hang them
    )
    yield from blocks.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1)


def _read(batch: pa.Table) -> Iterator[pa.Table]:
    for row in batch.to_pylist():
        piece = Piece(**row)
        try:
            with pq.ParquetFile(piece.file) as file:
                wanted = [name for name in piece.columns if name in file.schema_arrow.names]
                table = file.read(columns=wanted if piece.columns else None, use_threads=False)
                if piece.since is not None:
                    recent = _microseconds(file.read(columns=["timestamp"], use_threads=False)) >= piece.since
                    table = table.filter(pa.array(recent))
        except (OSError, pa.ArrowInvalid) as error:
            raise DataError(f"training shard {piece.file!r} cannot be read: {error}; prepare again") from None
        if len(table) < piece.stop:
            raise DataError(f"training shard {piece.file!r} has {len(table)} rows, not {piece.stop}")
        table = table.slice(piece.start, piece.rows)
        if piece.epoch >= 0:
            key = (piece.file.rsplit("/", 1)[-1], piece.start)
            table = table.take(rng_for(piece.seed, "rows", piece.epoch, *key).permutation(piece.rows))
        yield table.combine_chunks()


def _timestamps(file: str) -> np.ndarray:
    return _microseconds(pq.read_table(file, columns=["timestamp"], use_threads=False))


def _microseconds(table: pa.Table) -> np.ndarray:
    return table["timestamp"].to_numpy().astype("datetime64[us]").astype(np.int64)
