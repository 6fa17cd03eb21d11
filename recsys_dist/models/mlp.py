"""A multilayer perceptron over embeddings (the "DNN" of every table): what all deep rankers are measured by.

    a⁰ = [embedded fields, floats],  aˡ = f(Wˡ aˡ⁻¹ + bˡ),  P(y = 1 | x) = sigmoid( w·a + b )

A sequence is one field, the mean of its items' embeddings.

B rows, F fields, D embedding dimension, T tasks
"""

from typing import Literal

import torch

from recsys_dist.batch import Batch
from recsys_dist.models.protocol import Catalogue
from recsys_dist.models.ranking import Fields, Ranker, TowerConfig, embedded
from recsys_dist.schema import Schema


class Config(TowerConfig):
    name: Literal["mlp"] = "mlp"


class Model(Ranker):
    """Logits of `schema.ranking_label`."""

    def __init__(self, cfg: Config, schema: Schema, catalogue: Catalogue | None = None) -> None:
        super().__init__(cfg, schema)
        del catalogue  # a ranker knows items by their features alone
        self.fields = Fields(schema, embedded(schema), [], cfg)
        self.tower = cfg.tower(self.fields.width + len(schema.dense), self.outputs)

    def logits(self, batch: Batch) -> torch.Tensor:
        """[B, T]"""
        fields_BFD, _ = self.fields(batch.sparse)
        return self.tower(torch.cat([fields_BFD.flatten(1), batch.dense], dim=1), batch.real)
