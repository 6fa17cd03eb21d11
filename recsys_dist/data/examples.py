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
from recsys_dist.data.encoders import Encoders, statistic
from recsys_dist.data.entities import Entities
from recsys_dist.data.histories import Timeline, chunk_ends, listed
from recsys_dist.data.split import SPLITS, Split
from recsys_dist.feature_kinds import (
    Bucketed,
    Categorical,
    Cross,
    ListFeature,
    Numeric,
    Searches,
    Sequence,
    Sessions,
    Statistic,
    Time,
    side,
)

STATE = "_state"  # a row that asks for a user's features at a moment, and is no event
SPLIT, RANKING, ORDER = "_split", "_ranking", "_order"  # of examples, until they are written


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


def features(events: pa.Table, world: World, of: np.ndarray) -> dict[str, pa.Array]:
    """A column per feature of the schema, a row per event at positions `of` [m].

    `events` are sorted by `sort_events`. An event's features use its own context and what happened
    strictly before its timestamp.
    """
    return _Builder(events, world, of).columns()


def examples(events: pa.Table, world: World, split: Split) -> pa.Table:
    """Every event that is an example, with features, labels, `weight`, and SPLIT, RANKING and ORDER:

    RANKING  bool: an exposure of the log itself; history rows, whose context is unknown, are not
    weight   float32 as an example of recall: 1 for a positive, `schema.recall_exposure_weight` for others,
             0 for an item that the user was shown before (unless `schema.recall_repeats`)
    ORDER    a hash of user, item and time: sorting by it shuffles the log alike in every run
    """
    schema = world.encoders.schema
    ranking = ~np.asarray(events["history"])
    weight = np.where(is_positive(events, schema), 1.0, schema.recall_exposure_weight)
    if not schema.recall_repeats:
        weight[_repeats(events)] = 0.0
    of = np.flatnonzero(ranking | (weight > 0))
    made = events.take(pa.array(of))
    columns: dict[str, pa.Array | pa.ChunkedArray] = dict(features(events, world, of))
    columns |= {label.name: made[label.name].cast(pa.float32()) for label in schema.labels}
    columns |= {name: made[name] for name in ("user_id", "item_id", "timestamp")}
    if "bayes_probability" in made.column_names:
        columns["bayes_probability"] = made["bayes_probability"].cast(pa.float32())
    columns[SPLIT] = pa.array(split.assign(made["date"]))
    columns[RANKING] = pa.array(ranking[of])
    columns["weight"] = pa.array(weight[of].astype(np.float32))
    columns[ORDER] = pa.array(_order(made))
    return pa.table(columns)


def user_states(events: pa.Table, world: World, split: Split, name: str) -> pa.Table:
    """Users with a positive in split `name`: features as of its first moment, `truth` and `seen` item rows.

    truth  list<int32>: rows of the distinct items that the user wanted in the split, 0 = not in the catalogue
    seen   list<int32>: rows of the distinct items that the user was shown before it
    """
    schema = world.encoders.schema
    index = SPLITS.index(name)
    assigned = split.assign(events["date"])
    wanted = (assigned == index) & is_positive(events, schema) & ~np.asarray(events["history"])
    moment = _first_moment(split, name, schema.utc_offset_hours)
    users = pc.unique(events["user_id"].filter(pa.array(wanted)))
    before = events.filter(pa.array(assigned < index))
    states = pa.table(
        {
            "user_id": users,
            "timestamp": pa.array(np.full(len(users), moment), pa.timestamp("us", "UTC")),
            STATE: pa.array(np.ones(len(users), bool)),
        }
    )
    both = sort_events(pa.concat_tables([before, states], promote_options="default"))
    of = np.flatnonzero(np.asarray(pc.fill_null(both[STATE], False)))
    kept = both["user_id"].take(pa.array(of))
    item_rows = world.item_inputs[schema.item_id.name]
    return pa.table(
        {
            **features(both, world, of),
            "user_id": kept,
            "timestamp": both["timestamp"].take(pa.array(of)),
            "truth": _rows_per_user(events.filter(pa.array(wanted)), kept, world.items, item_rows),
            "seen": _rows_per_user(before, kept, world.items, item_rows),
        }
    )


def chunks(events: pa.Table, world: World, split: Split, feature: Sequence, until: str) -> pa.Table:
    """Few rows that hold all of a sequence feature's events up to split `until`, each as a target once.

    A row is an event with the sequence before it, and the item's id: for models that learn to tell
    every item of a sequence, and the row's own, from what came before. (Not seen as targets are events
    at the very time of a row's own, and one more time those as many before it.)
    """
    schema = world.encoders.schema
    # also where a date is earlier than the time says, no row lists what is held out
    events = events.filter(pa.array(split.assign(events["date"]) <= SPLITS.index(until)))
    user = _codes(events["user_id"])
    wanted = listed(events, feature, user, np.ones(len(events), bool))
    builder = _Builder(events, world, chunk_ends(user, wanted, feature.max_length))
    return pa.table(
        {
            feature.name: builder.listed(feature),
            schema.item_id.name: builder.single(schema.item_id),
            "user_id": builder.asked["user_id"],
            "timestamp": builder.asked["timestamp"],
        }
    )


