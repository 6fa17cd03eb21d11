"""Where the tables of a run will live, and what each worker will hold and send: known before anything starts.

TorchRec's planner decides where, as it will in training; the bytes follow from that.

W workers
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from recsys_dist.batch import Batch
from recsys_dist.data.collate import collate, columns
from recsys_dist.data.feed import AHEAD_BYTES
from recsys_dist.data.prepared import Prepared, readable
from recsys_dist.errors import ConfigError
from recsys_dist.models.protocol import Catalogue, model_module
from recsys_dist.schema import Schema
from recsys_dist.train.catalogue import catalogue_of
from recsys_dist.train.loop import Loss
from recsys_dist.train.placement import Placed, ShardingConfig, place
from recsys_dist.train.rehearsal import Rehearsed, rehearse
from recsys_dist.train.settings import TrainConfig
from recsys_dist.train.starting import BLOCK_ROWS

Share = Literal["weights", "optimizer", "gradients", "lookups", "activations", "batches", "copy", "process"]
_FLOAT, _ID = 4, 4  # bytes
_ADAM = 2  # floats of state per dense weight
_REHEARSED_ROWS = 4096  # at most; a larger part of a batch is taken to need in proportion
_COUNTED_ROWS = 512  # whose ids are counted
# Resident in a worker that has trained the smallest model: Python, torch, TorchRec and Ray (2026-11-23; CUDA
# builds, where there is no GPU, 353 MiB more, 2026-12-01; to measure it anew by importing them takes 7 s).
# A test holds it to what runs take.
_PROCESS_BYTES = (567 if torch.version.cuda is None else 920) << 20
# What the heap keeps over what is live in it: memory freed in one shape does not always fit the next, and the
# matrix library packs its operands (8,192 rows, 2026-11-23: DIN 1.7 times, a tower of 1024-512 3.4 times).
_HEAP = 2.5
_BATCHES = 4  # in flight: the idle one, the one that trains, the next one, and the rows that it is made of


@dataclass(frozen=True)
class Plan:
    """The tables, and bytes.

    holds      [W] each, at its peak: a worker's tables and dense weights; optimizer states; gradients that
               are kept until the step; vectors that its tables give in a step, and their gradients; what the
               layers keep for the backward pass, or validation for its scores; batches in flight and rows
               read ahead; the copy of weights and states from which a checkpoint is written; the process
               itself, and what it knows of the items
    exchanged  table -> sent between workers in a step, over all of them: ids, vectors and their gradients;
               `dense` is the sum of the dense gradients
    exchange   the precision of those vectors and gradients
    """

    tables: tuple[Placed, ...]
    workers: int
    holds: Mapping[Share, np.ndarray]
    exchanged: Mapping[str, int]
    exchange: str = "fp32"

    def refuse_beyond(self, machine_bytes: int) -> None:
        """ConfigError where all workers together hold more than a machine has, with what to do about it."""
        held = int(np.sum(list(self.holds.values())))
        if held <= machine_bytes:
            return
        most = max(self.holds, key=lambda share: int(self.holds[share].sum()))
        table = max(self.tables, key=lambda t: t.rows * t.dim)
        rows = int(table.rows * machine_bytes / held)
        ways = {
            "process": "take fewer workers",
            "activations": "lower batch_rows, or the model's widths",
            "batches": "lower batch_rows",
        }
        way = ways.get(
            most,
            f"the largest table {table.name!r} has {table.rows:,} rows of {table.dim}: prepare with a "
            f"vocabulary, or hash its feature into, under {rows:,} rows, lower model.embedding_dim",
        )
        raise ConfigError(
            f"training would hold {_gib(held)} in {self.workers} worker(s), most of it {most}, and this "
            f"machine has {_gib(machine_bytes)}; {way}, or train on a cluster with more memory"
        )


def plan(cfg: TrainConfig, prepared: Prepared, workers: int) -> Plan:
    """What so many workers training `cfg` will hold; ConfigError where they could not train rightly."""
    schema = cfg.inputs(prepared)
    catalogue = catalogue_of(prepared, schema, ("train",))
    loss = _built(cfg, schema, catalogue)
    groups = loss.model.table_groups()
    sharding = balanced(cfg, prepared, catalogue, workers)
    tables = place(loss, groups, cfg.optimizer, sharding, workers, "cuda" if cfg.use_gpu else "cpu")
    in_tables = {id(weight) for weights in groups.values() for weight in weights}
    dense = sum(w.numel() for w in loss.parameters() if id(w) not in in_tables)
    known = [*loss.buffers(), catalogue.positives, *catalogue.features.values()]
    part = max(cfg.parts(workers))
    sample = _sample(cfg, prepared, min(part, _REHEARSED_ROWS))
    step = _rehearsed(loss, cfg, collate(sample, schema), workers)
    rows_per_worker = (
        prepared.shards(cfg.training_splits(schema)["choose"][0]).total_rows * cfg.epochs / workers
    )
    holds = _kept(tables, dense, workers)
    holds["lookups"] = _lookups(tables, step, part, workers)
    holds["activations"] = np.full(workers, _activations(tables, step, cfg, prepared, part))
    in_flight = _BATCHES * part + min(rows_per_worker, AHEAD_BYTES / sample.nbytes * len(sample))
    holds["batches"] = np.full(workers, int(sample.nbytes / len(sample) * in_flight))
    holds["copy"] = _copied(tables, holds, cfg.checkpoint_every_s is not None)
    holds["process"] = np.full(workers, _PROCESS_BYTES + sum(tensor.nbytes for tensor in known))
    sent = {table.name: _exchanged(table, step, cfg, workers) for table in tables}
    sent["dense"] = 2 * (workers - 1) * dense * _FLOAT  # a ring's all-reduce
    return Plan(
        tables=tuple(tables),
        workers=workers,
        holds=holds,
        exchanged=sent,
        exchange=cfg.sharding.exchange or "fp32",
    )


def balanced(cfg: TrainConfig, prepared: Prepared, catalogue: Catalogue, workers: int) -> ShardingConfig:
    """`cfg.sharding`, and how many ids of a row each table is asked for, unless that says so itself."""
    if workers == 1:
        return cfg.sharding
    schema = cfg.inputs(prepared)
    loss = _built(cfg, schema, catalogue)
    step = _rehearsed(loss, cfg, collate(_sample(cfg, prepared, _COUNTED_ROWS), schema), workers=1)
    return ShardingConfig.parse(
        {**cfg.sharding.model_dump(), "ids": {**step.ids_per_row, **cfg.sharding.ids}}
    )


def describe(found: Plan, measured: Sequence[int] = ()) -> str:
    """The plan for people: a line per table and one per worker, with what it held at its peak where known."""
    width = max(len(table.name) for table in found.tables)
    lines = [f"{'table':<{width}}  {'rows':>13}  dim  {'bytes':>9}  kind           workers  sent in a step"]
    for table in sorted(found.tables, key=lambda t: -t.rows * t.dim):
        at = sorted({worker for worker, _, _ in table.pieces})
        where = ",".join(map(str, at)) if len(at) < found.workers or found.workers == 1 else "all"
        lines.append(
            f"{table.name:<{width}}  {table.rows:>13,}  {table.dim:>3}  "
            f"{_size(table.rows * table.dim * table.weight_bytes):>9}  {table.kind:<13}  {where:>7}  "
            f"{_size(found.exchanged[table.name]):>14}"
        )
    known = len(measured) == found.workers
    heads = [*found.holds, "all", *["measured"] * known]
    lines += ["", f"{'worker':<{width}}  " + "  ".join(f"{head:>9}" for head in heads)]
    for worker in range(found.workers):
        mine = [int(values[worker]) for values in found.holds.values()]
        row = [*mine, sum(mine), *measured[worker : worker + known]]
        sizes = [f"{_size(b):>{max(9, len(head))}}" for head, b in zip(heads, row, strict=True)]
        lines.append(f"{worker:<{width}}  " + "  ".join(sizes))
    if offloaded := [f"{table.name} ({table.kernel})" for table in found.tables if "uvm" in table.kernel]:
        lines += ["", f"in the host's memory: {', '.join(offloaded)}"]
    sent = sum(found.exchanged.values())
    lines += [
        "",
        f"sent between workers in a step: {_size(sent)}, {_size(found.exchanged['dense'])} of it dense; "
        f"vectors and their gradients as {found.exchange}",
    ]
    return "\n".join(lines)


def _kept(tables: list[Placed], dense: int, workers: int) -> dict[Share, np.ndarray]:
    """From step to step."""
    holds: dict[Share, np.ndarray] = {
        "weights": np.full(workers, dense * _FLOAT),
        "optimizer": np.full(workers, dense * _ADAM * _FLOAT),
        "gradients": np.full(workers, dense * _FLOAT),
    }
    for table in tables:
        for worker, rows, wide in table.pieces:
            holds["weights"][worker] += rows * wide * table.weight_bytes
            holds["optimizer"][worker] += rows * _state_floats(table, wide) * _FLOAT
            # the one that is kept, and the newest or what the step computes of it
            holds["gradients"][worker] += 0 if table.fused else 2 * rows * wide * _FLOAT
    return holds


def _state_floats(table: Placed, wide: int) -> int:
    """Floats of optimizer state per row of a piece."""
    return {"rowwise_adagrad": 1, "adagrad": wide, "sgd": 0, "ftrl": 2}[table.rule.rule]


def _lookups(tables: list[Placed], step: Rehearsed, part: int, workers: int) -> np.ndarray:
    """[W] what the tables of each worker give in a step, to all of them, and its gradient."""
    found = np.zeros(workers, np.int64)
    for table in tables:
        asked = step.vectors[table.name] * part / step.rows
        for worker, rows, wide in table.pieces:
            if table.kind != "data_parallel":
                # of a vector per id it gives those it has; of a sum of rows it gives its part, however small
                found[worker] += int(
                    2 * asked * workers * wide * _FLOAT * (1 if table.pooled else rows / table.rows)
                )
            else:
                found[worker] += int(2 * asked * wide * _FLOAT)
    return found


def _activations(
    tables: list[Placed], step: Rehearsed, cfg: TrainConfig, prepared: Prepared, part: int
) -> int:
    """The most that a worker's layers hold in a step; or, where that is more, its start or its validation."""
    live = int(_HEAP * step.live_bytes * part / step.rows)
    if cfg.model.asks_occurrences:
        live += 4 * sum(table.rows for table in tables) * _FLOAT  # see models.regularisation
    block = 2 * max(min(table.rows, BLOCK_ROWS) * table.dim for table in tables) * _FLOAT
    scores = 0
    if cfg.task == "recall":
        users = min(part, prepared.shards("users/valid").total_rows)
        scores = users * (prepared.schema.item_id.rows or 0) * _FLOAT
    return max(live, block, scores)


