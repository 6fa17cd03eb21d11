"""For every kind of sharding and 1, 2 and 3 workers: the losses, weights and states of one process.

Of a small model with every kind of table. Real models and all losses: tests/models/test_sharded.py.
"""

import functools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from recsys_dist.batch import Batch
from recsys_dist.train.loop import Epoch, Workers, idle_batch
from recsys_dist.train.optim import OptimizerConfig
from recsys_dist.train.placement import ShardingConfig
from recsys_dist.train.sharding import shard
from tests.train import tiny, truth
from tests.train.ranks import run_ranks
from tests.train.test_sharding import ADAGRAD, DECAY, FTRL, ROWWISE, build

SGD = OptimizerConfig.parse({"deep": {"rule": "sgd", "lr": 1.0}, "wide": {"rule": "sgd", "lr": 1.0}})
OPTIMIZERS = {"rowwise": ROWWISE, "adagrad": ADAGRAD, "ftrl": FTRL, "decay": DECAY}
POOLED, ALL = ("user", "item", "wide_item"), ("user", "item", "step")
KINDS: dict[str, dict[str, Any]] = {
    "auto": {},
    "table_wise": {"kind": "table_wise"},
    "row_wise": {"kind": "row_wise"},
    "data_parallel": {"tables": dict.fromkeys(POOLED, "data_parallel")},  # there is none of sequences
    "mix": {
        "tables": {
            "user": "row_wise",
            "item": "table_wise",
            "wide_item": "data_parallel",
            "step": "row_wise",
        }
    },
}
COLUMNS: dict[str, dict[str, Any]] = {  # row-wise Adagrad, FTRL and decay are refused for it: test_sharding
    "column_wise": {"tables": dict.fromkeys(ALL, "column_wise")},  # wide_item is too narrow for it
    "mix with columns": {
        "tables": {**KINDS["mix"]["tables"], "item": "column_wise", "user": "data_parallel"}
    },
}


def kinds(name: str) -> dict[str, dict[str, Any]]:
    return {**KINDS, **(COLUMNS if name == "adagrad" else {})}


def global_batches() -> list[Batch]:
    batches = (tiny.batch_of(truth.rows_of_step(step), "truth", step) for step in range(truth.STEPS))
    return truth.hardened(batches, tiny.schema())


@functools.cache
def expected(name: str) -> truth.Outcome:
    loss = build()
    before = truth.start(loss)
    found = truth.unsharded(loss, OPTIMIZERS[name], global_batches(), tiny.schema())
    for weight, value in before.items():
        assert np.abs(found.weights[weight] - value).max() > 100 * truth.WEIGHT_ATOL, weight
    return found


def on_rank(rank: int, world: int, name: str) -> dict[str, truth.Outcome]:
    found = {}
    for kind, cfg in kinds(name).items():
        mine = truth.share(global_batches(), rank, world)
        sharding = ShardingConfig.parse(cfg)
        found[kind], sharded = truth.on_worker(build(), OPTIMIZERS[name], sharding, mine, tiny.schema())
        plan = sharded.plan()
        assert all(plan[table]["kind"] == wanted for table, wanted in sharding.tables.items())
    return found


@pytest.mark.ranks
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("world", [1, 2, 3])
def test_workers_take_the_steps_of_one_unsharded_process(name: str, world: int) -> None:
    for rank, found in enumerate(run_ranks(world, on_rank, world, name)):
        for kind in kinds(name):
            truth.assert_same(found[kind], expected(name), f"{name}, {kind}, rank {rank} of {world}")


def in_few_bits(rank: int) -> truth.Outcome:
    loss = build()
    loss.autocast = True
    mine = truth.share(global_batches(), rank, 2)
    return truth.on_worker(loss, ROWWISE, ShardingConfig.parse(KINDS["mix"]), mine, tiny.schema())[0]


@pytest.mark.ranks
def test_with_autocast_losses_stay_within_what_its_bits_can_tell() -> None:
    first, second = run_ranks(2, in_few_bits)
    assert first.losses == second.losses != expected("rowwise").losses
    np.testing.assert_allclose(first.losses, expected("rowwise").losses, rtol=2**-7)


def parts() -> list[Batch]:
    """Of three workers: few rows that weigh much, many that weigh little, and a single one."""
    rows, weights = (3, 20, 1), (10.0, 0.1, 1.0)
    return [
        replace(tiny.batch_of(count, "part", rank), weight=torch.full((count,), weight))
        for rank, (count, weight) in enumerate(zip(rows, weights, strict=True))
    ]


def gradient(batches: list[Batch]) -> dict[str, np.ndarray]:
    """Of the weighted mean over the rows of all `batches`, by autograd alone."""
    loss = build()
    truth.start(loss)
    summed = torch.stack([(loss(batch, 0) * batch.weight).sum() for batch in batches]).sum()
    (summed / sum(float(batch.weight.sum()) for batch in batches)).backward()
    return {name: weight.grad.numpy() for name, weight in loss.named_parameters()}


def gradient_on_rank(rank: int) -> dict[str, np.ndarray]:
    """What the dense weights are stepped by, and how far a rate of 1 moves the tables."""
    loss = build()
    mix = ShardingConfig.parse(KINDS["mix"])
    sharded = shard(loss, loss.model.table_groups(), SGD, mix, truth.SEED)
    before, found, step = truth.whole(sharded.weights()), {}, sharded.optimizers.step

    def watched() -> None:
        found.update({name: weight.grad.numpy().copy() for name, weight in sharded.optimizers.dense.items()})
        step()

    sharded.optimizers.step = watched
    idle = idle_batch(tiny.schema(), truth.ROWS)
    Epoch(sharded.model, sharded.optimizers, idle, Workers()).run(iter([parts()[rank]]), 0)
    after = truth.whole(sharded.weights())
    return {**{name: before[name] - after[name] for name in sharded.tables}, **found}


@pytest.mark.ranks
def test_gradients_are_averaged_by_global_weight() -> None:
    """Not as a mean of the workers' means, where one row alone would count like three heavy ones."""
    expected, means = gradient(parts()), [gradient([part]) for part in parts()]
    for rank, found in enumerate(run_ranks(3, gradient_on_rank)):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            largest = np.abs(value).max()
            assert np.abs(np.mean([mean[name] for mean in means], axis=0) - value).max() > 0.1 * largest, name
            atol = truth.STATE_RTOL * largest
            np.testing.assert_allclose(found[name], value, rtol=0, atol=atol, err_msg=f"{name}, rank {rank}")


def test_global_batches_are_cut_as_unevenly_as_this_file_says() -> None:
    for world in (1, 2, 3):
        mine = [list(truth.share(global_batches(), rank, world)) for rank in range(world)]
        assert sum(batch.rows for batches in mine for batch in batches) == sum(
            b.rows for b in global_batches()
        )
        if world > 1:
            assert len(mine[-1]) == truth.LAST < truth.STEPS == len(mine[0])
            assert [mine[-1][step].rows for step in truth.EMPTY] == [0, 0]
            assert mine[-1][0].rows * 4 < mine[0][0].rows
            assert not mine[-1][truth.WEIGHTLESS].weight.any()
            assert mine[0][truth.NO_HISTORY].rows and not len(
                mine[0][truth.NO_HISTORY].sparse["history"].values()
            )