class _Builder:
    """Feature columns of the events at positions `of`; what several features share is computed once."""

    def __init__(self, events: pa.Table, world: World, of: np.ndarray) -> None:
        self.past = events
        self.of = of
        self.asked = events.take(pa.array(of))
        self.world = world
        self.schema = world.encoders.schema
        self.timestamp_us = np.asarray(self.asked["timestamp"].cast(pa.int64()))
        self.user = world.users.positions(self.asked["user_id"])
        self.past_item = world.items.positions(events["item_id"])
        self.item = self.past_item[of]
        self._pasts: dict[tuple[bool, str | None, int], tuple[np.ndarray, np.ndarray]] = {}

    def columns(self) -> dict[str, pa.Array]:
        singles = {
            f.name: self.single(f) for f in self.schema.features if not isinstance(f, Cross | ListFeature)
        }
        columns: dict[str, pa.Array] = {}
        for feature in self.schema.features:
            if isinstance(feature, ListFeature):
                columns[feature.name] = self.listed(feature)
            elif isinstance(feature, Cross):
                parts = [singles[name] for name in feature.of]
                columns[feature.name] = pa.array(transforms.cross(parts, feature.hash_buckets))
            else:
                columns[feature.name] = pa.array(singles[feature.name])
        return columns

    def single(self, feature: Categorical | Bucketed | Numeric | Time | Statistic) -> np.ndarray:
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
                return self.world.encoders.encode(feature, self.asked[feature.column])

    def _statistic(self, feature: Statistic) -> np.ndarray:
        encoders = self.world.encoders
        stats = encoders.statistics[feature.name]
        match side(feature.key):
            case "user":
                keys = self.world.user_inputs[feature.name][self.user]
            case "item":
                keys = self.world.item_inputs[feature.name][self.item]
            case "context":
                keys = stats.keys.lookup(self.asked[feature.key])
        today = transforms.day(self.timestamp_us, self.schema.utc_offset_hours)
        past = statistic(feature, stats, keys, np.minimum(today, encoders.freeze_day))
        return transforms.scaled(past, encoders.scales[feature.name])

    def listed(self, feature: ListFeature) -> pa.Array:
        """The items of past events, the sessions that these belong to, or the words searched for."""
        offsets, at = self._last(feature)
        if isinstance(feature, Searches):
            texts = self.past[feature.column].combine_chunks().cast(pa.string()).dictionary_encode()
            of_texts = transforms.words(texts.dictionary, feature.bigrams, feature.hash_buckets)
            words = of_texts.take(texts.indices.take(pa.array(at)))
            return pa.ListArray.from_arrays(words.offsets.take(pa.array(offsets)), words.values)
        if isinstance(feature, Sessions):
            gap_us = round(feature.gap_minutes * transforms.MINUTE_US)
            listed = transforms.sessions(self.past_us[at], offsets, gap_us, feature.sessions)
            return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), pa.array(listed))
        if feature.others_only:
            own = np.repeat(self.item, np.diff(offsets))
            kept = (self.past_item[at] != own) | (own == 0)  # 0: a row that asks for a user has no item
            offsets, at = np.r_[0, np.cumsum(kept)][offsets], at[kept]
        ids = self.world.item_inputs[feature.of][self.past_item[at]]
        return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), pa.array(ids))

    def _last(self, feature: ListFeature) -> tuple[np.ndarray, np.ndarray]:
        """Offsets and positions of the events that a list tells of, the same for all attributes of theirs."""
        told = feature.column if isinstance(feature, Searches) else feature.where
        what = type(feature) is Searches, told, feature.max_length
        if what not in self._pasts:
            wanted = listed(self.past, feature, self.past_user, self.real)
            self._pasts[what] = self.timeline.last(wanted, feature.max_length, self.of)
        return self._pasts[what]

    @cached_property
    def timeline(self) -> Timeline:
        return Timeline.of(self.past_user, self.past_us)

    @cached_property
    def real(self) -> np.ndarray:
        """[n] bool: which of the past rows are events."""
        if STATE not in self.past.column_names:
            return np.ones(len(self.past), bool)
        return ~np.asarray(pc.fill_null(self.past[STATE], False))

    @cached_property
    def past_user(self) -> np.ndarray:
        return _codes(self.past["user_id"])

    @cached_property
    def past_us(self) -> np.ndarray:
        return np.asarray(self.past["timestamp"].cast(pa.int64()))


def _codes(column: pa.ChunkedArray) -> np.ndarray:
    """[n] int32: equal values have equal codes."""
    return np.asarray(column.combine_chunks().dictionary_encode().indices)


def _first_moment(split: Split, name: str, utc_offset_hours: float) -> int:
    """Midnight, local time, of the split's first day, in microseconds since the epoch."""
    first = split.valid_from if name == "valid" else split.test_from
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


def _repeats(events: pa.Table) -> np.ndarray:
    """[n] bool: the user was shown the item in an earlier row."""
    codes = [_codes(events[name]) for name in ("user_id", "item_id")]
    pair = codes[0].astype(np.int64) << 32 | codes[1]
    repeated = np.ones(len(pair), bool)
    repeated[np.unique(pair, return_index=True)[1]] = False
    return repeated


def _order(events: pa.Table) -> np.ndarray:
    mixed = np.asarray(events["timestamp"].cast(pa.int64())).astype(np.uint64)
    for name in ("user_id", "item_id"):
        mixed = transforms.mix(mixed ^ transforms.hash_text(events[name]))
    return mixed
