"""What serving must remember of each user: her newest events, and the items that she was shown."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recsys_dist.data.histories import listed
from recsys_dist.schema import Schema

# with the inner name that Parquet gives: written, read and written again it is the same file
_AS_READ = pa.list_(pa.field("element", pa.int32()))


def recent(events: pa.Table, schema: Schema) -> pa.Table:
    """The events, sorted by `examples.sort_events`, that a later example of their user can still see.

    Per feature that lists past events these are the last `max_length` ones that it tells of, as
    `examples.features` takes.
    """
    user = np.asarray(events["user_id"].combine_chunks().dictionary_encode().indices)
    kept, every = np.zeros(len(events), bool), np.ones(len(events), bool)
    for feature in schema.lists:
        wanted = listed(events, feature, user, every)
        kept[_last(user, np.flatnonzero(wanted), feature.max_length)] = True
    return events.filter(pa.array(kept))


def shown(events: pa.Table, item_ids: pa.Array) -> pa.Table:
    """`user_id`, `items` (list<int32>): the distinct rows >= 1 of the items that each user has in the log.

    `item_ids[r - 1]` is the item of row r; items that it lacks are left out.
    """
    users = events["user_id"].combine_chunks().dictionary_encode()
    rows = (
        np.asarray(pc.fill_null(pc.index_in(events["item_id"], value_set=item_ids), -1)).astype(np.int64) + 1
    )
    pairs = np.unique((np.asarray(users.indices).astype(np.int64) << 32 | rows)[rows > 0])
    of_user, items = pairs >> 32, (pairs & 0xFFFFFFFF).astype(np.int32)
    offsets = np.r_[0, np.cumsum(np.bincount(of_user, minlength=len(users.dictionary)))].astype(np.int32)
    lists = pa.ListArray.from_arrays(pa.array(offsets), pa.array(items), _AS_READ)
    return pa.table({"user_id": users.dictionary, "items": lists})


def _last(user: np.ndarray, at: np.ndarray, length: int) -> np.ndarray:
    """Of ascending positions `at` the last `length` of each user; `user` [n] codes, equal ones adjacent."""
    change = np.flatnonzero(np.r_[user[at][1:] != user[at][:-1], True]) if len(at) else at
    ends = np.repeat(change, np.diff(np.r_[-1, change]))
    return at[ends - np.arange(len(at)) < length]
