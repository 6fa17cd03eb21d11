"""Recall: a user tower and an index of item vectors. R requests, K items each, D dimension"""

from dataclasses import dataclass
from typing import Self

import numpy as np
import pyarrow as pa
import torch

from recsys_dist.bundle import Bundle, Served
from recsys_dist.data.collate import collate
from recsys_dist.index import Excluded, Index
from recsys_dist.serve.features import Features


@dataclass(frozen=True)
class Recall:
    tower: Served
    index: Index
    features: Features

    @classmethod
    def of(cls, bundle: Bundle) -> Self:
        return cls(bundle.recall, bundle.index, Features.of(bundle, bundle.recall))

    @torch.inference_mode()
    def retrieve(self, users: pa.Table, k: int, excluded: Excluded) -> tuple[np.ndarray, np.ndarray]:
        """Item rows [R, k] by falling score, 0 where none is left, and the scores [R, k].

        `users` are rows of `Features.users`; `excluded` has the item rows that each may not get.
        """
        batch = collate(self.features.with_unknown_item(users, self.tower.schema), self.tower.schema)
        vectors_RD = self.tower.model(batch).numpy()
        return self.index.search(vectors_RD, k, excluded)
