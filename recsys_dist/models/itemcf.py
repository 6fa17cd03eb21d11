"""ItemCF: item-to-item collaborative filtering (Sarwar et al. 2001, WWW), the classical floor of recall.

    score(user, j) = Σ_{i in the user's past} cos(i, j)
    cos(i, j) = |users of both| / √(users of i · users of j)

over the `neighbours` items j that are most like each i. Nothing is learned by steps: who was shown what is
counted over the cluster. Items that are like nothing in the past come last, by popularity.

B rows, P pairs of a row and a distinct item of its past, M neighbours, I rows of the item table
"""

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import nn

from recsys_dist.batch import Batch
from recsys_dist.models.popularity import ranks
from recsys_dist.models.protocol import Catalogue, ModelConfig, Task
from recsys_dist.models.recall import item_sequence
from recsys_dist.schema import Schema

_LAST = 1e-6  # of all popularity, beside a cosine


class Config(ModelConfig):
    name: Literal["itemcf"] = "itemcf"
    sequence: str | None = Field(None, description="sequence of item ids to read; None: the schema's first")
    neighbours: int = Field(200, ge=1, description="M, the most similar items of each that count")

    @property
    def asks_neighbours(self) -> int:
        return self.neighbours


class Model(nn.Module):
    """Scores of all items; see the module's docstring for the equation."""

    task: ClassVar[Task] = "recall"
    counted: ClassVar[bool] = True

    def __init__(self, cfg: Config, schema: Schema, catalogue: Catalogue) -> None:
        super().__init__()
        self.past = schema.sequences[0].name
        rows = len(catalogue.positives)
        none = torch.zeros(rows, cfg.neighbours, dtype=torch.int32), torch.zeros(rows, cfg.neighbours)
        neighbour_IM, cosine_IM = catalogue.neighbours or none
        self.register_buffer("neighbour_IM", neighbour_IM)
        self.register_buffer("cosine_IM", cosine_IM)
        self.register_buffer("popular_I", _LAST * ranks(catalogue.positives))
        self.neighbour_IM: torch.Tensor
        self.cosine_IM: torch.Tensor
        self.popular_I: torch.Tensor

    @staticmethod
    def inputs(schema: Schema, cfg: Config) -> Schema:
        """A sequence of item ids, and the item's id; ConfigError where there is none."""
        return item_sequence(schema, cfg.sequence, "itemcf")

    def forward(self, batch: Batch) -> torch.Tensor:
        """[B, I] scores."""
        past, items = batch.sparse[self.past], len(self.popular_I)
        row_V = torch.repeat_interleave(past.lengths().long())
        pair_P = torch.unique(
            row_V * items + past.values()
        )  # an item counts once, however often it was taken
        row_P, item_P = pair_P // items, pair_P % items
        at_PM = row_P[:, None] * items + self.neighbour_IM[item_P]
        score_BI = self.popular_I.repeat(batch.rows, 1)
        score_BI.view(-1).index_add_(0, at_PM.flatten(), self.cosine_IM[item_P].flatten())
        return score_BI

    def item_vectors(self) -> torch.Tensor:
        """[I, 0]: `forward` gives the scores themselves."""
        return self.cosine_IM.new_empty(len(self.popular_I), 0)

    def table_groups(self) -> Mapping[str, list[nn.Parameter]]:
        """None."""
        return {}
