"""The canonical log: what a valid event is. A bad row is quarantined with a reason, never dropped silently.

n rows of a chunk. Everything is columnar; only the rows that are refused are looked at one by one.
"""

import json
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recsys_dist.config import nearest
from recsys_dist.data.columns import US_PER_DAY, Parsed, days, flags, flat, instants, numbers, texts
from recsys_dist.errors import SourceError
from recsys_dist.schema import Bucketed, Categorical, Label, Numeric, Schema, Statistic, side

INSTANT = pa.timestamp("us", "UTC")
MALFORMED = "malformed"  # column by which a source hands over lines that are no rows, as text
QUARANTINE = pa.schema(
    [("part", pa.string()), ("row", pa.int64()), ("reason", pa.string()), ("raw", pa.string())]
)


@dataclass(frozen=True)
class LogSpec:
    """What `validate` asks of every row.

    labels    outcome columns; required on every row that is not history
    context   event columns that features read -> whether they must be numbers; may be null
    earliest  a time before it cannot be right (web logs do not reach back beyond the web)
    skew      how far a clock may run ahead of ours before a time counts as future
    """

    labels: tuple[Label, ...]
    context: dict[str, bool]
    timestamp_unit: str = "us"
    utc_offset_hours: float = 0.0
    earliest: datetime = datetime(1990, 1, 1, tzinfo=UTC)
    skew: timedelta = timedelta(minutes=5)

    @classmethod
    def from_schema(cls, schema: Schema, timestamp_unit: str = "us") -> Self:
        """The columns that the features and labels of `schema` read; the unit is the source's."""
        context: dict[str, bool] = {}
        for feature in schema.features:
            numeric = isinstance(feature, Numeric | Bucketed)
            if isinstance(feature, Categorical | Numeric | Bucketed):
                column = feature.column
            elif isinstance(feature, Statistic):
                column = feature.key
            else:
                continue
            if side(column) == "context":
                context[column] = context.get(column, False) or numeric
        return cls(schema.labels, context, timestamp_unit, schema.utc_offset_hours)

    @property
    def required(self) -> list[str]:
        """Columns without which a file is refused as a whole."""
        labels = [label.name for label in self.labels]
        return ["user_id", "item_id", "timestamp", *labels, *(c for c in self.context if c not in labels)]

    def arrow_schema(self, with_probability: bool = False) -> pa.Schema:
        """Columns and types of the canonical log; numbers of the context are float64, the rest text."""
        fields = [
            pa.field("user_id", pa.string()),
            pa.field("item_id", pa.string()),
            pa.field("timestamp", INSTANT),
            pa.field("date", pa.date32()),
            pa.field("history", pa.bool_()),
        ]
        for label in self.labels:
            fields.append(pa.field(label.name, pa.int8() if label.kind == "binary" else pa.float32()))
        known = {f.name for f in fields}
        for name, numeric in self.context.items():
            if name not in known:
                fields.append(pa.field(name, pa.float64() if numeric else pa.string()))
        if with_probability:
            fields.append(pa.field("bayes_probability", pa.float32()))
        return pa.schema(fields)


@dataclass(frozen=True)
class Validated:
    """A chunk, divided: `kept.num_rows + quarantined.num_rows` is the number of rows given.

    kept         canonical columns and types (`LogSpec.arrow_schema`), in the order given
    kept_row     int64, the `row` of each kept row
    quarantined  `part`, `row`, `reason` (the first that applies), `raw` (the row as JSON)
    """

    kept: pa.Table
    kept_row: pa.Array
    quarantined: pa.Table


class _Faults:
    """The first reason that applies to each row, if any."""

    def __init__(self, rows: int) -> None:
        self.code = np.full(rows, -1, np.int16)
        self.reasons: list[str] = []

    def add(self, mask: np.ndarray, reason: str) -> None:
        if mask.any():
            self.code[mask & (self.code < 0)] = len(self.reasons)
            self.reasons.append(reason)


def validate(chunk: pa.Table, spec: LogSpec, part_name: str, now: datetime) -> Validated:
    """Divide a chunk of a source into canonical rows and quarantined ones.

    Raises SourceError where a required column is missing or holds lists: the file is refused, not its rows.
    """
    missing = [name for name in spec.required if name not in chunk.column_names]
    if missing:
        near = nearest(missing[0], list(chunk.column_names))
        also = f" (and {', '.join(missing[1:])})" if missing[1:] else ""
        raise SourceError(f"{part_name}: required column {missing[0]!r} is missing{also}{near}")
    raw = {name: flat(chunk[name], f"{part_name}: {name}") for name in chunk.column_names}
    faults = _Faults(chunk.num_rows)
    if MALFORMED in raw:
        faults.add(pc.is_valid(raw[MALFORMED]).to_numpy(zero_copy_only=False), "wrong number of fields")
    columns = {name: _ids(raw[name], name, faults) for name in ("user_id", "item_id")}
    columns |= _times(raw, spec, now, faults)
    history = flags(raw["history"]) if "history" in raw else _no(chunk.num_rows)
    faults.add(history.bad, "history is not 0 or 1")
    is_history = history.values & ~history.missing
    columns["history"] = pa.array(is_history)
    for label in spec.labels:
        columns[label.name] = _label(raw[label.name], label, is_history, faults)
    for name, numeric in spec.context.items():
        if name not in columns:
            columns[name] = _context(raw[name], name, faults) if numeric else texts(raw[name])
    if "bayes_probability" in raw:
        columns["bayes_probability"] = raw["bayes_probability"].cast(pa.float32())
    schema = spec.arrow_schema(with_probability="bayes_probability" in raw)
    table = pa.table([columns[name] for name in schema.names], schema=schema)
    return _divide(chunk, table, faults, part_name)