def _copied(tables: list[Placed], holds: Mapping[Share, np.ndarray], within_epochs: bool) -> np.ndarray:
    """[W] of everything, for a checkpoint within an epoch; after it the writer copies a table at a time."""
    largest = np.zeros(len(holds["weights"]), np.int64)
    for table in tables:
        for worker, rows, wide in table.pieces:
            largest[worker] = max(largest[worker], rows * wide * table.weight_bytes)
    return np.maximum(largest, (holds["weights"] + holds["optimizer"]) * within_epochs)


def _exchanged(table: Placed, step: Rehearsed, cfg: TrainConfig, workers: int) -> int:
    """Bytes that a table has sent in a step, over all workers: those of whom (W - 1) / W stay elsewhere."""
    rows = sum(cfg.parts(workers))
    if table.kind == "data_parallel":
        return 2 * (workers - 1) * table.rows * table.dim * _FLOAT
    asked = step.ids[table.name] * rows / step.rows * _ID
    vectors = (
        step.vectors[table.name] * rows / step.rows * table.dim * (2 if cfg.sharding.exchange else _FLOAT)
    )
    if table.kind == "row_wise" and table.pooled:
        vectors *= workers  # every worker has a part of every sum
    return int((asked + 2 * vectors) * (workers - 1) / workers)


