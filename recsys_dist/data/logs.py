"""The canonical log: what a valid event is. A bad row is quarantined with a reason, never dropped silently.

n rows of a chunk. Everything is columnar; only the rows that are refused are looked at one by one.
"""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recsys_dist.config import nearest
from recsys_dist.data.columns import (
    US_PER_DAY,
    Parsed,
    TimestampUnit,
    days,
    flags,
    flat,
    instants,
    numbers,
    texts,
)
from recsys_dist.errors import SourceError
from recsys_dist.feature_kinds import Bucketed, Categorical, Numeric, Searches, Statistic, side
from recsys_dist.schema import Label, Schema

INSTANT = pa.timestamp("us", "UTC")
DUPLICATE = "duplicate"
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
    utc_offset_hours: float = 0.0
    earliest: datetime = datetime(1990, 1, 1, tzinfo=UTC)
    skew: timedelta = timedelta(minutes=5)

    @classmethod
    def from_schema(cls, schema: Schema) -> Self:
        """The columns that the features and labels of `schema` read."""
        context: dict[str, bool] = {}
        for feature in schema.features:
            numeric = isinstance(feature, Numeric | Bucketed)
            if isinstance(feature, Categorical | Numeric | Bucketed | Searches):
                column = feature.column
            elif isinstance(feature, Statistic):
                column = feature.key
            else:
                continue
            if side(column) == "context":
                context[column] = context.get(column, False) or numeric
        return cls(schema.labels, context, schema.utc_offset_hours)

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
        fields += [pa.field(x.name, pa.int8() if x.kind == "binary" else pa.float32()) for x in self.labels]
        known = {f.name for f in fields}
        fields += [
            pa.field(name, pa.float64() if numeric else pa.string())
            for name, numeric in self.context.items()
            if name not in known
        ]
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


