"""Wide & Deep (Cheng et al. 2016, arXiv 1606.07792): memorise crosses, generalise by embeddings.

    P(y = 1 | x) = sigmoid( w_wide·[x, φ(x)] + w_deep·a(x) + b )                               (eq. 3)

φ are the cross-product transformations (`Cross` features of the schema), a the last layer of a ReLU
tower over embeddings and dense floats; both parts are trained jointly, each by its own optimizer.
The paper's FTRL with L1 for the wide part is the trainer's choice for the "wide" table group.

B rows, R of them not padding, W wide features
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import nn
from torch.nn import functional as F
from torchrec import EmbeddingBagConfig, JaggedTensor, KeyedJaggedTensor, PoolingType

from recsys_dist.batch import Batch
from recsys_dist.errors import ConfigError
from recsys_dist.models.layers import DIM_UNIT, MLP, Activation, embedding_tables, normal, table_rows
from recsys_dist.models.losses import binary_cross_entropy
from recsys_dist.models.protocol import Catalogue, ModelConfig, Parts, Task
from recsys_dist.schema import IdFeature, Schema, SingleId

# A linear weight is the mean of as many columns, which start equal, get equal gradients and so stay equal;
# Adagrad does not see that each gradient is a quarter: exactly the scalar weight that it stands for.
WIDE_DIM = DIM_UNIT
WIDE = "wide"  # the key and the table of the linear part


class Config(ModelConfig):
    name: Literal["wide_deep"] = "wide_deep"
    features: tuple[str, ...] | None = Field(None, description="features to read; None reads all")
    wide: tuple[str, ...] | None = Field(
        None, description="id features of the wide part; None takes all crosses and all single ids"
    )
    embedding_dim: int = Field(16, ge=1, multiple_of=DIM_UNIT)
    embedding_std: float = Field(0.01, ge=0, description="deep tables start as N(0, std²)")
    hidden: tuple[int, ...] = (256, 128)
    activation: Activation = "relu"
    dropout: float = Field(0.0, ge=0, lt=1)


class Model(nn.Module):
    """Logits of `schema.ranking_label`; see the module's docstring for the equation."""

    task: ClassVar[Task] = "ranking"

    def __init__(self, cfg: Config, schema: Schema, catalogue: Catalogue | None = None) -> None:
        super().__init__()
        del catalogue  # a ranker knows items by their features alone
        self.label = schema.ranking_label
        deep, wide = _deep_features(schema), _wide_features(schema, cfg)
        self.deep_names = [feature.name for feature in deep]
        # The linear model over one-hot ids: all its weights in one table, a stretch of rows per feature, so
        # that it costs one lookup and no exchange between workers of its own. Weights start at zero.
        rows = np.cumsum([0, *(table_rows(feature) for feature in wide)])
        self.wide_rows = {feature.name: int(first) for feature, first in zip(wide, rows, strict=False)}
        linear = EmbeddingBagConfig(
            name=WIDE,
            num_embeddings=int(rows[-1]),
            embedding_dim=WIDE_DIM,
            feature_names=[WIDE],
            pooling=PoolingType.SUM,
            init_fn=nn.init.zeros_,
        )
        self.tables = embedding_tables(
            schema, deep, cfg.embedding_dim, normal(cfg.embedding_std), extra=[linear] if wide else []
        )
        inputs = len(deep) * cfg.embedding_dim + len(schema.dense)
        self.tower = MLP(inputs, cfg.hidden, cfg.activation, cfg.dropout, out=1)
        self.of_item = {feature.name: "item" in schema.sides(feature) for feature in deep}
        self.table_of = {feature.name: schema.table(feature) for feature in deep}
        self.sequences = {feature.name for feature in schema.sequences}
        columns = np.repeat(list(self.of_item.values()), cfg.embedding_dim)
        dense_columns = ["item" in schema.sides(feature) for feature in schema.dense]
        self.register_buffer(
            "item_inputs", torch.from_numpy(np.r_[columns, dense_columns].astype(bool)), persistent=False
        )
        self.item_inputs: torch.Tensor  # [inputs] bool: columns of the tower's input that the item decides
        self.wide_sides = {f.name: {side == "item" for side in schema.sides(f)} for f in wide}

    @staticmethod
    def inputs(schema: Schema, cfg: Config) -> Schema:
        """All features, or those that `cfg.features` names; ConfigError where the deep part has no id."""
        read = schema if cfg.features is None else schema.select(cfg.features)
        if not _deep_features(read):
            raise ConfigError("wide_deep: its deep part has no id feature to embed; crosses go wide only")
        _wide_features(read, cfg)
        return read

    def forward(self, batch: Batch) -> torch.Tensor:
        """[B] logits."""
        found = self.tables(self._with_wide(batch.sparse)).to_dict()
        embedded = [found[name] for name in self.deep_names]
        # the bias of the tower's last layer is eq. 3's b
        logit_B = self.tower(torch.cat([*embedded, batch.dense], dim=1)).squeeze(1)
        if self.wide_rows:
            logit_B = logit_B + found[WIDE].sum(dim=1) / WIDE_DIM
        return logit_B

    def parts(self, batch: Batch, of_item: bool) -> Parts:
        """See FactoredRankModel; the wide features that depend on user and item both are left to `join`."""
        found = batch.sparse.to_dict()
        deep = [self._deep(name, found[name]) for name in self.deep_names if self.of_item[name] == of_item]
        first: Any = self.tower.layers[0]
        weight = first.weight[:, self.item_inputs if of_item else ~self.item_inputs]
        hidden = torch.cat([*deep, batch.dense], dim=1) @ weight.T
        logit = hidden.new_zeros(batch.rows)
        for name, sides in self.wide_sides.items():
            if sides == {of_item}:
                logit = logit + self._wide(name, found[name].values())
        return Parts(hidden, logit)

    def join(
        self,
        users: Parts,
        items: Parts,
        of: torch.Tensor,
        at: torch.Tensor,
        crosses: Mapping[str, torch.Tensor],
    ) -> torch.Tensor:
        """See FactoredRankModel: equal to `forward` but for rounding."""
        first: Any = self.tower.layers[0]
        hidden = items.hidden.index_select(0, at)
        hidden += (users.hidden + first.bias).index_select(0, of)
        logit = self.tower.layers[1:](hidden).squeeze(1) + users.logit[of] + items.logit[at]
        for name, sides in self.wide_sides.items():
            if len(sides) > 1:
                logit = logit + self._wide(name, crosses[name])
        return logit

    def _deep(self, name: str, ids: JaggedTensor) -> torch.Tensor:
        """[n, D] embedding of a deep feature, of an unsharded model."""
        table = self.tables.embedding_bags[self.table_of[name]].weight
        if name in self.sequences:
            return F.embedding_bag(ids.values(), table, ids.offsets(), mode="mean", include_last_offset=True)
        return F.embedding(ids.values(), table)

    def _wide(self, name: str, ids: torch.Tensor) -> torch.Tensor:
        """[n] weights of a wide feature's ids, of an unsharded model."""
        table = self.tables.embedding_bags[WIDE].weight
        return F.embedding(ids + self.wide_rows[name], table).sum(dim=1) / WIDE_DIM

    def _with_wide(self, sparse: KeyedJaggedTensor) -> KeyedJaggedTensor:
        """The ids with one key more: each row's ids of all wide features, shifted to their own rows."""
        if not self.wide_rows:
            return sparse
        jagged = [sparse[name] for name in self.wide_rows]
        # R rows of B have ids (padding has none), and then one of each of the W features
        ids_WR = torch.stack(
            [j.values() + first for j, first in zip(jagged, self.wide_rows.values(), strict=True)]
        )
        return KeyedJaggedTensor(
            keys=[*sparse.keys(), WIDE],
            values=torch.cat([sparse.values(), ids_WR.t().flatten()]),
            lengths=torch.cat([sparse.lengths(), jagged[0].lengths() * len(jagged)]),
        )

    def loss(self, batch: Batch, step: int) -> torch.Tensor:
        """[B] binary cross-entropy of each row."""
        del step  # nothing is sampled
        return binary_cross_entropy(self(batch), batch.labels[self.label])

    def table_groups(self) -> Mapping[str, list[nn.Parameter]]:
        """`"deep"`: embeddings; `"wide"`: the linear part's weights."""
        groups: dict[str, list[nn.Parameter]] = {"deep": []}
        for name, bag in self.tables.embedding_bags.items():
            groups.setdefault("wide" if name == WIDE else "deep", []).append(bag.weight)
        return groups


def _deep_features(schema: Schema) -> list[IdFeature]:
    """Every id feature but the crosses, which the paper gives to the wide part alone."""
    return [feature for feature in schema.ids if feature not in schema.crosses]


def _wide_features(schema: Schema, cfg: Config) -> list[SingleId]:
    if cfg.wide is None:
        return list(schema.singles)
    chosen = [schema[name] for name in cfg.wide]  # an unknown name is an error that names the nearest
    for feature in chosen:
        if not isinstance(feature, SingleId):
            raise ConfigError(
                f"wide_deep: wide feature {feature.name!r} is {feature.kind}; only single ids go wide"
            )
    return [feature for feature in chosen if isinstance(feature, SingleId)]
