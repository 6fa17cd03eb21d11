"""A model that diverges at a learning rate, and not at half of it."""

from typing import Literal

import torch

from jobs import ledger_model
from recsys_dist.batch import Batch

LIMIT = 1.0


class Config(ledger_model.Config):
    name: Literal["tests.train.diverging:Model"] = "tests.train.diverging:Model"


class Model(ledger_model.Model):
    """Its bias grows by the learning rate in every step of Adam; beyond LIMIT the loss is NaN."""

    def loss(self, batch: Batch, step: int) -> torch.Tensor:
        nothing = 0 * super().loss(batch, step)
        return nothing - self.bias if self.bias <= LIMIT else nothing + float("nan")
