"""What recall models share: lookups in an item table, and negatives drawn for the whole global batch.

B rows, S negatives, D dimension of the shared space, I rows of the item table
"""

import numpy as np
import torch
from torchrec import EmbeddingBagCollection, JaggedTensor, KeyedJaggedTensor

from recsys_dist.config import rng_for
from recsys_dist.errors import ConfigError

LOOKUP_ROWS = 65_536  # a whole table is looked up in blocks: the all-to-all's buffers stay bounded


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
