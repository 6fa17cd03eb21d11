"""Events as every user state keeps them: JSON for the next request, Parquet files by day for the log."""

import json
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from recsys_dist.data.output import sync, write_parquet

NEWEST_EVENTS = 500  # of a user since the bundle was made: bounds a request's work


def encode(events: pa.Table, schema: pa.Schema) -> list[tuple[str, int, str]]:
    """Each event's user, time (microseconds) and JSON, with the columns of the canonical `schema`."""
    plain = events.select(schema.names).cast(schema)
    us = plain["timestamp"].cast(pa.int64()).to_pylist()
    days = plain["date"].cast(pa.int32()).to_pylist()
    rows = plain.drop_columns(["timestamp", "date"]).to_pylist()
    return [
        (row["user_id"], at, json.dumps({"timestamp": at, "date": day, **row}))
        for row, at, day in zip(rows, us, days, strict=True)
    ]


def decode(events: Sequence[str | bytes], schema: pa.Schema) -> pa.Table:
    """Canonical events from JSON; a column that was not there when an event came is null."""
    stored = {"timestamp": pa.int64(), "date": pa.int32()}
    raw = pa.schema([(field.name, stored.get(field.name, field.type)) for field in schema])
    return pa.Table.from_pylist([json.loads(event) for event in events], schema=raw).cast(schema)


def write_days(events: pa.Table, directory: Path, first: str) -> None:
    """Write `events/date=DAY/part-FIRST.parquet` for each day; on return they survive a power cut.

    `first` names the first event, so that what was killed is done again over the same files.
    """
    for day in pc.unique(events["date"]).to_pylist():
        of_day = events.filter(pc.equal(events["date"], day)).drop_columns(["date"])
        file = directory / f"events/date={day}/part-{first}.parquet"
        write_parquet(of_day, file)
        sync(file)
        sync(file.parent)
    sync(directory / "events")
