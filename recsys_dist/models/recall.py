"""What recall models share: what a user tower may read, lookups, negatives of the whole global batch.

B rows, G of all workers, S negatives, C candidates, U distinct ones, V ids of all lists,
D dimension of the shared space, I rows of the item table
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn
from torchrec import EmbeddingBagCollection, JaggedTensor, KeyedJaggedTensor

from recsys_dist.config import rng_for
from recsys_dist.errors import ConfigError
from recsys_dist.schema import AnyFeature, Categorical, Schema, Sessions, Statistic

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
    bare_id = isinstance(feature, Categorical) and feature.column == "user_id"
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
    tables: EmbeddingBagCollection, key: str, ids: torch.Tensor, lengths: torch.Tensor
) -> torch.Tensor:
    """[len(lengths), D] vectors of `ids` by feature `key`; a length of 0 (padding) gives zeros."""
    vectors: torch.Tensor = tables(KeyedJaggedTensor(keys=[key], values=ids, lengths=lengths)).values()
    return vectors


def every_row(tables: EmbeddingBagCollection, key: str, rows: int, device: torch.device) -> torch.Tensor:
    """[rows, D] the whole table; on sharded tables every worker calls it together and gets it all."""
    ids = torch.arange(rows, dtype=torch.int32, device=device)
    blocks = torch.split(ids, LOOKUP_ROWS)
    return torch.cat([lookup(tables, key, block, torch.ones_like(block)) for block in blocks])


def one_id(sparse: KeyedJaggedTensor, name: str) -> torch.Tensor:
    """[B] the single id of each row; 0 where it has none, as in padding."""
    jagged = sparse[name]
    ids = torch.cat([jagged.values(), jagged.values().new_zeros(1)])
    return ids[jagged.offsets()[:-1].long()] * jagged.lengths()
