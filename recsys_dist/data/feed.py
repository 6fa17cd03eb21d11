"""Training shards → a worker's rows, through Ray Data: in the order of `data.order`, none lost, none twice.

`Feed` streams a worker's pieces in the very order in which they are listed: one Ray Data reader task at a
time runs ahead of training, across the borders of epochs, as far as a few blocks in the object store.
(`streaming_split(equal=True)` drops the remainder, and a new Dataset per epoch costs seconds of start-up.)
"""

import logging
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray.data
from ray.data import ExecutionResources, TaskPoolStrategy
from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.exceptions import RayTaskError

from recsys_dist.data.order import Piece, microseconds
from recsys_dist.errors import DataError

AHEAD_BYTES = 128 << 20  # of blocks read ahead, per worker
_ROUND_S = 0.05


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
        try:
            block = next(self._blocks, None)
        except RayTaskError as error:
            raise error.cause from None  # as the reader raised it, without Ray's traceback of it
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
    context = ray.data.DataContext.get_current().copy()  # others may use this process too
    context.enable_progress_bars = False
    context.custom_execution_callback_classes = [_Paced]
    context.execution_options.preserve_order = True
    context.execution_options.resource_limits = ExecutionResources(object_store_memory=AHEAD_BYTES)
    logger = logging.getLogger("ray.data")
    logger.setLevel(max(logger.level, logging.WARNING))
    items: list[Any] = [asdict(piece) for piece in pieces]
    with ray.data.DataContext.current(context):
        blocks = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
            _read,
            batch_size=1,
            batch_format="pyarrow",
            zero_copy_batch=True,
            compute=TaskPoolStrategy(size=1),
            num_cpus=0,  # workers hold all CPUs of a small cluster; a reader that waits would hang them
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
                    recent = microseconds(file.read(columns=["timestamp"], use_threads=False)) >= piece.since
                    table = table.filter(pa.array(recent))
        except (OSError, pa.ArrowInvalid) as error:
            raise DataError(f"training shard {piece.file!r} cannot be read: {error}; prepare again") from None
        if len(table) < piece.stop or piece.of not in (None, len(table)):
            raise DataError(
                f"training shard {piece.file!r} has {len(table)} rows, not {piece.of or piece.stop}: it was "
                "damaged, or prepared anew meanwhile"
            )
        order = piece.permutation(len(table))
        if order is None:
            yield table.slice(piece.start, piece.rows).combine_chunks()
        else:
            yield table.take(order[piece.start : piece.stop]).combine_chunks()
