"""What rankers share: their settings, fields of embeddings, the linear part, and what is learned from logits.

B rows, R of them not padding, F fields, D embedding dimension, W wide features, T tasks
"""

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import nn
from torchrec import EmbeddingBagConfig, KeyedJaggedTensor, PoolingType

from recsys_dist.batch import Batch
from recsys_dist.config import Config, nearest
from recsys_dist.errors import ConfigError
from recsys_dist.feature_kinds import IdFeature, SingleId
from recsys_dist.models import losses
from recsys_dist.models.calibration import Calibration
from recsys_dist.models.layers import (
    DIM_UNIT,
    MLP,
    Activation,
    Norm,
    Widths,
    embedding_tables,
    normal,
    table_rows,
)
from recsys_dist.models.precision import full
from recsys_dist.models.protocol import ModelConfig, Task
from recsys_dist.schema import Schema

# A linear weight is the mean of as many columns, which start equal, get equal gradients and so stay equal;
# Adagrad does not see that each gradient is a quarter: exactly the scalar weight that it stands for. (SGD
# does see it, and steps a quarter as far; a weight_decay is added to that quarter, and so counts four times.)
WIDE_DIM = DIM_UNIT
WIDE = "wide"  # the key and the table of the linear part


class Objective(Config):
    """What a ranker learns, beside or instead of the plain cross-entropy of its label."""

    loss: Literal["binary_cross_entropy", "focal"] = "binary_cross_entropy"
    focal_gamma: float = Field(2.0, ge=0, description="0 is cross-entropy again")
    positive_weight: float = Field(1.0, gt=0, description="of a positive row beside a negative one's 1")
    tasks: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default_factory=dict,
        description="further labels learned on the shared trunk, each with the weight of its loss; "
        "a `value` label is learned as its log1p",
    )


class RankConfig(ModelConfig):
    """Settings that all rankers have."""

    features: tuple[str, ...] | None = Field(None, description="features to read; None reads all")
    history: bool = Field(True, description="false leaves out what the user did before: sequences, searches")
    objective: Objective = Objective()


class EmbeddingConfig(RankConfig):
    """Of rankers that embed ids."""

    embedding_dim: int = Field(16, ge=1, multiple_of=DIM_UNIT)
    embedding_std: float = Field(0.01, ge=0, description="tables start as N(0, std²)")


class TowerConfig(EmbeddingConfig):
    """Of rankers with a tower of dense layers."""

    hidden: Widths = (256, 128)
    activation: Activation = "relu"
    norm: Norm | None = None
    dropout: float = Field(0.0, ge=0, lt=1)

    def tower(self, inputs: int, out: int | None) -> MLP:
        """The MLP of these settings."""
        return MLP(inputs, self.hidden, self.activation, self.dropout, out, self.norm)


