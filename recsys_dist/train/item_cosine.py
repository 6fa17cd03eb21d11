"""Which items the same users were shown, over the cluster: similarities of ItemCF, model and baseline.

One task per group of users reads who was shown what; one per so many items counts users of two items,
exactly, and keeps the most similar ones. A task holds the log's pairs, and what it counts, which is bounded.

U users, I rows of the item table, P pairs
"""

from collections.abc import Callable, Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray
import scipy.sparse as sp

from recsys_dist import session
from recsys_dist.baselines import incidence, nearest_items
from recsys_dist.data import pipeline, stages
from recsys_dist.data.prepared import Prepared
from recsys_dist.data.tasks import each

_TASK_PAIRS = 1 << 24  # of items, at most, that a task counts at once: 16 bytes each, and as much to sort


def similarity(prepared: Prepared, split: str, most: int) -> sp.csr_matrix | np.ndarray:
    """[I, I] float32 cosine of row's and column's item, of those that were shown to users before `split`.

    Each column has its `most` similar items alone; an array where that is all of them. History rows count,
    the unknown item does not.
    """
    item_rows = len(prepared.items) + 1
    found = _nearest(prepared, split, most)
    if most >= item_rows:
        whole = np.zeros((item_rows, item_rows), np.float32)
        for item, other, cosine in found:
            whole[other, item] = cosine
        return whole
    nothing = [np.empty(0, dtype) for dtype in (np.int64, np.int32, np.float32)]
    item, other, cosine = (np.concatenate(parts) for parts in zip(nothing, *found, strict=True))
    return sp.csr_matrix((cosine, (other, item)), shape=(item_rows, item_rows))


def neighbours(prepared: Prepared, split: str, most: int) -> tuple[np.ndarray, np.ndarray]:
    """[I, most] int32 items that are most like each, best first, then 0; and [I, most] float32 cosines."""
    rows = len(prepared.items) + 1
    others, cosines = np.zeros((rows, most), np.int32), np.zeros((rows, most), np.float32)
    for item, other, cosine in _nearest(prepared, split, most):
        first = np.r_[True, item[1:] != item[:-1]]  # an item's come one after the other
        place = np.arange(len(item)) - np.maximum.accumulate(np.where(first, np.arange(len(item)), 0))
        others[item, place], cosines[item, place] = other, cosine
    return others, cosines


def _nearest(prepared: Prepared, split: str, most: int) -> Iterator[list[np.ndarray]]:
    """What `baselines.nearest_items` gives, for some of the items at a time."""
    session.connect()
    pipeline.quiet()
    item_rows = len(prepared.items) + 1
    shown = ray.put(_shown(prepared, split))
    tasks = -(-item_rows * item_rows // _TASK_PAIRS)

    def nearest(task: int) -> pa.Table:
        items = np.arange(task, item_rows, tasks)  # the popular ones are spread over tasks
        found = nearest_items(ray.get(shown), items, most)
        return pa.table(dict(zip(("item", "other", "cosine"), found, strict=True)))

    return _columns(list(range(tasks)), nearest)


def _shown(prepared: Prepared, split: str) -> sp.csr_matrix:
    """[U, I] who was shown what before `split`; 0 of the unknown item."""
    row_of = prepared.items["item_id"].combine_chunks()
    first = prepared.manifest.config["split"][f"{split}_from"]

    def pairs(bucket: int) -> pa.Table:
        """Users numbered within the bucket, which has all events of each."""
        files = prepared.path.glob(f"events/date=*/bucket-{bucket:05d}.parquet")
        read = [file for file in sorted(files) if file.parent.name < f"date={first}"]
        tables = [pq.read_table(file, columns=["user_id", "item_id"], partitioning=None) for file in read]
        if not tables:
            return pa.table({"user": pa.array([], pa.int32()), "item": pa.array([], pa.int32())})
        events = pa.concat_tables(tables)
        at = pc.index_in(events["item_id"], value_set=row_of)
        users = events["user_id"].combine_chunks().dictionary_encode().indices
        found = pa.table({"user": users, "item": pc.add(at, 1)}).filter(pc.is_valid(at))
        return found.group_by(["user", "item"]).aggregate([])

    users, items, known = [np.empty(0, np.int64)], [np.empty(0, np.int32)], 0
    for user, item in _columns(stages.bucket_numbers(prepared.path), pairs):
        users.append(user.astype(np.int64) + known)
        items.append(item)
        known += int(user.max(initial=-1)) + 1
    return incidence(np.concatenate(users), np.concatenate(items), known, len(row_of) + 1)


def _columns(tasks: list[int], make: Callable[[int], pa.Table]) -> Iterator[list[np.ndarray]]:
    """The columns of what `make` gives for each, a task each, in any order; none where it gives no rows."""
    for found in each(tasks, make, whole=True).iter_batches(batch_size=None, batch_format="numpy"):
        yield list(found.values())
