"""Everything fitted on the training days that turns raw columns into model inputs, and its files.

Saved as Arrow and JSON: `schema.json`, `numbers.json`, `vocabulary.<feature>.parquet`,
`statistic.<feature>.parquet`.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from recsys_dist.data import transforms
from recsys_dist.data.counts import FITTED_ON, TRAIN, Counts
from recsys_dist.data.entities import Entities
from recsys_dist.data.output import write_parquet, write_text
from recsys_dist.data.transforms import Scale
from recsys_dist.data.vocab import Admission, Vocabulary
from recsys_dist.errors import DataError
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
    side,
)
from recsys_dist.schema import Schema

NO_DAY = 1 << 40  # later than any day, and small enough that key * NO_DAY + day fits int64


@dataclass(frozen=True)
class Statistics:
    """Running totals of one key by day: what was known of it at the end of each earlier day.

    keys       the key's values, a row each
    at         [m] int64, ascending: key row * NO_DAY + day
    count, positives  [m] totals up to and including that day
    prior      mean of the label over training
    """

    keys: Vocabulary
    at: np.ndarray
    count: np.ndarray
    positives: np.ndarray
    prior: float

    def before(self, key_rows: np.ndarray, days: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """[n] counts and positives of each key over all days before `days` [n]; zero for row 0."""
        if not len(self.at):
            return np.zeros(len(key_rows)), np.zeros(len(key_rows))
        sought = key_rows.astype(np.int64) * NO_DAY + days
        last = np.searchsorted(self.at, sought, side="left") - 1
        found = (last >= 0) & (self.at[last] // NO_DAY == key_rows) & (key_rows > 0)
        return np.where(found, self.count[last], 0.0), np.where(found, self.positives[last], 0.0)


@dataclass(frozen=True)
class Encoders:
    """Fitted schema and encoders. `freeze_day`: first local day whose outcomes no statistic may use."""

    schema: Schema
    vocabularies: dict[str, Vocabulary]
    bounds: dict[str, np.ndarray]
    scales: dict[str, Scale]
    statistics: dict[str, Statistics]
    freeze_day: int

    def encode(self, feature: Categorical | Bucketed | Numeric, column: pa.ChunkedArray) -> np.ndarray:
        """[n] model input of one raw column: int32 rows, or float32 for a numeric feature."""
        if isinstance(feature, Numeric) and feature.quantile:
            return transforms.quantile(column, self.bounds[feature.name], feature.power)
        if isinstance(feature, Numeric):
            return transforms.standardise(column, self.scales[feature.name])
        if isinstance(feature, Bucketed):
            return transforms.bucketise(column, self.bounds[feature.name])
        if feature.hash_buckets is not None:
            return transforms.hash_rows(column, feature.hash_buckets)
        return self.vocabularies[feature.name].lookup(column)

    def encode_entities(self, entities: Entities, key: str) -> dict[str, np.ndarray]:
        """Inputs of every user- or item-side feature by position, `[len(entities) + 1]`; 0 at position 0.

        `key` is `"user_id"` or `"item_id"`. Statistics are given as the rows of their keys.
        """
        encoded: dict[str, np.ndarray] = {}
        for feature in self.schema.features:
            if isinstance(feature, Categorical | Bucketed | Numeric) and side(feature.column) == side(key):
                encoded[feature.name] = self.encode(feature, _raw(entities, feature.column))
            elif isinstance(feature, Statistic) and side(feature.key) == side(key):
                keys = self.statistics[feature.name].keys
                encoded[feature.name] = keys.lookup(_raw(entities, feature.key))
        return {name: np.concatenate([values[:1] * 0, values]) for name, values in encoded.items()}

    def digest(self) -> str:
        """Identity of all that was fitted; differs when any value maps to another row or number."""
        seen = hashlib.sha256(json.dumps(self._numbers(), sort_keys=True).encode())
        for name, vocabulary in sorted(self.vocabularies.items()):
            seen.update(name.encode())
            seen.update(transforms.hash_text(vocabulary.values).tobytes())
        for name, statistics in sorted(self.statistics.items()):
            seen.update(name.encode())
            seen.update(statistics.at.tobytes() + statistics.count.tobytes() + statistics.positives.tobytes())
        return seen.hexdigest()[:16]

    def save(self, directory: Path) -> None:
        write_text(self.schema.model_dump_json(indent=1), directory / "schema.json")
        write_text(json.dumps(self._numbers(), indent=1), directory / "numbers.json")
        for name, vocabulary in self.vocabularies.items():
            vocabulary.save(directory / f"vocabulary.{name}.parquet")
        for name, stats in self.statistics.items():
            stats.keys.save(directory / f"statistic.{name}.keys.parquet")
            table = pa.table({"at": stats.at, "count": stats.count, "positives": stats.positives})
            write_parquet(table, directory / f"statistic.{name}.parquet")

    @classmethod
    def load(cls, directory: Path) -> "Encoders":
        schema = Schema.parse(json.loads((directory / "schema.json").read_text()))
        numbers = json.loads((directory / "numbers.json").read_text())
        statistics = {}
        for name, prior in numbers["priors"].items():
            table = pq.read_table(directory / f"statistic.{name}.parquet")
            keys = Vocabulary.load(directory / f"statistic.{name}.keys.parquet")
            at, count, positives = (table[column].to_numpy() for column in ("at", "count", "positives"))
            statistics[name] = Statistics(keys, at, count, positives, prior)
        return cls(
            schema,
            {
                name: Vocabulary.load(directory / f"vocabulary.{name}.parquet")
                for name in numbers["vocabularies"]
            },
            {name: np.array(bounds) for name, bounds in numbers["bounds"].items()},
            {name: Scale(**scale) for name, scale in numbers["scales"].items()},
            statistics,
            numbers["freeze_day"],
        )

    def _numbers(self) -> dict[str, object]:
        return {
            "freeze_day": self.freeze_day,
            "vocabularies": sorted(self.vocabularies),
            "bounds": {name: bounds.tolist() for name, bounds in self.bounds.items()},
            "scales": {name: asdict(scale) for name, scale in self.scales.items()},
            "priors": {name: stats.prior for name, stats in self.statistics.items()},
        }


def fit(
    schema: Schema,
    counts: Counts,
    users: Entities,
    items: Entities,
    freeze_day: int,
    former: Encoders | None = None,
) -> tuple[Encoders, dict[str, Admission]]:
    """Fit every feature on training and history events; statistics also run over the validation days.

    With what each vocabulary keeps. Values that `former` has a row for keep it.
    """
    vocabularies, bounds, scales, statistics = {}, {}, {}, {}
    rows: dict[str, int] = {}
    admissions: dict[str, Admission] = {}
    for feature in schema.features:
        match feature:
            case Categorical(hash_buckets=int(buckets)):
                rows[feature.name] = buckets + 1
            case Categorical():
                known, admissions[feature.name] = admitted(feature, counts, users, items)
                before = former.vocabularies.get(feature.name) if former else None
                vocabularies[feature.name] = known.numbered_as(before) if before else known
                rows[feature.name] = known.rows
            case Bucketed():
                values, total = _counted(feature.column, counts, users, items)
                bounds[feature.name] = transforms.quantile_bounds(
                    _numbers(feature, values), total, feature.buckets
                )
                rows[feature.name] = len(bounds[feature.name]) + 2
            case Numeric(quantile=True):
                values, total = _counted(feature.column, counts, users, items)
                bounds[feature.name] = transforms.distribution(_numbers(feature, values), total)
            case Numeric():
                values, total = _counted(feature.column, counts, users, items)
                scales[feature.name] = Scale.fit(_numbers(feature, values), total, feature.log)
            case Time():
                rows[feature.name] = 25 if feature.part == "hour" else 8
            case Cross() | Searches():
                rows[feature.name] = feature.hash_buckets + 1
            case Statistic():
                statistics[feature.name], seen = _fit_statistics(feature, counts, items)
                scales[feature.name] = _fit_scale(feature, statistics[feature.name], *seen)
            case Sequence() | Sessions():
                pass  # looked up in the table of the feature that it lists, or in none
    fitted = Encoders(schema.fitted(rows), vocabularies, bounds, scales, statistics, freeze_day)
    return fitted, admissions


def _numbers(feature: Bucketed | Numeric, values: pa.Array) -> np.ndarray:
    try:
        return transforms.floats(values)
    except pa.ArrowInvalid as error:
        raise DataError(
            f"feature {feature.name!r} is {feature.kind}, and {feature.column!r} has text: {error}; "
            "declare it categorical"
        ) from None


def admitted(
    feature: Categorical, counts: Counts, users: Entities, items: Entities
) -> tuple[Vocabulary, Admission]:
    """The values that a feature's limits let into its table, and how many each limit kept out."""
    values, total = _counted(feature.column, counts, users, items)
    seen = Vocabulary.fit(values, total)
    rare = seen.counts < feature.min_count
    old = np.zeros_like(rare)
    if feature.max_age_days is not None:
        newest = np.zeros(seen.rows, np.int64)
        np.maximum.at(newest, seen.lookup(values), _last_seen(feature.column, counts, users, items))
        old = ~rare & (newest[1:] <= counts.last_day(FITTED_ON) - feature.max_age_days)
    kept = ~rare & ~old
    beyond = kept & (np.cumsum(kept) >= (feature.max_rows or np.inf))
    known = seen.take(np.flatnonzero(kept & ~beyond))
    events = pc.sum(counts.totals("item_id", FITTED_ON)["total"]).as_py() or 0
    return known, Admission(
        values=len(seen.values),
        rare=int(rare.sum()),
        old=int(old.sum()),
        beyond=int(beyond.sum()),
        unknown=1 - int(known.counts.sum()) / max(1, events),
    )