class Ranker(nn.Module):
    """A ranker but for `logits`, which each model gives.

    The first of the T logits is the label's; the others are those of `objective.tasks`, in their order.
    """

    task: ClassVar[Task] = "ranking"
    predicts: str | None = None
    expects_amount: ClassVar[bool] = False  # that is, `predicts` is one: the logits are no log-odds

    def __init__(self, cfg: RankConfig, schema: Schema) -> None:
        super().__init__()
        self.objective = cfg.objective
        self.calibration = Calibration()
        self.label = schema.ranking_label
        self.outputs = 1 + len(cfg.objective.tasks)
        self.kinds = {label.name: label.kind for label in schema.labels}

    @staticmethod
    def inputs(schema: Schema, cfg: Any) -> Schema:
        """All features but sessions, or those that `cfg.features` names, the past only with `cfg.history`.

        ConfigError for a task whose label there is not, and for a model that embeds where nothing is left to.
        """
        labels = [label.name for label in schema.labels]
        for name in cfg.objective.tasks:
            if name not in labels or name == schema.ranking_label:
                raise ConfigError(
                    f"{cfg.name}: objective.tasks has {name!r}, which is not another label of the log"
                    f"{nearest(name, labels)}"
                )
        every = [feature.name for feature in schema.features if feature not in schema.sessions]
        chosen = every if cfg.features is None else cfg.features
        past = set() if cfg.history else {feature.name for feature in schema.lists}
        read = schema.select(name for name in chosen if name not in past)
        if isinstance(cfg, EmbeddingConfig) and not embedded(read):
            raise ConfigError(f"{cfg.name}: no id feature to embed is left; crosses have linear weights only")
        return read

    def logits(self, batch: Batch) -> torch.Tensor:
        """[B, T]"""
        raise NotImplementedError

    def forward(self, batch: Batch) -> torch.Tensor:
        """[B] logits of the label; in evaluation mode calibrated ones."""
        logit_B = self.logits(batch)[:, 0]
        return logit_B if self.training else self.calibration(logit_B)

    def prediction(self, logit_B: torch.Tensor) -> torch.Tensor:
        """[B] probability of the label."""
        return torch.sigmoid(logit_B)

    def loss(self, batch: Batch, step: int) -> torch.Tensor:
        """[B] the label's loss and the weighted sum of the other tasks'."""
        del step  # nothing is sampled
        return self.loss_of(self.logits(batch), batch)

    def loss_of(self, logits_BT: torch.Tensor, batch: Batch) -> torch.Tensor:
        """[B] `loss`, of logits that were computed before."""
        logits_BT = full(logits_BT)
        loss_B = self.label_loss(logits_BT[:, 0], batch)
        for column, (name, weight) in enumerate(self.objective.tasks.items(), start=1):
            of_task = losses.binary_cross_entropy if self.kinds[name] == "binary" else losses.log_square
            loss_B = loss_B + weight * of_task(logits_BT[:, column], batch.labels[name])
        return loss_B

    def label_loss(self, logit_B: torch.Tensor, batch: Batch) -> torch.Tensor:
        """[B] the label's alone."""
        label_B = batch.labels[self.label]
        if self.objective.loss == "focal":
            loss_B = losses.focal(logit_B, label_B, self.objective.focal_gamma)
        else:
            loss_B = losses.binary_cross_entropy(logit_B, label_B)
        return loss_B * torch.where(label_B > 0, self.objective.positive_weight, 1.0)

    def table_groups(self) -> Mapping[str, list[nn.Parameter]]:
        """`"wide"`: the linear part's weights, where there is one; `"deep"`: all embeddings."""
        groups: dict[str, list[nn.Parameter]] = {"deep": []}
        for name, weight in self.named_parameters():
            parts = name.split(".")
            if "embedding_bags" in parts or "embeddings" in parts:
                groups.setdefault("wide" if parts[-2] == WIDE else "deep", []).append(weight)
        return groups


class Fields(nn.Module):
    """Embedded fields, and the linear model over single ids: one collection, so one exchange of workers.

    Called with a batch's own ids, once a step: on GPUs workers exchange them a step ahead (`train.ahead`).
    A field is an id feature; ids of a list are pooled to their mean. All weights of the linear model
    over one-hot ids lie in one table, a stretch of rows per feature, and start at zero.
    """

    def __init__(
        self, schema: Schema, deep: Iterable[IdFeature], linear: Iterable[SingleId], cfg: EmbeddingConfig
    ) -> None:
        super().__init__()
        fields, wide = list(deep), list(linear)
        self.names = [feature.name for feature in fields]
        self.dim = cfg.embedding_dim
        rows = np.cumsum([0, *(table_rows(feature) for feature in wide)])
        self.wide_rows = {feature.name: int(first) for feature, first in zip(wide, rows, strict=False)}
        table = EmbeddingBagConfig(
            name=WIDE,
            num_embeddings=int(rows[-1]),
            embedding_dim=WIDE_DIM,
            feature_names=[WIDE],
            pooling=PoolingType.SUM,
            init_fn=nn.init.zeros_,
        )
        extra = [table] if wide else []
        self.tables = embedding_tables(schema, fields, self.dim, normal(cfg.embedding_std), extra=extra)

    @property
    def width(self) -> int:
        """F · D"""
        return len(self.names) * self.dim

    def forward(self, sparse: KeyedJaggedTensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Embedded fields [B, F, D] and the linear part [B], zeros without one; padding gives zeros."""
        found = self.tables(self.ids(sparse)).to_dict()
        linear_B = found[WIDE].sum(dim=1) / WIDE_DIM if self.wide_rows else _zeros(sparse)
        if not self.names:
            return linear_B.new_zeros(len(linear_B), 0, self.dim), linear_B
        flat = torch.cat([found[name] for name in self.names], dim=1)
        return flat.view(len(flat), len(self.names), self.dim), linear_B

    def ids(self, sparse: KeyedJaggedTensor) -> KeyedJaggedTensor:
        """What is looked up: the ids, and as one key more those of all wide features, in their own rows."""
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


def _zeros(sparse: KeyedJaggedTensor) -> torch.Tensor:
    """[B] float zeros."""
    return torch.zeros(sparse.stride(), device=sparse.lengths().device)


def embedded(schema: Schema) -> list[IdFeature]:
    """Every id feature but the crosses, which go to linear parts alone."""
    return [feature for feature in schema.ids if feature not in schema.crosses]