def validate(
    chunk: pa.Table,
    spec: LogSpec,
    part_name: str,
    timestamp_unit: TimestampUnit = "us",
    now: datetime | None = None,
) -> Validated:
    """Divide a chunk of a source into canonical rows and quarantined ones.

    `now` is when the log cannot yet have been written, the present by default. Raises SourceError
    where a required column is missing or holds lists: that refuses the file, not its rows.
    """
    _require_columns(chunk, spec, part_name)
    raw = {name: flat(chunk[name], f"{part_name}: {name}") for name in chunk.column_names}
    faults = _Faults(chunk.num_rows)
    if MALFORMED in raw:
        faults.add(pc.is_valid(raw[MALFORMED]).to_numpy(zero_copy_only=False), "wrong number of fields")
    columns = {name: _ids(raw[name], name, faults) for name in ("user_id", "item_id")}
    columns |= _times(raw, spec, instants(raw["timestamp"], timestamp_unit), now or datetime.now(UTC), faults)
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
    """[n] bool: rows whose (user_id, item_id, timestamp) an earlier row of the table has, in any order.

    A history row is no duplicate of an event: it repeats what happened, not the example.
    """
    keys = [
        table["history"].combine_chunks().cast(pa.int8()).to_numpy(),
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


def _require_columns(chunk: pa.Table, spec: LogSpec, part_name: str) -> None:
    missing = [name for name in spec.required if name not in chunk.column_names]
    if missing:
        near = nearest(missing[0], list(chunk.column_names))
        also = f" (and {', '.join(missing[1:])})" if missing[1:] else ""
        raise SourceError(f"{part_name}: required column {missing[0]!r} is missing{also}{near}")


def _times(
    raw: dict[str, pa.Array], spec: LogSpec, time: Parsed, now: datetime, faults: _Faults
) -> dict[str, pa.Array]:
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
    reasons = [faults.reasons[code] for code in faults.code[~good]]
    quarantined = quarantine(chunk.filter(pa.array(~good)), part_name, reasons)
    keep = pa.array(good)
    return Validated(table.filter(keep), row.filter(keep), quarantined)


def quarantine(rows: pa.Table, part_name: str, reason: str | list[str]) -> pa.Table:
    """Refused rows as QUARANTINE has them; `reason` is one for all, or one for each.

    Their number is the column `row`, null where there is none.
    """
    number = rows["row"].combine_chunks() if "row" in rows.column_names else pa.nulls(len(rows))
    raw = pa.table({name: _shown(rows[name]) for name in rows.column_names if name != "row"}).to_pylist()
    columns = [
        pa.array([part_name] * len(rows), pa.string()),
        number.cast(pa.int64()),
        pa.array([reason] * len(rows) if isinstance(reason, str) else reason, pa.string()),
        pa.array([json.dumps(r, default=str, ensure_ascii=False) for r in raw], pa.string()),
    ]
    return pa.table(columns, schema=QUARANTINE)


def _shown(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Moments as text: an impossible one need not be one for Python, whose years end with 9999."""
    return column.cast(pa.string()) if pa.types.is_temporal(column.type) else column


@dataclass(frozen=True)
class PartRows:
    """Rows of one part: `read == kept + sum of quarantined`."""

    read: int = 0
    kept: int = 0
    quarantined: dict[str, int] = field(default_factory=dict)

    def plus(self, other: "PartRows") -> "PartRows":
        reasons = Counter(self.quarantined) + Counter(other.quarantined)
        return PartRows(self.read + other.read, self.kept + other.kept, dict(reasons))


@dataclass(frozen=True)
class Ledger:
    """Every row read is kept or quarantined with a reason, and every refused file is named.

    Immutable; ledgers of parts read on different machines merge in any order.

    parts       part name -> its rows, duplicates among the kept
    refused     part name -> why its file was refused; rows read before the fault count as usual
    duplicates  rows that turned out to repeat another once all parts had been seen
    """

    parts: dict[str, PartRows] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    duplicates: int = 0

    @property
    def read(self) -> int:
        return sum(part.read for part in self.parts.values())

    @property
    def kept(self) -> int:
        return sum(part.kept for part in self.parts.values()) - self.duplicates

    @property
    def quarantined(self) -> Counter[str]:
        """Rows by reason, over all parts; those that repeat another as "duplicate"."""
        total = Counter({DUPLICATE: self.duplicates})
        for part in self.parts.values():
            total.update(part.quarantined)
        return +total

    def add(self, part: str, checked: Validated) -> "Ledger":
        """With a chunk of `part` counted."""
        counts = pc.value_counts(checked.quarantined["reason"]).to_pylist()
        reasons = {entry["values"]: entry["counts"] for entry in counts}
        kept = checked.kept.num_rows
        rows = PartRows(kept + checked.quarantined.num_rows, kept, reasons)
        return Ledger.merge([self, Ledger({part: rows})])

    def refuse(self, part: str, reason: str) -> "Ledger":
        """With the rest of `part` given up."""
        return Ledger.merge([self, Ledger(refused={part: reason})])

    def with_duplicates(self, rows: int) -> "Ledger":
        """With `rows` more of the kept rows quarantined as duplicates."""
        return Ledger(self.parts, self.refused, self.duplicates + rows)

    @staticmethod
    def merge(ledgers: Iterable["Ledger"]) -> "Ledger":
        """The sum of ledgers."""
        parts: dict[str, PartRows] = {}
        refused: dict[str, str] = {}
        duplicates = 0
        for ledger in ledgers:
            for name, rows in ledger.parts.items():
                parts[name] = parts.get(name, PartRows()).plus(rows)
            refused |= ledger.refused
            duplicates += ledger.duplicates
        return Ledger(parts, refused, duplicates)

    def check(self) -> None:
        """Assert that the rows add up; where they do not, this project lost some."""
        for name, part in self.parts.items():
            total = part.kept + sum(part.quarantined.values())
            assert part.read == total, f"{name}: {part.read} rows read, {total} accounted for"
        assert self.kept >= 0, f"{self.duplicates} duplicates among fewer rows kept"
        assert self.read == self.kept + self.quarantined.total()

    def to_json(self) -> dict[str, Any]:
        """Plain data that `from_json` reads back, with totals for people who open the file."""
        totals = {"read": self.read, "kept": self.kept, "quarantined": dict(self.quarantined)}
        parts = {name: asdict(part) for name, part in sorted(self.parts.items())}
        refused = dict(sorted(self.refused.items()))
        return {**totals, "duplicates": self.duplicates, "refused": refused, "parts": parts}

    @staticmethod
    def from_json(values: dict[str, Any]) -> "Ledger":
        """The ledger that `to_json` wrote."""
        parts = {name: PartRows(**part) for name, part in values["parts"].items()}
        return Ledger(parts, values["refused"], values["duplicates"])

    def summary(self) -> str:
        """What a person should know, in a few lines."""
        quarantined = self.quarantined
        lines = [f"{self.read:,} rows read = {self.kept:,} kept + {quarantined.total():,} quarantined"]
        lines += [f"{rows:>12,}  {reason}" for reason, rows in quarantined.most_common()]
        if self.refused:
            files = "file" if len(self.refused) == 1 else "files"
            lines.append(f"{len(self.refused):,} {files} refused:")
            lines += [f"  {reason}" for _, reason in sorted(self.refused.items())[:10]]
            lines += [f"  ... and {len(self.refused) - 10:,} more"] if len(self.refused) > 10 else []
        return "\n".join(lines)
