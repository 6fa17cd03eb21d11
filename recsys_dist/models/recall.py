"""What recall models share: what a user tower may read, lookups, negatives of the whole global batch.

B rows, G of all workers, S negatives, C candidates, U distinct ones, V ids of all lists,
D dimension of the shared space, I rows of the item table
"""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torchrec import (
    EmbeddingBagCollection,
    EmbeddingCollection,
    EmbeddingConfig,
    JaggedTensor,
    KeyedJaggedTensor,
)

from recsys_dist.config import rng_for
from recsys_dist.errors import ConfigError
from recsys_dist.feature_kinds import AnyFeature, Categorical, Cross, Sessions, Statistic
from recsys_dist.models.layers import normal, table_rows
from recsys_dist.schema import Schema

LOOKUP_ROWS = 65_536  # a whole table is looked up in blocks: the all-to-all's buffers stay bounded


def of_user(schema: Schema, named: Sequence[str] | None, model: str) -> set[str]:
    """Names of what a user tower reads: `named`, or else all that is known of a user before a request.

    That is no context, and (as in Covington et al. 2016) no bare id to memorise. Running statistics are
    left out too: they grow over the days of training, and stand beyond what training saw when the test
    begins. ConfigError where a named one depends on the item.
    """
    if named is None:
        return {f.name for f in schema.features if _known_before(f, schema)}
    for name in named:
        if "item" in schema.sides(schema[name]):
            raise ConfigError(f"{model}: {name!r} belongs to the item; a user tower cannot read it")
    return set(named)


def _known_before(feature: AnyFeature, schema: Schema) -> bool:
    parts = [schema[name] for name in feature.of] if isinstance(feature, Cross) else [feature]
    bare_id = any(isinstance(part, Categorical) and part.column == "user_id" for part in parts)
    return schema.sides(feature) == {"user"} and not bare_id and not isinstance(feature, Statistic | Sessions)


class Negatives:
    """Items drawn with replacement from q ∝ (positives + 1)^alpha over rows ≥ 1, never the unknown row 0.

    q_I      [I] float64 probability of each item to be drawn
    log_q_I  [I] float32 its logarithm; row 0 is neither drawn nor learned, and so only kept finite
    """

    def __init__(self, positives_I: torch.Tensor, count: int, alpha: float, seed: int) -> None:
        mass_I = (positives_I.cpu().numpy().astype(np.float64) + 1.0) ** alpha
        mass_I[0] = 0.0
        if mass_I.shape[0] < 2:
            raise ConfigError(
                "the catalogue has no item besides the unknown one: recall has nothing to learn"
            )
        self.q_I = mass_I / mass_I.sum()
        self._cumulative_I = np.cumsum(self.q_I)
        self.log_q_I = torch.from_numpy(np.log(np.maximum(self.q_I, np.finfo(np.float64).tiny))).float()
        self._count, self._seed = count, seed

    def draw(self, step: int) -> torch.Tensor:
        """[S] int32 item rows: the same on every worker for the same step."""
        uniform_S = rng_for(self._seed, "negatives", step).random(self._count)
        drawn_S = np.searchsorted(self._cumulative_I, uniform_S * self._cumulative_I[-1], side="right")
        return torch.from_numpy(drawn_S.astype(np.int32))


class GlobalRows(nn.Module):
    """[B, ...] of this worker → [G, ...] of the whole global batch, in the same order on every worker.

    In one process that is the same, and so is this module. `train.sharding.shard` puts its distributed twin
    in its place: losses over the other rows of a batch then are those of one process. Called equally often
    by all workers. Padding comes along: what must not count has weight 0 there too.
    """

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return rows


def listed(ids: JaggedTensor, candidate_C: torch.Tensor) -> torch.Tensor:
    """[B, C] bool: the row's list of ids holds the candidate."""
    distinct_U, which_C = torch.unique(candidate_C, return_inverse=True)
    row_V = torch.repeat_interleave(ids.lengths())
    at_V = torch.searchsorted(distinct_U, ids.values()).clamp(max=len(distinct_U) - 1)
    found_V = distinct_U[at_V] == ids.values()
    holds_BU = torch.zeros(len(ids.lengths()), len(distinct_U), dtype=torch.bool, device=candidate_C.device)
    holds_BU[row_V[found_V], at_V[found_V]] = True
    return holds_BU[:, which_C]


def lookup(
    tables: EmbeddingBagCollection,
    key: str,
    ids: torch.Tensor,
    lengths: torch.Tensor,
    keys: Sequence[str] | None = None,
) -> torch.Tensor:
    """[len(lengths), D] vectors of `ids` by feature `key`; a length of 0 (padding) gives zeros.

    `keys` are the features that the tables are looked up by elsewhere, where it is not `key` alone: sharded
    ones take the order of the first call for that of all.
    """
    keys = [key] if keys is None else keys
    of_keys = torch.cat([lengths if name == key else torch.zeros_like(lengths) for name in keys])
    vectors: torch.Tensor = tables(KeyedJaggedTensor(keys=list(keys), values=ids, lengths=of_keys))[key]
    return vectors


def every_row(
    tables: EmbeddingBagCollection,
    key: str,
    rows: int,
    device: torch.device,
    keys: Sequence[str] | None = None,
) -> torch.Tensor:
    """[rows, D] the whole table; on sharded tables every worker calls it together and gets it all."""
    ids = torch.arange(rows, dtype=torch.int32, device=device)
    blocks = torch.split(ids, LOOKUP_ROWS)
    return torch.cat([lookup(tables, key, block, torch.ones_like(block), keys) for block in blocks])


