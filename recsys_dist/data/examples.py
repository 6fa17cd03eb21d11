"""Canonical events of some users → examples: every feature of the fitted schema, point in time.

The one place that knows how a feature of each kind is made from events, users and items. Serving
calls `features` too, on the events of one user and the candidates as a table of future events.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recsys_dist.data import transforms
from recsys_dist.data.counts import is_positive
from recsys_dist.data.encoders import Encoders
from recsys_dist.data.entities import Entities
from recsys_dist.data.histories import Timeline
from recsys_dist.data.split import SPLITS, Split
from recsys_dist.schema import AnyFeature, Bucketed, Categorical, Numeric, Sequence, Statistic, Time, side

STATE = "state"  # a row that asks for a user's features at a moment, and is no event


@dataclass(frozen=True)
class World:
    """What examples are made with: encoders, and users and items with their encoded attributes."""

    encoders: Encoders
    users: Entities
    items: Entities

    @cached_property
    def user_inputs(self) -> dict[str, np.ndarray]:
        return self.encoders.encode_entities(self.users, "user_id")

    @cached_property
    def item_inputs(self) -> dict[str, np.ndarray]:
        return self.encoders.encode_entities(self.items, "item_id")


def sort_events(events: pa.Table) -> pa.Table:
    """By user, then time, then item: the order that histories are built in, whatever the file order."""
    return events.sort_by([(name, "ascending") for name in ("user_id", "timestamp", "item_id")])


def features(events: pa.Table, world: World) -> dict[str, pa.Array]:
    """A column per feature of the schema, a row per event of `events` (sorted by `sort_events`).

    An event's features use its own context and what happened strictly before its timestamp.
    """
    return {f.name: column for f, column in _Builder(events, world).columns()}


def examples(events: pa.Table, world: World, split: Split) -> pa.Table:
    """All exposures (history rows aside) with features, labels, `split`, `positive` and `order`.

    `order` is a hash of user, item and time: sorting by it shuffles the log alike in every run.
    """
    schema = world.encoders.schema
    chosen = pa.array(~np.asarray(events["history"]))
    columns: dict[str, pa.Array | pa.ChunkedArray] = dict(features(events, world))
    columns |= {label.name: events[label.name].cast(pa.float32()) for label in schema.labels}
    columns |= {name: events[name] for name in ("user_id", "item_id", "timestamp")}
    if "bayes_probability" in events.column_names:
        columns["bayes_probability"] = events["bayes_probability"].cast(pa.float32())
    columns["split"] = pa.array(split.assign(events["date"]))
    columns["positive"] = pa.array(is_positive(events, schema))
    columns["order"] = pa.array(_order(events))
    return pa.table(columns).filter(chosen)


def user_states(events: pa.Table, world: World, split: Split, of: str) -> pa.Table:
    """Users with a positive in split `of`: features as of its first moment, `truth` and `seen` item rows.

    truth  list<int32>: rows of the distinct items that the user wanted in the split, 0 = not in the catalogue
    seen   list<int32>: rows of the distinct items that the user was shown before it
    """
    schema = world.encoders.schema
    index = SPLITS.index(of)
    assigned = np.where(np.asarray(events["history"]), -1, split.assign(events["date"]))
    wanted = (assigned == index) & is_positive(events, schema)
    moment = _first_moment(split, of, schema.utc_offset_hours)
    users = pc.unique(events["user_id"].filter(pa.array(wanted)))
    before = events.filter(pa.array(assigned < index))
    states = pa.table(
        {
            "user_id": users,
            "timestamp": pa.array(np.full(len(users), moment), pa.timestamp("us", "UTC")),
            STATE: pa.array(np.ones(len(users), bool)),
        }
    )
    both = sort_events(pa.concat_tables([before, states.cast(states.schema)], promote_options="default"))
    asked = np.asarray(pc.fill_null(both[STATE], False))
    columns = {name: column.filter(pa.array(asked)) for name, column in features(both, world).items()}
    kept = both["user_id"].filter(pa.array(asked))
    item_rows = world.item_inputs[schema.item_id.name]
    return pa.table(
        {
            **columns,
            "user_id": kept,
            "timestamp": both["timestamp"].filter(pa.array(asked)),
            "truth": _rows_per_user(events.filter(pa.array(wanted)), kept, world.items, item_rows),
            "seen": _rows_per_user(before, kept, world.items, item_rows),
        }
    )


class _Builder:
    """Feature columns of sorted events; what several features share is computed once."""

    def __init__(self, events: pa.Table, world: World) -> None:
        self.events = events
        self.world = world
        self.schema = world.encoders.schema
        self.timestamp_us = np.asarray(events["timestamp"].cast(pa.int64()))
        self.user = world.users.positions(events["user_id"])
        self.item = world.items.positions(events["item_id"])

    def columns(self) -> list[tuple[AnyFeature, pa.Array]]:
        built: dict[str, np.ndarray] = {}
        arrays: list[tuple[AnyFeature, pa.Array]] = []
        ordered = sorted(self.schema.features, key=lambda f: f.kind == "cross")  # crosses read the others
        for feature in ordered:
            if isinstance(feature, Sequence):
                arrays.append((feature, self._sequence(feature)))
                continue
            if feature.kind == "cross":
                built[feature.name] = transforms.cross([built[n] for n in feature.of], feature.hash_buckets)
            else:
                built[feature.name] = self._single(feature)
            arrays.append((feature, pa.array(built[feature.name])))
        return arrays

    def _single(self, feature: Categorical | Bucketed | Numeric | Time | Statistic) -> np.ndarray:
        if isinstance(feature, Time):
            local = transforms.hour if feature.part == "hour" else transforms.weekday
            return local(self.timestamp_us, self.schema.utc_offset_hours)
        if isinstance(feature, Statistic):
            return self._statistic(feature)
        match side(feature.column):
            case "user":
                return self.world.user_inputs[feature.name][self.user]
            case "item":
                return self.world.item_inputs[feature.name][self.item]
            case "context":
                return self.world.encoders.encode(feature, self.events[feature.column])

    def _statistic(self, feature: Statistic) -> np.ndarray:
        stats = self.world.encoders.statistics[feature.name]
        if feature.key == "user_id":
            count, positives = self._user_totals(feature)
        else:
            if side(feature.key) == "item":
                keys = self.world.item_inputs[feature.name][self.item]
            else:
                keys = stats.keys.lookup(self.events[feature.key])
            today = transforms.day(self.timestamp_us, self.schema.utc_offset_hours)
            count, positives = stats.before(keys, np.minimum(today, self.world.encoders.freeze_day))
        if feature.label is None:
            return transforms.past_count(count)
        return transforms.past_rate(count, positives, stats.prior, feature.smoothing)

    def _user_totals(self, feature: Statistic) -> tuple[np.ndarray, np.ndarray]:
        if feature.label is None:
            return self.timeline.count(self.is_event), np.zeros(len(self.user))
        label = transforms.floats(self.events[feature.label])
        known = np.isfinite(label)
        return self.timeline.count(known), self.timeline.count(np.where(known, label, 0.0))

    def _sequence(self, feature: Sequence) -> pa.Array:
        wanted = self.is_event
        if feature.where is not None:
            label = transforms.floats(self.events[feature.where])
            wanted = wanted & (np.nan_to_num(label) > 0)
        offsets, at = self.timeline.last(wanted, feature.max_length)
        ids = self.world.item_inputs[feature.of][self.item[at]]
        return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), pa.array(ids))

    @cached_property
    def is_event(self) -> np.ndarray:
        if STATE not in self.events.column_names:
            return np.ones(len(self.events), bool)
        return ~np.asarray(pc.fill_null(self.events[STATE], False))

    @cached_property
    def timeline(self) -> Timeline:
        codes = self.events["user_id"].combine_chunks().dictionary_encode().indices
        return Timeline.of(np.asarray(codes), self.timestamp_us)


def _first_moment(split: Split, of: str, utc_offset_hours: float) -> int:
    """Midnight, local time, of the split's first day, in microseconds since the epoch."""
    first = split.valid_from if of == "valid" else split.test_from
    days = np.datetime64(first, "D").astype(np.int64)
    return int(days * transforms.DAY_US - utc_offset_hours * transforms.HOUR_US)


def _rows_per_user(
    events: pa.Table, users: pa.ChunkedArray, items: Entities, rows: np.ndarray
) -> pa.ListArray:
    """Distinct items of each user as a list of table rows, aligned with `users`."""
    pairs = events.select(["user_id", "item_id"]).group_by(["user_id", "item_id"]).aggregate([])
    at = np.asarray(pc.fill_null(pc.index_in(pairs["user_id"], value_set=users.combine_chunks()), -1))
    found = rows[items.positions(pairs["item_id"])]
    kept = at >= 0
    order = np.lexsort((found[kept], at[kept]))
    offsets = np.r_[0, np.cumsum(np.bincount(at[kept], minlength=len(users)))]
    return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), pa.array(found[kept][order]))


def _order(events: pa.Table) -> np.ndarray:
    text = (np.asarray(events[name].combine_chunks()) for name in ("user_id", "item_id"))
    mixed = np.asarray(events["timestamp"].cast(pa.int64())).astype(np.uint64)
    for column in text:
        mixed = transforms.mix(mixed ^ transforms.hash_array(column))
    return mixed
