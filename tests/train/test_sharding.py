import numpy as np
import pytest
import torch
from torchrec import EmbeddingBagConfig

from recsys_dist.errors import ConfigError
from recsys_dist.train.loop import Epoch, Loss, Workers, idle_batch
from recsys_dist.train.optim import OptimizerConfig
from recsys_dist.train.placement import ShardingConfig
from recsys_dist.train.sharding import materialise, shard
from recsys_dist.train.starting import blocks
from tests.train import tiny
from tests.train.ranks import run_ranks
from tests.train.truth import SEED, train, whole
from tests.train.unsharded import train_unsharded

GLOBAL_ROWS = [24, 24, 24, 17, 1]  # the last global batches are short: uneven and empty local batches
ROWWISE = OptimizerConfig.parse({"deep": {"lr": 0.3}, "wide": {"lr": 0.1}, "dense": {"lr": 0.01}})
ADAGRAD = OptimizerConfig.parse(
    {"deep": {"lr": 0.3, "rule": "adagrad"}, "wide": {"lr": 0.1, "rule": "adagrad"}, "dense": {"lr": 0.01}}
)


def global_batches() -> list:
    return [tiny.batch_of(rows, step) for step, rows in enumerate(GLOBAL_ROWS)]


def local_batches(rank: int, rows_per_worker: int):
    for batch in global_batches():
        start, stop = min(rank * rows_per_worker, batch.rows), min((rank + 1) * rows_per_worker, batch.rows)
        if start < stop:
            yield tiny.rows_of(batch, start, stop)


def build() -> Loss:
    torch.manual_seed(SEED)
    return Loss(tiny.Model(tiny.Config(), tiny.schema()))


FTRL = OptimizerConfig.parse(
    {"deep": {"lr": 0.3}, "wide": {"lr": 0.3, "rule": "ftrl", "l1": 2e-3}, "dense": {"lr": 0.01}}
)
DECAY = ROWWISE.override(["wide.weight_decay=0.02"])


def train_slowly(rank: int, optimizer: OptimizerConfig, factor: float) -> dict[str, np.ndarray]:
    loss = build()
    tables = ShardingConfig.parse({"tables": {"user": "data_parallel"}})
    sharded = shard(loss, loss.model.table_groups(), optimizer, tables, SEED)
    sharded.scale_rates(0.5)
    sharded.scale_rates(factor)
    train(
        Epoch(sharded.model, sharded.optimizers, idle_batch(tiny.schema(), 12), Workers()),
        local_batches(rank, 12),
    )
    return whole(sharded.weights())


@pytest.mark.ranks
@pytest.mark.parametrize("optimizer", [ROWWISE, DECAY], ids=["fused", "unfused"])
def test_scaled_rates_train_as_rates_that_were_set_so(optimizer):
    """Of dense weights, fused tables, data-parallel ones, and those without a kernel; not scaled twice."""
    lower = optimizer.override(
        [f"{of}.lr={getattr(optimizer, of).lr * 0.1}" for of in ("dense", "deep", "wide")]
    )
    scaled, set_so = run_ranks(2, train_slowly, optimizer, 0.1)[0], run_ranks(2, train_slowly, lower, 1.0)[0]
    for name, weight in set_so.items():
        np.testing.assert_allclose(scaled[name], weight, atol=1e-6, err_msg=name)


@pytest.mark.ranks
@pytest.mark.parametrize("kind", ["table_wise", "row_wise"])
def test_starting_values_do_not_depend_on_placement(kind):
    loss = materialise(build(), SEED)
    for found in run_ranks(2, started, kind):
        for name, weight in loss.state_dict().items():
            np.testing.assert_array_equal(found[name], weight.numpy(), err_msg=name)


def started(_rank: int, kind: str) -> dict[str, np.ndarray]:
    loss = build()
    return whole(shard(loss, loss.model.table_groups(), ROWWISE, ShardingConfig(kind=kind), SEED).weights())


def test_rowwise_adagrad_by_hand():
    """Two unsharded steps against the rule written out: s += mean(g^2), w -= lr g / (sqrt(s) + eps)."""
    loss, copy = materialise(build(), SEED), materialise(build(), SEED)
    optimizers = train_unsharded(loss, loss.model.table_groups(), ROWWISE)
    train(Epoch(loss, optimizers, idle_batch(tiny.schema(), 24), Workers()), global_batches()[:2])
    name = "model.deep.embedding_bags.item.weight"
    by_hand, total = dict(copy.named_parameters())[name], torch.zeros(tiny.ROWS["item"])
    adam = torch.optim.Adam([p for n, p in copy.named_parameters() if "tower" in n], lr=0.01)
    sums = {}
    for batch in global_batches()[:2]:
        copy.zero_grad()
        ((copy(batch, 0) * batch.weight).sum() / batch.weight.sum()).backward()
        adam.step()
        with torch.no_grad():
            for other, weight in copy.named_parameters():
                if "tower" in other:
                    continue
                total = sums.setdefault(other, torch.zeros(len(weight)))
                total += (weight.grad**2).mean(dim=1)
                lr = 0.1 if "wide" in other else 0.3
                weight -= lr * weight.grad / (total.sqrt() + 1e-8)[:, None]
    trained = dict(loss.named_parameters())[name]
    np.testing.assert_allclose(trained.detach(), by_hand.detach(), atol=1e-6)


def test_blocks_cover_a_table_alike_however_they_are_asked_for():
    rows = 65_536 + 100
    config = EmbeddingBagConfig(name="t", num_embeddings=rows, embedding_dim=4, init_fn=torch.nn.init.normal_)
    [(first, head), (second, tail)] = blocks(config, 1, "t", 0, rows)
    assert (first, second, len(head), len(tail)) == (0, 65_536, 65_536, 100)
    [(start, again)] = blocks(config, 1, "t", 65_540, 65_545)
    assert start == 65_536 and torch.equal(again, tail)
    assert not torch.equal(head[:100], tail)


@pytest.mark.ranks
def test_impossible_placements_explain_themselves():
    [messages] = run_ranks(1, refusals)
    assert "row-wise Adagrad would keep an accumulator per column shard" in messages["column_wise"]
    assert "did you mean 'item'" in messages["typo"]
    assert "sequence table" in messages["sequence"]
    assert "dimension 4 cannot be cut" in messages["narrow"]


def refusals(_rank: int) -> dict[str, str]:
    def message(sharding: dict, optimizer: OptimizerConfig = ROWWISE) -> str:
        loss = build()
        with pytest.raises(ConfigError) as error:
            shard(loss, loss.model.table_groups(), optimizer, ShardingConfig.parse(sharding), SEED)
        return str(error.value)

    return {
        "column_wise": message({"kind": "column_wise"}),
        "typo": message({"tables": {"itm": "row_wise"}}),
        "sequence": message({"tables": {"step": "data_parallel"}}),
        "narrow": message({"tables": {"wide_item": "column_wise"}}, ADAGRAD),
    }


def decay_of_a_sequence_table(_rank: int) -> str:
    with pytest.raises(ConfigError) as error:
        loss = build()
        decay = ROWWISE.override(["deep.weight_decay=0.01"])
        shard(loss, loss.model.table_groups(), decay, ShardingConfig(), SEED)
    return str(error.value)


@pytest.mark.ranks
def test_weight_decay_of_a_sequence_table_is_refused():
    assert "'step' is of sequences" in run_ranks(1, decay_of_a_sequence_table)[0]