def duplicates(table: pa.Table) -> np.ndarray:
    """[n] bool: rows whose (user_id, item_id, timestamp) an earlier row of the table has, in any order."""
    keys = [
        table["timestamp"].cast(pa.int64()).to_numpy(),
        *(
            pc.dictionary_encode(table[name].combine_chunks()).indices.to_numpy()
            for name in ("item_id", "user_id")
        ),
    ]
    order = np.lexsort(keys)  # stable: among equals the earliest row comes first
    same = np.ones(max(len(order) - 1, 0), bool)
    for key in keys:
        same &= key[order[1:]] == key[order[:-1]]
    result = np.zeros(len(order), bool)
    result[order[1:][same]] = True
    return result


def _ids(array: pa.Array, name: str, faults: _Faults) -> pa.Array:
    ids = texts(array)
    blank = pc.equal(pc.utf8_trim_whitespace(ids), "")
    faults.add(pc.fill_null(blank, True).to_numpy(zero_copy_only=False), f"{name} is missing")
    return ids


def _times(raw: dict[str, pa.Array], spec: LogSpec, now: datetime, faults: _Faults) -> dict[str, pa.Array]:
    time = instants(raw["timestamp"], spec.timestamp_unit)
    faults.add(time.missing, "timestamp is missing")
    faults.add(time.bad, "timestamp is not a time")
    earliest_us, latest_us = (int(t.timestamp() * 1e6) for t in (spec.earliest, now + spec.skew))
    faults.add(time.values < earliest_us, f"timestamp is before {spec.earliest:%Y-%m-%d}")
    faults.add(time.values > latest_us, "timestamp is in the future")
    us = np.clip(time.values, earliest_us, latest_us)  # only of rows that were just refused
    day = (us + round(spec.utc_offset_hours * 3_600_000_000)) // US_PER_DAY
    if "date" in raw:
        stated = days(raw["date"])
        faults.add(stated.bad, "date is not a day")
        # a log's own day may differ around midnight; further off, it would end up in the wrong split
        faults.add(~stated.missing & (np.abs(stated.values - day) > 1), "date is not the timestamp's day")
        day = np.where(stated.missing | stated.bad, day, stated.values)
    return {
        "timestamp": pa.array(us).cast(pa.timestamp("us")).cast(INSTANT),
        "date": pa.array(np.clip(day, -(2**31), 2**31 - 1).astype(np.int32)).cast(pa.date32()),
    }


def _label(array: pa.Array, label: Label, is_history: np.ndarray, faults: _Faults) -> pa.Array:
    if label.kind == "binary":
        parsed = flags(array)
        faults.add(parsed.bad, f"{label.name} is not 0 or 1")
        values = parsed.values.astype(np.int8)
    else:
        parsed = numbers(array)
        faults.add(parsed.bad, f"{label.name} is not a number")
        with np.errstate(over="ignore"):
            values = parsed.values.astype(np.float32)
        present = ~parsed.missing & ~parsed.bad
        faults.add(present & (parsed.values < 0), f"{label.name} is negative")
        faults.add(present & ~np.isfinite(values), f"{label.name} is not finite")
    faults.add(parsed.missing & ~is_history, f"{label.name} is missing")
    return pa.array(values, mask=parsed.missing)


def _context(array: pa.Array, name: str, faults: _Faults) -> pa.Array:
    parsed = numbers(array)
    faults.add(parsed.bad, f"{name} is not a number")
    faults.add(~parsed.missing & np.isinf(parsed.values), f"{name} is not finite")
    return pa.array(parsed.values, mask=parsed.missing | parsed.bad)


def _no(rows: int) -> Parsed:
    nothing = np.zeros(rows, bool)
    return Parsed(nothing, nothing, nothing)


def _divide(chunk: pa.Table, table: pa.Table, faults: _Faults, part_name: str) -> Validated:
    good = faults.code < 0
    row = chunk["row"].combine_chunks().cast(pa.int64())
    bad = pa.array(~good)
    refused = chunk.drop_columns(["row"]).filter(bad).to_pylist()
    quarantined = pa.table(
        [
            pa.array([part_name] * len(refused), pa.string()),
            row.filter(bad),
            pa.array([faults.reasons[code] for code in faults.code[~good]], pa.string()),
            pa.array([json.dumps(r, default=_plain, ensure_ascii=False) for r in refused], pa.string()),
        ],
        schema=QUARANTINE,
    )
    keep = pa.array(good)
    return Validated(table.filter(keep), row.filter(keep), quarantined)


def _plain(value: object) -> str:
    """JSON for the types that it lacks."""
    return value.isoformat() if isinstance(value, date | datetime) else str(value)
