"""The made-up rows that every side trains on.

N rows, F single ids, L longest history
"""

from collections.abc import Iterator

import numpy as np

Rows = dict[str, np.ndarray]

# Rows of each id's table: two large ones, a few in between, many small ones, as logs have them.
TABLES = {
    "item": 100_000,
    "category": 1_000,
    "user": 100_000,
    "author": 20_000,
    "city": 5_000,
    "device": 2_000,
    "tag": 500,
    "tab": 20,
    "hour": 25,
    "weekday": 8,
}
FLOATS = 8
HISTORY = ("item", "category")  # ids that are known of each event of a history
LONGEST, MEAN_LENGTH = 50, 20
SESSION_EVENTS, SESSIONS = 4, 5


def made_up(count: int, seed: int = 0) -> Rows:
    """`count` rows with Zipf-like ids ≥ 1.

    ids [N, F], history_* and negative_* [N, L], 0 behind the end, length [N], Beta-distributed with mean 20,
    session [N, L], numbered back from the newest, all int32; dense [N, 8] and click [N] float32.
    """
    rng = np.random.default_rng(seed)

    def ids(table: str, shape: tuple[int, ...]) -> np.ndarray:
        return (TABLES[table] ** rng.random(shape)).astype(np.int32)

    share = MEAN_LENGTH / LONGEST
    length = np.rint(LONGEST * rng.beta(5 * share, 5 * (1 - share), count)).astype(np.int32)
    left = length[:, None] - np.arange(LONGEST, dtype=np.int32)  # events from here to the newest
    found: Rows = {
        "ids": np.stack([ids(table, (count,)) for table in TABLES], axis=1),
        "length": length,
        "session": np.where(left > 0, np.minimum((left - 1) // SESSION_EVENTS + 1, SESSIONS), 0),
        "dense": rng.normal(size=(count, FLOATS)).astype(np.float32),
        "click": rng.integers(0, 2, count).astype(np.float32),
    }
    for kind in ("history", "negative"):
        found |= {f"{kind}_{t}": np.where(left > 0, ids(t, (count, LONGEST)), 0) for t in HISTORY}
    return found


def batches(rows: Rows, size: int) -> Iterator[Rows]:
    """Slices of `size` rows."""
    for start in range(0, len(rows["click"]), size):
        yield {name: column[start : start + size] for name, column in rows.items()}
