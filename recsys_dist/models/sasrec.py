"""SASRec (Kang & McAuley 2018, ICDM, arXiv 1808.09781), and as gSASRec trains it (Petrov & Macdonald 2023,
RecSys, arXiv 2308.07192): causal self-attention over a user's past items predicts the next one.

    x_i = M[s_i] + P[n - i],   h = x + Dropout(Attention(LN(x))),   f = h + Dropout(FFN(LN(h)))  (eqs. 1-5)
    score(j after s_1 .. s_i) = LN(f_i)·M[j]                                                    (eqs. 6, 7)

M is the item table; P has a vector for each place in the sequence, counted from its newest item. Every
position learns to predict the item after it, the last one the row's own item. Who has no past is read as
having seen one unknown item (row 0 of M), whose vector is learned like the others.

B rows, V positions of all their sequences together, L of the longest, D dimension, H heads,
S items to score against, I rows of the item table
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import nn
from torch.nn import functional as F
from torchrec import JaggedTensor

from recsys_dist.batch import Batch
from recsys_dist.config import Seed
from recsys_dist.models.layers import DIM_UNIT, MLP, RowActivation, table_rows
from recsys_dist.models.losses import gbce, gbce_beta, sampled_softmax
from recsys_dist.models.protocol import Catalogue, ModelConfig, Task
from recsys_dist.models.recall import (
    Negatives,
    all_vectors,
    following,
    item_sequence,
    item_tables,
    newest,
    nothing,
    one_id,
    vectors_of,
)
from recsys_dist.schema import Schema


class Config(ModelConfig):
    name: Literal["sasrec"] = "sasrec"
    sequence: str | None = Field(None, description="sequence of item ids to read; None: the schema's first")
    dim: int = Field(64, ge=1, multiple_of=DIM_UNIT, description="D, of items and of the attention")
    blocks: int = Field(2, ge=1)
    heads: int = Field(1, ge=1)
    norm: Literal["pre", "post"] = Field("pre", description="layer norm before each sublayer, or after")
    activation: RowActivation = "relu"
    dropout: float = Field(0.0, ge=0, lt=1, description="of embeddings and of what each sublayer adds")
    embedding_std: float = Field(0.05, gt=0, description="tables and places start as N(0, std²)")
    tied: bool = Field(True, description="score with the input's item table; else with one of its own")
    loss: Literal["sampled_softmax", "softmax", "gbce"] = "sampled_softmax"
    negatives: int = Field(256, ge=1, description="drawn anew for every global batch; softmax takes all")
    negatives_alpha: float = Field(
        0.0, ge=0, le=10, description="0 draws uniformly, as gBCE does; 1 by popularity"
    )
    negatives_seed: Seed = 0
    calibration: float = Field(0.75, ge=0, le=1, description="t of gBCE; 0: plain binary cross-entropy")

    @model_validator(mode="after")
    def _even_heads(self) -> "Config":
        if self.dim % self.heads:
            raise ValueError(f"dim={self.dim} cannot be shared evenly by heads={self.heads}")
        return self


@dataclass(frozen=True)
class _Group:
    """Sequences next to each other that are about as long, so that padding them costs little.

    at  [positions] where each lies in them padded, [rows · longest]
    """

    rows: int
    longest: int
    at: torch.Tensor


class Block(nn.Module):
    """Attention to what came before, then a point-wise network, each added to its input (eqs. 2-5)."""

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.heads, self.pre, self.dropout = cfg.heads, cfg.norm == "pre", nn.Dropout(cfg.dropout)
        self.norms = nn.ModuleList([nn.LayerNorm(cfg.dim) for _ in range(2)])
        self.qkv = MLP(cfg.dim, (), out=3 * cfg.dim)
        self.joined = MLP(cfg.dim, (), out=cfg.dim)
        self.pointwise = MLP(cfg.dim, (cfg.dim,), cfg.activation, out=cfg.dim)

    def forward(self, x_VD: torch.Tensor, groups: list[_Group]) -> torch.Tensor:
        """[V, D]; the positions of `groups`, one group after the other."""
        if self.pre:
            x_VD = x_VD + self.dropout(self.attention(self.norms[0](x_VD), groups))
            return x_VD + self.dropout(self.pointwise(self.norms[1](x_VD)))
        x_VD = self.norms[0](x_VD + self.dropout(self.attention(x_VD, groups)))
        return self.norms[1](x_VD + self.dropout(self.pointwise(x_VD)))

    def attention(self, x_VD: torch.Tensor, groups: list[_Group]) -> torch.Tensor:
        """[V, D]  softmax(Q K^T / √(D/H)) V of each head, over a sequence's positions up to each."""
        attended = []
        for qkv, group in zip(self.qkv(x_VD).split([len(g.at) for g in groups]), groups, strict=True):
            # padded at the end only, which causality alone keeps real positions from seeing
            padded = qkv.new_zeros(group.rows * group.longest, qkv.shape[1]).index_copy(0, group.at, qkv)
            heads = padded.view(group.rows, group.longest, 3, self.heads, -1)
            q, k, v = heads.permute(2, 0, 3, 1, 4)
            found = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
            # an embedding lookup is indexing with a fast backward pass
            attended.append(F.embedding(group.at, found.reshape(len(padded), -1)))
        return self.joined(torch.cat(attended))


