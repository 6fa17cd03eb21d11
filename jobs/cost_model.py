"""What a training step costs: what a model asks, over what each worker's machine gives. No measuring here.

A phase takes its bytes or its arithmetic over one rate, and phases follow each other; of several workers the
busiest sets the time. `jobs.bench_scaling` measures the rates and sets predictions beside measurements.

W workers
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

FLOAT_BYTES = 4
_PASSES = 3  # over a looked-up row: read for the forward pass, read and written by its optimizer
_ADAM_PASSES = 7  # over a dense weight: weight, gradient and two moments read, all but the gradient written
_COLLECTIVES = 4  # a step's exchanges of embeddings: lengths, ids, vectors, gradients
PHASES = ("loader", "lookup", "exchange", "dense", "all-reduce", "optimizer", "rest")


@dataclass(frozen=True)
class Work:
    """What a step asks, per row of the batch unless said otherwise.

    id_bytes      of the ids that are looked up
    table_bytes   of the table rows that they name
    vector_bytes  of what the tables give: sums of rows, or the rows themselves
    flops         of matrix products, forward and backward
    dense_bytes   of all dense weights
    """

    id_bytes: float
    table_bytes: float
    vector_bytes: float
    flops: float
    dense_bytes: float


@dataclass(frozen=True)
class Machine:
    """What one worker has. Rates are bytes, flops or rows per second.

    near, far    what it sends to workers of its own machine, of which there are `group`, and to others
    latency_s    of a collective of two workers; `per_peer_s` more for each further one
    step_s       of a step, whatever it computes; row_s of a row besides what is counted
    ahead        whether the next batch is loaded meanwhile
    """

    loader: float
    gather: float
    flops: float
    stream: float
    near: float
    far: float
    group: int
    latency_s: float
    per_peer_s: float = 0.0
    step_s: float = 0.0
    row_s: float = 0.0
    ahead: bool = False

    def send_s(self, sent: float, workers: int) -> float:
        """Seconds until a worker has sent so many bytes, equally many to each of all workers.

        Those to its own machine and those to others travel at the same time.
        """
        beside = min(self.group, workers)
        return max(sent * beside / workers / self.near, sent * (workers - beside) / workers / self.far)

    def collective_s(self, workers: int) -> float:
        return 0.0 if workers == 1 else self.latency_s + self.per_peer_s * (workers - 2)

    def all_reduce_s(self, size: float, workers: int) -> float:
        """Seconds of a sum over all workers: within each machine, then a part each between machines."""
        beside = min(self.group, workers)
        machines = workers / beside
        within = 2 * (beside - 1) / beside * size / self.near
        return within + 2 * (machines - 1) / machines * size / beside / self.far


@dataclass(frozen=True)
class Spread:
    """How tables lie on the workers.

    busiest  the lookups of the busiest worker over their mean
    sent     what the busiest worker sends of vectors, over what it would if they were spread evenly
    copies   workers that each id goes to
    fullest  the table rows of who has the most, over their mean
    """

    busiest: float = 1.0
    sent: float = 1.0
    copies: float = 1.0
    fullest: float = 1.0


class Table(NamedTuple):
    """Its rows, the ids that a row of the batch looks up in it, and its columns."""

    rows: int
    ids: float
    dim: int


def step_seconds(
    work: Work, machine: Machine, batch_rows: float, workers: int, spread: Spread | None = None
) -> dict[str, float]:
    """Phase -> seconds of a step of a global batch; see `total_s` for their sum."""
    spread = spread or Spread()
    part = batch_rows / workers
    exchanged = part * (work.id_bytes * spread.copies + 2 * work.vector_bytes * spread.sent)
    several = workers > 1
    return {
        "loader": part / machine.loader,
        "lookup": _PASSES * part * work.table_bytes * spread.busiest / machine.gather,
        "exchange": (machine.send_s(exchanged, workers) + _COLLECTIVES * machine.collective_s(workers))
        * several,
        "dense": part * work.flops / machine.flops,
        "all-reduce": (machine.all_reduce_s(work.dense_bytes, workers) + machine.collective_s(workers))
        * several,
        "optimizer": _ADAM_PASSES * work.dense_bytes / machine.stream,
        "rest": machine.step_s + machine.row_s * part,
    }


def total_s(phases: Mapping[str, float], ahead: bool) -> float:
    """Of a step; loading `ahead` costs only what the rest of the step does not hide."""
    computing = sum(phases.values()) - phases["loader"]
    return max(computing, phases["loader"]) if ahead else computing + phases["loader"]


def limit_s(work: Work, machine: Machine, batch_rows: float) -> float:
    """Seconds that one worker's lookups and matrix products would take at the machine's own rates."""
    phases = step_seconds(work, machine, batch_rows, 1)
    return phases["lookup"] + phases["dense"]


def fitted(work: Work, machine: Machine, batch_rows: float, measured_s: float) -> Machine:
    """The machine with `row_s` such that one worker's step takes what was measured."""
    missing = measured_s - total_s(step_seconds(work, machine, batch_rows, 1), machine.ahead)
    return replace(machine, row_s=machine.row_s + missing / batch_rows)


def zipf(rng: np.random.Generator, rows: int, exponent: float, count: int) -> np.ndarray:
    """[count] rows of a table, from 0, of which row k is drawn in proportion to (k + 1) ^ -exponent.

    By the inverse of the continuous distribution function. `exponent` is not 1.
    """
    power = 1 - exponent
    drawn = ((float(rows) ** power - 1) * rng.random(count) + 1) ** (1 / power)
    return np.minimum(drawn.astype(np.int64), rows) - 1


def simulated(
    tables: Sequence[Table],
    kind: str,
    workers: int,
    batch_rows: int,
    exponent: float,
    rng: np.random.Generator,
) -> Spread:
    """How the ids of a batch fall on workers; row 0 of a table is the most frequent, as vocabularies have it.

    table_wise   whole tables, each to who has the fewest rows
    column_wise  each table in 2, 4, 8, .. stretches of 4 columns or more, until there is one for each worker
    row_wise     each table in as many stretches of rows as workers; each worker gives a part of every sum
    row_hashed   the same of rows in an order that knows no frequency
    """
    load = np.zeros(workers)
    if kind in ("table_wise", "column_wise"):
        wanted = 1 << (-(-workers // len(tables)) - 1).bit_length()
        held = np.zeros(workers)
        for table in sorted(tables, reverse=True):
            pieces = min(wanted, table.dim // 4) if kind == "column_wise" else 1
            for _ in range(pieces):
                least = int(held.argmin())
                held[least] += table.rows / pieces
                load[least] += table.ids / pieces
        busiest, fullest = (float(each.max() / each.mean()) for each in (load, held))
        return Spread(busiest, busiest, pieces, fullest)
    for number, table in enumerate(tables):
        drawn = zipf(rng, table.rows, exponent, int(batch_rows * table.ids))
        block = -(-table.rows // workers)
        at = drawn // block if kind == "row_wise" else _shuffled(drawn + (number << 40)) % workers
        load += np.bincount(at.astype(np.int64), minlength=workers)
    return Spread(float(load.max() / load.mean()), workers)


def _shuffled(rows: np.ndarray) -> np.ndarray:
    """A fixed mixing of 64-bit numbers: Knuth's multiplicative hash, its high bits."""
    return (rows.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(40)
