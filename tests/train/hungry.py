"""A model that asks for more memory than there is."""

from typing import Literal

import torch

from jobs import ledger_model
from recsys_dist.batch import Batch


class Config(ledger_model.Config):
    name: Literal["tests.train.hungry:Model"] = "tests.train.hungry:Model"


class Model(ledger_model.Model):
    def loss(self, batch: Batch, step: int) -> torch.Tensor:
        """Takes a pebibyte in its fourth step, on one worker."""
        if step == 3 and torch.distributed.get_rank() == 1:
            torch.empty(1 << 50, dtype=torch.uint8)
        return super().loss(batch, step)
