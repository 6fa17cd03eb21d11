"""YoutubeDNN recall (Covington, Adams & Sargin 2016, RecSys, doi 10.1145/2959100.2959190, §3).

    P(item = i | user) = exp(v_i·u) / Σ_j exp(v_j·u)

u is a tower over the means of the watched items' and the searched words' embeddings (uni- and bigrams, a
`Searches` feature of the schema) and other user and context features; v is
the softmax's own weight, a second item table. Trained by a softmax over the positive and S negatives
that all rows of the global batch share, drawn from q ∝ (positives + 1)^alpha and corrected by log q.

B rows, S negatives, D dimension of the shared space, I rows of the item table
"""

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import nn
from torch.nn import functional as F

from recsys_dist.batch import Batch
from recsys_dist.config import Seed
from recsys_dist.errors import ConfigError
from recsys_dist.models.layers import DIM_UNIT, MLP, RowActivation, Widths, embedding_tables, normal, pooled
from recsys_dist.models.losses import bayesian_personalised_ranking, gbce, gbce_beta, sampled_softmax
from recsys_dist.models.protocol import Catalogue, ModelConfig, Task
from recsys_dist.models.recall import Negatives, every_row, lookup, more_rows, of_user, one_id
from recsys_dist.schema import Schema


class Config(ModelConfig):
    name: Literal["youtubednn"] = "youtubednn"
    features: tuple[str, ...] | None = Field(
        None, description="user and context features to read; None reads the user's, but not her bare id"
    )
    embedding_dim: int = Field(
        64,
        ge=1,
        multiple_of=DIM_UNIT,
        description="of input tables that past items or words are looked up in",
    )
    side_dim: int = Field(
        8, ge=1, multiple_of=DIM_UNIT, description="of all other input tables: the user's attributes, context"
    )
    embedding_std: float = Field(0.05, gt=0, description="all tables start as N(0, std²)")
    hidden: Widths | None = Field(
        (256,), description="() is one linear layer; null none at all: the user is the embeddings' sum"
    )
    shared: bool | None = Field(
        None, description="one table for items watched and to recommend, as in BARS; default: the paper's two"
    )
    activation: RowActivation = "relu"
    dropout: float = Field(0.0, ge=0, lt=1)
    output_dim: int = Field(64, ge=1, multiple_of=DIM_UNIT, description="D, of user and item vectors")
    output_activation: bool = Field(
        False, description="activate the user vector too, as the paper's last ReLU layer is"
    )
    normalise: bool = Field(True, description="cosine instead of the paper's inner product")
    temperature: float = Field(0.07, gt=0, description="logits are divided by it in training; 1 in the paper")
    item_bias: bool = Field(False, description="a learned popularity term, in more dimensions")
    loss: Literal["sampled_softmax", "bpr", "gbce"] = Field(
        "sampled_softmax", description="the paper's; or pairs (BPR), or binary cross-entropy (gBCE)"
    )
    calibration: float = Field(0.75, ge=0, le=1, description="t of gBCE; 0: plain binary cross-entropy")
    negatives: int = Field(1024, ge=1, description="S, drawn anew for every global batch")
    negatives_alpha: float = Field(0.75, ge=0, le=10, description="0 draws uniformly, 1 by popularity")
    negatives_seed: Seed = 0

    @model_validator(mode="after")
    def _compatible(self) -> "Config":
        if (self.shared or self.hidden is None) and self.embedding_dim != self.output_dim:
            raise ValueError(
                "shared tables, and tables whose rows' sum is the user's vector, are as wide as what is "
                "recommended: give embedding_dim and output_dim one value"
            )
        return self


