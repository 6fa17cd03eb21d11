"""YoutubeDNN ranking (Covington, Adams & Sargin 2016, RecSys, doi 10.1145/2959100.2959190, §4).

Weighted logistic regression on watch time: a tower's logit z, trained by

    L = -T·log p - log(1 - p)·n,   p = sigmoid(z)

over impressions, T the watch time of a clicked one. In the paper a clicked impression counts as a positive
alone (n = 0) and the others as negatives of weight 1, so that the odds exp(z) are E[T](1 + P) for a small
click rate P. With `count_all` a clicked one counts as a negative too (n = 1): the odds are E[T], exactly.
Served is exp(z), the expected watch time of an impression, where what is watched without a click is nothing.

The paper's inputs x, x² and √x of quantiles are features of the schema: `Numeric(quantile=True, power=2)`.

B rows, F fields, D embedding dimension, T tasks
"""

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from recsys_dist.batch import Batch
from recsys_dist.config import nearest
from recsys_dist.errors import ConfigError
from recsys_dist.models.losses import weighted_logistic
from recsys_dist.models.protocol import Catalogue
from recsys_dist.models.ranking import Fields, Objective, Ranker, TowerConfig, embedded
from recsys_dist.schema import Schema


class Config(TowerConfig):
    name: Literal["youtubednn_ranking"] = "youtubednn_ranking"
    value: str | None = Field(
        None, description="`value` label to expect, as watch time; None takes the only one there is"
    )
    unit: float = Field(
        1000.0, gt=0, description="of the value, as 1000 for milliseconds: weights of about 1 train well"
    )
    count_all: bool = Field(False, description="clicked impressions count as negatives too: odds are E[T]")


class Model(Ranker):
    """Logits z of `schema.ranking_label`'s impressions; `prediction` is the expected value of each."""

    expects_amount: ClassVar[bool] = True

    def __init__(self, cfg: Config, schema: Schema, catalogue: Catalogue | None = None) -> None:
        super().__init__(cfg, schema)
        del catalogue  # a ranker knows items by their features alone
        self.cfg = cfg
        self.predicts: str = _value(schema, cfg)
        self.fields = Fields(schema, embedded(schema), [], cfg)
        self.tower = cfg.tower(self.fields.width + len(schema.dense), self.outputs)

    @staticmethod
    def inputs(schema: Schema, cfg: Any) -> Schema:
        """See Ranker; ConfigError too where there is no amount to expect, and for other objectives."""
        if cfg.objective != Objective(tasks=cfg.objective.tasks):
            raise ConfigError(
                "youtubednn_ranking: its loss is its own; of `objective` it takes `tasks` alone"
            )
        _value(schema, cfg)
        return Ranker.inputs(schema, cfg)

    def logits(self, batch: Batch) -> torch.Tensor:
        """[B, T]"""
        fields_BFD, _ = self.fields(batch.sparse)
        return self.tower(torch.cat([fields_BFD.flatten(1), batch.dense], dim=1), batch.real)

    def label_loss(self, logit_B: torch.Tensor, batch: Batch) -> torch.Tensor:
        """[B] weighted logistic loss."""
        clicked_B = batch.labels[self.label]
        amount_B = clicked_B * batch.labels[self.predicts] / self.cfg.unit
        negative_B = torch.ones_like(clicked_B) if self.cfg.count_all else 1 - clicked_B
        return weighted_logistic(logit_B, amount_B, negative_B)

    def prediction(self, logit_B: torch.Tensor) -> torch.Tensor:
        """[B] expected value, in the label's own unit."""
        return logit_B.exp() * self.cfg.unit


def _value(schema: Schema, cfg: Config) -> str:
    amounts = [label.name for label in schema.labels if label.kind == "value"]
    if cfg.value in amounts:
        return cfg.value
    if cfg.value is not None:
        raise ConfigError(f"youtubednn_ranking: no value label {cfg.value!r}{nearest(cfg.value, amounts)}")
    if len(amounts) != 1:
        found = f"has {', '.join(amounts)}: choose one" if amounts else "has none"
        raise ConfigError(
            f"youtubednn_ranking: needs a label of kind 'value'; the schema {found} (model.value)"
        )
    return amounts[0]
