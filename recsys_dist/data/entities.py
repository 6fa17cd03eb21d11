"""Users or items with their attributes, addressed by position; position 0 is one we know nothing of."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recsys_dist.data.keys import Keys
from recsys_dist.errors import DataError


@dataclass(frozen=True)
class Entities:
    """`ids[p - 1]` has position p; `attributes` has a row per position from 1 (null where not described)."""

    ids: pa.Array  # string
    attributes: pa.Table

    @classmethod
    def of(cls, described: pa.Table | None, key: str, seen: pa.Array) -> "Entities":
        """Everything in the users/items table, and every id `seen` in the log besides, by name.

        Raises DataError where the table has an id twice.
        """
        if described is None:
            described = pa.table({key: pa.array([], pa.string())})
        known = described[key].combine_chunks()
        unique = pc.unique(known)
        if len(unique) != len(known):
            repeated = pc.value_counts(known).field("counts")
            first = pc.value_counts(known).field("values").filter(pc.greater(repeated, 1))[0]
            raise DataError(
                f"the table of {key.removesuffix('_id')}s has {key} {first} more than once; keep one row each"
            )
        new = seen.filter(pc.invert(pc.is_in(seen, known))).sort()  # found in any order, as tasks end
        undescribed = pa.table({key: new.cast(pa.string())})
        both = pa.concat_tables([described, undescribed], promote_options="default").combine_chunks()
        return cls(pa.concat_arrays(both[key].chunks or [pa.array([], pa.string())]), both)

    def __len__(self) -> int:
        return len(self.ids)

    def positions(self, column: pa.Array | pa.ChunkedArray) -> np.ndarray:
        """[n] int32 positions of the ids; 0 where unknown."""
        return self._keys.positions(column)

    @cached_property
    def _keys(self) -> Keys:
        return Keys(self.ids)

    def attribute(self, name: str) -> pa.ChunkedArray:
        """Raw values in position order from 1. Raises DataError that names the attributes there are."""
        if name not in self.attributes.column_names:
            have = ", ".join(self.attributes.column_names)
            raise DataError(f"a feature reads attribute {name!r}, which the table lacks; it has: {have}")
        return self.attributes[name]
