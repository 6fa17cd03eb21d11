"""How often each raw value occurred, by day: all that vocabularies, scales and statistics are fitted on.

Held-out test days are never counted.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recsys_dist.data import transforms
from recsys_dist.data.split import Split
from recsys_dist.feature_kinds import Bucketed, Categorical, Numeric, Statistic, column_of, side
from recsys_dist.schema import Schema

HISTORY, TRAIN, VALID, LATE_HISTORY, TEST = "history", "train", "valid", "late history", "test"
FITTED_ON = (HISTORY, TRAIN)
# by (is it a history row, index of its day's split): a history row of later days is as held out as these days
PERIODS = np.array([[TRAIN, VALID, TEST], [HISTORY, LATE_HISTORY, TEST]])
POSITIVE = "_positive"  # any label of schema.recall_positive


@dataclass(frozen=True)
class Counts:
    """Per event column a table: `value, day, period, rows`, and per label `<label>_rows, <label>_sum`.

    `<label>_rows` counts events whose label is known. Columns counted: `user_id`, `item_id`, and
    the context columns that a feature reads.
    """

    by_column: dict[str, pa.Table]

    @classmethod
    def of(cls, events: pa.Table, schema: Schema, split: Split) -> "Counts":
        """Count canonical events; test days are left out."""
        period = split.assign(events["date"])
        names = PERIODS[np.asarray(events["history"]).astype(np.int8), period]
        stamps = np.asarray(events["timestamp"].cast(pa.int64()))
        base = {
            "day": pa.array(transforms.day(stamps, schema.utc_offset_hours)),
            "period": pa.array(names).dictionary_encode(),
            "rows": pa.array(np.ones(len(names), np.int64)),
            **_label_counts(events, schema),
        }
        counted = pa.array(names != TEST)
        return cls(
            {
                column: _sum(pa.table({"value": _value(events, column, schema), **base}).filter(counted))
                for column in counted_columns(schema)
            }
        )

    @classmethod
    def merge(cls, parts: Iterable["Counts"]) -> "Counts":
        """Add up counts of disjoint sets of events; in one order, as what is fitted on them rounds by it."""
        tables: dict[str, list[pa.Table]] = {}
        for part in parts:
            for column, table in part.by_column.items():
                tables.setdefault(column, []).append(table)
        order = [(name, "ascending") for name in ("value", "day", "period")]
        return cls({column: _sum(pa.concat_tables(found)).sort_by(order) for column, found in tables.items()})

    def totals(self, column: str, periods: tuple[str, ...], of: str = "rows") -> pa.Table:
        """`value, total` by value: how often it occurred in the periods; `of` may be `<label>_sum`."""
        summed = self._of(column, periods).group_by("value").aggregate([(of, "sum")])
        return summed.select(["value", f"{of}_sum"]).rename_columns(["value", "total"]).sort_by("value")

    def last_days(self, column: str, periods: tuple[str, ...]) -> pa.Table:
        """`value, total` by value, as `totals` in the same order: the last local day that it occurred on."""
        chosen = self._of(column, periods).group_by("value").aggregate([("day", "max")])
        return chosen.select(["value", "day_max"]).rename_columns(["value", "total"]).sort_by("value")

    def last_day(self, periods: tuple[str, ...]) -> int:
        """The last local day with an event."""
        return int(pc.max(self._of("item_id", periods)["day"]).as_py() or 0)

    def prior(self, label: str) -> float:
        """Mean of the label over training and history events where it is known."""
        fitted = self._of("item_id", FITTED_ON)
        rows = pc.sum(fitted[f"{label}_rows"]).as_py() or 0
        return (pc.sum(fitted[f"{label}_sum"]).as_py() or 0.0) / rows if rows else 0.5

    def _of(self, column: str, periods: tuple[str, ...]) -> pa.Table:
        table = self.by_column[column]
        return table.filter(pc.is_in(table["period"].cast(pa.string()), pa.array(periods)))


def counted_columns(schema: Schema) -> list[str]:
    """Event columns whose values must be counted to fit the schema."""
    columns = {"user_id", "item_id"}
    for feature in schema.features:
        if isinstance(feature, Categorical | Bucketed | Numeric) and side(feature.column) == "context":
            columns.add(feature.column)
        if isinstance(feature, Statistic) and side(feature.key) == "context":
            columns.add(feature.key)
    return sorted(columns)


def is_positive(events: pa.Table, schema: Schema) -> np.ndarray:
    """[n] bool: any label of `schema.recall_positive` is above zero (an unknown label is not)."""
    marks = [np.asarray(pc.fill_null(pc.greater(events[name], 0), False)) for name in schema.recall_positive]
    return np.logical_or.reduce(marks)


def _label_counts(events: pa.Table, schema: Schema) -> dict[str, pa.Array]:
    columns: dict[str, pa.Array] = {}
    for label in schema.labels:
        values = transforms.floats(events[label.name])
        known = np.isfinite(values)
        columns[f"{label.name}_rows"] = pa.array(known.astype(np.int64))
        columns[f"{label.name}_sum"] = pa.array(np.where(known, values, 0.0))
    columns[f"{POSITIVE}_rows"] = pa.array(np.ones(len(events), np.int64))
    columns[f"{POSITIVE}_sum"] = pa.array(is_positive(events, schema).astype(np.float64))
    return columns


def _value(events: pa.Table, column: str, schema: Schema) -> pa.ChunkedArray | pa.Array:
    readers = [feature for feature in schema.features if column_of(feature) == column]
    if not any(isinstance(reader, Bucketed | Numeric) for reader in readers):
        return events[column].cast(pa.string())
    if any(isinstance(reader, Categorical | Statistic) for reader in readers):
        return events[column]  # one of them takes each value for itself
    # Ten bits of mantissa: a thousandth of the value, so that a continuous column has few distinct values.
    mantissa, exponent = np.frexp(transforms.floats(events[column]))
    return pa.array(np.ldexp(np.round(mantissa * 1024) / 1024, exponent), from_pandas=True)


def _sum(table: pa.Table) -> pa.Table:
    keys = ["value", "day", "period"]
    summed = table.filter(pc.is_valid(table["value"]))
    summed = summed.set_column(2, "period", summed["period"].cast(pa.string()))
    measures = [name for name in table.column_names if name not in keys]
    result = summed.group_by(keys).aggregate([(name, "sum") for name in measures])
    return result.select([*keys, *(f"{name}_sum" for name in measures)]).rename_columns([*keys, *measures])
