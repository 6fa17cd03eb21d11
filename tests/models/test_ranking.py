"""What rankers share: objectives and tasks by their formulas, and what is refused."""

import numpy as np
import pytest
import torch

from recsys_dist.config import rng_for
from recsys_dist.errors import ConfigError
from recsys_dist.models.mlp import Config, Model
from recsys_dist.models.ranking import Objective
from recsys_dist.train.sharding import materialise
from tests.batches import random_batch, small_schema

ROWS = 7


def build(objective: Objective) -> Model:
    cfg = Config(objective=objective, hidden=(8,))
    torch.manual_seed(0)
    return materialise(Model(cfg, Model.inputs(small_schema(), cfg)), 0)


def cross_entropy(logit: np.ndarray, label: np.ndarray) -> np.ndarray:
    p = 1 / (1 + np.exp(-logit))
    return -label * np.log(p) - (1 - label) * np.log(1 - p)


def test_tasks_share_the_trunk_and_add_their_weighted_losses() -> None:
    model = build(Objective(tasks={"like": 0.5}))
    batch = random_batch(small_schema(), ROWS, rng_for(0, "rows"))
    logits = model.logits(batch).detach().double().numpy()
    assert logits.shape == (ROWS, 2)
    np.testing.assert_allclose(model(batch).detach(), logits[:, 0], rtol=1e-6)
    click, like = (batch.labels[name].double().numpy() for name in ("click", "like"))
    expected = cross_entropy(logits[:, 0], click) + 0.5 * cross_entropy(logits[:, 1], like)
    np.testing.assert_allclose(model.loss(batch, 0).detach(), expected, rtol=1e-5)


def test_positive_rows_weigh_what_they_are_told() -> None:
    plain, weighted = build(Objective()), build(Objective(positive_weight=3))
    batch = random_batch(small_schema(), ROWS, rng_for(1, "rows"))
    ratio = (weighted.loss(batch, 0) / plain.loss(batch, 0)).detach()
    torch.testing.assert_close(ratio, torch.where(batch.labels["click"] > 0, 3.0, 1.0))


def test_focal_loss_is_its_equation() -> None:
    model = build(Objective(loss="focal", focal_gamma=1.5))
    batch = random_batch(small_schema(), ROWS, rng_for(2, "rows"))
    p = 1 / (1 + np.exp(-model(batch).detach().double().numpy()))
    click = batch.labels["click"].double().numpy()
    p_t = np.where(click > 0, p, 1 - p)
    np.testing.assert_allclose(model.loss(batch, 0).detach(), -((1 - p_t) ** 1.5) * np.log(p_t), rtol=1e-5)


def test_a_task_that_is_no_other_label_is_refused() -> None:
    for name in ("lik", "click"):  # misspelt; the label itself
        cfg = Config(objective=Objective(tasks={name: 1.0}))
        with pytest.raises(ConfigError, match=f"objective.tasks has '{name}'"):
            Model.inputs(small_schema(), cfg)


def test_the_past_can_be_left_out() -> None:
    read = Model.inputs(small_schema(), Config(history=False))
    assert not read.lists and [f.name for f in read.singles] == [f.name for f in small_schema().singles]


@pytest.mark.parametrize("weight", [-1.0, 0.0, float("nan"), float("inf")])
def test_a_weight_that_would_learn_the_opposite_or_nothing_is_refused(weight: float) -> None:
    with pytest.raises(ConfigError, match="tasks"):
        Objective.parse({"tasks": {"like": weight}})
    with pytest.raises(ConfigError, match="positive_weight"):
        Objective.parse({"positive_weight": weight})
