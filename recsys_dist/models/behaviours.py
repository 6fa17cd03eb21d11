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
from torch.nn import functional as F
from torchrec import KeyedJaggedTensor

from recsys_dist.batch import Batch
from recsys_dist.config import nearest
from recsys_dist.errors import ConfigError
from recsys_dist.feature_kinds import Sequence
from recsys_dist.models.layers import MLP, Activation, WorkerMax, embedding_tables, normal
from recsys_dist.models.protocol import Catalogue
from recsys_dist.models.ranking import Fields, Ranker, TowerConfig, embedded
from recsys_dist.models.regularisation import BatchAwareL2, pulled
from recsys_dist.schema import Schema

Bags = tuple[torch.Tensor, torch.Tensor]  # ids, and how many each bag has
_NEGATIVE = "not "


class HistoryConfig(TowerConfig):
    """Settings of rankers that attend to a user's history."""

    activation: Activation = "dice"
    histories: tuple[str, ...] | None = Field(
        None, description="sequences to attend to; others are pooled to their mean. None attends to all"
    )
    regularisation: float = Field(
        0.0,
        ge=0,
        description="λ of DIN's mini-batch aware L2: ids of a batch are pulled by λ / n each step, where n "
        "training rows have them",
    )

    @property
    def asks_occurrences(self) -> bool:
        return self.regularisation > 0


class Segments:
    """Which tokens belong to which row: tokens lie row after row, `lengths_B` of each."""

    def __init__(self, lengths_B: torch.Tensor, tokens: int) -> None:
        self.lengths_B = lengths_B.long()
        self.rows = len(lengths_B)
        device = lengths_B.device
        # [V] row of each token, and [B + 1] where each row's tokens begin
        self.row_V = torch.repeat_interleave(
            torch.arange(self.rows, device=device), self.lengths_B, output_size=tokens
        )
        self.offsets = F.pad(self.lengths_B.cumsum(0), (1, 0))
        self.every_V = torch.arange(tokens, device=device)

    def expand(self, x: torch.Tensor) -> torch.Tensor:
        """[B, H] → [V, H] each token's row of `x`."""
        out: torch.Tensor = _Expand.apply(x, self)  # type: ignore[no-untyped-call]
        return out

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """[V, H] → [B, H] the sum over each row's tokens; zeros for a row without any."""
        out: torch.Tensor = _Sum.apply(x, self)  # type: ignore[no-untyped-call]
        return out

    def mean(self, x: torch.Tensor) -> torch.Tensor:
        """[V, H] → [B, H] the mean over each row's tokens; zeros for a row without any."""
        return self.sum(x) / self.lengths_B.clamp(min=1)[:, None]

    def softmax(self, score_V: torch.Tensor) -> torch.Tensor:
        """[V] softmax over each row's tokens."""
        lowest = torch.finfo(score_V.dtype).min
        # a row's maximum changes nothing but rounding, so no gradient need go through it
        top_B = score_V.new_full((self.rows,), lowest).scatter_reduce(0, self.row_V, score_V.detach(), "amax")
        exp_V = (score_V - top_B[self.row_V]).exp()
        return exp_V / self.expand(self.sum(exp_V[:, None]))[:, 0]

    def summed(self, x: torch.Tensor) -> torch.Tensor:
        """`sum` without its gradient: bags of neighbours, on CPU five times as fast as index_add."""
        return F.embedding_bag(self.every_V, x, self.offsets, mode="sum", include_last_offset=True)


