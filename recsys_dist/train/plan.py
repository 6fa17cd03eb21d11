"""Where the tables of a run will live, and what each worker will hold and send: known before anything starts.

TorchRec's planner decides where, as it will in training; the bytes follow from that.

W workers
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from recsys_dist.data.collate import collate, columns
from recsys_dist.data.prepared import Prepared
from recsys_dist.errors import ConfigError
from recsys_dist.models.protocol import model_module
from recsys_dist.models.ranking import WIDE
from recsys_dist.schema import Schema
from recsys_dist.train.catalogue import catalogue_of
from recsys_dist.train.loop import Loss
from recsys_dist.train.settings import TrainConfig
from recsys_dist.train.sharding import Placed, place

Share = Literal["weights", "optimizer", "gradients", "lookups", "copy"]
_FLOAT, _ID = 4, 4  # bytes
_ADAM = 2  # floats of state per dense weight
_SAMPLE_ROWS = 4096  # of the first shard, to learn how many ids a row has


@dataclass(frozen=True)
class Plan:
    """The tables, and bytes.

    holds      [W] each: a worker's tables and dense weights; optimizer states; gradients that are kept until
               the step; vectors looked up for a batch, and their gradients; the copy of weights and states
               from which a checkpoint within an epoch is written. Neither the process itself nor what a
               model's own layers keep for the backward pass is in it
    exchanged  table -> sent between workers in a step, over all of them: ids, vectors and their gradients;
               `dense` is the sum of the dense gradients
    """

    tables: tuple[Placed, ...]
    workers: int
    holds: Mapping[Share, np.ndarray]
    exchanged: Mapping[str, int]

    @property
    def largest_bytes(self) -> int:
        """What the fullest worker holds."""
        return int(np.sum(list(self.holds.values()), axis=0).max())

    def refuse_beyond(self, machine_bytes: int) -> None:
        """ConfigError where all workers together hold more than a machine has, with what to do about it."""
        held = int(np.sum(list(self.holds.values())))
        if held <= machine_bytes:
            return
        table = max(self.tables, key=lambda t: t.rows * t.dim)
        rows = int(table.rows * machine_bytes / held)
        raise ConfigError(
            f"training would hold {_gib(held)} in {self.workers} worker(s), and this machine has "
            f"{_gib(machine_bytes)}; the largest table {table.name!r} has {table.rows:,} rows of "
            f"{table.dim}: prepare with a vocabulary, or hash its feature into, under {rows:,} rows, lower "
            "model.embedding_dim, or train on a cluster with more memory"
        )


def plan(cfg: TrainConfig, prepared: Prepared, workers: int) -> Plan:
    """What so many workers training `cfg` will hold; ConfigError where they could not train rightly."""
    schema = cfg.inputs(prepared)
    module = model_module(cfg.model.name)
    loss = Loss(module.Model(cfg.model, schema, catalogue_of(prepared, schema, ("train",))))
    groups = loss.model.table_groups()
    kind = "cuda" if cfg.use_gpu else "cpu"
    tables = place(loss, groups, cfg.optimizer, cfg.sharding, workers, kind)
    in_tables = {id(weight) for weights in groups.values() for weight in weights}
    dense = sum(w.numel() for w in loss.parameters() if id(w) not in in_tables)
    split = cfg.training_splits(schema)["choose"][0]
    ids = _ids_per_row(prepared.files(split)[0], schema)
    return Plan(
        tables=tuple(tables),
        workers=workers,
        holds=_holds(tables, dense, cfg, workers, ids),
        exchanged={
            **{table.name: _exchanged(table, cfg, workers, ids) for table in tables},
            "dense": 2 * (workers - 1) * dense * _FLOAT,  # a ring's all-reduce
        },
    )


def describe(found: Plan) -> str:
    """The plan for people: a line per table and one per worker."""
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
    lines += [
        "",
        f"{'worker':<{width}}  " + "  ".join(f"{share:>9}" for share in found.holds) + "        all",
    ]
    for worker in range(found.workers):
        mine = [int(values[worker]) for values in found.holds.values()]
        lines.append(f"{worker:<{width}}  " + "  ".join(f"{_size(b):>9}" for b in [*mine, sum(mine)]))
    sent = sum(found.exchanged.values())
    lines += [
        "",
        f"sent between workers in a step: {_size(sent)}, {_size(found.exchanged['dense'])} of it dense",
    ]
    return "\n".join(lines)


def _holds(
    tables: list[Placed], dense: int, cfg: TrainConfig, workers: int, ids: Mapping[str, float]
) -> dict[Share, np.ndarray]:
    holds: dict[Share, np.ndarray] = {
        "weights": np.full(workers, dense * _FLOAT),
        "optimizer": np.full(workers, dense * _ADAM * _FLOAT),
        "gradients": np.full(workers, dense * _FLOAT),
        "lookups": np.zeros(workers, np.int64),
    }
    for table in tables:
        for worker, rows, wide in table.pieces:
            holds["weights"][worker] += rows * wide * table.weight_bytes
            holds["optimizer"][worker] += rows * _state_floats(table, wide) * _FLOAT
            holds["gradients"][worker] += 0 if table.fused else rows * wide * _FLOAT
        vectors = max(cfg.parts(workers)) * _vectors_per_row(table, ids)
        holds["lookups"] += int(2 * vectors * table.dim * _FLOAT)
    copied = cfg.checkpoint_every_s is not None
    holds["copy"] = (holds["weights"] + holds["optimizer"]) * copied
    return holds


def _state_floats(table: Placed, wide: int) -> int:
    """Floats of optimizer state per row of a piece."""
    return {"rowwise_adagrad": 1, "adagrad": wide, "sgd": 0, "ftrl": 2}[table.rule.rule]


def _vectors_per_row(table: Placed, ids: Mapping[str, float]) -> float:
    """Vectors that a row of the batch gets of a table: one per feature, or one per id."""
    return sum(1.0 if table.pooled else ids.get(feature, 1.0) for feature in table.features)


def _exchanged(table: Placed, cfg: TrainConfig, workers: int, ids: Mapping[str, float]) -> int:
    """Bytes that a table has sent in a step, over all workers: those of whom (W - 1) / W stay elsewhere."""
    rows = sum(cfg.parts(workers))
    if table.kind == "data_parallel":
        return 2 * (workers - 1) * table.rows * table.dim * _FLOAT
    asked = rows * sum(ids.get(feature, 1.0) for feature in table.features) * _ID
    vectors = rows * _vectors_per_row(table, ids) * table.dim * _FLOAT
    if table.kind == "row_wise" and table.pooled:
        vectors *= workers  # every worker has a part of every sum
    return int((asked + 2 * vectors) * (workers - 1) / workers)


def _ids_per_row(file: str, schema: Schema) -> dict[str, float]:
    """Mean ids of each feature, in the first rows of a shard."""
    with pq.ParquetFile(file) as shard:
        wanted = [name for name in columns(schema) if name in shard.schema_arrow.names]
        table = pa.Table.from_batches([next(shard.iter_batches(_SAMPLE_ROWS, columns=wanted))])
    sparse = collate(table, schema).sparse
    found = {name: float(sparse[name].lengths().float().mean()) for name in (f.name for f in schema.keys)}
    return {**found, WIDE: float(len(schema.singles))}


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:,.0f} {unit}" if unit == "B" or count >= 100 else f"{count:,.1f} {unit}"
        count /= 1024
    raise AssertionError


def _gib(count: float) -> str:
    return f"{count / 2**30:,.1f} GiB"
