"""Deep Crossing (Shan et al. 2016, KDD, doi 10.1145/2939672.2939704): residual units over stacked embeddings.

    x⁰ = [embedded fields, floats]                                                         (stacking, §4.2)
    xˡ⁺¹ = ReLU( xˡ + W₁ ReLU(W₀ xˡ + b₀) + b₁ )                                 (residual unit, eq. 4)

The paper passes features of few values unembedded; here every id is embedded.

B rows, F fields, D embedding dimension, I = F·D + floats inputs, H inner width, T tasks
"""

from typing import Literal

import torch
from pydantic import Field
from torch import nn

from recsys_dist.batch import Batch
from recsys_dist.models.layers import MLP, Activation, Norm, Widths
from recsys_dist.models.protocol import Catalogue
from recsys_dist.models.ranking import EmbeddingConfig, Fields, Ranker, embedded
from recsys_dist.schema import Schema


class Config(EmbeddingConfig):
    name: Literal["deep_crossing"] = "deep_crossing"
    hidden: Widths = Field((256, 128), description="inner width of each residual unit")
    activation: Activation = "relu"
    norm: Norm | None = None
    dropout: float = Field(0.0, ge=0, lt=1)


class ResidualUnit(nn.Module):
    """Two layers around an inner width, added to their input before the last ReLU."""

    def __init__(self, inputs: int, inner: int, cfg: Config) -> None:
        super().__init__()
        self.inner = MLP(inputs, (inner,), cfg.activation, cfg.dropout, inputs, cfg.norm)

    def forward(self, x_BI: torch.Tensor, real_B: torch.Tensor) -> torch.Tensor:
        """[B, I] → [B, I]"""
        return torch.relu(x_BI + self.inner(x_BI, real_B))


class Model(Ranker):
    """Logits of `schema.ranking_label`."""

    def __init__(self, cfg: Config, schema: Schema, catalogue: Catalogue | None = None) -> None:
        super().__init__(cfg, schema)
        del catalogue  # a ranker knows items by their features alone
        self.fields = Fields(schema, embedded(schema), [], cfg)
        inputs = self.fields.width + len(schema.dense)
        self.units = nn.ModuleList(ResidualUnit(inputs, inner, cfg) for inner in cfg.hidden)
        self.score = MLP(inputs, (), out=self.outputs)

    def logits(self, batch: Batch) -> torch.Tensor:
        """[B, T]"""
        fields_BFD, _ = self.fields(batch.sparse)
        x_BI = torch.cat([fields_BFD.flatten(1), batch.dense], dim=1)
        for unit in self.units:
            x_BI = unit(x_BI, batch.real)
        return self.score(x_BI)
