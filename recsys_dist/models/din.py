"""Deep Interest Network (Zhou et al. 2018, arXiv 1706.06978): the history as this candidate sees it.

    v_U(t) = Σ_j a(e_j, e_t) e_j                                                                (eq. 3)

over the behaviours e_j of a user, with the local activation unit a (see behaviours.ActivationUnit); its
weights are not normalised. Candidate, pooled histories, other fields and floats go to a tower with Dice.

B rows, V tokens, T tasks
"""

from typing import Any, Literal

import torch
from pydantic import Field
from torch import nn

from recsys_dist.batch import Batch
from recsys_dist.models.behaviours import (
    ActivationUnit,
    Behaviours,
    HistoryConfig,
    history_groups,
    with_history,
)
from recsys_dist.models.layers import Activation, Widths
from recsys_dist.models.protocol import Catalogue
from recsys_dist.models.ranking import Ranker
from recsys_dist.schema import Schema


class Config(HistoryConfig):
    name: Literal["din"] = "din"
    unit_hidden: Widths = Field((36,), min_length=1, description="of the activation unit; fig. 2")
    unit_activation: Activation = "dice"
    softmax: bool = Field(False, description="normalise the weights of a history to sum to 1")


class Model(Ranker):
    """Logits of `schema.ranking_label`; see the module's docstring for the equation."""

    def __init__(self, cfg: Config, schema: Schema, catalogue: Catalogue | None = None) -> None:
        super().__init__(cfg, schema)
        self.softmax = cfg.softmax
        self.behaviours = Behaviours(schema, cfg, history_groups(schema, cfg), catalogue)
        widths = self.behaviours.widths
        self.units = nn.ModuleList(ActivationUnit(w, cfg.unit_hidden, cfg.unit_activation) for w in widths)
        inputs = self.behaviours.fields_width + sum(widths) + len(schema.dense)
        self.tower = cfg.tower(inputs, self.outputs)

    @staticmethod
    def inputs(schema: Schema, cfg: Any) -> Schema:
        """See Ranker; ConfigError too where there is no history."""
        return with_history(schema, cfg)

    def logits(self, batch: Batch) -> torch.Tensor:
        """[B, T]"""
        fields, histories = self.behaviours(batch)
        pooled = []
        for history, unit in zip(histories, self.units, strict=True):
            weight_V = unit(history, batch.real)
            if self.softmax:
                weight_V = history.segments.softmax(weight_V)
            pooled.append(history.segments.sum(weight_V[:, None] * history.behaviour_VE))
        return self.tower(torch.cat([fields, *pooled, batch.dense], dim=1), batch.real)
