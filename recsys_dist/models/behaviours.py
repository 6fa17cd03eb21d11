"""What DIN, DIEN and DSIN share: a user's behaviours, event by event, beside the candidate.

Everything here works on real tokens, row after row and oldest first; nothing is padded.

B rows, V tokens (behaviours of all rows), D embedding dimension, F fields,
E width of a behaviour: the embeddings of all ids known of it (item, category, ...) side by side
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field
from torch import nn
from torchrec import JaggedTensor, KeyedJaggedTensor

from recsys_dist.config import nearest
from recsys_dist.errors import ConfigError
from recsys_dist.models.layers import MLP, Activation, WorkerMax, embedding_tables, normal
from recsys_dist.models.ranking import Fields, Ranker, TowerConfig, embedded
from recsys_dist.schema import Schema, Sequence


class HistoryConfig(TowerConfig):
    """Settings of rankers that attend to a user's history."""

    activation: Activation = "dice"
    histories: tuple[str, ...] | None = Field(
        None, description="sequences to attend to; others are pooled to their mean. None attends to all"
    )


@dataclass(frozen=True)
class History:
    """Aligned sequences of one `where` and `max_length`: a token is one event.

    behaviour_VE  embeddings of what is known of each event
    query_BE      the same of the candidate
    row_V         int64 row that each token belongs to
    lengths_B     int64 tokens of each row
    """

    behaviour_VE: torch.Tensor
    query_BE: torch.Tensor
    row_V: torch.Tensor
    lengths_B: torch.Tensor


class Behaviours(nn.Module):
    """Embeds all id features: fields as other rankers have them, and histories token by token.

    A token is looked up as a bag of one id. TorchRec's EmbeddingCollection, made for tokens, spends ten
    times as long in its backward pass on CPU (80k ids x 16: 19 ms against 2), and knows fewer shardings.
    """

    def __init__(self, schema: Schema, cfg: HistoryConfig) -> None:
        super().__init__()
        self.groups = history_groups(schema, cfg)
        self.attended = {feature.name for group in self.groups for feature in group}
        self.dim = cfg.embedding_dim
        read = embedded(schema)
        # the features of each table that an attended sequence lists; all others are fields
        self.listed = {
            group_of: [feature.name for feature in read if schema.table(feature) == group_of]
            for group_of in dict.fromkeys(feature.of for group in self.groups for feature in group)
        }
        items = [feature for feature in read if feature.name in self.listed]
        others = [feature for feature in read if schema.table(feature) not in self.listed]
        self.tables = embedding_tables(schema, items, self.dim, normal(cfg.embedding_std))
        self.fields = Fields(schema, others, [], cfg) if others else None
        self.workers = WorkerMax()

    @property
    def widths(self) -> list[int]:
        """E of each history."""
        return [len(group) * self.dim for group in self.groups]

    @property
    def fields_width(self) -> int:
        """F · D"""
        pooled = sum(len(names) for names in self.listed.values()) - len(self.attended)
        return pooled * self.dim + (self.fields.width if self.fields is not None else 0)

    def forward(self, sparse: KeyedJaggedTensor) -> tuple[torch.Tensor, list[History]]:
        """[B, F·D] fields, the candidate's among them, and the histories. Padding has zeros and no tokens."""
        jagged = {name: sparse[name] for names in self.listed.values() for name in names}
        found = self._lookup(jagged)
        fields = [vectors for name, vectors in found.items() if name not in self.attended]
        if self.fields is not None:
            fields.append(self.fields(sparse)[0].flatten(1))
        histories = []
        for group in self.groups:
            lengths_B = jagged[group[0].name].lengths().long()
            behaviour_VE = torch.cat([found[feature.name] for feature in group], dim=1)
            query_BE = torch.cat([found[feature.of] for feature in group], dim=1)
            row_V = rows_of(lengths_B, len(behaviour_VE))
            histories.append(History(behaviour_VE, query_BE, row_V, lengths_B))
        return torch.cat(fields, dim=1), histories

    def _lookup(self, jagged: Mapping[str, JaggedTensor]) -> dict[str, torch.Tensor]:
        """Feature -> [V, D] if attended, else pooled [B, D]: all features of a table are one key's bags."""

        def bags(name: str) -> torch.Tensor:
            lengths = jagged[name].lengths()
            return (
                torch.ones_like(jagged[name].values(), dtype=lengths.dtype)
                if name in self.attended
                else lengths
            )

        lengths = {table: [bags(name) for name in names] for table, names in self.listed.items()}
        counts = {table: sum(map(len, of)) for table, of in lengths.items()}
        # keys need equally many bags, and so do workers: gloo gathers row-wise tables
        most = self.workers(max(counts.values()), next(iter(jagged.values())).values().device)
        keys = list(self.listed)
        padded = [
            x for table in keys for x in (*lengths[table], lengths[table][0].new_zeros(most - counts[table]))
        ]
        found = self.tables(
            KeyedJaggedTensor(
                keys=keys,
                values=torch.cat([jagged[name].values() for table in keys for name in self.listed[table]]),
                lengths=torch.cat(padded),
            )
        ).to_dict()
        split = {
            table: found[table][: counts[table]].split([len(x) for x in lengths[table]]) for table in keys
        }
        return {name: x for table in keys for name, x in zip(self.listed[table], split[table], strict=True)}


