"""Ranking: the prediction for every candidate, of all requests in one batch. R requests, C candidates"""

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import pyarrow as pa
import torch

from recsys_dist.bundle import Bundle, Served
from recsys_dist.data.collate import collate
from recsys_dist.models.protocol import FactoredRankModel, Parts
from recsys_dist.schema import Schema
from recsys_dist.serve.features import Features


@dataclass(frozen=True)
class Rank:
    """`items` are the catalogue's parts by position, of a ranker that can be taken apart."""

    ranker: Served
    features: Features
    items: Parts | None
    user_side: Schema

    @classmethod
    def of(cls, bundle: Bundle) -> Self:
        features = Features.of(bundle, bundle.ranking)
        model = bundle.ranking.model
        items = _parts(bundle.ranking, features) if isinstance(model, FactoredRankModel) else None
        return cls(bundle.ranking, features, items, bundle.ranking.schema.of_side(item=False))

    @torch.inference_mode()
    def predictions(self, users: pa.Table, of: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """[C] float32: what is predicted of row `of` [C] of `users` and the items at `positions` [C]."""
        logits = (
            self._whole(users, of, positions) if self.items is None else self._joined(users, of, positions)
        )
        model: Any = self.ranker.model
        predicted: np.ndarray = model.prediction(logits).numpy()
        return predicted

    def _whole(self, users: pa.Table, of: np.ndarray, positions: np.ndarray) -> torch.Tensor:
        rows = self.features.rows(users, of, positions)
        logits: torch.Tensor = self.ranker.model(collate(rows, self.ranker.schema))
        return logits

    def _joined(self, users: pa.Table, of: np.ndarray, positions: np.ndarray) -> torch.Tensor:
        """The same from parts: a user's is computed once for all her candidates."""
        model = self.ranker.model
        assert isinstance(model, FactoredRankModel) and self.items is not None
        batch = collate(self.features.with_unknown_item(users, self.user_side), self.user_side)
        crosses = self.features.crosses(users, of, positions)
        return model.join(
            model.parts(batch, of_item=False),
            self.items,
            torch.from_numpy(of),
            torch.from_numpy(positions),
            {name: torch.from_numpy(ids) for name, ids in crosses.items()},
        )


@torch.inference_mode()
def _parts(ranker: Served, features: Features) -> Parts:
    model = ranker.model
    assert isinstance(model, FactoredRankModel)
    schema = ranker.schema.of_side(item=True)
    blocks = [model.parts(collate(rows, schema), of_item=True) for rows in features.of_every_item()]
    return Parts(torch.cat([b.hidden for b in blocks]), torch.cat([b.logit for b in blocks]))
