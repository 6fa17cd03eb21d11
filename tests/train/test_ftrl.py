"""FTRL-Proximal against algorithm 1 of the paper, written out in NumPy for scalar weights."""

import numpy as np
import pytest
import torch

from recsys_dist.config import rng_for
from recsys_dist.errors import ConfigError
from recsys_dist.models.lr import Config, Model
from recsys_dist.train.ftrl import FTRL
from recsys_dist.train.loop import Epoch, Loss, Workers, idle_batch
from recsys_dist.train.optim import OptimizerConfig
from recsys_dist.train.sharding import materialise
from tests.batches import random_batch, small_schema
from tests.train.unsharded import train_unsharded

RULE = {"lr": 0.3, "beta": 0.7, "l1": 1.0, "l2": 0.2}


class Scalars:
    """Algorithm 1, one coordinate after the other."""

    def __init__(self, weights: int, lr: float, beta: float, l1: float, l2: float) -> None:
        self.z, self.n, self.w = np.zeros(weights), np.zeros(weights), np.zeros(weights)
        self.lr, self.beta, self.l1, self.l2 = lr, beta, l1, l2

    def step(self, gradient: np.ndarray) -> None:
        for i in np.flatnonzero(gradient):
            g = gradient[i]
            sigma = (np.sqrt(self.n[i] + g**2) - np.sqrt(self.n[i])) / self.lr
            self.z[i] += g - sigma * self.w[i]
            self.n[i] += g**2
            if abs(self.z[i]) <= self.l1:
                self.w[i] = 0
            else:
                scale = (self.beta + np.sqrt(self.n[i])) / self.lr + self.l2
                self.w[i] = -(self.z[i] - np.sign(self.z[i]) * self.l1) / scale


def gradients(steps: int, weights: int) -> np.ndarray:
    """Most weights have none in most steps."""
    rng = rng_for(0, "ftrl")
    return rng.normal(size=(steps, weights)) * (rng.random((steps, weights)) < 0.3)


def stepped(table: torch.Tensor, gradient: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """The table after a step for each of the gradients, spread evenly over its columns; and z and n."""
    weight = torch.nn.Parameter(table)
    optimizer = FTRL([weight], **RULE)
    for g in torch.tensor(gradient).to(table.dtype):
        weight.grad = (g[:, None] / table.shape[1]).expand_as(weight).clone()
        optimizer.step()
    return weight.detach(), optimizer.state[weight]["sum"]


def test_a_row_of_equal_columns_is_the_scalar_weight_of_algorithm_1() -> None:
    gradient = gradients(30, 50)
    expected = Scalars(50, **RULE)
    for g in gradient:
        expected.step(g)
    table, sums = stepped(torch.zeros(50, 4, dtype=torch.float64), gradient)
    for column in table.T:
        np.testing.assert_allclose(column, expected.w, rtol=1e-12)
    np.testing.assert_allclose(sums, np.stack([expected.z, expected.n], axis=1), rtol=1e-12)
    zero = expected.w == 0
    assert 5 < zero.sum() < 45 and torch.equal(table[:, 0] == 0, torch.tensor(zero))

    four, one = stepped(torch.zeros(50, 4), gradient), stepped(torch.zeros(50, 1), gradient)
    assert torch.equal(four[0], one[0].expand(50, 4)) and torch.equal(four[1], one[1])  # bit for bit


def test_it_trains_the_linear_part_as_a_scalar_weight_per_feature() -> None:
    """z = w·x of a one-hot x, the gradient of the mean loss xᵀ(sigmoid(z) - y) / B into algorithm 1."""
    cfg = Config(features=("user", "item", "hour"))
    rule = {"lr": 0.5, "beta": 0.01, "l1": 0.06, "l2": 0.05}
    optimizer = OptimizerConfig.parse({"wide": {"rule": "ftrl", **rule}, "dense": {"lr": 1e-30}})
    schema = Model.inputs(small_schema(), cfg)
    rng = rng_for(1, "ftrl")
    batches = []
    for _ in range(20):
        item = rng.integers(1, 40, 64)  # clicks follow the item's row; users and hours are noise
        columns = {"item": item, "click": (rng.random(64) < np.where(item % 2, 0.9, 0.1)).astype(float)}
        batches.append(random_batch(schema, 64, rng, columns))
    loss = materialise(Loss(Model(cfg, schema)), 0)
    optimizers = train_unsharded(loss, loss.model.table_groups(), optimizer)
    Epoch(loss, optimizers, idle_batch(schema, 64), Workers()).run(iter(batches), 0)
    rows = loss.model.fields.wide_rows
    table = loss.model.fields.tables.embedding_bags["wide"].weight.detach().numpy()

    expected = Scalars(len(table), **rule)
    for batch in batches:
        x = np.zeros((64, len(table)))
        for name, first in rows.items():
            x[np.arange(64), first + batch.sparse[name].values().numpy()] = 1
        p = 1 / (1 + np.exp(-x @ expected.w))
        expected.step(x.T @ (p - batch.labels["click"].numpy()) / 64)
    np.testing.assert_allclose(table.mean(axis=1), expected.w, atol=1e-5)
    noise = np.r_[table[rows["user"] : rows["item"]], table[rows["hour"] :]]
    assert (noise == 0).all(axis=1).mean() > 0.5, "L1 leaves noise out, exactly"
    assert (table[rows["item"] + 1 : rows["hour"]] != 0).all(axis=1).mean() > 0.8


def test_more_l1_leaves_fewer_weights() -> None:
    left = []
    for l1 in (0, 0.5, 2, 20):
        weight = torch.nn.Parameter(torch.zeros(200, 4))
        optimizer = FTRL([weight], lr=0.1, beta=1, l1=l1, l2=0)
        for g in torch.tensor(gradients(20, 200), dtype=torch.float32):
            weight.grad = g[:, None].expand(200, 4) / 4
            optimizer.step()
        left.append(int(weight.count_nonzero()))
    assert left == sorted(left, reverse=True) and left[0] > 790 and left[-1] == 0


def test_what_it_is_not_for_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"it is for optimizer.wide alone"):
        OptimizerConfig.parse({"deep": {"rule": "ftrl"}})
    with pytest.raises(ConfigError, match=r"l1 and l2 are of rule 'ftrl'; 'adagrad' has none"):
        OptimizerConfig.parse({"wide": {"rule": "adagrad", "l1": 0.1}})
