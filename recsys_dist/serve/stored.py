"""Events as every user state keeps them: JSON for the next request, Parquet files by day for the log."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from recsys_dist.data.columns import numbers
from recsys_dist.data.output import sync, write_parquet
from recsys_dist.serve.api import text_of

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
    """Canonical events from JSON; a column that was not there when an event came is null.

    A context column that another bundle kept as text, or as a number, is read as the log reads it.
    """
    if not events:
        return schema.empty_table()
    stored = {"timestamp": pa.int64(), "date": pa.int32()}
    rows = [json.loads(event) for event in events]
    columns = {
        field.name: _column([row.get(field.name) for row in rows], stored.get(field.name, field.type))
        for field in schema
    }
    return pa.table(columns).cast(schema)


def numbers_of(texts: pa.StringArray) -> pa.Array:
    """What is no number, or an infinite one, counts as missing, as it does in the log."""
    parsed = numbers(texts)
    return pa.array(parsed.values, pa.float64(), mask=parsed.missing | parsed.bad | np.isinf(parsed.values))


def _column(values: Sequence[Any], type_: pa.DataType) -> pa.Array:
    try:
        return pa.array(values, type_)
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        texts = pa.array([text_of(value) for value in values], pa.string())
        return texts if pa.types.is_string(type_) else numbers_of(texts).cast(type_)


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


def complete(directory: Path, schema: pa.Schema, labels: Sequence[str]) -> None:
    """Add columns of `schema` to files from before there were these: nulls, or 0 where they are `labels`."""
    for file in sorted(directory.glob("events/date=*/part-*.parquet")):
        there = pq.read_schema(file).names
        missing = [field for field in schema if field.name not in (*there, "date")]
        if not missing:
            continue
        table = pq.ParquetFile(file).read()
        for field in missing:
            nothing = pa.scalar(0 if field.name in labels else None, field.type)
            table = table.append_column(field, pa.repeat(nothing, len(table)))
        write_parquet(table, file)
