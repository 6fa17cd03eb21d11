"""Deep Interest Evolution Network (Zhou et al. 2019, arXiv 1809.03672): interests that drift.

    h_t = GRU(e_t, h_{t-1})                        interest states                             (eq. 2-5)
    a_t = softmax_t( h_t W e_a )                   how much of it the candidate concerns       (eq. 8)
    h'_t = AUGRU(h_t, h'_{t-1}, a_t)               update gate a_t u_t                         (eq. 14-15)

The last h' goes to the tower beside candidate, other fields, floats and each history's mean. An auxiliary
loss has each h_t tell the next behaviour from one that did not happen:

    L = L_target + alpha L_aux                                                                  (eq. 7)
    L_aux = - mean_t [ log sigmoid(h_t·e_{t+1}) + log(1 - sigmoid(h_t·ê_{t+1})) ]               (eq. 6)

B rows, V tokens, E width of a behaviour and of all states, T tasks
"""

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field
from torch import nn
from torch.nn import functional as F

from recsys_dist.batch import Batch
from recsys_dist.config import Seed
from recsys_dist.models.behaviours import (
    Behaviours,
    History,
    HistoryConfig,
    Segments,
    history_groups,
    with_history,
)
from recsys_dist.models.protocol import Catalogue
from recsys_dist.models.ranking import Ranker
from recsys_dist.models.recurrence import Packing, gru
from recsys_dist.schema import Schema

Evolution = Literal["augru", "agru", "aigru"]


class Config(HistoryConfig):
    name: Literal["dien"] = "dien"
    evolution: Evolution = Field(
        "augru", description="attention scales the update gate, is it (agru), or scales the input (aigru)"
    )
    pooled: bool = Field(
        True, description="the mean of each history too, which the authors' code has and the paper does not"
    )
    auxiliary: float = Field(1.0, ge=0, description="alpha, weight of the auxiliary loss")
    negatives_seed: Seed = 0


class GRU(nn.Module):
    """A gated recurrent unit of `width` inputs and states; see recurrence."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inputs = nn.Linear(width, 3 * width)
        self.recurrent_GH = nn.Parameter(torch.empty(3 * width, width))
        of_inputs, of_states = self.inputs.weight.detach(), self.recurrent_GH.detach()
        for gate in (*of_inputs.chunk(3), *of_states.chunk(3)):
            nn.init.orthogonal_(gate)
        nn.init.zeros_(self.inputs.bias)

    def forward(
        self,
        x_VE: torch.Tensor,
        packing: Packing,
        attention_V: torch.Tensor | None = None,
        open_gate: bool = False,
    ) -> torch.Tensor:
        """[V, E] states; with `open_gate` the update gate is the attention alone."""
        gates_VG: torch.Tensor = self.inputs(x_VE)
        recurrent_GH: torch.Tensor = self.recurrent_GH
        if open_gate:
            reset, update, new = gates_VG.chunk(3, dim=1)
            gates_VG = torch.cat([reset, torch.full_like(update, math.inf), new], dim=1)
            reset, update, new = recurrent_GH.chunk(3)
            recurrent_GH = torch.cat([reset, torch.zeros_like(update), new])
        return gru(gates_VG, recurrent_GH, packing, attention_V)


class Interest(nn.Module):
    """Extractor and evolution of one history."""

    def __init__(self, width: int, evolution: Evolution) -> None:
        super().__init__()
        self.evolution = evolution
        self.extractor, self.evolving = GRU(width), GRU(width)
        self.attention_EE = nn.Parameter(torch.empty(width, width))
        nn.init.xavier_normal_(self.attention_EE)

    def forward(self, history: History) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, E] the last evolved state, zeros without a history, and [V, E] interest states."""
        segments, packing = history.segments, Packing(history.segments)
        state_VE = self.extractor(history.behaviour_VE, packing)
        query_VE = segments.expand(history.query_BE @ self.attention_EE.T)
        attention_V = segments.softmax((state_VE * query_VE).sum(1))
        if self.evolution == "aigru":
            evolved_VE = self.evolving(state_VE * attention_V[:, None], packing)
        else:
            evolved_VE = self.evolving(state_VE, packing, attention_V, open_gate=self.evolution == "agru")
        return last(evolved_VE, segments), state_VE