class Model(nn.Module):
    """Vectors of users and items; see the module's docstring for the equations."""

    task: ClassVar[Task] = "recall"
    every_position: ClassVar[bool] = True

    def __init__(self, cfg: Config, schema: Schema, catalogue: Catalogue) -> None:
        super().__init__()
        self.cfg = cfg
        item, past = schema.item_id, schema.sequences[0]
        self.item, self.past, self.longest = item.name, past.name, past.max_length
        read = {item.name: [past.name, item.name]}
        if not cfg.tied:
            read = {item.name: [past.name], f"output_{item.name}": [item.name]}
        self.tables = item_tables(item, cfg.dim, cfg.embedding_std, read)
        self.places = nn.Parameter(torch.randn(self.longest, cfg.dim) * cfg.embedding_std)
        self.dropout = nn.Dropout(cfg.dropout)
        self.blocks = nn.ModuleList([Block(cfg) for _ in range(cfg.blocks)])
        self.norm = nn.LayerNorm(cfg.dim) if cfg.norm == "pre" else nn.Identity()
        self.negatives = Negatives(
            catalogue.positives, cfg.negatives, cfg.negatives_alpha, cfg.negatives_seed
        )
        # follows from the catalogue, and so is no part of the state
        self.register_buffer("log_q_I", self.negatives.log_q_I, persistent=False)
        self.log_q_I: torch.Tensor
        self.beta = gbce_beta(cfg.negatives, table_rows(item) - 1, cfg.calibration)

    @staticmethod
    def inputs(schema: Schema, cfg: Config) -> Schema:
        """A sequence of item ids, and the item's id; ConfigError where there is none."""
        return item_sequence(schema, cfg.sequence, "sasrec")

    def forward(self, batch: Batch) -> torch.Tensor:
        """[B, D] user vectors: what their newest positions predict."""
        past, row_B = newest(batch.sparse[self.past], self.longest)
        found = vectors_of(self.tables, {self.past: past, self.item: nothing(past.lengths())})
        last_B = past.offsets()[1:] - 1
        return self._hidden(past, found[self.past])[last_B[row_B.argsort()]]

    def item_vectors(self) -> torch.Tensor:
        """[I, D] item vectors; on sharded tables every worker calls it together and gets them all."""
        rows, device = len(self.log_q_I), self.log_q_I.device
        return all_vectors(self.tables, self.item, [self.past], rows, device)

    def loss(self, batch: Batch, step: int) -> torch.Tensor:
        """[B] sum of the losses of a row's positions, divided by the sequence's `max_length`.

        So positions weigh alike, however many a row has. Those whose next item is unknown (row 0), which
        nothing can recommend, add nothing.
        """
        past, row_B = newest(batch.sparse[self.past], self.longest)
        next_V = following(past, one_id(batch.sparse, self.item)[row_B])
        if self.cfg.loss == "softmax":
            other_S = torch.arange(1, len(self.log_q_I), dtype=torch.int32)
        else:
            other_S = self.negatives.draw(step)
        other_S = other_S.to(next_V.device)
        lengths = torch.cat([past.lengths(), torch.ones_like(other_S)])
        scored = JaggedTensor(torch.cat([next_V, other_S]), lengths=lengths)
        found = vectors_of(self.tables, {self.past: past, self.item: scored})
        next_VD, other_SD = torch.split(found[self.item], [len(next_V), len(other_S)])
        hidden_VD = self._hidden(past, found[self.past])
        loss_V = self._loss(hidden_VD, next_VD, other_SD, next_V, other_S) * (next_V > 0)
        of_V = torch.repeat_interleave(row_B, past.lengths())
        return loss_V.new_zeros(batch.rows).index_add(0, of_V, loss_V) / self.longest

    def table_groups(self) -> Mapping[str, list[nn.Parameter]]:
        """`"deep"`: the item table, and the output's where it has its own."""
        return {"deep": list(self.tables.parameters())}

    def _hidden(self, past: JaggedTensor, x_VD: torch.Tensor) -> torch.Tensor:
        """[V, D] what each position predicts."""
        end_V = torch.repeat_interleave(past.offsets()[1:], past.lengths())
        age_V = end_V - 1 - torch.arange(len(x_VD), device=x_VD.device)
        x_VD = self.dropout(x_VD + F.embedding(age_V, self.places))
        groups = _groups(past.lengths())
        for block in self.blocks:
            x_VD = block(x_VD, groups)
        return self.norm(x_VD)

    def _loss(
        self,
        hidden_VD: torch.Tensor,
        next_VD: torch.Tensor,
        other_SD: torch.Tensor,
        next_V: torch.Tensor,
        other_S: torch.Tensor,
    ) -> torch.Tensor:
        """[V] loss of each position."""
        hit_VS = next_V[:, None] == other_S[None, :]
        if self.cfg.loss == "gbce":
            next_score_V = (hidden_VD * next_VD).sum(dim=1)
            return gbce(next_score_V, hidden_VD @ other_SD.T, hit_VS, self.beta)
        # "softmax" has all items, none of them drawn
        log_q_I = self.log_q_I if self.cfg.loss == "sampled_softmax" else torch.zeros_like(self.log_q_I)
        return sampled_softmax(hidden_VD, next_VD, other_SD, log_q_I[next_V], log_q_I[other_S], hit_VS)


def _groups(lengths: torch.Tensor) -> list[_Group]:
    """Sequences in ascending order of `lengths`, cut where these double."""
    doubled = torch.ceil(torch.log2(lengths.float()))
    sizes = torch.unique_consecutive(doubled, return_counts=True)[1].tolist()
    groups = []
    for part in torch.split(lengths, sizes):
        longest = int(part[-1])
        real = torch.arange(longest, device=part.device) < part[:, None]
        groups.append(_Group(len(part), longest, real.flatten().nonzero().squeeze(1)))
    return groups
