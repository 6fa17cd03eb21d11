"""Every model, sharded over two workers, scores and learns as it does in one process."""

from typing import Any

import numpy as np
import pytest
import torch
from torchrec import EmbeddingCollection

from recsys_dist.batch import Batch
from recsys_dist.config import rng_for
from recsys_dist.models.protocol import model_module, model_names
from recsys_dist.schema import Schema
from recsys_dist.train.loop import Epoch, Loss, Workers, idle_batch
from recsys_dist.train.optim import OptimizerConfig
from recsys_dist.train.sharding import ShardingConfig, materialise, shard, train_unsharded
from tests.batches import random_batch, small_catalogue, small_schema, take
from tests.train.ranks import run_ranks

SEED = 5
KINDS = ("table_wise", "row_wise", "data_parallel")  # the last not of tables for sequences
OPTIMIZER = OptimizerConfig.parse({"deep": {"lr": 0.1}, "wide": {"lr": 0.1}, "dense": {"lr": 0.01}})
FTRL = OptimizerConfig.parse(
    {**OPTIMIZER.model_dump(), "wide": {"rule": "ftrl", "lr": 0.1, "beta": 0.01, "l1": 0.02}}
)
DECAY = OPTIMIZER.override(["deep.weight_decay=0.01", "wide.weight_decay=0.01"])
PULLED = OPTIMIZER.override(["deep.rule=sgd"])  # Adagrad hides how large a gradient is


def inputs(name: str) -> Schema:
    module = model_module(name)
    return module.Model.inputs(small_schema(), module.Config())


def build(name: str, optimizer: OptimizerConfig) -> Loss:
    module = model_module(name)
    cfg = module.Config()
    if optimizer == PULLED:
        cfg = module.Config(regularisation=5.0, embedding_std=0.5)
    torch.manual_seed(SEED)
    return Loss(module.Model(cfg, inputs(name), small_catalogue()))


def kinds(name: str) -> tuple[str, ...]:
    sequences = any(isinstance(module, EmbeddingCollection) for module in build(name, OPTIMIZER).modules())
    return KINDS[: 2 if sequences else 3]


def global_batches(name: str) -> list[Batch]:
    """Three steps of 12 rows, the last with 7: the second worker gets 6, 6 and 1.

    The first must not have as many clicks as not: a bias that starts at 0 would have a gradient of 0 but for
    rounding, which Adam makes a step of full length.
    """
    batches = [random_batch(inputs(name), 12, rng_for(step, "workers")) for step in range(3)]
    return [*batches[:2], take(batches[2], torch.arange(7))]


def learned(model: Any, epoch: Epoch, batches: list[Batch], probe: Batch) -> list[np.ndarray]:
    """Scores of `probe` before and after training on `batches`, the epoch's loss, and item vectors."""
    before = model.eval()(probe).detach().numpy()
    totals = epoch.run(iter(batches), 0)
    after = model.eval()(probe).detach().numpy()
    vectors = model.item_vectors().detach().numpy() if model.task == "recall" else np.empty(0)
    return [before, after, np.array([totals.loss]), vectors]


def on_rank(rank: int, name: str, optimizer: OptimizerConfig) -> dict[str, list[np.ndarray]]:
    local = [take(b, torch.arange(6 * rank, min(6 * rank + 6, b.rows))) for b in global_batches(name)]
    found = {}
    for kind in kinds(name):
        loss = build(name, optimizer)
        sharded = shard(loss, loss.model.table_groups(), optimizer, ShardingConfig(kind=kind), SEED)
        epoch = Epoch(sharded.model, sharded.optimizers, idle_batch(inputs(name), 6), Workers())
        found[kind] = learned(sharded.inner(), epoch, local, global_batches(name)[0])
    return found


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("name", "optimizer"),
    [
        *((name, OPTIMIZER) for name in model_names()),
        ("wide_deep", FTRL),
        ("wide_deep", DECAY),
        ("dien", PULLED),  # its history is regularised, its negatives not
    ],
)
def test_two_workers_learn_what_one_process_learns(name: str, optimizer: OptimizerConfig) -> None:
    loss = materialise(build(name, optimizer), SEED)
    optimizers = train_unsharded(loss, loss.model.table_groups(), optimizer)
    batches = global_batches(name)
    epoch = Epoch(loss, optimizers, idle_batch(inputs(name), 12), Workers())
    expected = learned(loss.model, epoch, batches, batches[0])
    assert np.abs(expected[0] - expected[1]).max() > 1e-3  # it did learn
    for found in run_ranks(2, on_rank, name, optimizer):
        for kind in kinds(name):
            for mine, theirs in zip(found[kind], expected, strict=True):
                np.testing.assert_allclose(mine, theirs, atol=3e-5, err_msg=f"{name} {kind}")
