import numpy as np
import pytest
import torch

from recsys_dist.errors import NonFiniteLossError
from recsys_dist.train.loop import Epoch, Loss, Totals, Workers, idle_batch
from recsys_dist.train.optim import OptimizerConfig, Optimizers
from recsys_dist.train.placement import ShardingConfig
from recsys_dist.train.sharding import materialise, shard
from tests.train import tiny
from tests.train.ranks import run_ranks
from tests.train.truth import whole
from tests.train.unsharded import train_unsharded

OPTIMIZER = OptimizerConfig()


class Remembering(Loss):
    """Keeps the row ids that it was trained on."""

    def __init__(self, model) -> None:
        super().__init__(model)
        self.seen: list[torch.Tensor] = []

    def forward(self, batch, step):
        self.seen.append(batch.row_id[batch.weight > 0])
        return super().forward(batch, step)


def epoch_of(loss, rows: int = 8) -> Epoch:
    materialise(loss, 0)
    optimizers = train_unsharded(loss, loss.model.table_groups(), OPTIMIZER)
    return Epoch(loss, optimizers, idle_batch(tiny.schema(), rows), Workers())


def with_ids(batch, first: int):
    batch.row_id.copy_(torch.arange(first, first + batch.rows))
    return batch


def uneven(rank: int, counts: list[list[int]]) -> tuple[list[int], int, int, float]:
    """This rank trains `counts[rank]` batches of so many rows; returns its rows, and the global totals."""
    torch.manual_seed(0)
    loss = Remembering(tiny.Model(tiny.Config(), tiny.schema()))
    sharded = shard(loss, loss.model.table_groups(), OPTIMIZER, ShardingConfig(kind="row_wise"), 0)
    epoch = Epoch(sharded.model, sharded.optimizers, idle_batch(tiny.schema(), 8), Workers())
    batches = [
        with_ids(tiny.batch_of(rows, rank, number), 1000 * rank + 8 * number)
        for number, rows in enumerate(counts[rank])
    ]
    totals = epoch.run(iter(batches), 0)
    return torch.cat(loss.seen).tolist(), totals.steps, totals.rows, totals.weight


@pytest.mark.ranks
@pytest.mark.parametrize(
    "counts", [[[8, 8, 8, 3], [8]], [[8], []], [[], [5]], [[8, 8], [8, 7], [8, 8, 8, 8]]]
)
def test_uneven_shards_train_each_row_once_and_do_not_hang(counts):
    found = run_ranks(len(counts), uneven, counts, timeout_s=60)
    for rank, (rows, steps, total_rows, weight) in enumerate(found):
        expected = [1000 * rank + 8 * n + i for n, size in enumerate(counts[rank]) for i in range(size)]
        assert rows == expected
        assert steps == max(map(len, counts))
        assert total_rows == sum(map(sum, counts))
        assert weight == pytest.approx(found[0][3])


def test_no_data_at_all_is_an_empty_epoch():
    totals = epoch_of(Loss(tiny.Model(tiny.Config(), tiny.schema()))).run(iter([]), 0)
    assert (totals.steps, totals.rows, totals.loss) == (0, 0, 0.0)


def test_loss_is_the_weighted_mean_before_each_step():
    loss = Loss(tiny.Model(tiny.Config(), tiny.schema()))
    epoch = epoch_of(loss)
    batch = tiny.batch_of(8, "loss")
    with torch.no_grad():
        expected = float((loss(batch, 0) * batch.weight).sum() / batch.weight.sum())
    assert epoch.run(iter([batch]), 0).loss == pytest.approx(expected)


def test_rows_of_weight_zero_change_nothing():
    torch.manual_seed(0)
    one = Loss(tiny.Model(tiny.Config(), tiny.schema()))
    torch.manual_seed(0)
    two = Loss(tiny.Model(tiny.Config(), tiny.schema()))
    batch, other = tiny.batch_of(8, "a"), tiny.batch_of(8, "b")
    other.weight.zero_()
    epoch_of(one).run(iter([batch]), 0)
    epoch_of(two).run(iter([batch, other]), 0)
    tables = {n: w for n, w in one.state_dict().items() if "embedding" in n}  # Adam moves on by its momentum
    for name, weight in tables.items():
        np.testing.assert_array_equal(two.state_dict()[name].numpy(), weight.numpy(), err_msg=name)


def test_what_adam_goes_on_from_lies_where_its_weight_does() -> None:
    """As on a GPU, for which "meta" stands in: checkpoints are read on the host."""
    weight = torch.nn.Parameter(torch.empty(3, device="meta"))
    optimizers = Optimizers([("tower", weight)], {}, OPTIMIZER.dense)
    optimizers.load_state({"tower.step": torch.tensor(7.0), "tower.exp_avg": torch.ones(3)})
    assert {slot: value.device.type for slot, value in optimizers.state().items()} == {
        "tower.step": "meta",
        "tower.exp_avg": "meta",
    }


def nan_on_rank_one(rank: int) -> str:
    torch.manual_seed(0)
    loss = Loss(tiny.Model(tiny.Config(), tiny.schema()))
    sharded = shard(loss, loss.model.table_groups(), OPTIMIZER, ShardingConfig(), 0)
    batches = [with_ids(tiny.batch_of(8, rank, number), (rank + 1 << 32) + 8 * number) for number in range(6)]
    if rank == 1:
        batches[2].dense[3, 0] = float("nan")
        batches[2].dense[5, 1] = float("inf")
    epoch = Epoch(sharded.model, sharded.optimizers, idle_batch(tiny.schema(), 8), Workers())
    with pytest.raises(NonFiniteLossError) as error:
        epoch.run(iter(batches), 100)
    return str(error.value)


