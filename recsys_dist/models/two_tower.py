"""Two-tower recall: a deep tower for users, one for items, and the cosine between what they give.

    s(x, y) = cos( u(x), v(y) ) / τ           Huang et al. 2013 (DSSM, CIKM, doi 10.1145/2505515.2505665)
    s'(x, j) = s(x, j) - log Q_j                   Yi et al. 2019 (RecSys, doi 10.1145/3298689.3346996)
    L_b = -log exp s'(x_b, y_b) / ( exp s'(x_b, y_b) + Σ_{j in batch} w_j exp s'(x_b, y_j)
                                                     + Σ_{j drawn}        exp s'(x_b, y_j) )
    Q_j = W p_j + S r_j

The negatives of a row are the items of all other rows of the global batch and, mixed with them, S items
drawn from the catalogue (Yang et al. 2020, WWW Companion, doi 10.1145/3366424.3386195), without those
that are the row's own positive. Q_j is how often item j is expected among both: p_j is its share of the
weight of all training rows, W the batch's weight, r_j ∝ (positives + 1)^alpha its probability in one draw.
Dividing every candidate by its own Q_j, whichever source it came from, is the balance heuristic of
sampling from a mixture; with S = 0 it is Yi et al.'s correction. A row of weight w_j stands for w_j
samples, and so padding for none. Only training corrects: the index ranks by the cosine.

B rows, G rows of all workers, S drawn negatives, C = G + S candidates, D dimension of the shared space,
I rows of the item table, F id features of the item, N items to embed
"""

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import nn
from torch.nn import functional as F
from torchrec import KeyedJaggedTensor

from recsys_dist.batch import Batch
from recsys_dist.config import Seed
from recsys_dist.errors import ConfigError
from recsys_dist.feature_kinds import AnyFeature, Cross, DenseFeature, IdFeature, Sequence, Statistic
from recsys_dist.models.layers import DIM_UNIT, MLP, RowActivation, Widths, embedding_tables, normal, pooled
from recsys_dist.models.losses import sampled_softmax
from recsys_dist.models.protocol import Catalogue, ModelConfig, Task
from recsys_dist.models.recall import LOOKUP_ROWS, GlobalRows, Negatives, listed, of_user, one_id
from recsys_dist.schema import Schema


class Config(ModelConfig):
    name: Literal["two_tower"] = "two_tower"
    features: tuple[str, ...] | None = Field(
        None, description="user and context features to read; None reads the user's, but not her bare id"
    )
    item_features: tuple[str, ...] | None = Field(
        None, description="the item's own features to read; None reads all but its statistics"
    )
    embedding_dim: int = Field(
        64,
        ge=1,
        multiple_of=DIM_UNIT,
        description="of the item's id and of tables that past items or words are looked up in",
    )
    side_dim: int = Field(8, ge=1, multiple_of=DIM_UNIT, description="of all other tables")
    embedding_std: float = Field(0.05, gt=0, description="all tables start as N(0, std²)")
    hidden: Widths = Field((256,), description="of the user tower")
    item_hidden: Widths = Field((256,), description="of the item tower")
    activation: RowActivation = "relu"
    dropout: float = Field(0.0, ge=0, lt=1)
    output_dim: int = Field(64, ge=1, description="D, of user and item vectors")
    temperature: float = Field(0.07, gt=0, description="τ: cosines are divided by it in training")
    negatives: int = Field(1024, ge=0, description="S, drawn anew for every global batch; 0: in-batch only")
    negatives_alpha: float = Field(
        0.0, ge=0, le=10, description="0 draws uniformly, as in the paper; 1 by popularity"
    )
    negatives_seed: Seed = 0
    mask_history: bool = Field(
        False, description="items in the row's own sequences are no negatives of it, as its positive is not"
    )