class Model(nn.Module):
    """Vectors of users and items; see the module's docstring for the equation."""

    task: ClassVar[Task] = "recall"

    def __init__(self, cfg: Config, schema: Schema, catalogue: Catalogue) -> None:
        super().__init__()
        self.cfg = cfg
        self.item = schema.item_id.name
        # a sequence brings the item feature whose table it shares; the tower must not see that one
        read = [f for f in schema.ids if "item" not in schema.sides(f)]
        self.names, self.keys = [feature.name for feature in read], [feature.name for feature in schema.ids]
        of_bags = {schema.table(f) for f in schema.bags}
        dims = {
            schema.table(f): cfg.embedding_dim if schema.table(f) in of_bags else cfg.side_dim for f in read
        }
        vector_dim = cfg.output_dim + DIM_UNIT * cfg.item_bias
        if cfg.shared:
            dims[self.item] = vector_dim
        self.widths = [dims[schema.table(f)] for f in read]
        sought = [*read, schema.item_id] if cfg.shared else read
        self.tables = embedding_tables(schema, sought, dims, normal(cfg.embedding_std))
        self.bags = [feature.name for feature in schema.bags]
        inputs = sum(self.widths) + len(schema.dense) + len(self.bags)
        if cfg.hidden is None:
            self.tower = None
        elif cfg.output_activation:
            self.tower = MLP(inputs, (*cfg.hidden, cfg.output_dim), cfg.activation, cfg.dropout)
        else:
            self.tower = MLP(inputs, cfg.hidden, cfg.activation, cfg.dropout, out=cfg.output_dim)
        if not cfg.shared:
            self.item_tables = embedding_tables(
                schema, [schema.item_id], vector_dim, normal(cfg.embedding_std), prefix="output_"
            )
        self.negatives = Negatives(
            catalogue.positives, cfg.negatives, cfg.negatives_alpha, cfg.negatives_seed
        )
        self.beta = gbce_beta(cfg.negatives, len(catalogue.positives) - 1, cfg.calibration)
        # follows from the catalogue, and so is no part of the state
        self.register_buffer("log_q_I", self.negatives.log_q_I, persistent=False)
        self.log_q_I: torch.Tensor

    @staticmethod
    def inputs(schema: Schema, cfg: Config) -> Schema:
        """The tower's features and the item's id; ConfigError where there is no history of items."""
        chosen = of_user(schema, cfg.features, "youtubednn")
        of = {schema.table(f) for f in schema.sequences if f.name in chosen}
        if not of:
            raise ConfigError("youtubednn: needs a sequence feature, the user's past items, and has none")
        item = schema.item_id.name
        if cfg.shared and item not in of:
            raise ConfigError("youtubednn: shared=true needs a sequence of item ids, and there is none")
        wide = {schema.table(f) for f in schema.bags if f.name in chosen}
        as_wide = {f.name for f in schema.ids if schema.table(f) in wide or cfg.side_dim == cfg.output_dim}
        if cfg.hidden is None and not as_wide >= {*chosen}:
            raise ConfigError(
                f"youtubednn: hidden=null adds embeddings of {cfg.output_dim} dimensions, and "
                f"{', '.join(sorted({*chosen} - as_wide))} has none such; "
                f"choose with features=[...], or set side_dim={cfg.output_dim}"
            )
        return schema.select({*chosen, *of, item})

    def forward(self, batch: Batch) -> torch.Tensor:
        """[B, D] user vectors; with `item_bias` [B, D + 4]: √τ times the mean of an item's 4 last counts too.

        With `normalise` the first D of users and items have length 1: a cosine, and how popular the item is.
        (√τ has the weights learn as fast as the D beside them, with which they share a row's step size.)
        """
        return self._users(pooled(self.tables(batch.sparse), self.names), batch)

    def item_vectors(self) -> torch.Tensor:
        """[I, D] item vectors; on sharded tables every worker calls it together and gets them all."""
        rows, device = len(self.log_q_I), self.log_q_I.device
        if self.cfg.shared:
            return self._normalised(every_row(self.tables, self.item, rows, device, self.keys))
        return self._normalised(every_row(self.item_tables, self.item, rows, device))

    def loss(self, batch: Batch, step: int) -> torch.Tensor:
        """[B] the sampled softmax, or `cfg.loss`; 0 where the positive is unknown: nothing recommends it."""
        positive_B = one_id(batch.sparse, self.item)
        negative_S = self.negatives.draw(step).to(positive_B.device)
        user_BD, vectors = self._embedded(batch, negative_S)
        positive_BD, negative_SD = vectors[: batch.rows], vectors[batch.rows :]
        user_BD = user_BD / self.cfg.temperature
        hit_BS = positive_B[:, None] == negative_S[None, :]
        if self.cfg.loss == "sampled_softmax":
            log_q = self.log_q_I[positive_B], self.log_q_I[negative_S]
            loss_B = sampled_softmax(user_BD, positive_BD, negative_SD, *log_q, hit_BS)
        else:
            logit_B, others_BS = (user_BD * positive_BD).sum(dim=1), user_BD @ negative_SD.T
            if self.cfg.loss == "bpr":
                loss_B = bayesian_personalised_ranking(logit_B, others_BS, hit_BS)
            else:
                loss_B = gbce(logit_B, others_BS, hit_BS, self.beta)
        return loss_B * (positive_B > 0)

    def table_groups(self) -> Mapping[str, list[nn.Parameter]]:
        """`"deep"`: the input tables and the softmax's item table."""
        output = [] if self.cfg.shared else self.item_tables.parameters()
        return {"deep": [*self.tables.parameters(), *output]}

    def _embedded(self, batch: Batch, negative_S: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, D] of users; [B + S, D] of positives and negatives, together: one exchange between workers."""
        if self.cfg.shared:
            found = self.tables(more_rows(batch.sparse, self.item, negative_S))
            return self._users(pooled(found, self.names)[: batch.rows], batch), self._normalised(
                found[self.item]
            )
        jagged = batch.sparse[self.item]
        ids = torch.cat([jagged.values(), negative_S])
        lengths = torch.cat([jagged.lengths(), torch.ones_like(negative_S)])
        return self(batch), self._normalised(lookup(self.item_tables, self.item, ids, lengths))

    def _users(self, embedded: torch.Tensor, batch: Batch) -> torch.Tensor:
        if self.tower is not None:
            # a mean of one video and of fifty look alike; how long each history is tells them apart
            lengths = [torch.log1p(batch.sparse[name].lengths().float()) for name in self.bags]
            embedded = self.tower(torch.cat([embedded, batch.dense, torch.stack(lengths, dim=1) / 4], dim=1))
        else:
            summands = torch.split(embedded, self.widths, dim=1)
            embedded = torch.stack([rows[:, : self.cfg.output_dim] for rows in summands]).sum(dim=0)
        user_BD = self._normalised(embedded)
        if not self.cfg.item_bias:
            return user_BD
        return F.pad(user_BD, (0, DIM_UNIT), value=self.cfg.temperature**0.5 / DIM_UNIT)

    def _normalised(self, vectors: torch.Tensor) -> torch.Tensor:
        """[N, D or D + 4] with the first D at length 1, where the model's are."""
        if not self.cfg.normalise:
            return vectors
        direction, bias = vectors[:, : self.cfg.output_dim], vectors[:, self.cfg.output_dim :]
        return torch.cat([F.normalize(direction, dim=1), bias], dim=1)
