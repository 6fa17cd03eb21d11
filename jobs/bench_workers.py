"""The processes that `jobs.bench_train` measures: one worker of a group, and the plain PyTorch loop.

And the rows that they train on.
"""

import itertools
import re
import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch
import torch.distributed as dist
from torch import nn

from recsys_dist import cpu
from recsys_dist.batch import Batch
from recsys_dist.config import rng_for
from recsys_dist.data.collate import collate, columns
from recsys_dist.data.feed import Feed
from recsys_dist.data.order import deal, evenly, shuffled, stored
from recsys_dist.feature_kinds import Sequence
from recsys_dist.models.layers import MLP
from recsys_dist.models.protocol import model_module
from recsys_dist.models.ranking import TowerConfig
from recsys_dist.schema import Schema
from recsys_dist.train.ahead import schedule
from recsys_dist.train.loop import Epoch, Loss, Totals, Workers, idle_batch
from recsys_dist.train.optim import OptimizerConfig
from recsys_dist.train.placement import ShardingConfig
from recsys_dist.train.progress import Progress, steps_per_point
from recsys_dist.train.rehearsal import rehearse
from recsys_dist.train.sampling import Stopwatch, features_of_tables
from recsys_dist.train.sharding import shard

_IDS, _TABLE_ROWS, _FLOATS = 10, 100_000, 8
_DISTINCT_BATCHES = 8  # cycled through where loading is not measured
_COUNTED_ROWS = 512  # by whose ids the tables are placed
_EPOCH_ROWS = 1_000_000  # of which a `run` tells as if it were the beginning


def ids_and_floats(ids: int, table_rows: int, *more: dict[str, Any]) -> Schema:
    """A schema of so many single ids, each with a table of its own, 8 floats, and `more` features."""
    features = [{"kind": "categorical", "name": "item", "column": "item_id"}]
    features += [{"kind": "categorical", "name": f"id_{i}", "column": f"users.id_{i}"} for i in range(1, ids)]
    floats = [{"kind": "numeric", "name": f"float_{i}", "column": f"users.float_{i}"} for i in range(_FLOATS)]
    schema = Schema.parse(
        {
            "features": [*features, *more, *floats],
            "labels": [{"name": "click"}],
            "ranking_label": "click",
            "recall_positive": ["click"],
        }
    )
    return schema.fitted({schema.table(feature): table_rows for feature in schema.ids})


BENCH_SCHEMA = ids_and_floats(
    _IDS,
    _TABLE_ROWS,
    *({"kind": "cross", "name": f"cross_{i}", "of": ["item", f"id_{i}"]} for i in (1, 2)),
    {"kind": "sequence", "name": "history", "of": "item", "max_length": 20},
)


def made_up(schema: Schema, size: int, number: int) -> pa.Table:
    """Shard `number`, of so many rows; ids are Zipf-like, histories have 10 items on average."""
    rng = rng_for(0, "bench", number)
    columns: dict[str, Any] = {}
    for feature in schema.ids:
        assert feature.rows is not None
        lengths = rng.integers(0, 21, size) if isinstance(feature, Sequence) else np.ones(size, np.int64)
        ids = (feature.rows ** rng.random(lengths.sum())).astype(np.int32)
        offsets = np.r_[0, np.cumsum(lengths)].astype(np.int32)
        is_list = isinstance(feature, Sequence)
        columns[feature.name] = pa.ListArray.from_arrays(offsets, ids) if is_list else ids
    columns |= {feature.name: rng.normal(size=size).astype(np.float32) for feature in schema.dense}
    columns["click"] = rng.integers(0, 2, size).astype(np.float32)
    columns["row_id"] = (np.int64(number) << 32) + np.arange(size)
    return pa.table(columns)


def write_shards(folder: Path, rows: int, shard_rows: int, schema: Schema) -> list[tuple[str, int]]:
    """Made-up training shards: each one's file and rows."""
    files = []
    for number, start in enumerate(range(0, rows, shard_rows)):
        size = min(shard_rows, rows - start)
        file = folder / f"part-{number:05d}.parquet"
        pq.write_table(made_up(schema, size, number), file)
        files.append((str(file), size))
    return files


