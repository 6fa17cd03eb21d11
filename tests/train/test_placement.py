"""Where the planner puts tables: as much work for each worker, by what a row of data asks of them."""

from collections import defaultdict

import pytest
import torch
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig

from recsys_dist.errors import ConfigError
from recsys_dist.train.optim import OptimizerConfig
from recsys_dist.train.placement import ShardingConfig, place


def together(dims: dict[str, int], ids: dict[str, float], workers: int = 2) -> list[set[str]]:
    """The tables of each worker, of a model with tables of such dimensions."""
    tables = [
        EmbeddingBagConfig(name=name, num_embeddings=1000, embedding_dim=dim, feature_names=[f"of_{name}"])
        for name, dim in dims.items()
    ]
    model = nn.ModuleDict({"tables": EmbeddingBagCollection(tables=tables, device=torch.device("meta"))})
    groups = {"deep": list(model.parameters())}
    found = defaultdict(set)
    for table in place(model, groups, OptimizerConfig(), ShardingConfig(ids=ids), workers):
        [(worker, _, _)] = table.pieces
        found[worker].add(table.name)
    return sorted(found.values(), key=len)


def test_a_table_of_many_ids_has_a_worker_of_its_own() -> None:
    dims = dict.fromkeys("abcd", 16)
    assert list(map(len, together(dims, {}))) == [2, 2]
    assert together(dims, {"c": 12.0}) == [{"c"}, {"a", "b", "d"}]


def test_small_tables_of_many_ids_are_placed_first() -> None:
    dims = {"narrow": 4, "a": 16, "b": 16, "c": 16}
    assert together(dims, {"narrow": 3.5}) == [{"narrow"}, {"a", "b", "c"}]


def test_a_table_that_the_model_has_not_is_named() -> None:
    with pytest.raises(ConfigError, match=r"sharding\.ids: the model has no table 'itme'.*'item'"):
        together({"item": 16}, {"itme": 2.0})