class Model(Ranker):
    """Logits of `schema.ranking_label`; see the module's docstring for the equations."""

    def __init__(self, cfg: Config, schema: Schema, catalogue: Catalogue | None = None) -> None:
        super().__init__(cfg, schema)
        self.cfg = cfg
        self.behaviours = Behaviours(schema, cfg, history_groups(schema, cfg), catalogue)
        widths = self.behaviours.widths
        self.interests = nn.ModuleList(Interest(width, cfg.evolution) for width in widths)
        inputs = self.behaviours.fields_width + (1 + cfg.pooled) * sum(widths) + len(schema.dense)
        self.tower = cfg.tower(inputs, self.outputs)

    @staticmethod
    def inputs(schema: Schema, cfg: Any) -> Schema:
        """See Ranker; ConfigError too where there is no history."""
        return with_history(schema, cfg)

    def logits(self, batch: Batch) -> torch.Tensor:
        """[B, T]"""
        return self._logits(batch)[0]

    def loss(self, batch: Batch, step: int) -> torch.Tensor:
        """[B] the target's loss and alpha times the auxiliary one."""
        if self.cfg.auxiliary == 0:
            return super().loss(batch, step)
        logits_BT, auxiliary_B = self._logits(batch, self._negatives(batch, step))
        return self.loss_of(logits_BT, batch) + self.cfg.auxiliary * auxiliary_B

    def _logits(
        self, batch: Batch, negatives: Mapping[str, torch.Tensor] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, T] logits and [B] auxiliary loss, 0 without negatives."""
        fields, histories = self.behaviours(batch, negatives)
        auxiliary_B, states = fields.new_zeros(batch.rows), []
        for history, interest in zip(histories, self.interests, strict=True):
            state_BE, state_VE = interest(history)
            states.append(state_BE)
            if self.cfg.pooled:
                states.append(history.segments.mean(history.behaviour_VE))
            if history.negative_VE is not None:
                auxiliary_B = auxiliary_B + auxiliary_loss(state_VE, history)
        return self.tower(torch.cat([fields, *states, batch.dense], dim=1), batch.real), auxiliary_B

    def _negatives(self, batch: Batch, step: int) -> dict[str, torch.Tensor]:
        """Ids [V] by sequence: a row draws the same on whatever worker it is."""
        seed = hashed(torch.tensor([self.cfg.negatives_seed, step])).sum()
        drawn = {}
        for number, feature in enumerate(f for group in self.behaviours.groups for f in group):
            jagged = batch.sparse[feature.name]
            segments = Segments(jagged.lengths(), len(jagged.values()))
            place_V = segments.every_V - segments.offsets[segments.row_V]
            key_V = hashed(hashed(batch.row_id + seed.to(batch.device))[segments.row_V] + place_V)
            drawn[feature.name] = others(hashed(key_V + number), jagged.values(), feature.rows or 1)
        return drawn


def auxiliary_loss(state_VE: torch.Tensor, history: History) -> torch.Tensor:
    """[B] eq. 6-7 over each row's steps but the last, which has no next; 0 for a history of one or none.

    The paper sums over steps; their mean, as in the authors' code, leaves alpha independent of the length.
    """
    assert history.negative_VE is not None
    segments = history.segments
    next_VE = F.pad(history.behaviour_VE[1:], (0, 0, 0, 1))
    wrong_VE = F.pad(history.negative_VE[1:], (0, 0, 0, 1))
    has_next_V = (segments.row_V[1:] == segments.row_V[:-1]).to(state_VE.dtype)
    loss_V = F.softplus(-(state_VE * next_VE).sum(1)) + F.softplus((state_VE * wrong_VE).sum(1))
    total_B = segments.sum(loss_V[:, None] * F.pad(has_next_V, (0, 1))[:, None])[:, 0]
    return total_B / (segments.lengths_B - 1).clamp(min=1)


def last(x_VE: torch.Tensor, segments: Segments) -> torch.Tensor:
    """[B, E] the last token of each row; zeros for a row without any."""
    rows = segments.lengths_B.nonzero()[:, 0]
    newest = x_VE.index_select(0, segments.offsets[rows + 1] - 1)
    return x_VE.new_zeros(segments.rows, x_VE.shape[1]).index_copy(0, rows, newest)


def others(random_V: torch.Tensor, id_V: torch.Tensor, rows: int) -> torch.Tensor:
    """[V] rows of a table, uniform over all but the given id; int64 random numbers choose."""
    drawn_V = random_V.remainder(max(rows - 1, 1)).to(id_V.dtype)
    return (drawn_V + (drawn_V >= id_V)).clamp(max=rows - 1)


def hashed(x: torch.Tensor) -> torch.Tensor:
    """int64 → int64, well mixed: splitmix64's finaliser (Steele et al. 2014), products wrap around."""
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        x = (x ^ _shifted(x, shift)) * factor
    return x ^ _shifted(x, 31)


def _shifted(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical shift to the right, where int64's own keeps the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
