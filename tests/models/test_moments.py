"""Batch normalisation and Dice over workers: the moments of all rows, as if one process had them."""

from typing import Any

import numpy as np
import pytest
import torch

from recsys_dist.batch import Batch
from recsys_dist.config import rng_for
from recsys_dist.models.layers import BatchNorm
from recsys_dist.models.mlp import Config, Model
from recsys_dist.train.loop import Epoch, Loss, Workers, idle_batch
from recsys_dist.train.optim import OptimizerConfig
from recsys_dist.train.placement import ShardingConfig
from recsys_dist.train.sharding import materialise, shard
from tests.batches import random_batch, small_schema, take
from tests.train.ranks import run_ranks
from tests.train.unsharded import train_unsharded

SEED = 5
CONFIG = Config(hidden=(8, 4), norm="batch", activation="dice")
OPTIMIZER = OptimizerConfig.parse({"deep": {"lr": 0.1}, "dense": {"lr": 0.01}})
ROWS = (12, 12, 7, 4)  # of the global batches: the second worker gets 6, 6, 1 and none


def build() -> Loss:
    torch.manual_seed(SEED)
    return Loss(Model(CONFIG, Model.inputs(small_schema(), CONFIG)))


def global_batches() -> list[Batch]:
    return [random_batch(small_schema(), rows, rng_for(step, "moments")) for step, rows in enumerate(ROWS)]


def learned(model: Any, epoch: Epoch, batches: list[Batch]) -> dict[str, np.ndarray]:
    """Loss, last gradient norms, the tower's weights and moments, and scores, after training on `batches`."""
    epoch.sample_steps = 1
    totals = epoch.run(iter(batches), 0)
    found = {name: value.numpy().copy() for name, value in model.tower.state_dict().items()}
    scores = model.eval()(global_batches()[0]).detach().numpy()
    gradients = {f"gradient of {layer}": np.array(norm) for layer, norm in totals.gradients.items()}
    return {**found, **gradients, "loss": np.array(totals.loss), "scores": scores}


def on_rank(rank: int) -> dict[str, np.ndarray]:
    mine = [range(6 * rank, min(6 * rank + 6, rows)) for rows in ROWS]
    local = [take(b, torch.tensor(rows)) for b, rows in zip(global_batches(), mine, strict=True) if rows]
    loss = build()
    sharded = shard(loss, loss.model.table_groups(), OPTIMIZER, ShardingConfig(kind="row_wise"), SEED)
    epoch = Epoch(sharded.model, sharded.optimizers, idle_batch(small_schema(), 6), Workers())
    return learned(sharded.inner(), epoch, local)


def test_a_single_row_changes_no_running_moments() -> None:
    norm = BatchNorm(3).train()
    norm(torch.randn(8, 3))
    before = norm.mean.clone(), norm.variance.clone()
    norm(torch.randn(1, 3))
    norm(torch.randn(4, 3), torch.tensor([True, False, False, False]))
    torch.testing.assert_close((norm.mean, norm.variance), before, rtol=0, atol=0)


@pytest.mark.ranks
def test_two_workers_normalise_as_one_process() -> None:
    loss = materialise(build(), SEED)
    optimizers = train_unsharded(loss, loss.model.table_groups(), OPTIMIZER)
    epoch = Epoch(loss, optimizers, idle_batch(small_schema(), 12), Workers())
    expected = learned(loss.model, epoch, global_batches())
    moments = [name for name in expected if name.endswith(("mean", "variance"))]
    assert (
        len(moments) == 8 and "gradient of tower.layers.0" in expected
    )  # a batch norm's and a Dice's after each of two layers
    for found in run_ranks(2, on_rank):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, atol=3e-5, err_msg=name)