class ActivationUnit(nn.Module):
    """DIN's local activation unit (arXiv 1706.06978, fig. 2): how much a behaviour says of a candidate.

    a(e_b, e_t) = MLP( [e_b, e_t, e_b - e_t, e_b ∘ e_t] ), a linear output without softmax: the sum of the
    weights tells how strong the interest is (§4.3). The figure calls the interaction "out product"; taken is
    the authors' code's, difference and elementwise product, of 2E numbers instead of E².
    """

    def __init__(self, width: int, hidden: tuple[int, ...], activation: Activation) -> None:
        super().__init__()
        self.mlp = MLP(4 * width, hidden, activation, out=1)

    def forward(self, history: History, real_B: torch.Tensor) -> torch.Tensor:
        """[V] weights of the behaviours."""
        first: Any = self.mlp.layers[0]
        of_b, of_t, of_difference, of_product = first.weight.chunk(4, dim=1)
        # W·[b, t, b - t, b∘t] = (W1 + W3) b + (W2 - W3) t + W4 (b∘t): the candidate's share once a row
        query_BH = torch.addmm(first.bias, history.query_BE, (of_t - of_difference).T)
        product_VE = history.behaviour_VE * expand(history.query_BE, history.row_V)
        tokens = torch.cat([history.behaviour_VE, product_VE], dim=1)
        weight = torch.cat([of_b + of_difference, of_product], dim=1)
        hidden_VH = torch.addmm(expand(query_BH, history.row_V), tokens, weight.T)
        return self.mlp.after(1, hidden_VH, expand(real_B, history.row_V))[:, 0]


def rows_of(lengths_B: torch.Tensor, tokens: int) -> torch.Tensor:
    """[V] int64 row of each token."""
    rows = torch.arange(len(lengths_B), device=lengths_B.device)
    return torch.repeat_interleave(rows, lengths_B.long(), output_size=tokens)


def expand(x: torch.Tensor, row_V: torch.Tensor) -> torch.Tensor:
    """[B, ...] → [V, ...] each token's row of `x`."""
    return x.index_select(0, row_V)


def segment_sum(x: torch.Tensor, row_V: torch.Tensor, rows: int) -> torch.Tensor:
    """[V, ...] → [B, ...] the sum over each row's tokens; zeros for a row without any.

    (On CPU, forward and backward, index_add is the fastest of index_add, torch.segment_reduce,
    embedding_bag and fbgemm's padding: .7, 1.0, 4.0 and .5 ms for 39k x 16, 2.5, 7.0, 4.1, 5.8 for x 80.)
    """
    return x.new_zeros(rows, *x.shape[1:]).index_add(0, row_V, x)


def segment_softmax(score_V: torch.Tensor, row_V: torch.Tensor, rows: int) -> torch.Tensor:
    """[V] softmax over each row's tokens."""
    lowest = torch.finfo(score_V.dtype).min
    # a row's maximum changes nothing but rounding, so no gradient need go through it
    top_B = score_V.new_full((rows,), lowest).scatter_reduce(0, row_V, score_V.detach(), "amax")
    exp_V = (score_V - expand(top_B, row_V)).exp()
    return exp_V / expand(segment_sum(exp_V, row_V, rows), row_V)


def history_groups(schema: Schema, cfg: HistoryConfig) -> list[list[Sequence]]:
    """Sequences that list the same events, in schema order; ConfigError where there is none."""
    known = [feature.name for feature in schema.sequences]
    for name in cfg.histories or ():
        if name not in known:
            raise ConfigError(
                f"{cfg.name}: histories has {name!r}, which is no sequence{nearest(name, known)}"
            )
    groups: dict[tuple[str | None, int], list[Sequence]] = {}
    for feature in schema.sequences:
        if cfg.histories is None or feature.name in cfg.histories:
            groups.setdefault((feature.where, feature.max_length), []).append(feature)
    if not groups:
        raise ConfigError(
            f"{cfg.name}: attends to a history, and the features it reads have none; give the schema one, "
            "as in Sequence(name='clicked', of=<feature of the item's id>, where='click')"
        )
    return list(groups.values())


def with_history(schema: Schema, cfg: Any) -> Schema:
    """`Ranker.inputs` of models that need a history; ConfigError where there is none."""
    read = Ranker.inputs(schema, cfg)
    history_groups(read, cfg)
    return read