class BenchWorker:
    """One worker of a group that lives through the whole benchmark.

    distinct  batches that it cycles through where loading is not measured
    gpu       whether it trains on the GPU that Ray gives it
    """

    def __init__(
        self, schema: Schema = BENCH_SCHEMA, distinct: int = _DISTINCT_BATCHES, gpu: bool = False
    ) -> None:
        self.schema, self.distinct = schema, distinct
        self.device = torch.device("cuda:0" if gpu else "cpu")

    def join(self, rank: int, world: int, port: int, batch_rows: int, files: list[tuple[str, int]]) -> None:
        """Meet the others of the group."""
        cpu.configure(1)
        backend = "gloo" if self.device.type == "cpu" else "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend, f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
        parts = evenly(batch_rows, world)
        self.rows = parts[rank]
        self.share = deal(shuffled(stored(files, columns(self.schema)), 0, 1), parts)[rank]
        self.idle = idle_batch(self.schema, max(parts)).to(self.device)
        self.batches = list(itertools.islice(self._load(), self.distinct))
        self.steps = sum(rows for _, rows in files) // batch_rows

    def build(self, cfg: TowerConfig) -> None:
        """Models of the next measurements: ours and, of Wide & Deep, the plain one."""
        torch.manual_seed(0)
        self.dim = cfg.embedding_dim
        loss, twin = (Loss(model_module(cfg.name).Model(cfg, self.schema)) for _ in range(2))
        step = rehearse(twin, collate(made_up(self.schema, _COUNTED_ROWS, 0), self.schema), workers=1)
        sharding = ShardingConfig(ids=step.ids_per_row)
        groups = loss.model.table_groups()
        self.sharded = shard(loss, groups, OptimizerConfig(), sharding, seed=0, device=self.device)
        plain = cfg.name == "wide_deep" and dist.get_world_size() == 1
        self.plain = PlainWideDeep(self.schema, cfg.hidden, self.device) if plain else None

    def keep(self, file: Path, cfg: TowerConfig) -> None:
        """Write the batches for `jobs.bench_sides.torchrec_alone`."""
        batches = [
            {
                "values": batch.sparse.values(),
                "lengths": batch.sparse.lengths(),
                "dense": batch.dense,
                "label": batch.labels["click"],
            }
            for batch in self.batches
        ]
        tables = {feature.name: feature.rows for feature in self.schema.keys}
        (hidden,) = cfg.hidden
        torch.save({"tables": tables, "dim": cfg.embedding_dim, "hidden": hidden, "batches": batches}, file)

    def measure(self, kind: str) -> dict[str, float]:
        """Rows, seconds, seconds in the loader, and seconds of this process's CPU time in one epoch.

        `loader` loads alone, `step` trains on batches in memory, `end_to_end` on loaded ones, and `run` takes
        samples and writes progress besides, as a run does; `plain` is the plain PyTorch loop.
        """
        match kind:
            case "loader":
                return self._loader()
            case "plain":
                assert self.plain is not None
                return self.plain.run(itertools.islice(itertools.cycle(self.batches), self.steps))
            case "step":
                batches: Iterator[Batch] = itertools.islice(itertools.cycle(self.batches), self.steps)
            case _:
                loading = self._load()
                batches = itertools.chain([next(loading)], loading)  # Ray Data's start is not a step's cost
        with tempfile.TemporaryDirectory(prefix="bench-train-") as folder:
            told = self._told(Path(folder)) if kind == "run" else {}
            epoch = Epoch(self.sharded.model, self.sharded.optimizers, self.idle, Workers(), **told)
            epoch.schedule = schedule(self.device)
            began = time.process_time()
            totals = epoch.run(batches, 0)
            cpu_s = time.process_time() - began
        mine = self.steps * self.rows if kind == "step" else sum(piece.rows for piece in self.share)
        return {"rows": mine, "seconds": totals.seconds, "loader_s": totals.loader_s, "cpu_s": cpu_s}

    def memory_bytes(self) -> dict[str, int]:
        """The most that was resident so far; what is now, of its own, and shared with Ray's object store."""
        names = {"VmHWM": "peak", "RssAnon": "own", "RssShmem": "shared"}
        found = re.findall(r"(\w+):\s+(\d+) kB", Path("/proc/self/status").read_text())
        return {names[name]: int(kib) * 1024 for name, kib in found if name in names}

    def limits(self) -> dict[str, float]:
        """What this worker's machine gives at the moment, the others of its group being at it too.

        Bytes of table rows a second that a lookup of single ids reads, as wide as the model's and as often
        each as the batches have them; flops a second of a product of [1024, 1024] matrices; bytes a second of
        adding up; with others, bytes a second sent by an all-to-all, and seconds of one that sends nothing.
        """
        ids = self.batches[0].sparse.values().clamp(max=_TABLE_ROWS - 1).to(self.device)
        table, square, many = (
            torch.ones(size, device=self.device) for size in ((_TABLE_ROWS, self.dim), (1024, 1024), 8 << 20)
        )
        first = torch.arange(len(ids), device=self.device)
        found = {
            "gather": len(ids)
            * self.dim
            * 4
            / _seconds(lambda: nn.functional.embedding_bag(ids, table, first), 60),
            "flops": 2 * 1024**3 / _seconds(lambda: square @ square, 12),
            "stream": 2 * many.nbytes / _seconds(lambda: many.add_(1), 15),
        }
        world = dist.get_world_size()
        if world > 1:
            empty, full = (torch.zeros(size, device=self.device) for size in (world, world << 18))
            latency = _seconds(lambda: dist.all_to_all_single(torch.empty_like(empty), empty), 100)
            took = _seconds(lambda: dist.all_to_all_single(torch.empty_like(full), full), 20)
            found |= {"latency_s": latency, "send": full.nbytes / took}
        return found

    def _told(self, folder: Path) -> dict[str, Any]:
        """What an epoch of a run does besides training; see `train.phase`."""
        totals, rank = Totals(), dist.get_rank()
        progress = Progress(folder, rank, lambda: True, profile=False)
        return {
            "on_step": progress.curve("bench", 1, 1, 0, _EPOCH_ROWS, totals),
            "sample_steps": steps_per_point(_EPOCH_ROWS, self.rows * dist.get_world_size()),
            "stopwatch": Stopwatch(self.sharded.lookups(), self.device),
            "tables": features_of_tables(self.schema),
            "totals": totals,
        }

    def _load(self) -> Iterator[Batch]:
        feed = Feed(self.share)
        yield from (collate(table, self.schema) for table in feed.take(self.share, self.rows))
        feed.close()

    def _loader(self) -> dict[str, float]:
        batches = self._load()
        next(batches)
        began = time.perf_counter()
        rows = sum(batch.rows for batch in batches)
        seconds = time.perf_counter() - began
        return {"rows": rows, "seconds": seconds, "loader_s": seconds}