def collisions(schema: Schema, counts: Counts, users: Entities, items: Entities) -> dict[str, float]:
    """Hashed feature -> share of its values, in training and history events, that share a row with others."""
    found = {}
    for feature in schema.features:
        if isinstance(feature, Categorical) and feature.hash_buckets is not None:
            values, total = _counted(feature.column, counts, users, items)
            seen = pc.unique(values.filter(pa.array(total > 0)).cast(pa.string()).drop_null())
            _, of_row = np.unique(transforms.hash_rows(seen, feature.hash_buckets), return_counts=True)
            found[feature.name] = float(of_row[of_row > 1].sum() / max(1, of_row.sum()))
    return found


def _raw(entities: Entities, column: str) -> pa.ChunkedArray:
    _, dot, attribute = column.partition(".")
    return entities.attribute(attribute) if dot else pa.chunked_array([entities.ids])


def _counted(
    column: str, counts: Counts, users: Entities, items: Entities
) -> tuple[pa.ChunkedArray | pa.Array, np.ndarray]:
    """Raw values of a column and how many training and history events had each (values may repeat)."""
    return _by_value(column, counts.totals(_counted_as(column), FITTED_ON), users, items)


def _last_seen(column: str, counts: Counts, users: Entities, items: Entities) -> np.ndarray:
    """The last day of training and history of each value that `_counted` gives; any day of those not seen."""
    return _by_value(column, counts.last_days(_counted_as(column), FITTED_ON), users, items)[1]


