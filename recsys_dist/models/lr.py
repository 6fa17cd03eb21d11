"""Logistic regression (a perceptron with a sigmoid): the floor of every table.

    P(y = 1 | x) = sigmoid( w·x + b )

x has a one-hot stretch per single id and cross of the schema, and its floats. Lists are not read.

B rows
"""

from typing import Any, Literal

import torch
from torch import nn

from recsys_dist.batch import Batch
from recsys_dist.errors import ConfigError
from recsys_dist.feature_kinds import Bag
from recsys_dist.models.protocol import Catalogue
from recsys_dist.models.ranking import EmbeddingConfig, Fields, RankConfig, Ranker
from recsys_dist.schema import Schema


class Config(RankConfig):
    name: Literal["lr"] = "lr"


class Model(Ranker):
    """Logits of `schema.ranking_label`."""

    def __init__(self, cfg: Config, schema: Schema, catalogue: Catalogue | None = None) -> None:
        super().__init__(cfg, schema)
        del catalogue  # a ranker knows items by their features alone
        self.fields = Fields(schema, [], schema.singles, EmbeddingConfig(name=cfg.name))
        self.dense = nn.Linear(len(schema.dense), 1)
        nn.init.zeros_(self.dense.weight)
        nn.init.zeros_(self.dense.bias)

    @staticmethod
    def inputs(schema: Schema, cfg: Any) -> Schema:
        """All features but lists, or those that `cfg.features` names; ConfigError without a single id."""
        if cfg.objective.tasks:
            raise ConfigError("lr: objective.tasks needs a trunk that tasks can share; take mlp")
        read = Ranker.inputs(schema, cfg)
        read = read.select(f.name for f in read.features if not isinstance(f, Bag))
        if not read.singles:
            raise ConfigError("lr: the schema has no feature with one id per row")
        return read

    def logits(self, batch: Batch) -> torch.Tensor:
        """[B, 1]"""
        _, linear_B = self.fields(batch.sparse)
        return linear_B[:, None] + self.dense(batch.dense)
