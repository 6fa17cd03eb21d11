"""A small ranking model with every kind of table that training must handle, and batches for it."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import nn
from torchrec import (
    EmbeddingBagCollection,
    EmbeddingBagConfig,
    EmbeddingCollection,
    EmbeddingConfig,
    KeyedJaggedTensor,
    PoolingType,
)

from recsys_dist.batch import Batch
from recsys_dist.config import rng_for
from recsys_dist.models.protocol import ModelConfig
from recsys_dist.schema import Schema

KEYS = ["user", "item", "history"]
ROWS = {"user": 50, "item": 40}


def schema(rows: Mapping[str, int] = ROWS) -> Schema:
    """Two single ids, a history sharing the item table, two floats, one label; already fitted."""
    return Schema.parse(
        {
            "features": [
                {"kind": "categorical", "name": "user", "column": "user_id"},
                {"kind": "categorical", "name": "item", "column": "item_id"},
                {"kind": "sequence", "name": "history", "of": "item", "max_length": 4},
                {"kind": "numeric", "name": "age", "column": "users.age"},
                {"kind": "numeric", "name": "length", "column": "items.length"},
            ],
            "labels": [{"name": "click"}],
            "ranking_label": "click",
            "recall_positive": ["click"],
        }
    ).fitted(rows)


class Config(ModelConfig):
    name: Literal["tiny"] = "tiny"
    dim: int = 8
    width: int = 16


class Model(nn.Module):
    """Pooled deep tables, a one-dimensional wide table, a sequence table, and a two-layer tower."""

    task: ClassVar[str] = "ranking"

    def __init__(self, cfg: Config, schema: Schema, catalogue: Any = None) -> None:
        super().__init__()
        del catalogue
        self.label = schema.ranking_label
        meta = torch.device("meta")
        self.deep = EmbeddingBagCollection(
            tables=[
                EmbeddingBagConfig(
                    name="user", embedding_dim=cfg.dim, num_embeddings=ROWS["user"], feature_names=["user"]
                ),
                EmbeddingBagConfig(
                    name="item",
                    embedding_dim=cfg.dim,
                    num_embeddings=ROWS["item"],
                    feature_names=["item", "history"],
                    pooling=PoolingType.MEAN,
                ),
                EmbeddingBagConfig(
                    name="wide_item", embedding_dim=4, num_embeddings=ROWS["item"], feature_names=["item"]
                ),
            ],
            device=meta,
        )
        self.steps = EmbeddingCollection(
            tables=[
                EmbeddingConfig(
                    name="step", embedding_dim=cfg.dim, num_embeddings=ROWS["item"], feature_names=["history"]
                )
            ],
            device=meta,
        )
        inputs = 4 * cfg.dim + 2
        self.tower = nn.Sequential(nn.Linear(inputs, cfg.width), nn.ReLU(), nn.Linear(cfg.width, 1))

    @staticmethod
    def inputs(schema: Schema, _cfg: Config) -> Schema:
        return schema

    def forward(self, batch: Batch) -> torch.Tensor:
        pooled = self.deep(batch.sparse).to_dict()
        history = self.steps(batch.sparse)["history"]
        lengths = history.lengths()
        of_row = torch.repeat_interleave(torch.arange(batch.rows), lengths)
        summed = torch.zeros(batch.rows, history.values().shape[1]).index_add(0, of_row, history.values())
        item = "item@item" if "item@item" in pooled else "item"
        wide = "item@wide_item"
        inputs = [pooled["user"], pooled[item], pooled["history"], torch.tanh(summed), batch.dense]
        return self.tower(torch.cat(inputs, dim=1)).squeeze(1) + pooled[wide].sum(1)

    def loss(self, batch: Batch, step: int) -> torch.Tensor:
        del step
        return nn.functional.binary_cross_entropy_with_logits(
            self(batch), batch.labels[self.label], reduction="none"
        )

    def table_groups(self) -> Mapping[str, list[nn.Parameter]]:
        bags = self.deep.embedding_bags
        return {
            "deep": [bags["user"].weight, bags["item"].weight, self.steps.embeddings["step"].weight],
            "wide": [bags["wide_item"].weight],
        }


def batch_of(rows: int, *key: str | int, weighted: bool = True) -> Batch:
    """Random rows, the same for the same key."""
    rng = rng_for(7, "tiny", *key)
    lengths = torch.from_numpy(rng.integers(0, 5, rows).astype("int32"))
    ones = torch.ones(rows, dtype=torch.int32)
    history = torch.from_numpy(rng.integers(1, ROWS["item"], int(lengths.sum())).astype("int32"))
    user = torch.from_numpy(rng.integers(0, ROWS["user"], rows).astype("int32"))
    item = torch.from_numpy(rng.integers(0, ROWS["item"], rows).astype("int32"))
    return Batch(
        dense=torch.from_numpy(rng.normal(size=(rows, 2)).astype("float32")),
        sparse=KeyedJaggedTensor(
            keys=KEYS,
            values=torch.cat([user, item, history]),
            lengths=torch.cat([ones, ones, lengths]),
        ),
        labels={"click": torch.from_numpy(rng.integers(0, 2, rows).astype("float32"))},
        weight=torch.from_numpy(rng.uniform(0.2, 3.0, rows).astype("float32"))
        if weighted
        else torch.ones(rows),
        row_id=torch.arange(rows, dtype=torch.int64),
    )


def rows_of(batch: Batch, start: int, stop: int) -> Batch:
    """Rows `start:stop` of a batch: what one worker gets of a global batch."""
    per_key = batch.sparse.to_dict()
    values, lengths = [], []
    for key in KEYS:
        offsets = per_key[key].offsets()
        values.append(per_key[key].values()[int(offsets[start]) : int(offsets[stop])])
        lengths.append(per_key[key].lengths()[start:stop])
    return Batch(
        batch.dense[start:stop],
        KeyedJaggedTensor(keys=KEYS, values=torch.cat(values), lengths=torch.cat(lengths)),
        {name: label[start:stop] for name, label in batch.labels.items()},
        batch.weight[start:stop],
        batch.row_id[start:stop],
    )
