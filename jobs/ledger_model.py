"""A model that remembers which rows it was trained on: what `jobs.chaos_train` trains.

Beside the intercept of the label it has one weight w_r per training row, found by the row's provenance
(shard, row), and the loss of row r is

    cross-entropy(b, y_r) + w_r

The gradient of w_r is positive whenever row r is in a batch. Adagrad's first step is -lr whatever the size
of a gradient, a second one less and in the same direction: after one epoch a row has w_r = -lr exactly where
it was trained once, 0 where it was lost, and less than -lr where it was repeated.
"""

import time
from collections.abc import Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor, PoolingType

from recsys_dist.batch import Batch
from recsys_dist.models.protocol import ModelConfig, Task
from recsys_dist.schema import Schema
from recsys_dist.train.checkpoint import load_for_inference

_ROW_OF = 0xFFFFFFFF  # a row id is shard << 32 | row


class Config(ModelConfig):
    """`shards` are the rows of each training shard, in order; a step waits `pause_s`, to be killed in."""

    name: Literal["jobs.ledger_model:Model"] = "jobs.ledger_model:Model"
    shards: tuple[int, ...] = ()
    pause_s: float = 0.0


class Model(nn.Module):
    task: ClassVar[Task] = "ranking"

    def __init__(self, cfg: Config, schema: Schema, catalogue: Any = None) -> None:
        super().__init__()
        del catalogue
        self.label = schema.ranking_label
        self._pause_s = cfg.pause_s
        table = EmbeddingBagConfig(
            name="row",
            num_embeddings=1 + sum(cfg.shards),  # row 0: padding
            embedding_dim=4,
            feature_names=["row"],
            pooling=PoolingType.SUM,
            init_fn=nn.init.zeros_,
        )
        self.rows = EmbeddingBagCollection(tables=[table], device=torch.device("meta"))
        self.bias = nn.Parameter(torch.zeros(()))
        first = torch.tensor([1, *accumulate(cfg.shards, initial=1)][1:-1])
        self.register_buffer("first", first, persistent=False)
        self.first: torch.Tensor  # [shards] the table row of each shard's first row

    @staticmethod
    def inputs(schema: Schema, _cfg: Config) -> Schema:
        """One feature, so that there is a batch; it is not read."""
        return schema.select([schema.singles[0].name])

    def table_groups(self) -> Mapping[str, list[nn.Parameter]]:
        return {"deep": list(self.rows.parameters())}

    def loss(self, batch: Batch, step: int) -> torch.Tensor:
        """[B]"""
        del step
        time.sleep(self._pause_s)
        real = batch.row_id >= 0
        at = torch.where(real, self.first[batch.row_id.clamp(min=0) >> 32] + (batch.row_id & _ROW_OF), 0)
        ids = KeyedJaggedTensor(keys=["row"], values=at, lengths=torch.ones_like(at, dtype=torch.int32))
        entropy = binary_cross_entropy_with_logits(
            self.forward(batch), batch.labels[self.label], reduction="none"
        )
        return entropy + self.rows(ids).values().sum(dim=1)

    def forward(self, batch: Batch) -> torch.Tensor:
        """[B] logits"""
        return self.bias.expand(batch.rows)


def trained_once(checkpoint: Path, lr: float) -> dict[str, int]:
    """How many training rows a run of one epoch has lost, repeated, and trained once."""
    model, _ = load_for_inference(checkpoint)
    steps = -model.state_dict()["rows.embedding_bags.row.weight"][1:].double().numpy() / lr
    once = np.isclose(steps, 1, atol=1e-3).all(axis=1)
    lost = (steps < 0.5).all(axis=1)
    return {"once": int(once.sum()), "lost": int(lost.sum()), "repeated": int((~once & ~lost).sum())}