class Model(nn.Module):
    """Vectors of length 1 of users and items; see the module's docstring for the equations."""

    task: ClassVar[Task] = "recall"

    def __init__(self, cfg: Config, schema: Schema, catalogue: Catalogue) -> None:
        super().__init__()
        self.cfg = cfg
        self.item = schema.item_id.name
        ids = [f for f in schema.ids if "item" not in schema.sides(f)]
        item_ids = [f for f in _of_item(schema, cfg) if isinstance(f, IdFeature)]
        item_dense = [f for f in _of_item(schema, cfg) if isinstance(f, DenseFeature)]
        wide = {self.item, *(schema.table(f) for f in schema.bags)}
        dims = {
            schema.table(f): cfg.embedding_dim if schema.table(f) in wide else cfg.side_dim
            for f in (*ids, *item_ids)
        }
        start = normal(cfg.embedding_std)
        self.names = [feature.name for feature in ids]
        self.tables = embedding_tables(schema, ids, dims, start)
        self.bags = [feature.name for feature in schema.bags]
        self.histories = [f.name for f in schema.sequences if f.of == self.item]
        self.dense = [at for at, f in enumerate(schema.dense) if "item" not in schema.sides(f)]
        inputs = sum(dims[schema.table(f)] for f in ids) + len(self.dense) + len(self.bags)
        self.tower = MLP(inputs, cfg.hidden, cfg.activation, cfg.dropout, out=cfg.output_dim)
        self.item_names = [feature.name for feature in item_ids]
        self.item_tables = embedding_tables(schema, item_ids, dims, start, prefix="item_")
        inputs = sum(dims[f.name] for f in item_ids) + len(item_dense)
        self.item_tower = MLP(inputs, cfg.item_hidden, cfg.activation, cfg.dropout, out=cfg.output_dim)
        self.everyone = GlobalRows()
        self.negatives = Negatives(
            catalogue.positives, cfg.negatives, cfg.negatives_alpha, cfg.negatives_seed
        )
        # follow from the catalogue, and so are no part of the state
        for name, values in (
            ("expected_drawn_I", torch.from_numpy(cfg.negatives * self.negatives.q_I).float()),
            ("share_I", _shares(catalogue)),
            ("item_ids_FI", _stacked(catalogue, [f.name for f in item_ids])),
            ("item_dense_FI", _stacked(catalogue, [f.name for f in item_dense])),
        ):
            self.register_buffer(name, values, persistent=False)
        self.expected_drawn_I: torch.Tensor
        self.share_I: torch.Tensor
        self.item_ids_FI: torch.Tensor
        self.item_dense_FI: torch.Tensor

    @staticmethod
    def inputs(schema: Schema, cfg: Config) -> Schema:
        """The features of both towers and the item's id; ConfigError where a tower has nothing to read."""
        users, items = of_user(schema, cfg.features, "two_tower"), _of_item(schema, cfg)
        if not any(isinstance(schema[name], IdFeature) for name in users):
            raise ConfigError("two_tower: its user tower has no id feature or sequence to embed")
        if not any(isinstance(feature, IdFeature) for feature in items):
            raise ConfigError("two_tower: its item tower has no id feature to embed")
        chosen = {*users, *(f.name for f in items), schema.item_id.name}
        for feature in [schema[name] for name in chosen]:
            if isinstance(feature, Cross | Sequence):
                chosen |= {feature.of} if isinstance(feature.of, str) else {*feature.of}
        read = schema.select(chosen)
        if cfg.mask_history and schema.item_id.name not in {f.of for f in read.sequences}:
            raise ConfigError("two_tower: mask_history needs a sequence of item ids, and there is none")
        return read

    def forward(self, batch: Batch) -> torch.Tensor:
        """[B, D] user vectors of length 1."""
        embedded = pooled(self.tables(batch.sparse), self.names)
        # a mean of one video and of fifty look alike; how long each history is tells them apart
        lengths = [torch.log1p(batch.sparse[name].lengths().float())[:, None] / 4 for name in self.bags]
        inputs = torch.cat([embedded, batch.dense[:, self.dense], *lengths], dim=1)
        return F.normalize(self.tower(inputs), dim=1)

    def item_vectors(self) -> torch.Tensor:
        """[I, D] of length 1; on sharded tables every worker calls it together and gets them all."""
        every_I = torch.arange(len(self.share_I), device=self.share_I.device)
        return torch.cat([self._items(block_N) for block_N in torch.split(every_I, LOOKUP_ROWS)])

    def loss(self, batch: Batch, step: int) -> torch.Tensor:
        """[B] in-batch softmax with mixed negatives; 0 where the positive is unknown (row 0)."""
        positive_B = one_id(batch.sparse, self.item)
        drawn_S = self.negatives.draw(step).to(positive_B.device)
        # one lookup, and so one exchange between workers, for positives and drawn negatives together
        item_ND = self._items(torch.cat([positive_B, drawn_S]))
        positive_BD, drawn_SD = item_ND[: batch.rows], item_ND[batch.rows :]
        weight_G = self.everyone(batch.weight * (positive_B > 0))
        candidate_C = torch.cat([self.everyone(positive_B), drawn_S])
        weight_C = torch.cat([weight_G, torch.ones_like(drawn_S, dtype=weight_G.dtype)])
        candidate_CD = torch.cat([self.everyone(positive_BD), drawn_SD])
        left_out_BC = (positive_B[:, None] == candidate_C[None, :]) | (weight_C == 0)
        if self.cfg.mask_history:
            for name in self.histories:
                left_out_BC |= listed(batch.sparse[name], candidate_C)
        log_expected_I = _log(weight_G.sum() * self.share_I + self.expected_drawn_I)
        user_BD = self(batch) / self.cfg.temperature
        loss_B = sampled_softmax(
            user_BD,
            positive_BD,
            candidate_CD,
            log_expected_I[positive_B],
            log_expected_I[candidate_C] - _log(weight_C),
            left_out_BC,
        )
        return loss_B * (positive_B > 0)

    def table_groups(self) -> Mapping[str, list[nn.Parameter]]:
        """`"deep"`: the tables of both towers."""
        return {"deep": [*self.tables.parameters(), *self.item_tables.parameters()]}

    def _items(self, item_N: torch.Tensor) -> torch.Tensor:
        """[N, D] vectors of items; all their features are the catalogue's, drawn or not."""
        ids_FN = self.item_ids_FI[:, item_N]
        sparse = KeyedJaggedTensor(
            keys=self.item_names,
            values=ids_FN.flatten(),
            lengths=torch.ones_like(ids_FN).flatten(),
        )
        embedded = pooled(self.item_tables(sparse), self.item_names)
        dense_NF = self.item_dense_FI[:, item_N].T
        return F.normalize(self.item_tower(torch.cat([embedded, dense_NF], dim=1)), dim=1)


