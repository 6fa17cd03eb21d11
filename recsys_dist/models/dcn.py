"""Deep & Cross Network, three forms of the cross layer beside a deep tower.

    vector   x_{l+1} = x_0 (x_lᵀ w_l) + b_l + x_l                                              (DCN, eq. 3)
    matrix   x_{l+1} = x_0 ∘ (W_l x_l + b_l) + x_l                                          (DCN-v2, eq. 1)
             with `rank` R:  W_l = U_l V_lᵀ,  U and V of I by R                                       (eq. 2)
    mixture  x_{l+1} = Σ_k G_k(x_l) · x_0 ∘ (U_k g(C_k g(V_kᵀ x_l)) + b_l) + x_l                      (eq. 3)
             G = softmax of a linear gate, g = tanh

DCN: Wang et al. 2017, arXiv 1708.05123; DCN-v2: Wang et al. 2021, arXiv 2008.13535.
x_0 are the stacked embeddings and floats. `structure` puts the tower beside the cross layers (their outputs
are joined, both papers' parallel form) or after them (DCN-v2's stacked form).

B rows, I inputs, K experts, R rank, T tasks
"""

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import nn

from recsys_dist.batch import Batch
from recsys_dist.models.layers import MLP
from recsys_dist.models.protocol import Catalogue
from recsys_dist.models.ranking import Fields, Ranker, TowerConfig, embedded
from recsys_dist.schema import Schema


class Config(TowerConfig):
    name: Literal["dcn"] = "dcn"
    form: Literal["vector", "matrix", "mixture"] = "matrix"
    cross_layers: int = Field(3, ge=1)
    rank: int | None = Field(None, ge=1, description="of matrices; None is full, but 64 in a mixture")
    experts: int = Field(4, ge=1, description="K of a mixture")
    structure: Literal["parallel", "stacked"] = "parallel"

    @model_validator(mode="after")
    def _compatible(self) -> "Config":
        if self.form == "vector" and self.rank is not None:
            raise ValueError("rank has no meaning for form=vector, whose layers have no matrix")
        return self


class VectorCross(nn.Module):
    """A layer of DCN."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.weight_I = nn.Parameter(torch.empty(inputs).normal_(std=inputs**-0.5))
        self.bias_I = nn.Parameter(torch.zeros(inputs))

    def forward(self, x0_BI: torch.Tensor, x_BI: torch.Tensor) -> torch.Tensor:
        """[B, I] → [B, I]"""
        return x0_BI * (x_BI @ self.weight_I)[:, None] + self.bias_I + x_BI


class MatrixCross(nn.Module):
    """A layer of DCN-v2; with a rank its matrix is the product of two thin ones."""

    def __init__(self, inputs: int, rank: int | None) -> None:
        super().__init__()
        self.down = nn.Linear(inputs, rank, bias=False) if rank is not None else nn.Identity()
        self.up = nn.Linear(inputs if rank is None else rank, inputs)
        for layer in (self.down, self.up):
            if isinstance(layer, nn.Linear):
                nn.init.xavier_normal_(layer.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x0_BI: torch.Tensor, x_BI: torch.Tensor) -> torch.Tensor:
        """[B, I] → [B, I]"""
        return torch.addcmul(x_BI, x0_BI, self.up(self.down(x_BI)))


class MixtureCross(nn.Module):
    """A layer of DCN-Mix: K low-rank experts, gated by their input."""

    def __init__(self, inputs: int, rank: int, experts: int) -> None:
        super().__init__()
        self.down_KIR = nn.Parameter(torch.empty(experts, inputs, rank))
        self.inner_KRR = nn.Parameter(torch.empty(experts, rank, rank))
        self.up_KRI = nn.Parameter(torch.empty(experts, rank, inputs))
        for stack in (self.down_KIR, self.inner_KRR, self.up_KRI):
            for matrix in stack:
                nn.init.xavier_normal_(matrix)
        self.bias_I = nn.Parameter(torch.zeros(inputs))
        self.gate = nn.Linear(inputs, experts, bias=False)
        nn.init.xavier_normal_(self.gate.weight)

    def forward(self, x0_BI: torch.Tensor, x_BI: torch.Tensor) -> torch.Tensor:
        """[B, I] → [B, I]"""
        inner_KBR = torch.tanh(torch.tanh(x_BI @ self.down_KIR) @ self.inner_KRR)
        experts_KBI = x0_BI * (inner_KBR @ self.up_KRI + self.bias_I)
        gate_BK = torch.softmax(self.gate(x_BI), dim=1)
        return torch.einsum("bk,kbi->bi", gate_BK, experts_KBI) + x_BI


def cross_layer(cfg: Config, inputs: int) -> nn.Module:
    """A cross layer of the configured form: (x_0 [B, I], x_l [B, I]) → x_{l+1} [B, I]."""
    match cfg.form:
        case "vector":
            return VectorCross(inputs)
        case "matrix":
            return MatrixCross(inputs, cfg.rank)
        case "mixture":
            return MixtureCross(inputs, cfg.rank or 64, cfg.experts)


class Model(Ranker):
    """Logits of `schema.ranking_label`."""

    def __init__(self, cfg: Config, schema: Schema, catalogue: Catalogue | None = None) -> None:
        super().__init__(cfg, schema)
        del catalogue  # a ranker knows items by their features alone
        self.fields = Fields(schema, embedded(schema), [], cfg)
        inputs = self.fields.width + len(schema.dense)
        self.crosses = nn.ModuleList(cross_layer(cfg, inputs) for _ in range(cfg.cross_layers))
        self.tower = cfg.tower(inputs, None)
        self.parallel = cfg.structure == "parallel"
        self.score = MLP(self.tower.out_features + inputs * self.parallel, (), out=self.outputs)

    def logits(self, batch: Batch) -> torch.Tensor:
        """[B, T]"""
        fields_BFD, _ = self.fields(batch.sparse)
        x0_BI = torch.cat([fields_BFD.flatten(1), batch.dense], dim=1)
        x_BI = x0_BI
        for cross in self.crosses:
            x_BI = cross(x0_BI, x_BI)
        if self.parallel:
            return self.score(torch.cat([x_BI, self.tower(x0_BI, batch.real)], dim=1))
        return self.score(self.tower(x_BI, batch.real))
