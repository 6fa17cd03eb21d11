"""What sampled steps measure: parts that add up to the step, each counted where it is spent."""

import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchrec import KeyedJaggedTensor

from recsys_dist.errors import NonFiniteLossError
from recsys_dist.train import sampling
from recsys_dist.train.loop import Epoch, Loss, Totals, Workers, idle_batch
from recsys_dist.train.optim import OptimizerConfig
from recsys_dist.train.placement import ShardingConfig
from recsys_dist.train.sampling import PARTS, Stopwatch, added, features_of_tables, table_use
from recsys_dist.train.sharding import shard
from tests.train import tiny
from tests.train.ranks import run_ranks

SLOW_S, STEPS = 0.25, 6


class Clock:
    """Stands still but where told to go on."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def spend(self, ms: float) -> None:
        self.now += ms / 1e3


class Costly(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, clock, forward_ms, backward_ms):
        ctx.clock, ctx.ms = clock, backward_ms
        clock.spend(forward_ms)
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        ctx.clock.spend(ctx.ms)
        return gradient, None, None, None


class Lookup(nn.Module):
    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock, self.table = clock, nn.Parameter(torch.ones(50, 1))

    def forward(self, ids):
        return Costly.apply(self.table[ids.long()], self.clock, 5, 7)


class Tower(nn.Module):
    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock, self.lookup = clock, Lookup(clock)

    def forward(self, batch, _step):
        found = self.lookup(batch.sparse["user"].values())
        return Costly.apply(found, self.clock, 11, 13).squeeze(1)


def test_each_moment_counts_for_the_part_that_it_is_spent_in(monkeypatch):
    """Milliseconds by hand: what measuring takes counts for nothing; steps 1 and 3 are not timed."""
    clock = Clock()
    monkeypatch.setattr(sampling, "time", clock)
    model = Tower(clock)
    optimizers = SimpleNamespace(
        step=lambda: clock.spend(17), gradient_norms=lambda: clock.spend(1000) or {"tower": torch.tensor(1.0)}
    )

    def loaded():
        for number in range(4):
            clock.spend(3)
            yield tiny.batch_of(8, number)

    told = []
    epoch = Epoch(model, optimizers, idle_batch(tiny.schema(), 8), Workers(), sample_steps=2)
    epoch.stopwatch = Stopwatch([model.lookup])
    epoch.on_step = lambda totals: (told.append(totals.step_ms), clock.spend(2))
    epoch.due, epoch.save = (lambda: True), lambda _: clock.spend(19)
    epoch.run(loaded(), 0)
    spent = {"loader": 3, "exchange": 0, "lookup": 12, "dense": 24, "optimizer": 17, "checkpoint": 19}
    # before step 0 nothing is to be saved or told; before step 2 step 1 is settled, and the one that is saved
    first = {**spent, "checkpoint": 0, "other": 0}
    third = {**spent, "other": 2}
    assert told == [pytest.approx(first)] * 2 + [pytest.approx(third)] * 2
    assert tuple(told[0]) == PARTS


def busy(seconds: float) -> None:
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        pass


class Slow(nn.Module):
    """Rank 1 takes its time before the forward pass of the tower's last layer."""

    def __init__(self, rank: int, layer: nn.Module) -> None:
        super().__init__()
        self.rank, self.layer = rank, layer

    def forward(self, x):
        busy(SLOW_S * self.rank)
        return self.layer(x)