def _of_item(schema: Schema, cfg: Config) -> list[AnyFeature]:
    """What the item tower reads; no statistic, whose one value a catalogue would have is not the day's."""
    alone = [f for f in schema.features if schema.sides(f) == {"item"}]
    if cfg.item_features is None:
        return [f for f in alone if not isinstance(f, Statistic)]
    for feature in [schema[name] for name in cfg.item_features]:
        if feature not in alone:
            raise ConfigError(
                f"two_tower: {feature.name!r} is not the item's alone; its tower cannot read it"
            )
        if isinstance(feature, Statistic):
            raise ConfigError(
                f"two_tower: {feature.name!r} changes from day to day, an item has one vector; leave it out"
            )
    return [f for f in alone if f.name in cfg.item_features]


def _shares(catalogue: Catalogue) -> torch.Tensor:
    """[I] float32 share of each item in the weight of all training rows; 0 of the unknown one."""
    weight_I = (catalogue.positives if catalogue.weight is None else catalogue.weight).double()
    weight_I = torch.where(weight_I > 0, weight_I, 1.0)  # never in training, or just once: keeps log q finite
    weight_I[0] = 0
    return (weight_I / weight_I.sum()).float()


def _stacked(catalogue: Catalogue, names: list[str]) -> torch.Tensor:
    """[F, I] the named features of all items; [0, I] where there is none."""
    if not names or not catalogue.features:
        return torch.empty(0, len(catalogue.positives))
    return torch.stack([catalogue.features[name] for name in names])


def _log(x: torch.Tensor) -> torch.Tensor:
    """Finite at 0, where nothing depends on it: of what weighs nothing, and of the unknown item."""
    return x.clamp(min=torch.finfo(x.dtype).tiny).log()
