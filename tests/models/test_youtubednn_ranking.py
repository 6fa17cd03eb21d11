"""Weighted logistic regression: its loss by the formula, and odds that come to the expected amount."""

import numpy as np
import pytest
import torch

from recsys_dist.config import rng_for
from recsys_dist.errors import ConfigError
from recsys_dist.models.ranking import Objective
from recsys_dist.models.youtubednn_ranking import Config, Model
from recsys_dist.schema import Schema
from recsys_dist.train.sharding import materialise
from tests.batches import random_batch, small_schema


def build(cfg: Config) -> Model:
    torch.manual_seed(0)
    return materialise(Model(cfg, Model.inputs(small_schema(), cfg)), 0)


@pytest.mark.parametrize("count_all", [False, True])
def test_loss_weighs_positives_by_their_amount(count_all: bool) -> None:
    model = build(Config(count_all=count_all))
    columns = {"click": np.array([1, 1, 0, 0]), "watch_ms": np.array([2000.0, 500, 0, 900])}
    batch = random_batch(small_schema(), 4, rng_for(0, "rows"), columns)
    p = 1 / (1 + np.exp(-model(batch).detach().double().numpy()))
    positive = np.array([2.0, 0.5, 0, 0]) * -np.log(p)  # what was watched without a click counts for nothing
    negative = (np.ones(4) if count_all else np.array([0, 0, 1, 1])) * -np.log(1 - p)
    np.testing.assert_allclose(model.loss(batch, 0).detach(), positive + negative, rtol=1e-5)


@pytest.mark.parametrize("count_all", [False, True])
def test_odds_come_to_the_expected_amount(count_all: bool) -> None:
    """20 % clicks of 3 s: E[T] = 600 ms exactly, or as in the paper E[T] / (1 - P) = 750 ms."""
    model = build(Config(count_all=count_all, features=("hour",), hidden=()))
    clicked = np.arange(50) < 10
    columns = {"hour": np.ones(50, np.int64), "click": clicked, "watch_ms": 3000.0 * clicked}
    batch = random_batch(
        Model.inputs(small_schema(), Config(features=("hour",))), 50, rng_for(1, "rows"), columns
    )
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=100)

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = model.loss(batch, 0).mean()
        value.backward()
        return value

    optimizer.step(loss)
    expected = model.prediction(model(batch)).detach()
    torch.testing.assert_close(expected, torch.full((50,), 600.0 if count_all else 750.0), rtol=1e-3, atol=0)


def test_what_it_cannot_expect_is_refused() -> None:
    untimed = small_schema().model_dump()
    untimed["labels"] = [label for label in untimed["labels"] if label["kind"] == "binary"]
    with pytest.raises(ConfigError, match="the schema has none"):
        Model.inputs(Schema.parse(untimed), Config())
    with pytest.raises(ConfigError, match="did you mean 'watch_ms'"):
        Model.inputs(small_schema(), Config(value="watch"))
    with pytest.raises(ConfigError, match="its loss is its own"):
        Model.inputs(small_schema(), Config(objective=Objective(loss="focal")))
