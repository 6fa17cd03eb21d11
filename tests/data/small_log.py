"""A small random log with everything in it: ties in time, history rows, unknown users, items and labels."""

import datetime as dt

import numpy as np
import pyarrow as pa

from recsys_dist.config import rng_for
from recsys_dist.feature_kinds import (
    Bucketed,
    Categorical,
    Cross,
    Numeric,
    Searches,
    Sequence,
    Sessions,
    Statistic,
    Time,
)
from recsys_dist.schema import Label, Schema

SEARCHES = ["Red shoes", " red SHOES", "red  SHOES!", "blue-ray player", "Straße 5", "", "?!", "shoes"]
FIRST_DAY = dt.date(2024, 3, 1)

SCHEMA = Schema(
    features=(
        Categorical(name="user", column="user_id"),
        Categorical(name="item", column="item_id"),
        Categorical(name="genre", column="items.genre", min_count=2),
        Categorical(name="device", column="device", hash_buckets=16),
        Bucketed(name="length", column="items.length", buckets=4),
        Time(name="hour", part="hour"),
        Time(name="weekday", part="weekday"),
        Cross(name="user_genre", of=("user", "genre"), hash_buckets=64),
        Sequence(name="clicked", of="item", where="click", max_length=3),
        Sequence(name="clicked_genre", of="genre", where="click", max_length=3),
        Sequence(name="shown", of="item", max_length=4),
        Sessions(name="shown_sessions", max_length=4, gap_minutes=600, sessions=3),
        Searches(name="searched", column="query", max_length=2, hash_buckets=64),
        Numeric(name="age", column="users.age"),
        Numeric(name="watch_capacity", column="items.length", log=True),
        Statistic(name="user_count", key="user_id"),
        Statistic(name="user_rate", key="user_id", label="click", smoothing=2),
        Statistic(name="item_count", key="item_id"),
        Statistic(name="genre_rate", key="items.genre", label="click", smoothing=2),
        Statistic(name="device_rate", key="device", label="click", smoothing=2),
    ),
    labels=(Label(name="click"), Label(name="like"), Label(name="watch_ms", kind="value")),
    ranking_label="click",
    recall_positive=("click", "like"),
    utc_offset_hours=8,
)


def users() -> pa.Table:
    rng = rng_for(0, "users")
    return pa.table({"user_id": [f"u{n}" for n in range(12)], "age": rng.integers(15, 60, 12)})


def items() -> pa.Table:
    rng = rng_for(0, "items")
    return pa.table(
        {
            "item_id": [f"i{n}" for n in range(20)],
            "genre": [*rng.choice(["drama", "sport", "news"], 18), "rare", None],
            "length": pa.array([*rng.integers(1, 90, 19), None], pa.float64()),
        }
    )


def events(rows: int = 600, days: int = 8, seed: int = 0) -> pa.Table:
    """Canonical events in random order; the earliest fifth is history, with unknown clicks."""
    rng = rng_for(seed, "events")
    start = int(dt.datetime.combine(FIRST_DAY, dt.time(), dt.UTC).timestamp()) - 8 * 3600
    seconds = np.sort(rng.integers(0, days * 24 * 20, rows)) * 180  # coarse: equal times occur
    history = np.arange(rows) < rows // 5
    stamps = (start + seconds) * 1_000_000
    local_day = (stamps + 8 * 3_600_000_000) // 86_400_000_000
    table = pa.table(
        {
            "user_id": [f"u{n}" for n in rng.integers(0, 14, rows)],  # two of them not described
            "item_id": [f"i{n}" for n in rng.zipf(1.5, rows) % 22],
            "timestamp": pa.array(stamps, pa.timestamp("us", "UTC")),
            "date": pa.array(local_day.astype(np.int32)).cast(pa.date32()),
            "history": history,
            "click": pa.array(rng.random(rows) < 0.4, mask=history).cast(pa.int8()),
            "like": pa.array(rng.random(rows) < 0.2).cast(pa.int8()),
            "watch_ms": pa.array(rng.exponential(1000, rows), pa.float32()),
            "device": pa.array(rng.choice(["phone", "tv", "web"], rows), mask=rng.random(rows) < 0.1),
            "query": pa.array(rng.choice(SEARCHES, rows), mask=rng.random(rows) < 0.6),
        }
    )
    return table.take(rng.permutation(rows))
