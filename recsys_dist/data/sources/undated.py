"""Data sets that come split but without times: a made-up day each for training, validation and test."""

from collections.abc import Iterator
from datetime import date
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recsys_dist.data.sources import files
from recsys_dist.data.sources.protocol import CHUNK_ROWS
from recsys_dist.data.split import Split
from recsys_dist.data.transforms import DAY_US

SPLIT = Split(valid_from=date(2020, 1, 2), test_from=date(2020, 1, 3))
TRAIN_US, VALID_US, TEST_US = (
    ((SPLIT.valid_from - date(1970, 1, 1)).days + day) * DAY_US for day in (-1, 0, 1)
)  # midnights, in microseconds since the epoch


def word_lists(url: str) -> pa.ListArray:
    """The words of each line of a text file. Raises SourceError where it cannot be read."""
    with files.naming(url):
        lines = pa.array(Path(url).read_text(encoding="ascii", errors="replace").splitlines(), pa.string())
    return pc.ascii_split_whitespace(pc.ascii_trim_whitespace(lines))


def chunks(events: pa.Table) -> Iterator[pa.Table]:
    """`events` as a source's `read` yields them."""
    for start in range(0, len(events), CHUNK_ROWS):
        yield events.slice(start, CHUNK_ROWS)


def places(owner: np.ndarray, draw: np.ndarray) -> np.ndarray:
    """[n] int64: the place 0, 1, ... of each row among those of its owner [n], in the order of `draw` [n]."""
    order = np.lexsort((draw, owner))
    sizes = np.bincount(owner)
    result = np.empty(len(owner), np.int64)
    result[order] = np.arange(len(owner)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return result