def _counted_as(column: str) -> str:
    return {"user": "user_id", "item": "item_id", "context": column}[side(column)]


def _by_value(
    column: str, totals: pa.Table, users: Entities, items: Entities
) -> tuple[pa.ChunkedArray | pa.Array, np.ndarray]:
    """Raw values of a column, and what `totals` says of each, or of the user or item that has it."""
    if side(column) == "context":
        return totals["value"].combine_chunks(), totals["total"].to_numpy()
    entities = users if side(column) == "user" else items
    by_position = np.zeros(len(entities) + 1, np.int64)
    by_position[entities.positions(totals["value"])] = totals["total"].to_numpy()
    return _raw(entities, column), by_position[1:]


def statistic(feature: Statistic, stats: Statistics, key_rows: np.ndarray, days: np.ndarray) -> np.ndarray:
    """[n] float32 of a statistic as of the beginning of `days` [n], not yet standardised."""
    count, positives = stats.before(key_rows, days)
    if feature.label is None:
        return transforms.past_count(count)
    return transforms.past_rate(count, positives, stats.prior, feature.smoothing)


def _fit_statistics(
    feature: Statistic, counts: Counts, items: Entities
) -> tuple[Statistics, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """The running totals, and the training events that will ask for them: key rows, days, and how many."""
    prior = counts.prior(feature.label) if feature.label else 0.0
    table = counts.by_column["item_id" if side(feature.key) == "item" else feature.key]
    values = table["value"].cast(pa.string())
    if "." in feature.key:
        raw = _raw(items, feature.key).cast(pa.string()).combine_chunks()
        values = raw.take(pa.array(items.positions(values) - 1))
    count = table[f"{feature.label}_rows" if feature.label else "rows"].to_numpy().astype(np.float64)
    positives = table[f"{feature.label}_sum"].to_numpy() if feature.label else np.zeros(len(count))
    flat = values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values
    keys = Vocabulary.fit(flat, count.astype(np.int64))
    key_rows, days = keys.lookup(values), table["day"].to_numpy()
    trained = np.asarray(pc.equal(table["period"], TRAIN))
    asked = np.where(trained, table["rows"].to_numpy(), 0)
    stats = Statistics(keys, *_running(key_rows, days, count, positives), prior)
    return stats, (key_rows, days, asked)


def _fit_scale(
    feature: Statistic, stats: Statistics, key_rows: np.ndarray, days: np.ndarray, asked: np.ndarray
) -> Scale:
    return Scale.fit(statistic(feature, stats, key_rows, days).astype(np.float64), asked, log=False)


def _running(
    key_rows: np.ndarray, days: np.ndarray, count: np.ndarray, positives: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sum per (key, day), then accumulate over the days of each key."""
    known = key_rows > 0
    at, group = np.unique(key_rows[known].astype(np.int64) * NO_DAY + days[known], return_inverse=True)
    totals = []
    first = np.r_[True, at[1:] // NO_DAY != at[:-1] // NO_DAY][: len(at)]
    for measure in (count[known], positives[known]):
        running = np.cumsum(np.bincount(group, measure, len(at)))
        before_key = np.r_[0.0, running][np.flatnonzero(first)]
        totals.append(running - np.repeat(before_key, np.diff(np.r_[np.flatnonzero(first), len(at)])))
    return at, totals[0], totals[1]
