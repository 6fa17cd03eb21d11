"""DeepFM (Guo et al. 2017, arXiv 1703.04247): a factorisation machine and a tower on the same embeddings.

    P(y = 1 | x) = sigmoid( y_FM + y_DNN )                                                           (eq. 1)
    y_FM = w·x + Σ_{i<j} <v_i, v_j> x_i x_j                                                          (eq. 2)

B rows, F fields, D embedding dimension, T tasks
"""

from typing import Literal

import torch

from recsys_dist.batch import Batch
from recsys_dist.models.layers import MLP
from recsys_dist.models.pairs import Pairs
from recsys_dist.models.protocol import Catalogue
from recsys_dist.models.ranking import Fields, Ranker, TowerConfig, embedded
from recsys_dist.schema import Schema


class Config(TowerConfig):
    name: Literal["deepfm"] = "deepfm"


class Model(Ranker):
    """Logits of `schema.ranking_label`; further tasks are the tower's alone."""

    def __init__(self, cfg: Config, schema: Schema, catalogue: Catalogue | None = None) -> None:
        super().__init__(cfg, schema)
        del catalogue  # a ranker knows items by their features alone
        self.fields = Fields(schema, embedded(schema), schema.singles, cfg)
        self.pairs = Pairs(len(schema.dense), cfg.embedding_dim, cfg.embedding_std)
        self.dense = MLP(len(schema.dense), (), out=1)
        self.tower = cfg.tower(self.fields.width + len(schema.dense), self.outputs)

    def logits(self, batch: Batch) -> torch.Tensor:
        """[B, T]"""
        fields_BFD, linear_B = self.fields(batch.sparse)
        pairs_B = self.pairs(fields_BFD, batch.dense).sum(dim=1)
        deep_BT = self.tower(torch.cat([fields_BFD.flatten(1), batch.dense], dim=1), batch.real)
        fm_B1 = (linear_B + pairs_B)[:, None] + self.dense(batch.dense)
        return torch.cat([deep_BT[:, :1] + fm_B1, deep_BT[:, 1:]], dim=1)
