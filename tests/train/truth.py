"""Trains a model in one process, or its share of it on a worker, and compares all that came of either.

The global batches are the same for any number of workers; `cut` shares their rows out, as unevenly as can be.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torchrec import KeyedJaggedTensor

from recsys_dist.batch import Batch
from recsys_dist.config import rng_for
from recsys_dist.schema import Schema
from recsys_dist.train.loop import Epoch, Loss, Workers, idle_batch
from recsys_dist.train.optim import OptimizerConfig
from recsys_dist.train.placement import ShardingConfig
from recsys_dist.train.sharding import ShardedModel, materialise, shard
from tests.batches import take
from tests.train.unsharded import train_unsharded, unsharded_accumulators

SEED = 3
STEPS = 20
ROWS = 24  # of a global batch; of some fewer
NO_HISTORY = 3  # the step in which no row of any worker has a history
EMPTY = (5, 11)  # steps in which the last worker's batch has no rows
WEIGHTLESS = 8  # the step in which all rows of the last worker weigh nothing
LAST = 16  # steps of the last worker, which then has run out

# float32 sums in another order differ by some 1e-7 of their largest addend. Adam and Adagrad divide gradients
# by their own size, so that this comes back relative to a weight's step. Measured after 20 steps: at most
# 4e-6 of a loss, 7e-5 of the states, 5e-5 of the scores. With a mean of means losses are 6e-2 off.
LOSS_RTOL = 2e-5
STATE_RTOL = 3e-4  # of the largest value in a tensor of sums or moments, which may be 1e-6 small itself
WEIGHT_ATOL = 3e-5  # of the tiny model, whose steps are 1e-2 to 1e-1
NOISE = 1e-6  # of the largest root mean square gradient in a tensor: nothing but rounding


@dataclass(frozen=True)
class Outcome:
    """What training came to, the same on every worker.

    losses   of each step: the global batch's weighted mean
    weights  all parameters and buffers, tables put together
    state    Adam's of the dense weights, and the tables' accumulators
    """

    losses: list[float]
    weights: dict[str, np.ndarray]
    state: dict[str, np.ndarray]


def rows_of_step(step: int) -> int:
    """Of the global batch: now and then a short one, and one with a single row."""
    return {7: 17, 13: 1}.get(step, ROWS)


def without(batch: Batch, empty: set[str]) -> Batch:
    """The batch without any id in the keys `empty`."""
    keys = batch.sparse.keys()
    found = {key: batch.sparse[key] for key in keys}
    sparse = KeyedJaggedTensor(
        keys=keys,
        values=torch.cat([j.values()[:0] if key in empty else j.values() for key, j in found.items()]),
        lengths=torch.cat([j.lengths() * (key not in empty) for key, j in found.items()]),
    )
    return replace(batch, sparse=sparse)


def hardened(batches: Iterable[Batch], schema: Schema) -> list[Batch]:
    """The global batches with random weights, in one step without histories, in one partly weightless."""
    found = []
    for step, batch in enumerate(batches):
        weight = rng_for(step, "weights").uniform(0.2, 3.0, batch.rows).astype("float32")
        if step == WEIGHTLESS:
            weight[cut(batch.rows, step, 2)[1] :] = 0
        hard = without(batch, {f.name for f in schema.lists}) if step == NO_HISTORY else batch
        found.append(replace(hard, weight=torch.from_numpy(weight)))
    return found


def cut(rows: int, step: int, world: int) -> list[int]:
    """[world + 1] where workers' rows of a global batch begin and end.

    Each worker has twice the rows of the next, the last an eighth of all; in some steps it has none.
    """
    if world == 1:
        return [0, rows]
    last = 0 if step in EMPTY or step >= LAST else max(1, rows // 8)
    shares = 2.0 ** -np.arange(world - 1)
    bounds = np.rint(np.cumsum(shares) / shares.sum() * (rows - last)).astype(int)
    return [0, *bounds.tolist(), rows]


def share(batches: list[Batch], rank: int, world: int) -> Iterator[Batch]:
    """One worker's rows of the global batches; the last has run out where the others go on."""
    for step, batch in enumerate(batches[: LAST if 0 < rank == world - 1 else None]):
        start, stop = cut(batch.rows, step, world)[rank : rank + 2]
        yield take(batch, torch.arange(start, stop))


