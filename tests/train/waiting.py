"""A model that takes its time until a file is there."""

from pathlib import Path
from typing import Any, Literal

import torch

from jobs import ledger_model
from recsys_dist.batch import Batch
from recsys_dist.schema import Schema


class Config(ledger_model.Config):
    name: Literal["tests.train.waiting:Model"] = "tests.train.waiting:Model"
    until: str


class Model(ledger_model.Model):
    def __init__(self, cfg: Config, schema: Schema, catalogue: Any = None) -> None:
        super().__init__(cfg, schema, catalogue)
        self._until = Path(cfg.until)

    def loss(self, batch: Batch, step: int) -> torch.Tensor:
        if self._until.exists():
            self._pause_s = 0.0
        return super().loss(batch, step)
