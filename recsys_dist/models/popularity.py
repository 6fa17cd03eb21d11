"""Popularity: the same items for all, those wanted most often first. The floor of every recall table.

B rows, I rows of the item table
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from recsys_dist.batch import Batch
from recsys_dist.models.protocol import Catalogue, ModelConfig, Task
from recsys_dist.schema import Schema


class Config(ModelConfig):
    name: Literal["popularity"] = "popularity"


class Model(nn.Module):
    """Scores of all items, alike for all users."""

    task: ClassVar[Task] = "recall"
    counted: ClassVar[bool] = True

    def __init__(self, cfg: Config, schema: Schema, catalogue: Catalogue) -> None:
        super().__init__()
        del cfg, schema
        self.register_buffer("popular_I", ranks(catalogue.positives))
        self.popular_I: torch.Tensor

    @staticmethod
    def inputs(schema: Schema, cfg: Any) -> Schema:
        """The item's id, and one thing of the user, whatever it is: a batch has rows by what it reads."""
        del cfg
        of_user = [feature.name for feature in schema.features if "item" not in schema.sides(feature)]
        return schema.select({schema.item_id.name, *of_user[:1]})

    def forward(self, batch: Batch) -> torch.Tensor:
        """[B, I] scores."""
        return self.popular_I.repeat(batch.rows, 1)

    def item_vectors(self) -> torch.Tensor:
        """[I, 0]: `forward` gives the scores themselves."""
        return self.popular_I.new_empty(len(self.popular_I), 0)

    def table_groups(self) -> Mapping[str, list[nn.Parameter]]:
        """None."""
        return {}


def ranks(positives_I: torch.Tensor) -> torch.Tensor:
    """[I] float32 in (0, 1], distinct to 2^24 items: 1 for most positives, ties by row."""
    order = torch.argsort(positives_I, descending=True, stable=True)
    rank_I = torch.empty(len(order), dtype=torch.float64)
    rank_I[order] = 1 - torch.arange(len(order), dtype=torch.float64) / len(order)
    return rank_I.float()
