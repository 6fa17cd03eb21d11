"""Deep Session Interest Network (Feng et al. 2019, arXiv 1905.06482): behaviours by sessions, then sessions.

    division     a session ends where the next behaviour is 30 minutes later: `Sessions` of the schema
    extractor    Q = Q + BE,  BE_(k,t,c) = w_k + w_t + w_c         bias of session, place in it, and unit
                 I_k = mean( FFN( multi-head self-attention(Q_k) ) )            each with residual and norm
    interacting  H_k = Bi-LSTM(I)_k
    activating   U = Σ_k softmax_k( I_k W X ) I_k, and the same of H, for the candidate X

Both U go to the tower beside candidate, other fields and floats. Heads are those of Vaswani et al. 2017,
with DSIN's scale 1 / sqrt(E). k counts from the newest; what is older than the schema's `sessions` is one.

B rows, V tokens, S sessions of all rows, E width of a behaviour, L length in a block of like sessions
"""

from typing import Any, Literal

import torch
from pydantic import Field
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

from recsys_dist.batch import Batch
from recsys_dist.errors import ConfigError
from recsys_dist.feature_kinds import Sequence, Sessions
from recsys_dist.models.behaviours import Behaviours, History, HistoryConfig, Segments, history_groups
from recsys_dist.models.layers import MLP
from recsys_dist.models.protocol import Catalogue
from recsys_dist.models.ranking import Ranker
from recsys_dist.models.recurrence import Packing
from recsys_dist.schema import Schema


class Config(HistoryConfig):
    name: Literal["dsin"] = "dsin"
    heads: int = Field(2, ge=1, description="must divide the width of a behaviour")
    feed_forward: int = Field(64, ge=1, description="width of the FFN's hidden layer")


class BiasEncoding(nn.Module):
    """BE_(k,t,c) = w_k + w_t + w_c."""

    def __init__(self, sessions: int, places: int, width: int) -> None:
        super().__init__()
        self.session = nn.Parameter(torch.zeros(sessions))
        self.place = nn.Parameter(torch.zeros(places))
        self.unit_E = nn.Parameter(torch.zeros(width))

    def forward(self, x_VE: torch.Tensor, session_V: torch.Tensor, place_V: torch.Tensor) -> torch.Tensor:
        """[V, E]"""
        bias_V = self.session.index_select(0, session_V) + self.place.index_select(0, place_V)
        return x_VE + bias_V[:, None] + self.unit_E


class SelfAttention(nn.Module):
    """Multi-head self-attention within segments, residual and norm, then FFN, residual and norm."""

    def __init__(self, width: int, heads: int, feed_forward: int) -> None:
        super().__init__()
        self.heads = heads
        self.projected = nn.Linear(width, 3 * width, bias=False)
        self.joined = nn.Linear(width, width, bias=False)
        self.ffn = MLP(width, (feed_forward,), "relu", out=width)
        self.first_norm, self.last_norm = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x_VE: torch.Tensor, segments: Segments) -> torch.Tensor:
        """[V, E]"""
        attended_VE = self._attended(self.projected(x_VE), segments)
        x_VE = self.first_norm(x_VE + self.joined(attended_VE))
        out: torch.Tensor = self.last_norm(x_VE + self.ffn(x_VE))
        return out

    def _attended(self, projected_V: torch.Tensor, segments: Segments) -> torch.Tensor:
        """[V, E]; segments of like length share a block, padded to the next power of two at most."""
        width = projected_V.shape[1] // 3
        blocks, places = [], []
        for index, real in _blocks(segments):
            n, length = index.shape
            qkv = projected_V.index_select(0, index.flatten()).view(n, length, 3, self.heads, -1)
            q, k, v = qkv.permute(2, 0, 3, 1, 4)
            mask = real[:, None, None, :]
            found = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=width**-0.5)
            blocks.append(found.transpose(1, 2).reshape(n, length, width)[real])
            places.append(index[real])
        if not blocks:
            return projected_V[:, :width]
        return torch.cat(blocks).index_select(0, torch.cat(places).argsort())