class _Expand(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, segments: Segments) -> torch.Tensor:
        ctx.segments = segments
        return x.index_select(0, segments.row_V)

    @staticmethod
    def backward(ctx: Any, *gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.segments.summed(gradient[0]), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, segments: Segments) -> torch.Tensor:
        ctx.segments = segments
        return segments.summed(x)

    @staticmethod
    def backward(ctx: Any, *gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient[0].index_select(0, ctx.segments.row_V), None


@dataclass(frozen=True)
class History:
    """Aligned sequences of one `where` and `max_length`: a token is one event.

    behaviour_VE  embeddings of what is known of each event
    query_BE      the same of the candidate
    segments      which tokens are whose
    negative_VE   the same of events that did not happen, where asked for
    """

    behaviour_VE: torch.Tensor
    query_BE: torch.Tensor
    segments: Segments
    negative_VE: torch.Tensor | None = None


class Behaviours(nn.Module):
    """Embeds all id features: fields as other rankers have them, and histories token by token.

    A token is looked up as a bag of one id: TorchRec's EmbeddingCollection, made for tokens, knows fewer
    shardings.
    """

    def __init__(
        self,
        schema: Schema,
        cfg: HistoryConfig,
        groups: list[list[Sequence]],
        catalogue: Catalogue | None = None,
    ) -> None:
        super().__init__()
        self.groups = groups  # see history_groups
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
        # these alone are looked up by bags of many ids; the sum of one id is itself
        listed = [f for f in read if isinstance(f, Sequence) and schema.table(f) in self.listed]
        self.averaged = [feature.name for feature in listed if feature.name not in self.attended]
        self.tables = embedding_tables(schema, items, self.dim, normal(cfg.embedding_std))
        self.fields = Fields(schema, others, [], cfg) if others else None
        self.workers = WorkerMax()
        self.l2 = _l2(schema, cfg, self.attended, catalogue) if cfg.regularisation else None

    @property
    def widths(self) -> list[int]:
        """E of each history."""
        return [len(group) * self.dim for group in self.groups]

    @property
    def fields_width(self) -> int:
        """F · D"""
        pooled = sum(len(names) for names in self.listed.values()) - len(self.attended)
        return pooled * self.dim + (self.fields.width if self.fields is not None else 0)

    def forward(
        self, batch: Batch, negatives: Mapping[str, torch.Tensor] | None = None
    ) -> tuple[torch.Tensor, list[History]]:
        """[B, F·D] fields, the candidate's among them, and the histories. Padding has zeros and no tokens.

        `negatives` are ids [V] by sequence, an event each that did not happen, to be embedded alike.
        """
        sparse, bags = batch.sparse, dict[str, Bags]()
        for name in (name for names in self.listed.values() for name in names):
            ids, lengths = sparse[name].values(), sparse[name].lengths()
            bags[name] = (ids, torch.ones_like(ids) if name in self.attended else lengths.to(ids.dtype))
        for name, ids in (negatives or {}).items():
            bags[_negative(name)] = (ids, torch.ones_like(ids))
        found = self._lookup(bags)
        for name in self.averaged:
            found[name] = found[name] / sparse[name].lengths().clamp(min=1)[:, None]
        rates = self.l2(batch) if self.l2 is not None and self.training else {}
        found = {name: pulled(x, rates[name]) if name in rates else x for name, x in found.items()}
        fields = [
            found[name] for names in self.listed.values() for name in names if name not in self.attended
        ]
        if self.fields is not None:
            others_BFD = self.fields(sparse)[0]
            if rates:
                others_BFD = pulled(others_BFD, torch.stack([rates[n] for n in self.fields.names], dim=1))
            fields.append(others_BFD.flatten(1))
        return torch.cat(fields, dim=1), [self._history(group, sparse, found) for group in self.groups]

    def _history(
        self, group: list[Sequence], sparse: KeyedJaggedTensor, found: Mapping[str, torch.Tensor]
    ) -> History:
        def side_by_side(names: list[str]) -> torch.Tensor:
            return torch.cat([found[name] for name in names], dim=1)

        names = [feature.name for feature in group]
        behaviour_VE = side_by_side(names)
        segments = Segments(sparse[names[0]].lengths(), len(behaviour_VE))
        query_BE = side_by_side([feature.of for feature in group])
        negatives = [_negative(name) for name in names if _negative(name) in found]
        return History(behaviour_VE, query_BE, segments, side_by_side(negatives) if negatives else None)

    def _lookup(self, bags: Mapping[str, Bags]) -> dict[str, torch.Tensor]:
        """A vector per bag, by the bags' name: all bags of a table follow each other under its one key."""
        keys = list(self.listed)
        of = {key: [n for n in bags if n.removeprefix(_NEGATIVE) in self.listed[key]] for key in keys}
        counts = {key: [len(bags[name][1]) for name in of[key]] for key in keys}
        # keys need equally many bags, and so do workers: gloo gathers row-wise tables
        device = bags[of[keys[0]][0]][0].device
        most = self.workers(max(map(sum, counts.values())), device)
        lengths: list[torch.Tensor] = []
        for key in keys:
            lengths += [bags[name][1] for name in of[key]]
            lengths.append(lengths[-1].new_zeros(most - sum(counts[key])))
        values = torch.cat([bags[name][0] for key in keys for name in of[key]])
        tables = self.tables(
            KeyedJaggedTensor(keys=keys, values=values, lengths=torch.cat(lengths))
        ).to_dict()
        found: dict[str, torch.Tensor] = {}
        for key in keys:
            vectors = tables[key][: sum(counts[key])].split(counts[key])
            found |= dict(zip(of[key], vectors, strict=True))
        return found


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
        expand = history.segments.expand
        # W·[b, t, b - t, b∘t] = (W1 + W3) b + (W2 - W3) t + W4 (b∘t): the candidate's share once a row
        query_BH = torch.addmm(first.bias, history.query_BE, (of_t - of_difference).T)
        product_VE = history.behaviour_VE * expand(history.query_BE)
        hidden_VH = torch.addmm(expand(query_BH), history.behaviour_VE, (of_b + of_difference).T)
        hidden_VH = torch.addmm(hidden_VH, product_VE, of_product.T)
        return self.mlp.after(1, hidden_VH, expand(real_B))[:, 0]


def _l2(schema: Schema, cfg: HistoryConfig, attended: set[str], catalogue: Catalogue | None) -> BatchAwareL2:
    for feature in schema.bags:
        if feature.name not in attended:
            raise ConfigError(
                f"{cfg.name}: regularisation={cfg.regularisation:g} is of single embeddings, and of "
                f"{feature.kind} {feature.name!r} only their mean is known; attend to it, or leave it out "
                "of features"
            )
    rows = catalogue.occurrences if catalogue is not None else {}
    return BatchAwareL2(cfg.regularisation, schema, embedded(schema), rows)


def _negative(name: str) -> str:
    return _NEGATIVE + name


def history_groups(schema: Schema, cfg: HistoryConfig) -> list[list[Sequence]]:
    """Sequences that list the same events, in schema order; ConfigError where there is none."""
    known = [feature.name for feature in schema.sequences]
    for name in cfg.histories or ():
        if name not in known:
            raise ConfigError(
                f"{cfg.name}: histories has {name!r}, which is no sequence{nearest(name, known)}"
            )
    groups: dict[tuple[str | None, int, bool], list[Sequence]] = {}
    for feature in schema.sequences:
        if cfg.histories is None or feature.name in cfg.histories:
            groups.setdefault((feature.where, feature.max_length, feature.others_only), []).append(feature)
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
