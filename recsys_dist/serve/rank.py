"""Ranking: the probability of every candidate, of all requests in one batch. C candidates in all"""

from dataclasses import dataclass
from typing import Self

import numpy as np
import pyarrow as pa
import torch

from recsys_dist.bundle import Bundle, Served
from recsys_dist.data.collate import collate
from recsys_dist.serve.features import Features


@dataclass(frozen=True)
class Rank:
    ranker: Served
    features: Features

    @classmethod
    def of(cls, bundle: Bundle) -> Self:
        return cls(bundle.ranking, Features.of(bundle, bundle.ranking))

    @torch.inference_mode()
    def probabilities(self, users: pa.Table, of: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """[C] float32: that the user in row `of` [C] of `users` takes the item at `positions` [C]."""
        rows = self.features.rows(users, of, positions)
        logits: torch.Tensor = self.ranker.model(collate(rows, self.ranker.schema))
        return torch.sigmoid(logits).numpy()
