"""Which rows of an epoch come when, on which worker, and which are still to come.

An epoch goes through the shards in an order drawn from (seed, epoch), and through the rows of a shard in one
drawn from (seed, epoch, shard). Positions count rows in that order, whoever trains them: what was trained are
intervals of positions per shard, and what is left is dealt to as many workers as there are now. Where the
workers are as many as before, each goes on with its own share: each took its part of every batch of it.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from recsys_dist.config import rng_for
from recsys_dist.data.prepared import readable

Intervals = dict[str, list[tuple[int, int]]]  # shard -> positions start:stop, ascending, apart
_TIME_BINS = 4096


@dataclass(frozen=True)
class Piece:
    """Rows at positions `start:stop` of a parquet file, in stored order or in the order of an epoch.

    `columns` that the file lacks are left out (`weight` is in some splits only); none named reads all.
    `since`, in microseconds: only rows from then on are there to be counted. `of`: how many rows there are.
    """

    file: str
    start: int
    stop: int
    columns: tuple[str, ...] = ()
    seed: int = 0
    epoch: int = -1  # -1: stored order
    since: int | None = None
    of: int | None = None

    @property
    def rows(self) -> int:
        return self.stop - self.start

    @property
    def shard(self) -> str:
        """Its name wherever the data are, as in `ranking/train/part-00000.parquet`."""
        return "/".join(self.file.split("/")[-3:])

    def permutation(self, rows: int) -> np.ndarray | None:
        """Stored row at each position of a file of so many rows; None: as stored."""
        if self.epoch < 0:
            return None
        return rng_for(self.seed, "rows", self.epoch, self.shard).permutation(rows)


def stored(
    files: Iterable[tuple[str, int]], columns: Sequence[str] = (), since: int | None = None
) -> list[Piece]:
    """(file, rows) pairs as whole pieces, in stored order."""
    return [Piece(file, 0, rows, tuple(columns), since=since, of=rows) for file, rows in files if rows]


def shuffled(pieces: Sequence[Piece], seed: int, epoch: int) -> list[Piece]:
    """Whole pieces in the order of an epoch: permuted, and (when read) the rows within each."""
    order = rng_for(seed, "pieces", epoch).permutation(len(pieces))
    return [replace(pieces[i], seed=seed, epoch=epoch) for i in order]


def evenly(rows: int, workers: int) -> list[int]:
    """Each worker's part of so many rows: alike, or one more with the first ones."""
    return [rows // workers + (worker < rows % workers) for worker in range(workers)]


def deal(pieces: Sequence[Piece], parts: Sequence[int]) -> list[list[Piece]]:
    """Cut pieces into a consecutive share per worker, as large as their `parts` of a batch to a row.

    What is left after whole batches, dealt again in the same parts, is what was left of each share.
    """
    total = sum(piece.rows for piece in pieces)
    ends = [total * end // sum(parts) for end in itertools.accumulate(parts)]  # shares meet: no row is lost
    shares, left = [], list(pieces)
    for start, stop in itertools.pairwise([0, *ends]):
        share, left = cut(left, stop - start)
        shares.append(share)
    return shares


def cut(pieces: Sequence[Piece], rows: int) -> tuple[list[Piece], list[Piece]]:
    """The first `rows` rows of the pieces, and the others."""
    first: list[Piece] = []
    for number, piece in enumerate(pieces):
        if piece.rows > rows:
            middle = piece.start + rows
            first += [replace(piece, stop=middle)] if rows else []
            return first, [replace(piece, start=middle), *pieces[number + 1 :]]
        first.append(piece)
        rows -= piece.rows
    return first, []


def with_trained(before: Mapping[str, Sequence[tuple[int, int]]], pieces: Iterable[Piece]) -> Intervals:
    """`before` and the rows of `pieces`, which it has not."""
    found = {shard: list(intervals) for shard, intervals in before.items()}
    for piece in pieces:
        found.setdefault(piece.shard, []).append((piece.start, piece.stop))
    return {shard: _joined(intervals) for shard, intervals in sorted(found.items())}


def untrained(pieces: Iterable[Piece], trained: Mapping[str, Sequence[tuple[int, int]]]) -> list[Piece]:
    """The rows of whole pieces that are in none of the intervals, in the pieces' order."""
    left = []
    for piece in pieces:
        edges = [(piece.start, piece.start), *trained.get(piece.shard, []), (piece.stop, piece.stop)]
        gaps = [(stop, start) for (_, stop), (start, _) in itertools.pairwise(edges)]
        left += [replace(piece, start=start, stop=stop) for start, stop in gaps if start < stop]
    return left


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


def microseconds(table: pa.Table) -> np.ndarray:
    """[rows] of the column `timestamp`."""
    return table["timestamp"].to_numpy().astype("datetime64[us]").astype(np.int64)


def _timestamps(file: str) -> np.ndarray:
    with readable(file):
        return microseconds(pq.read_table(file, columns=["timestamp"], use_threads=False))


def _joined(intervals: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """In ascending order, those that meet made one."""
    joined: list[tuple[int, int]] = []
    for start, stop in sorted(intervals):
        if joined and joined[-1][1] == start:
            start = joined.pop()[0]
        joined.append((start, stop))
    return joined