def _built(cfg: TrainConfig, schema: Schema, catalogue: Catalogue) -> Loss:
    """The model with its loss, unsharded; ConfigError where its dense layers alone are too large."""
    try:
        model = model_module(cfg.model.name).Model(cfg.model, schema, catalogue)
        return Loss(model, autocast=cfg.autocast is not None)
    except RuntimeError as error:
        if not any(said in str(error) for said in ("allocate memory", "Storage size calculation overflowed")):
            raise
        raise ConfigError(
            f"model {cfg.model.name!r}: its layers do not fit in this machine's memory; lower its widths, "
            "such as model.hidden"
        ) from None


def _rehearsed(loss: Loss, cfg: TrainConfig, batch: Batch, workers: int) -> Rehearsed:
    loss.train(not cfg.model.asks_occurrences)  # which are not counted yet, and which only training reads
    return rehearse(loss, batch, workers)


def _sample(cfg: TrainConfig, prepared: Prepared, rows: int) -> pa.Table:
    """So many rows from the beginning of the first training shard with any, repeated where it has fewer."""
    schema = cfg.inputs(prepared)
    shards = prepared.shards(cfg.training_splits(schema)["choose"][0])
    first = prepared.path / next(file for file, n in zip(shards.files, shards.rows, strict=True) if n)
    with readable(first), pq.ParquetFile(first) as shard:
        wanted = [name for name in columns(schema) if name in shard.schema_arrow.names]
        table = pa.Table.from_batches([next(shard.iter_batches(rows, columns=wanted))])
    return table.take(np.resize(np.arange(len(table)), rows))


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:,.0f} {unit}" if unit == "B" or count >= 100 else f"{count:,.1f} {unit}"
        count /= 1024
    raise AssertionError


def _gib(count: float) -> str:
    return f"{count / 2**30:,.1f} GiB"
