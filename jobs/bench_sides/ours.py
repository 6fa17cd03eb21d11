"""Our models through `shard` and `Epoch`, as one training worker runs them, without Ray."""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist

from jobs.bench_sides.bare import Run
from jobs.bench_sides.rows import FLOATS, HISTORY, LONGEST, SESSIONS, TABLES, Rows
from recsys_dist import cpu
from recsys_dist.batch import Batch
from recsys_dist.config import rng_for
from recsys_dist.data.collate import collate
from recsys_dist.feature_kinds import Categorical, Numeric, Sequence, Sessions
from recsys_dist.models.protocol import Catalogue, model_module, model_names
from recsys_dist.schema import Label, Schema
from recsys_dist.train.loop import Epoch, Loss, Workers, idle_batch
from recsys_dist.train.optim import OptimizerConfig
from recsys_dist.train.placement import ShardingConfig
from recsys_dist.train.sharding import shard

# youtubednn_ranking is wide_deep's tower
MODELS = tuple(name for name in model_names(counted=False) if name != "youtubednn_ranking")


def _schema() -> Schema:
    columns = {"item": "item_id", "category": "items.category"}
    schema = Schema(
        features=(
            *(Categorical(name=name, column=columns.get(name, f"users.{name}")) for name in TABLES),
            *(Sequence(name=f"history_{name}", of=name, max_length=LONGEST) for name in HISTORY),
            Sessions(name="session", max_length=LONGEST, sessions=SESSIONS),
            *(Numeric(name=f"float_{number}", column=f"users.float_{number}") for number in range(FLOATS)),
        ),
        labels=(Label(name="click"),),
        ranking_label="click",
        recall_positive=("click",),
    )
    return schema.fitted(TABLES)


SCHEMA = _schema()


def prepared(model: str, rows: Rows, batch_rows: int) -> dict[str, Run]:
    """`step`: batches in memory; `fed`: rows in random order from Arrow columns, collated as it trains."""
    if not dist.is_initialized():
        cpu.configure(torch.get_num_threads())
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    module = model_module(model)
    cfg = module.Config()
    schema = module.Model.inputs(SCHEMA, cfg)
    loss = Loss(module.Model(cfg, schema, catalogue(rows)))
    sharded = shard(loss, loss.model.table_groups(), OptimizerConfig(), ShardingConfig(), seed=0)
    arrow, idle = table(rows), idle_batch(schema, batch_rows)
    in_memory = list(_batches(arrow, schema, batch_rows))
    steps = 0

    def train(batches: Iterator[Batch]) -> int:
        nonlocal steps
        totals = Epoch(sharded.model, sharded.optimizers, idle, Workers()).run(batches, steps)
        steps += totals.steps
        return totals.rows

    def fed() -> int:
        order = rng_for(0, "order", steps).permutation(len(arrow))
        return train(_batches(arrow, schema, batch_rows, order))

    return {"step": lambda: train(iter(in_memory)), "fed": fed}


def _batches(arrow: pa.Table, schema: Schema, size: int, order: np.ndarray | None = None) -> Iterator[Batch]:
    for start in range(0, len(arrow), size):
        part = arrow.slice(start, size) if order is None else arrow.take(order[start : start + size])
        yield collate(part, schema)


def table(rows: Rows) -> pa.Table:
    """The rows as a training shard has them: histories as lists, without padding."""
    real = np.arange(LONGEST) < rows["length"][:, None]
    offsets = pa.array(np.r_[0, np.cumsum(rows["length"])].astype(np.int32))
    lists = {name: rows[name][real] for name in ("session", *(f"history_{name}" for name in HISTORY))}
    columns = {name: rows["ids"][:, number] for number, name in enumerate(TABLES)}
    columns |= {name: pa.ListArray.from_arrays(offsets, pa.array(ids)) for name, ids in lists.items()}
    columns |= {f"float_{number}": rows["dense"][:, number] for number in range(FLOATS)}
    return pa.table({**columns, "click": rows["click"], "row_id": np.arange(len(rows["click"]))})


def catalogue(rows: Rows) -> Catalogue:
    """What recall models are told of the items."""
    counts = np.bincount(rows["ids"][:, 0], minlength=TABLES["item"])
    item = torch.arange(TABLES["item"], dtype=torch.int32)
    return Catalogue(torch.from_numpy(counts), {"item": item, "category": item % TABLES["category"]})
