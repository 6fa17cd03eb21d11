"""Wide & Deep (Cheng et al. 2016, arXiv 1606.07792): memorise crosses, generalise by embeddings.

    P(y = 1 | x) = sigmoid( w_wide·[x, φ(x)] + w_deep·a(x) + b )                               (eq. 3)

φ are the cross-product transformations (`Cross` features of the schema), a the last layer of a ReLU
tower over embeddings and dense floats; both parts are trained jointly, each by its own optimizer.
The paper's FTRL with L1 for the wide part is `optimizer.wide.rule=ftrl` of the trainer.

B rows, T tasks
"""

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch.nn import functional as F
from torchrec import JaggedTensor

from recsys_dist.batch import Batch
from recsys_dist.errors import ConfigError
from recsys_dist.feature_kinds import SingleId
from recsys_dist.models.protocol import Catalogue, Parts
from recsys_dist.models.ranking import WIDE, WIDE_DIM, Fields, Ranker, TowerConfig, embedded
from recsys_dist.schema import Schema


class Config(TowerConfig):
    name: Literal["wide_deep"] = "wide_deep"
    wide: tuple[str, ...] | None = Field(
        None, description="id features of the wide part; None takes all crosses and all single ids"
    )


class Model(Ranker):
    """Logits of `schema.ranking_label`; see the module's docstring for the equation."""

    def __init__(self, cfg: Config, schema: Schema, catalogue: Catalogue | None = None) -> None:
        super().__init__(cfg, schema)
        del catalogue  # a ranker knows items by their features alone
        deep, wide = embedded(schema), _wide_features(schema, cfg)
        self.fields = Fields(schema, deep, wide, cfg)
        self.tower = cfg.tower(self.fields.width + len(schema.dense), self.outputs)
        self.of_item = {feature.name: "item" in schema.sides(feature) for feature in deep}
        self.table_of = {feature.name: schema.table(feature) for feature in deep}
        self.bags = {feature.name for feature in schema.bags}
        columns = np.repeat(list(self.of_item.values()), cfg.embedding_dim)
        dense_columns = ["item" in schema.sides(feature) for feature in schema.dense]
        self.register_buffer(
            "item_inputs", torch.from_numpy(np.r_[columns, dense_columns].astype(bool)), persistent=False
        )
        self.item_inputs: torch.Tensor  # [inputs] bool: columns of the tower's input that the item decides
        self.wide_sides = {f.name: {side == "item" for side in schema.sides(f)} for f in wide}

    @staticmethod
    def inputs(schema: Schema, cfg: Any) -> Schema:
        """See Ranker; ConfigError too for a wide feature that is no single id."""
        read = Ranker.inputs(schema, cfg)
        _wide_features(read, cfg)
        return read

    def logits(self, batch: Batch) -> torch.Tensor:
        """[B, T]; tasks beside the label are the deep part's."""
        fields_BFD, wide_B = self.fields(batch.sparse)
        # the bias of the tower's last layer is eq. 3's b
        deep_BT = self.tower(torch.cat([fields_BFD.flatten(1), batch.dense], dim=1), batch.real)
        return torch.cat([deep_BT[:, :1] + wide_B[:, None], deep_BT[:, 1:]], dim=1)

    def parts(self, batch: Batch, of_item: bool) -> Parts:
        """See FactoredRankModel; the wide features that depend on user and item both are left to `join`."""
        found = batch.sparse.to_dict()
        deep = [self._deep(name, found[name]) for name in self.fields.names if self.of_item[name] == of_item]
        first: Any = self.tower.layers[0]
        inputs = first.weight.new_zeros(batch.rows, first.weight.shape[1])
        inputs[:, self.item_inputs == of_item] = torch.cat([*deep, batch.dense], dim=1)
        wide = {name: found[name].values() for name, sides in self.wide_sides.items() if sides == {of_item}}
        return Parts(inputs @ first.weight.T, self._wide(wide, batch.rows))

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
        user = users.hidden if first.bias is None else users.hidden + first.bias  # None before batch norm
        hidden += user.index_select(0, of)
        met = {name: crosses[name] for name, sides in self.wide_sides.items() if len(sides) > 1}
        wide = users.logit[of] + items.logit[at] + self._wide(met, len(of))
        return self.calibration(self.tower.after(1, hidden)[:, 0] + wide)

    def _deep(self, name: str, ids: JaggedTensor) -> torch.Tensor:
        """[n, D] embedding of a deep feature, of an unsharded model."""
        table = self.fields.tables.embedding_bags[self.table_of[name]].weight
        if name in self.bags:
            return F.embedding_bag(ids.values(), table, ids.offsets(), mode="mean", include_last_offset=True)
        return F.embedding(ids.values(), table)

    def _wide(self, ids: Mapping[str, torch.Tensor], rows: int) -> torch.Tensor:
        """[rows] sums of the wide features' weights, of an unsharded model; `ids` [rows] of each."""
        if not ids:  # a model without a wide part has no table of it
            first: Any = self.tower.layers[0]
            return first.weight.new_zeros(rows)
        table = self.fields.tables.embedding_bags[WIDE].weight
        found = torch.stack([values + self.fields.wide_rows[name] for name, values in ids.items()])
        return F.embedding(found, table).sum(dim=(0, 2)) / WIDE_DIM


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
