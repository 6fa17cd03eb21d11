"""Logistic regression against its formula over one-hot features, and crosses as products of indicators."""

import dataclasses

import numpy as np
import pytest
import torch

from recsys_dist.batch import Batch
from recsys_dist.config import rng_for
from recsys_dist.data import transforms
from recsys_dist.errors import ConfigError
from recsys_dist.models.lr import Config, Model
from recsys_dist.train.sharding import materialise
from tests.batches import random_batch, small_schema

BUCKETS = 63  # and row 0: the 64 rows of small_schema's cross


def build() -> Model:
    torch.manual_seed(0)
    model = materialise(Model(Config(), Model.inputs(small_schema(), Config())), 0).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    return model


def doubled(batch: Batch) -> Batch:
    labels = {name: label.double() for name, label in batch.labels.items()}
    return dataclasses.replace(batch, dense=batch.dense.double(), labels=labels)


def test_logit_and_gradient_are_those_of_one_hot_features() -> None:
    """z = w·x + b over the whole one-hot x; dL/dw = xᵀ (sigmoid(z) - y)."""
    model = build()
    batch = doubled(random_batch(Model.inputs(small_schema(), Config()), 20, rng_for(0, "lr")))
    table = model.fields.tables.embedding_bags["wide"].weight
    x = np.zeros((batch.rows, len(table)))
    for name, first in model.fields.wide_rows.items():
        x[np.arange(batch.rows), first + batch.sparse[name].values().numpy()] = 1
    w = table.detach().numpy().mean(axis=1)  # a weight is the mean of its columns
    dense = batch.dense.numpy()
    z = x @ w + dense @ model.dense.weight.detach().numpy()[0] + model.dense.bias.item()
    # TorchRec looks up in single precision, whatever the table's
    np.testing.assert_allclose(model(batch).detach(), z, atol=2e-6)

    model.loss(batch, 0).sum().backward()
    residual = 1 / (1 + np.exp(-z)) - batch.labels["click"].numpy()
    np.testing.assert_allclose(table.grad.numpy().sum(axis=1), x.T @ residual, atol=2e-6)
    np.testing.assert_allclose(model.dense.weight.grad[0], dense.T @ residual, rtol=1e-5)
    np.testing.assert_allclose(model.dense.bias.grad, [residual.sum()], rtol=1e-5)


def test_a_weight_on_a_cross_is_the_product_form() -> None:
    """Wide & Deep's eq. 1, φ_k(x) = Π x_i^{c_ki}: 1 where all of a cross's indicators are 1, else 0.

    Σ_k w_k φ_k(x) over all pairs (u, a) of ids, each with the weight of its bucket, against the lookup.
    """
    model = build()
    rng = rng_for(1, "cross")
    user, author = rng.integers(0, 30, 40), rng.integers(0, 12, 40)  # row 0, unknown, is no feature
    ids = {"user": user, "author": author, "user_x_author": transforms.cross([user, author], BUCKETS)}
    batch = doubled(random_batch(Model.inputs(small_schema(), Config()), 40, rng, ids))
    first = model.fields.wide_rows["user_x_author"]
    weight = model.fields.tables.embedding_bags["wide"].weight
    with torch.no_grad():
        weight[first] = 0  # no φ is 1
    is_user, is_author = np.eye(30)[user], np.eye(12)[author]
    pairs = np.stack(np.meshgrid(np.arange(1, 30), np.arange(1, 12), indexing="ij"), axis=-1).reshape(-1, 2)
    bucket = transforms.cross([pairs[:, 0], pairs[:, 1]], BUCKETS)
    w = weight.detach().numpy().mean(axis=1)[first + bucket]
    phi = is_user[:, pairs[:, 0]] * is_author[:, pairs[:, 1]]  # [rows, pairs]
    with_cross = model(batch)
    with torch.no_grad():
        weight[first:] = 0
    np.testing.assert_allclose((with_cross - model(batch)).detach(), phi @ w, atol=2e-6)
    assert set(phi.sum(axis=1)) == {0, 1}  # a row has one pair, or an unknown id and none


def test_what_it_cannot_do_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"lr: objective.tasks needs a trunk"):
        Model.inputs(small_schema(), Config.parse({"objective": {"tasks": {"like": 1.0}}}))
    with pytest.raises(ConfigError, match="no feature with one id per row"):
        Model.inputs(small_schema(), Config(features=("age",)))