class DenseAlone(nn.Module):
    """No lookups: workers wait for each other in DDP alone, which does so in C++."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.tower = Slow(rank, nn.Linear(2, 1))

    def forward(self, batch, _step):
        return self.tower(batch.dense).squeeze(1)


def timed_steps(rank: int, tables: bool) -> tuple[list[dict[str, float]], float]:
    """Parts of each step on this rank, where rank 1 is slow, and the seconds of all steps together."""
    torch.manual_seed(0)
    lookups = []
    if tables:
        loss = Loss(tiny.Model(tiny.Config(), tiny.schema()))
        loss.model.tower[2] = Slow(rank, loss.model.tower[2])
        sharded = shard(loss, loss.model.table_groups(), OptimizerConfig(), ShardingConfig(), 0)
        model, optimizers, lookups = sharded.model, sharded.optimizers, sharded.lookups()
        assert lookups
    else:
        model = DistributedDataParallel(DenseAlone(rank))
        adam = torch.optim.Adam(model.parameters())
        optimizers = SimpleNamespace(step=adam.step, gradient_norms=dict)
    epoch = Epoch(model, optimizers, idle_batch(tiny.schema(), 8), Workers(), sample_steps=1)
    epoch.stopwatch = Stopwatch(lookups)
    told = []
    epoch.on_step = lambda totals: told.append(totals.step_ms)
    totals = epoch.run((tiny.batch_of(8, rank, number) for number in range(STEPS)), 0)
    return told, totals.seconds


@pytest.mark.ranks
@pytest.mark.parametrize("tables", [True, False])
def test_who_waits_for_a_slow_worker_counts_that_as_exchange(tables):
    (quick, seconds), (slow, _) = run_ranks(2, timed_steps, tables)
    half = 1e3 * SLOW_S / 2
    assert np.median([ms["exchange"] for ms in quick]) > half > np.median([ms["dense"] for ms in quick])
    assert np.median([ms["dense"] for ms in slow]) > half > np.median([ms["exchange"] for ms in slow])
    assert len(quick) == STEPS
    assert sum(sum(ms.values()) for ms in quick) == pytest.approx(1e3 * seconds, rel=0.1)
    assert all((ms["lookup"] > 0) == tables and ms["optimizer"] > 0 for ms in quick)


@pytest.mark.ranks
def test_a_worker_alone_exchanges_nothing():
    [(steps, _)] = run_ranks(1, timed_steps, True)
    assert np.median([ms["exchange"] / sum(ms.values()) for ms in steps]) < 0.05
    assert np.median([ms["lookup"] for ms in steps]) > 0


def test_a_step_that_fails_leaves_nothing_behind():
    wait, batch = dist.Work.wait, tiny.batch_of(8, "nan")
    batch.dense[0, 0] = float("nan")
    optimizers = SimpleNamespace(step=lambda: None, gradient_norms=dict)
    epoch = Epoch(DenseAlone(0), optimizers, idle_batch(tiny.schema(), 8), Workers(), sample_steps=1)
    with pytest.raises(NonFiniteLossError):
        epoch.run(iter([batch] * 3), 0)
    assert dist.Work.wait is wait
    assert not epoch.stopwatch.part("dense").__enter__() and not epoch.totals.step_ms


def test_how_a_batch_uses_the_tables():
    tables = features_of_tables(tiny.schema())
    assert tables == {"user": ["user"], "item": ["item", "history"]}
    batches = [tiny.batch_of(rows, "use", rows) for rows in (40, 7)]
    expected = {}
    for table, features in tables.items():
        ids = [torch.cat([batch.sparse[f].values() for f in features]).tolist() for batch in batches]
        expected[table] = (
            sum(map(len, ids)),
            sum(each.count(0) for each in ids),
            sum(len(set(each)) for each in ids),
        )
    assert expected["user"][0] == 47 and expected["user"][1] > 0
    assert added(table_use(batches[0], tables), table_use(batches[1], tables)) == expected
    nothing, lengths = torch.zeros(0, dtype=torch.int32), torch.zeros(3, dtype=torch.int32)
    without = KeyedJaggedTensor(keys=["history"], values=nothing, lengths=lengths)
    assert table_use(SimpleNamespace(sparse=without), {"item": ["history"]}) == {"item": (0, 0, 0)}


def test_an_epoch_counts_the_tables_of_its_samples_but_no_idle_batch():
    """Steps 0 and 2 of 3 are sampled; a worker without data looks row 0 up, which is no use of a table."""
    tables = features_of_tables(tiny.schema())
    batches = [tiny.batch_of(8, "epoch", number) for number in range(3)]
    optimizers = SimpleNamespace(step=lambda: None, gradient_norms=dict)
    epoch = Epoch(DenseAlone(0), optimizers, idle_batch(tiny.schema(), 8), Workers(), sample_steps=2)
    epoch.tables = tables
    expected = added(table_use(batches[0], tables), table_use(batches[2], tables))
    assert epoch.run(iter(batches), 0).tables == expected
    assert epoch._table_use(None, 0) == {}
    assert Totals().tables == {}