def train(epoch: Epoch, batches: Iterable[Batch]) -> list[float]:
    """The loss of each step, over all workers."""
    losses, before = [], [0.0, 0.0]

    def on_step(totals: Any) -> None:
        losses.append((totals.loss_sum - before[0]) / (totals.weight - before[1]))
        before[:] = [totals.loss_sum, totals.weight]

    epoch.on_step = on_step
    epoch.run(iter(batches), 0)
    return losses


def unsharded(loss: Loss, optimizer: OptimizerConfig, batches: list[Batch], schema: Schema) -> Outcome:
    """Of one process that has the global batches; `loss` was materialised."""
    optimizers = train_unsharded(loss, loss.model.table_groups(), optimizer)
    losses = train(Epoch(loss, optimizers, idle_batch(schema, ROWS), Workers()), batches)
    state = {**optimizers.state(), **unsharded_accumulators(loss, optimizers)}
    return Outcome(losses, _arrays(loss.state_dict()), _arrays(state))


def on_worker(
    loss: Loss, optimizer: OptimizerConfig, sharding: ShardingConfig, mine: Iterable[Batch], schema: Schema
) -> tuple[Outcome, ShardedModel]:
    """Of a process group, whose worker has the batches `mine`. Collective."""
    sharded = shard(loss, loss.model.table_groups(), optimizer, sharding, SEED)
    losses = train(Epoch(sharded.model, sharded.optimizers, idle_batch(schema, ROWS), Workers()), mine)
    state = {**sharded.optimizers.state(), **sharded.accumulators()}
    return Outcome(losses, whole(sharded.weights()), whole(state)), sharded


def start(loss: Loss) -> dict[str, np.ndarray]:
    """What `shard` with SEED starts from, which `loss` has then too."""
    return _arrays(materialise(loss, SEED).state_dict())


def assert_same(found: Outcome, expected: Outcome, of: str, weight_atol: float = WEIGHT_ATOL) -> None:
    """All of it, up to rounding."""
    np.testing.assert_allclose(found.losses, expected.losses, rtol=LOSS_RTOL, err_msg=f"{of}: losses")
    assert found.weights.keys() == expected.weights.keys() and found.state.keys() == expected.state.keys()
    for name, weight in expected.weights.items():
        np.testing.assert_allclose(
            np.where(_noise(expected, name), weight, found.weights[name]),
            weight,
            rtol=0,
            atol=weight_atol,
            err_msg=f"{of}: {name}",
        )
    for name, value in expected.state.items():
        atol = STATE_RTOL * np.abs(value).max()
        np.testing.assert_allclose(
            found.state[name], value, rtol=0, atol=atol, err_msg=f"{of}: state of {name}"
        )


def _noise(expected: Outcome, name: str) -> np.ndarray:
    """Which entries of a dense weight have gradients that would be 0 but for rounding: Adam steps at random.

    (So attention's bias of the keys, which its softmax does not see.) That the gradients are so small in the
    other outcome too is seen by Adam's moments.
    """
    squared = expected.state.get(f"{name}.exp_avg_sq", np.ones(()))
    return np.sqrt(squared) < NOISE * np.sqrt(squared.max())


def whole(state: dict[str, Any]) -> dict[str, np.ndarray]:
    """Sharded tensors put together again from all workers' shards, and the worker's own of all others."""
    sharded = {name: value for name, value in state.items() if hasattr(value, "local_shards")}
    mine = {
        name: [(tuple(s.metadata.shard_offsets), s.tensor.numpy().copy()) for s in value.local_shards()]
        for name, value in sharded.items()
    }
    found: dict[str, list] = {}
    for theirs in Workers().gather(mine):
        for name, pieces in theirs.items():
            found.setdefault(name, []).extend(pieces)
    own = {name: value for name, value in state.items() if name not in sharded}
    return {**_arrays(own), **{name: _assembled(pieces) for name, pieces in found.items()}}


def _assembled(pieces: list) -> np.ndarray:
    size = [max(o[d] + v.shape[d] for o, v in pieces) for d in range(pieces[0][1].ndim)]
    full = np.zeros(size, np.float32)
    for offsets, values in pieces:
        full[tuple(slice(o, o + n) for o, n in zip(offsets, values.shape, strict=True))] = values
    return full


def _arrays(state: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    return {name: value.detach().numpy().copy() for name, value in state.items()}
