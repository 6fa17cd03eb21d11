"""DLRM (Naumov et al. 2019, arXiv 1906.00091): floats through a bottom MLP, pairwise dots, a top MLP.

    z = top( [d, <f_i, f_j> for i < j] ),  f = (d, embedded fields),  d = bottom(floats)

`interaction=cat` is the authors' code's other one (`--arch-interaction-op`): the vectors f themselves.

B rows, F fields of ids, D embedding dimension, T tasks
"""

from typing import Any, Literal

import torch
from pydantic import Field

from recsys_dist.batch import Batch
from recsys_dist.errors import ConfigError
from recsys_dist.models.layers import MLP, Widths
from recsys_dist.models.protocol import Catalogue
from recsys_dist.models.ranking import Fields, Ranker, TowerConfig, embedded
from recsys_dist.schema import Schema


class Config(TowerConfig):
    """`hidden` is the top MLP's."""

    name: Literal["dlrm"] = "dlrm"
    bottom: Widths = Field((64,), description="widths of the bottom MLP before its last, of D")
    interaction: Literal["dot", "cat"] = "dot"
    embedding_std: float = Field(0.1, ge=0, description="dots of N(0, .01²) vectors would begin at nothing")


class Model(Ranker):
    """Logits of `schema.ranking_label`. Without floats there is no bottom MLP, and no d."""

    def __init__(self, cfg: Config, schema: Schema, catalogue: Catalogue | None = None) -> None:
        super().__init__(cfg, schema)
        del catalogue  # a ranker knows items by their features alone
        self.fields = Fields(schema, embedded(schema), [], cfg)
        floats = len(schema.dense)
        self.bottom = MLP(floats, (*cfg.bottom, cfg.embedding_dim), cfg.activation) if floats else None
        vectors = len(self.fields.names) + (floats > 0)
        self.register_buffer("pairs", torch.triu_indices(vectors, vectors, offset=1), persistent=False)
        self.pairs: torch.Tensor  # [2, pairs] i < j
        self.dots = cfg.interaction == "dot"
        inputs = self.pairs.shape[1] + cfg.embedding_dim * (floats > 0)
        self.top = cfg.tower(inputs if self.dots else vectors * cfg.embedding_dim, self.outputs)

    @staticmethod
    def inputs(schema: Schema, cfg: Any) -> Schema:
        """See Ranker; ConfigError too where there is no pair of vectors to take a dot of."""
        read = Ranker.inputs(schema, cfg)
        if cfg.interaction == "dot" and not read.dense and len(embedded(read)) == 1:
            raise ConfigError(
                f"dlrm: {embedded(read)[0].name!r} alone has nothing to interact with; name more features, "
                "or take interaction=cat"
            )
        return read

    def logits(self, batch: Batch) -> torch.Tensor:
        """[B, T]"""
        vectors, _ = self.fields(batch.sparse)
        direct = []
        if self.bottom is not None:
            floats_BD = self.bottom(batch.dense, batch.real)
            vectors, direct = torch.cat([floats_BD[:, None], vectors], dim=1), [floats_BD]
        if not self.dots:
            return self.top(vectors.flatten(1), batch.real)
        dots = vectors @ vectors.transpose(1, 2)  # [B, F + 1, F + 1]
        first, second = self.pairs
        return self.top(torch.cat([*direct, dots[:, first, second]], dim=1), batch.real)