def _seconds(call: Callable[[], Any], times: int) -> float:
    """Mean of so many calls after one that warms up: what others take from this process is in it."""

    def now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    call()
    began = now()
    for _ in range(times):
        call()
    return (now() - began) / times


class PlainWideDeep(nn.Module):
    """The same network as a user would write it in PyTorch alone: sparse gradients, Adagrad and Adam."""

    def __init__(
        self, schema: Schema, hidden: tuple[int, ...], device: torch.device | str = "cpu", dim: int = 16
    ) -> None:
        super().__init__()
        deep = [f.name for f in schema.ids if f not in schema.crosses]
        wide = [f.name for f in schema.singles]
        tables = {schema.table(f): f.rows or 0 for f in schema.ids}
        self.of = {f.name: schema.table(f) for f in schema.ids}
        self.deep_names, self.wide_names = deep, wide
        self.deep = nn.ModuleDict(
            {self.of[n]: nn.EmbeddingBag(tables[self.of[n]], dim, mode="mean", sparse=True) for n in deep}
        )
        self.wide = nn.ModuleDict({n: nn.EmbeddingBag(tables[n], 1, mode="sum", sparse=True) for n in wide})
        self.tower = MLP(len(deep) * dim + len(schema.dense), hidden, out=1)
        self.device = torch.device(device)
        self.to(device)
        sparse = [*self.deep.parameters(), *self.wide.parameters()]
        self.optimizers = [
            torch.optim.Adagrad(sparse, lr=0.05),
            torch.optim.Adam(self.tower.parameters(), lr=1e-3, fused=True),
        ]

    def forward(self, ids: dict[str, tuple[torch.Tensor, torch.Tensor]], dense: torch.Tensor) -> torch.Tensor:
        """[B] logits from (values, offsets) per feature."""
        deep = [self.deep[self.of[name]](*ids[name]) for name in self.deep_names]
        wide = torch.cat([self.wide[name](*ids[name]) for name in self.wide_names], dim=1).sum(dim=1)
        return self.tower(torch.cat([*deep, dense], dim=1)).squeeze(1) + wide

    def run(self, batches: Iterator[Batch]) -> dict[str, float]:
        """Train on batches whose columns were cut out before the clock starts."""
        sliced = [
            (
                {k: (j.values(), j.offsets()[:-1].int()) for k, j in batch.sparse.to_dict().items()},
                batch.dense,
                batch.labels["click"],
            )
            for batch in (batch.to(self.device) for batch in batches)
        ]
        began = time.perf_counter()
        for ids, dense, label in sliced:
            loss = nn.functional.binary_cross_entropy_with_logits(self(ids, dense), label)
            torch.autograd.backward(loss)
            for optimizer in self.optimizers:
                optimizer.step()
                optimizer.zero_grad()
        float(loss)  # a GPU is done then
        rows = sum(len(label) for _, _, label in sliced)
        return {"rows": rows, "seconds": time.perf_counter() - began, "loader_s": 0.0}


def started(
    world: int, batch_rows: int, files: list[tuple[str, int]], *settings: Any, gpu: bool = False
) -> list[Any]:
    """A group of so many workers, `BenchWorker(*settings)`, as actors of Ray; with `gpu` each has one."""
    actor: Any = ray.remote(num_cpus=0, num_gpus=int(gpu))(BenchWorker)
    group, port = [actor.remote(*settings, gpu=gpu) for _ in range(world)], free_port()
    ray.get([w.join.remote(r, world, port, batch_rows, files) for r, w in enumerate(group)])
    return group


def combined(found: list[dict[str, float]]) -> dict[str, float]:
    """Of all workers: rows add up, the slowest sets the time."""
    seconds = max(one["seconds"] for one in found)
    loader_s = statistics.mean(one["loader_s"] for one in found)
    return {
        "rows_per_s": sum(one["rows"] for one in found) / seconds,
        "loader_share": loader_s / seconds,
    }


def free_port() -> int:
    """A TCP port that nobody uses at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
