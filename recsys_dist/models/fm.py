"""Factorisation machine (Rendle 2010, ICDM, doi 10.1109/ICDM.2010.127).

    z = b + Σ_i w_i x_i + Σ_{i<j} <v_i, v_j> x_i x_j                                            (eq. 1)

the pairs by half the square of the sum less the sum of squares (lemma 3.1), in O(F·D). A float x_i has
its own vector v_i; a sequence is one field, the mean of its items' vectors.

B rows, F fields of ids, N floats, D embedding dimension, T tasks
"""

from typing import Literal

import torch

from recsys_dist.batch import Batch
from recsys_dist.models.layers import MLP
from recsys_dist.models.pairs import Pairs
from recsys_dist.models.protocol import Catalogue
from recsys_dist.models.ranking import EmbeddingConfig, Fields, Ranker, embedded
from recsys_dist.schema import Schema


class Config(EmbeddingConfig):
    name: Literal["fm"] = "fm"


class Model(Ranker):
    """Logits of `schema.ranking_label`; further tasks are linear in the pairs' D sums."""

    def __init__(self, cfg: Config, schema: Schema, catalogue: Catalogue | None = None) -> None:
        super().__init__(cfg, schema)
        del catalogue  # a ranker knows items by their features alone
        self.fields = Fields(schema, embedded(schema), schema.singles, cfg)
        self.pairs = Pairs(len(schema.dense), cfg.embedding_dim, cfg.embedding_std)
        self.dense = MLP(len(schema.dense), (), out=1)  # its bias is b
        self.further = MLP(cfg.embedding_dim, (), out=self.outputs - 1) if self.outputs > 1 else None

    def logits(self, batch: Batch) -> torch.Tensor:
        """[B, T]"""
        fields_BFD, linear_B = self.fields(batch.sparse)
        pairs_BD = self.pairs(fields_BFD, batch.dense)
        logit_B1 = (linear_B + pairs_BD.sum(dim=1))[:, None] + self.dense(batch.dense)
        return logit_B1 if self.further is None else torch.cat([logit_B1, self.further(pairs_BD)], dim=1)