def more_rows(sparse: KeyedJaggedTensor, key: str, ids: torch.Tensor) -> KeyedJaggedTensor:
    """`sparse`, and after its rows one for each of `ids`, that has it as `key` and nothing else."""
    keys, lengths, values = sparse.keys(), [], []
    for name in keys:
        own = sparse[name]
        lengths.append(F.pad(own.lengths(), (0, len(ids)), value=int(name == key)))
        values += [own.values(), ids] if name == key else [own.values()]
    return KeyedJaggedTensor(keys=keys, values=torch.cat(values), lengths=torch.cat(lengths))


def one_id(sparse: KeyedJaggedTensor, name: str) -> torch.Tensor:
    """[B] the single id of each row; 0 where it has none, as in padding."""
    jagged = sparse[name]
    ids = torch.cat([jagged.values(), jagged.values().new_zeros(1)])
    return ids[jagged.offsets()[:-1].long()] * jagged.lengths()


def item_tables(
    item: Categorical, dim: int, std: float, features: Mapping[str, list[str]]
) -> EmbeddingCollection:
    """Tables over the items by name, each [rows, dim] from N(0, std²), with the features looked up in it.

    What they return has a vector per id, not one per row. On the meta device until sharded or materialised.
    """
    tables = [
        EmbeddingConfig(
            name=name,
            num_embeddings=table_rows(item),
            embedding_dim=dim,
            feature_names=names,
            init_fn=normal(std),
        )
        for name, names in features.items()
    ]
    return EmbeddingCollection(tables=tables, device=torch.device("meta"))


def each(ids: torch.Tensor) -> JaggedTensor:
    """A row per id."""
    return JaggedTensor(ids, lengths=torch.ones_like(ids))


def nothing(ids: torch.Tensor) -> JaggedTensor:
    """As many rows, without any id."""
    return JaggedTensor(ids[:0], lengths=torch.zeros_like(ids))


def vectors_of(tables: EmbeddingCollection, sought: Mapping[str, JaggedTensor]) -> dict[str, torch.Tensor]:
    """For each feature of `tables` the vectors [V, D] of its ids, in one exchange between workers.

    Each feature's rows are equally many on all workers; they need not be as many as another's.
    """
    keys = sorted(sought)  # a sharded collection takes the first call's order for that of all
    rows = max(len(jagged.lengths()) for jagged in sought.values())
    lengths = [F.pad(sought[key].lengths(), (0, rows - len(sought[key].lengths()))) for key in keys]
    ids = torch.cat([sought[key].values() for key in keys])
    found = tables(KeyedJaggedTensor(keys=keys, values=ids, lengths=torch.cat(lengths).int()))
    return {key: found[key].values() for key in keys}


def all_vectors(
    tables: EmbeddingCollection, key: str, others: Iterable[str], rows: int, device: torch.device
) -> torch.Tensor:
    """`every_row` of such tables: that of feature `key`; `others` are their other features."""
    found = []
    for ids in torch.split(torch.arange(rows, dtype=torch.int32, device=device), LOOKUP_ROWS):
        sought = dict.fromkeys(others, nothing(ids)) | {key: each(ids)}
        found.append(vectors_of(tables, sought)[key])
    return torch.cat(found)


def newest(past: JaggedTensor, length: int) -> tuple[JaggedTensor, torch.Tensor]:
    """The newest `length` ids of each row, shortest first; a row without any has one, the unknown id 0.

    Also the row [B] that each came from.
    """
    lengths, order = past.lengths().clamp(1, length).sort(stable=True)
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0, dtype=lengths.dtype)])
    row_V = torch.repeat_interleave(lengths)
    first = past.offsets()[1:][order] - lengths
    at_V = (first - offsets[:-1])[row_V] + torch.arange(len(row_V), device=row_V.device)
    some = past.lengths()[order] > 0
    ids = past.values()
    ids = torch.cat([ids, ids.new_zeros(1)])[at_V] * some[row_V]
    return JaggedTensor(ids, lengths=lengths, offsets=offsets), order


def following(past: JaggedTensor, last: torch.Tensor) -> torch.Tensor:
    """[V] the id after each of the V of `past`; after a row's newest it is the row's of `last` [B]."""
    return past.values().roll(-1).index_copy(0, past.offsets()[1:].long() - 1, last)


def ending_with(past: JaggedTensor, last: torch.Tensor) -> JaggedTensor:
    """`past` with each row's id of `last` [B] after its newest."""
    lengths = past.lengths() + 1
    ids = past.values().new_empty(len(past.values()) + len(last))
    row_V = torch.repeat_interleave(past.lengths())
    at_V = torch.arange(len(row_V), device=row_V.device) + row_V
    ids = ids.index_copy(0, at_V, past.values()).index_copy(0, lengths.cumsum(0) - 1, last)
    return JaggedTensor(ids, lengths=lengths)


def item_sequence(schema: Schema, name: str | None, model: str) -> Schema:
    """The named sequence of item ids, None the first, with the item's id; ConfigError where there is none."""
    names = [feature.name for feature in schema.item_sequences]
    if not names:
        raise ConfigError(f"{model}: needs a sequence of item ids, the user's past items, and has none")
    chosen = names[0] if name is None else name
    if chosen not in names:
        raise ConfigError(f"{model}: {chosen!r} is no sequence of item ids; those are {', '.join(names)}")
    return schema.select({chosen, schema.item_id.name})