@pytest.mark.ranks
def test_a_nan_stops_all_workers_and_names_its_rows():
    for message in run_ranks(2, nan_on_rank_one, timeout_s=60):
        assert "step 102 is not finite in 2 of its 16 rows: shard 2 row 19, shard 2 row 21" in message


def leaving_out(rank: int, bad_steps: list[int], skip_steps: int) -> tuple[dict[str, np.ndarray], Totals]:
    """Six batches of 8 rows a rank; `bad_steps` have a NaN on rank 1, or are not there with no skipping."""
    torch.manual_seed(0)
    loss = Loss(tiny.Model(tiny.Config(), tiny.schema()))
    sharded = shard(loss, loss.model.table_groups(), OPTIMIZER, ShardingConfig(kind="row_wise"), 0)
    batches = [tiny.batch_of(8, rank, number) for number in range(6)]
    for step in bad_steps:
        batches[step].dense[3, 0] = float("nan") if rank == 1 else 0.0
    if not skip_steps:
        batches = [batch for step, batch in enumerate(batches) if step not in bad_steps]
    idle = idle_batch(tiny.schema(), 8)
    epoch = Epoch(sharded.model, sharded.optimizers, idle, Workers(), skip_steps=skip_steps)
    totals = epoch.run(iter(batches), 0)
    return whole({**sharded.weights(), **sharded.accumulators()}), totals


@pytest.mark.ranks
@pytest.mark.parametrize("bad_steps", [[2], [0, 1, 4], [4, 5]])
def test_steps_that_are_left_out_leave_no_trace(bad_steps):
    found, totals = run_ranks(2, leaving_out, bad_steps, 2)[0]
    expected, without = run_ranks(2, leaving_out, bad_steps, 0)[0]
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    assert (totals.steps, totals.skipped) == (6, 16 * len(bad_steps))
    assert (totals.rows, totals.loss) == (without.rows, without.loss)


def test_more_steps_in_a_row_than_may_be_left_out_end_training():
    batches = [tiny.batch_of(8, "nan", number) for number in range(5)]
    for number in (0, 2, 3):
        batches[number].dense[0, 0] = float("nan")
    loss = Loss(tiny.Model(tiny.Config(), tiny.schema()))
    epoch = epoch_of(loss)
    epoch.skip_steps = 1
    with pytest.raises(NonFiniteLossError, match="step 3 is not finite"):
        epoch.run(iter(batches), 0)


def test_a_nan_in_the_last_step_is_not_missed():
    batch = tiny.batch_of(8, "nan")
    batch.dense[0, 0] = float("nan")
    with pytest.raises(NonFiniteLossError, match="shard 0 row 0"):
        epoch_of(Loss(tiny.Model(tiny.Config(), tiny.schema()))).run(iter([batch]), 0)


def test_diverged_weights_are_told_from_bad_rows():
    loss = Loss(tiny.Model(tiny.Config(), tiny.schema()))
    epoch = epoch_of(loss)
    with torch.no_grad():
        loss.model.tower[2].bias.fill_(float("nan"))
    with pytest.raises(NonFiniteLossError, match="the weights diverged before; lower the learning rates"):
        epoch.run(iter([tiny.batch_of(8, "x")]), 0)


def test_gradient_norms_are_each_layers_own_at_the_sampled_steps():
    """The norm of a layer's weights and bias together, before clipping; steps 4 and 6 of 3..6 are sampled."""
    loss = Loss(tiny.Model(tiny.Config(), tiny.schema()))
    materialise(loss, 0)
    cfg = OptimizerConfig.parse({"dense": {"clip_norm": 1e-3}})
    optimizers = train_unsharded(loss, loss.model.table_groups(), cfg)
    norms = {0: [], 2: []}  # layer -> of every step

    def watched(step=optimizers.step) -> None:
        for layer, found in norms.items():
            parts = [p.grad.double().numpy().ravel() for p in loss.model.tower[layer].parameters()]
            found.append(np.sqrt((np.concatenate(parts) ** 2).sum()))
        step()

    optimizers.step = watched
    told = []
    epoch = Epoch(loss, optimizers, idle_batch(tiny.schema(), 8), Workers(), sample_steps=2)
    epoch.on_step = lambda totals: told.append(totals.gradients)
    epoch.run((tiny.batch_of(8, "norms", step) for step in range(4)), 3)
    expected = [{f"tower.{layer}": pytest.approx(norms[layer][at]) for layer in norms} for at in (1, 1, 3)]
    assert told == [{}, *expected]
    assert told[1] != told[3] and min(told[1].values()) > 1e-3


def test_clipping_bounds_the_dense_gradient():
    cfg = OptimizerConfig.parse({"dense": {"clip_norm": 0.01}})
    loss = Loss(tiny.Model(tiny.Config(), tiny.schema()))
    materialise(loss, 0)
    optimizers = train_unsharded(loss, loss.model.table_groups(), cfg)
    norms = []
    for dense in list(optimizers.dense.values())[:1]:
        dense.register_post_accumulate_grad_hook(lambda p: norms.append(float(p.grad.norm())))
    step = optimizers._optimizers[0].step
    clipped = []

    def watched() -> None:
        clipped.append(float(torch.cat([p.grad.flatten() for p in optimizers.dense.values()]).norm()))
        step()

    optimizers._optimizers[0].step = watched
    Epoch(loss, optimizers, idle_batch(tiny.schema(), 8), Workers()).run(iter([tiny.batch_of(8, "c")]), 0)
    assert norms[0] > 0.01
    assert clipped[0] == pytest.approx(0.01, rel=1e-3)
