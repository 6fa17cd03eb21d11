"""Raw value → table row. Row 0 is unknown: null, kept out by a limit, or not seen in training."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from recsys_dist.config import Config
from recsys_dist.data.keys import Keys
from recsys_dist.data.output import write_parquet

UNKNOWN = 0


class Admission(Config):
    """How many of the values seen in training a vocabulary keeps; of others, the first limit they are beyond.

    unknown  share of the events it was fitted on that read row 0, nulls among them
    """

    values: int
    rare: int  # min_count
    old: int  # max_age_days
    beyond: int  # max_rows
    unknown: float

    @property
    def kept(self) -> int:
        return self.values - self.rare - self.old - self.beyond


@dataclass(frozen=True)
class Vocabulary:
    """Known values of one table in row order: `values[r - 1]` has row r; `counts` are its training rows."""

    values: pa.Array  # string
    counts: np.ndarray  # int64

    @classmethod
    def fit(cls, values: pa.Array, counts: np.ndarray) -> "Vocabulary":
        """All values that were counted, most frequent first, ties by value.

        `values` may repeat: their counts are added up. Nulls are left out.
        """
        table = pa.table({"value": values.cast(pa.string()), "count": pa.array(counts, pa.int64())})
        summed = table.filter(pc.is_valid(table["value"])).group_by("value").aggregate([("count", "sum")])
        seen = summed.filter(pc.greater(summed["count_sum"], 0))
        seen = seen.sort_by([("count_sum", "descending"), ("value", "ascending")]).combine_chunks()
        return cls(_flat(seen["value"]), seen["count_sum"].to_numpy())

    @property
    def rows(self) -> int:
        """Size of the embedding table: the known values and the unknown row."""
        return len(self.values) + 1

    def lookup(self, column: pa.Array | pa.ChunkedArray) -> np.ndarray:
        """[n] int32 rows of the raw values."""
        return self._keys.positions(column)

    @cached_property
    def _keys(self) -> Keys:
        return Keys(self.values)

    def take(self, at: np.ndarray) -> "Vocabulary":
        """Of the values at these places (a row's less one), in this order."""
        return Vocabulary(self.values.take(pa.array(at)), self.counts[at])

    def numbered_as(self, former: "Vocabulary") -> "Vocabulary":
        """The same values; those that `former` has keep its rows, and others take the rows that are free.

        (Of kept values only those move whose row this smaller table has not.)
        """
        there = former.lookup(self.values) - 1
        stays = (there >= 0) & (there < len(there))
        at = np.full(len(there), -1)
        at[there[stays]] = np.flatnonzero(stays)
        at[at < 0] = np.flatnonzero(~stays)
        return self.take(at)

    def save(self, path: Path) -> None:
        write_parquet(pa.table({"value": self.values, "count": self.counts}), path)

    @classmethod
    def load(cls, path: Path) -> "Vocabulary":
        table = pq.read_table(path)
        return cls(_flat(table["value"]), table["count"].to_numpy())


def _flat(column: pa.ChunkedArray) -> pa.Array:
    return pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
