"""Layers by hand-computable numbers: activations, initial variance, tables and their pooling."""

import numpy as np
import pytest
import torch
from torchrec import KeyedJaggedTensor, KeyedTensor

from recsys_dist.errors import ConfigError
from recsys_dist.models.layers import MLP, embedding_tables, normal, pooled
from recsys_dist.schema import Schema
from recsys_dist.train.sharding import materialise
from tests.batches import small_schema


def test_mlp_is_a_chain_of_linear_maps_and_activations() -> None:
    torch.manual_seed(0)
    mlp = MLP(3, (5, 4), "leaky_relu", out=2).double()
    weights = [p.detach().numpy() for p in mlp.parameters()]
    x = np.random.default_rng(0).normal(size=(6, 3))
    h = x
    for layer in range(3):
        h = h @ weights[2 * layer].T + weights[2 * layer + 1]
        h = h if layer == 2 else np.where(h > 0, h, 0.01 * h)
    np.testing.assert_allclose(mlp(torch.tensor(x)).detach().numpy(), h, rtol=1e-12)
    assert mlp.out_features == 2 and MLP(3, (5, 4)).out_features == 4 and MLP(3, ()).out_features == 3


@pytest.mark.parametrize(
    ("activation", "low", "high"), [("relu", 0.5, 2), ("tanh", 0.2, 1), ("prelu", 0.5, 2)]
)
def test_start_keeps_the_signal_through_ten_layers(activation: str, low: float, high: float) -> None:
    torch.manual_seed(1)
    mlp = MLP(256, (256,) * 10, activation)  # type: ignore[arg-type]
    out = mlp(torch.randn(512, 256))
    assert low < out.pow(2).mean().sqrt() < high


def test_dropout_only_drops_in_training() -> None:
    mlp = MLP(4, (64,), dropout=0.5)
    x = torch.randn(8, 4)
    assert not torch.equal(mlp(x), mlp(x))
    assert torch.equal(mlp.eval()(x), mlp(x))


def test_features_of_one_table_are_looked_up_together() -> None:
    schema = small_schema()
    tables = embedding_tables(schema, schema.ids, 4, normal(0.1))
    configs = {c.name: c for c in tables.embedding_bag_configs()}
    assert configs["item"].feature_names == ["item", "watched"]
    assert configs["author"].feature_names == ["author", "watched_authors"]
    assert [c.num_embeddings for c in configs.values()] == [30, 40, 12, 25, 64, 21]
    assert all(p.device.type == "meta" for p in tables.parameters())


def test_pooling_is_the_mean_of_the_ids_and_zero_of_none() -> None:
    schema = small_schema()
    tables = embedding_tables(schema, [schema["item"], schema["watched"]], 4, normal(1))
    materialise(tables, seed=0)
    weight = tables.embedding_bags["item"].weight
    sparse = KeyedJaggedTensor(
        keys=["watched", "item"],
        values=torch.tensor([3, 5, 7, 9, 2], dtype=torch.int32),
        lengths=torch.tensor([3, 0, 1, 1], dtype=torch.int32),
    )
    out = tables(sparse)
    torch.testing.assert_close(out["watched"][0], weight[[3, 5, 7]].mean(dim=0))
    assert not out["watched"][1].any()
    torch.testing.assert_close(out["item"], weight[[9, 2]])


def test_pooled_orders_columns_by_name_not_by_shard() -> None:
    values = torch.arange(6.0).reshape(1, 6)
    embeddings = KeyedTensor(["b", "a", "c"], [2, 2, 2], values)
    assert pooled(embeddings, ["a", "b", "c"]).tolist() == [[2, 3, 0, 1, 4, 5]]
    assert pooled(embeddings, ["b", "a", "c"]).tolist() == [[0, 1, 2, 3, 4, 5]]


def test_tables_start_as_told() -> None:
    schema = small_schema()
    weight = (
        materialise(embedding_tables(schema, schema.ids, 64, normal(0.01)), 2).embedding_bags["item"].weight
    )
    assert 0.009 < weight.std() < 0.011 and weight.requires_grad


def test_an_unfitted_schema_is_refused() -> None:
    schema = Schema.parse(
        {**small_schema().model_dump(), "features": [{"kind": "time", "name": "hour", "part": "hour"}]}
    )
    with pytest.raises(ConfigError, match="'hour' has no table size"):
        embedding_tables(schema, schema.ids, 4, normal(1))
