"""Raw value → table row. Row 0 is unknown: null, rarer than `min_count`, or not seen in training."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from recsys_dist.data.keys import Keys
from recsys_dist.data.output import write_parquet

UNKNOWN = 0


@dataclass(frozen=True)
class Vocabulary:
    """Known values of one table in row order: `values[r - 1]` has row r; `counts` are its training rows."""

    values: pa.Array  # string
    counts: np.ndarray  # int64

    @classmethod
    def fit(cls, values: pa.Array, counts: np.ndarray, min_count: int = 1) -> "Vocabulary":
        """Keep values counted at least `min_count` times, most frequent first, ties by value.

        `values` may repeat: their counts are added up. Nulls are left out.
        """
        table = pa.table({"value": values.cast(pa.string()), "count": pa.array(counts, pa.int64())})
        summed = table.filter(pc.is_valid(table["value"])).group_by("value").aggregate([("count", "sum")])
        kept = summed.filter(pc.greater_equal(summed["count_sum"], min_count))
        kept = kept.sort_by([("count_sum", "descending"), ("value", "ascending")]).combine_chunks()
        return cls(_flat(kept["value"]), kept["count_sum"].to_numpy())

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

    def merge(self, values: pa.Array, counts: np.ndarray, min_count: int = 1) -> "Vocabulary":
        """Add newly seen values behind the known ones, whose rows never change; counts are added up."""
        fresh = Vocabulary.fit(values, counts, 1)
        rows = self.lookup(fresh.values)
        known, new = rows > UNKNOWN, (rows == UNKNOWN) & (fresh.counts >= min_count)
        total = self.counts.copy()
        np.add.at(total, rows[known] - 1, fresh.counts[known])
        appended = fresh.values.filter(pa.array(new))
        return Vocabulary(
            pa.concat_arrays([self.values, appended]), np.concatenate([total, fresh.counts[new]])
        )

    def save(self, path: Path) -> None:
        write_parquet(pa.table({"value": self.values, "count": self.counts}), path)

    @classmethod
    def load(cls, path: Path) -> "Vocabulary":
        table = pq.read_table(path)
        return cls(_flat(table["value"]), table["count"].to_numpy())


def _flat(column: pa.ChunkedArray) -> pa.Array:
    return pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
