"""The processes that `jobs.bench_train` measures: one worker of a group, and the plain PyTorch loop."""

import itertools
import socket
import time
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import nn

from recsys_dist import cpu
from recsys_dist.batch import Batch
from recsys_dist.data.collate import collate, columns
from recsys_dist.data.feed import Feed
from recsys_dist.data.order import deal, evenly, shuffled, stored
from recsys_dist.models.layers import MLP
from recsys_dist.models.wide_deep import Config, Model
from recsys_dist.schema import Schema
from recsys_dist.train.loop import Epoch, Loss, Workers, idle_batch
from recsys_dist.train.optim import OptimizerConfig
from recsys_dist.train.sharding import ShardingConfig, shard

_IDS, _TABLE_ROWS, _FLOATS = 10, 100_000, 8
_DISTINCT_BATCHES = 8  # cycled through where loading is not measured


def _bench_schema() -> Schema:
    ids = [{"kind": "categorical", "name": "item", "column": "item_id"}]
    ids += [{"kind": "categorical", "name": f"id_{i}", "column": f"users.id_{i}"} for i in range(1, _IDS)]
    crosses = [{"kind": "cross", "name": f"cross_{i}", "of": ["item", f"id_{i}"]} for i in (1, 2)]
    floats = [{"kind": "numeric", "name": f"float_{i}", "column": f"users.float_{i}"} for i in range(_FLOATS)]
    history = {"kind": "sequence", "name": "history", "of": "item", "max_length": 20}
    schema = Schema.parse(
        {
            "features": [*ids, *crosses, history, *floats],
            "labels": [{"name": "click"}],
            "ranking_label": "click",
            "recall_positive": ["click"],
        }
    )
    return schema.fitted({schema.table(feature): _TABLE_ROWS for feature in schema.ids})


BENCH_SCHEMA = _bench_schema()


class BenchWorker:
    """One worker of a group that lives through the whole benchmark."""

    def join(self, rank: int, world: int, port: int, batch_rows: int, files: list[tuple[str, int]]) -> None:
        """Meet the others of the group."""
        cpu.configure(1)
        dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
        parts = evenly(batch_rows, world)
        self.rows = parts[rank]
        self.share = deal(shuffled(stored(files, columns(BENCH_SCHEMA)), 0, 1), parts)[rank]
        self.idle = idle_batch(BENCH_SCHEMA, max(parts))
        self.batches = list(itertools.islice(self._load(), _DISTINCT_BATCHES))
        self.steps = sum(rows for _, rows in files) // batch_rows

    def build(self, hidden: tuple[int, ...]) -> None:
        """Models of the next measurements, ours and the plain one."""
        torch.manual_seed(0)
        loss = Loss(Model(Config(hidden=hidden), BENCH_SCHEMA))
        groups = loss.model.table_groups()
        self.sharded = shard(loss, groups, OptimizerConfig(), ShardingConfig(), seed=0)
        self.plain = PlainWideDeep(BENCH_SCHEMA, hidden) if dist.get_world_size() == 1 else None

    def measure(self, kind: str) -> dict[str, float]:
        """One run of `loader`, `step`, `end_to_end` or `plain`: rows, seconds, seconds in the loader."""
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
        epoch = Epoch(self.sharded.model, self.sharded.optimizers, self.idle, Workers())
        totals = epoch.run(batches, 0)
        mine = sum(piece.rows for piece in self.share) if kind == "end_to_end" else self.steps * self.rows
        return {"rows": mine, "seconds": totals.seconds, "loader_s": totals.loader_s}

    def _load(self) -> Iterator[Batch]:
        feed = Feed(self.share)
        yield from (collate(table, BENCH_SCHEMA) for table in feed.take(self.share, self.rows))
        feed.close()

    def _loader(self) -> dict[str, float]:
        batches = self._load()
        next(batches)
        began = time.perf_counter()
        rows = sum(batch.rows for batch in batches)
        seconds = time.perf_counter() - began
        return {"rows": rows, "seconds": seconds, "loader_s": seconds}


class PlainWideDeep(nn.Module):
    """The same network as a user would write it in PyTorch alone: sparse gradients, Adagrad and Adam."""

    def __init__(self, schema: Schema, hidden: tuple[int, ...], dim: int = 16) -> None:
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
            for batch in batches
        ]
        began = time.perf_counter()
        for ids, dense, label in sliced:
            loss = nn.functional.binary_cross_entropy_with_logits(self(ids, dense), label)
            torch.autograd.backward(loss)
            for optimizer in self.optimizers:
                optimizer.step()
                optimizer.zero_grad()
        rows = sum(len(label) for _, _, label in sliced)
        return {"rows": rows, "seconds": time.perf_counter() - began, "loader_s": 0.0}


def free_port() -> int:
    """A TCP port that nobody uses at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
