"""One task of the cluster for each of some numbers: buckets of a log, or whatever they are of."""

from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa
import ray


def each(numbers: list[int], make: Callable[[int], pa.Table], whole: bool = False) -> "ray.data.Dataset":
    """What `make` gives for each, in any order, nothing where it gives no rows.

    Ray Data cuts a table that is larger than its blocks, except where it is to come `whole`.
    """

    def run(batch: dict[str, Any]) -> Iterator[pa.Table]:
        for number in batch["item"]:
            yield make(int(number))

    context = ray.data.DataContext.get_current().copy()
    if whole:
        context.target_max_block_size = None
    with ray.data.DataContext.current(context):
        tasks = ray.data.from_items(numbers, override_num_blocks=len(numbers))
        return tasks.map_batches(run, batch_size=1)