class SessionInterest(nn.Module):
    """Extractor, interaction and activation of one history."""

    def __init__(self, width: int, sessions: Sessions, cfg: Config) -> None:
        super().__init__()
        if width % cfg.heads:
            raise ConfigError(f"dsin: heads={cfg.heads} does not divide the behaviours' width {width}")
        self.name = sessions.name
        self.bias = BiasEncoding(sessions.rows, sessions.max_length, width)
        self.attention = SelfAttention(width, cfg.heads, cfg.feed_forward)
        # normalised, interests would begin a hundred times as large as the fields that they lie beside
        nn.init.constant_(self.attention.last_norm.weight, cfg.embedding_std)
        self.lstm = nn.LSTM(width, width, bidirectional=True)
        self.of_interest = nn.Linear(width, width, bias=False)
        self.of_context = nn.Linear(width, 2 * width, bias=False)

    def forward(self, history: History, session_V: torch.Tensor) -> torch.Tensor:
        """[B, 3E] what the candidate makes of the sessions, and of the sessions in their context."""
        by_session, by_row = divided(history.segments, session_V)
        place_V = by_session.every_V - by_session.offsets[by_session.row_V]
        x_VE = self.attention(self.bias(history.behaviour_VE, session_V, place_V), by_session)
        interest_SE = by_session.sum(x_VE) / by_session.lengths_B[:, None]
        context = self._context(interest_SE, by_row)
        return torch.cat(
            [
                activated(interest_SE, self.of_interest(history.query_BE), by_row),
                activated(context, self.of_context(history.query_BE), by_row),
            ],
            dim=1,
        )

    def _context(self, interest_SE: torch.Tensor, by_row: Segments) -> torch.Tensor:
        """[S, 2E] the Bi-LSTM's states."""
        if not len(interest_SE):  # torch's LSTM takes no empty sequence, and every weight wants its gradient
            return interest_SE.repeat(1, 2) + sum(weight.sum() for weight in self.lstm.parameters()) * 0
        packing = Packing(by_row)
        packed = PackedSequence(interest_SE.index_select(0, packing.token_V), torch.tensor(packing.live))
        states: torch.Tensor = self.lstm(packed)[0].data
        return states.index_select(0, packing.place_V)


class Model(Ranker):
    """Logits of `schema.ranking_label`; see the module's docstring for the equations."""

    def __init__(self, cfg: Config, schema: Schema, catalogue: Catalogue | None = None) -> None:
        super().__init__(cfg, schema)
        groups = _groups(schema, cfg)
        self.behaviours = Behaviours(schema, cfg, groups, catalogue)
        sessions = [_sessions_of(group[0], schema) for group in groups]
        self.interests = nn.ModuleList(
            SessionInterest(width, of, cfg)
            for width, of in zip(self.behaviours.widths, sessions, strict=True)
            if of is not None
        )
        inputs = self.behaviours.fields_width + 3 * sum(self.behaviours.widths) + len(schema.dense)
        self.tower = cfg.tower(inputs, self.outputs)

    @staticmethod
    def inputs(schema: Schema, cfg: Any) -> Schema:
        """See Ranker, and sessions; ConfigError too where no history has any."""
        features = [f.name for f in schema.features] if cfg.features is None else list(cfg.features)
        read = Ranker.inputs(schema, Config.parse({**cfg.model_dump(), "features": features}))
        _groups(read, cfg)
        return read

    def logits(self, batch: Batch) -> torch.Tensor:
        """[B, T]"""
        fields, histories = self.behaviours(batch)
        interests = [
            interest(history, batch.sparse[interest.name].values().long())
            for history, interest in zip(histories, self.interests, strict=True)
        ]
        return self.tower(torch.cat([fields, *interests, batch.dense], dim=1), batch.real)


def divided(segments: Segments, session_V: torch.Tensor) -> tuple[Segments, Segments]:
    """Tokens by session (in the order of rows, oldest first), and sessions by row."""
    row_V = segments.row_V
    begins = torch.ones_like(row_V, dtype=torch.bool)
    begins[1:] = (row_V[1:] != row_V[:-1]) | (session_V[1:] != session_V[:-1])
    first_S = begins.nonzero()[:, 0]
    lengths_S = torch.diff(first_S, append=first_S.new_tensor([len(row_V)]))
    sessions_B = torch.bincount(row_V[first_S], minlength=segments.rows)
    return Segments(lengths_S, len(row_V)), Segments(sessions_B, len(first_S))


def activated(x: torch.Tensor, query: torch.Tensor, by_row: Segments) -> torch.Tensor:
    """[S, H], [B, H] → [B, H] the sessions summed by their softmax weights; zeros without a session."""
    weight_S = by_row.softmax((x * by_row.expand(query)).sum(1))
    return by_row.sum(weight_S[:, None] * x)


def _blocks(segments: Segments) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Per power of two, the segments longer than half of it: [n, L] tokens, and which of these are real."""
    lengths, found = segments.lengths_B, []
    longest = int(lengths.max()) if len(lengths) else 0
    less, most = 0, min(longest, 1)
    while less < longest:
        chosen = ((lengths > less) & (lengths <= most)).nonzero()[:, 0]
        if len(chosen):
            place = torch.arange(most, device=lengths.device)
            real = place < lengths[chosen, None]
            found.append(((segments.offsets[chosen, None] + place) * real, real))
        less, most = most, min(longest, 2 * most)
    return found


def _groups(schema: Schema, cfg: Config) -> list[list[Sequence]]:
    """Histories whose sessions the schema has; ConfigError where there is none."""
    groups = [g for g in history_groups(schema, cfg) if _sessions_of(g[0], schema) is not None]
    if not groups:
        first = history_groups(schema, cfg)[0][0]
        raise ConfigError(
            f"dsin: needs to know which session a behaviour belongs to, and no history has sessions; give "
            f"the schema Sessions(name='sessions', where={first.where!r}, max_length={first.max_length}) "
            f"for {first.name!r}"
        )
    return groups


def _sessions_of(sequence: Sequence, schema: Schema) -> Sessions | None:
    events = (sequence.where, sequence.max_length)
    known = (f for f in schema.sessions if (f.where, f.max_length) == events and not sequence.others_only)
    return next(known, None)
