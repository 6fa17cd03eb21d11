"""What is fitted: statistics by day against a loop, and encoded entities."""

import datetime as dt
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recsys_dist.data.counts import Counts
from recsys_dist.data.encoders import Encoders, Statistics, _running, collisions, fit
from recsys_dist.data.transforms import hash_rows
from recsys_dist.data.vocab import Admission, Vocabulary
from recsys_dist.errors import DataError
from recsys_dist.feature_kinds import Categorical
from recsys_dist.schema import Schema
from tests.data.small_log import SCHEMA, events, items
from tests.data.test_counts import late_history
from tests.data.test_examples import FREEZE, SPLIT, world_of

KEYS = Vocabulary(pa.array(["a", "b", "c"]), np.ones(3, np.int64))
DAY_COUNTS = st.lists(
    st.tuples(st.integers(0, 3), st.integers(0, 5), st.integers(0, 4), st.integers(0, 4)), max_size=30
)


@given(DAY_COUNTS, st.lists(st.tuples(st.integers(0, 3), st.integers(-3, 7)), min_size=1, max_size=20))
def test_before_adds_up_all_earlier_days(
    counted: list[tuple[int, int, int, int]], asked: list[tuple[int, int]]
) -> None:
    """Keys, days, counts, positives of any order, repeated days among them; key row 0 knows nothing."""
    keys, days, count, positives = np.array(counted, np.int64).reshape(-1, 4).T
    statistics = Statistics(KEYS, *_running(keys, days, count, positives), prior=0.5)
    rows, moments = np.array(asked, np.int64).T
    got = statistics.before(rows, moments)
    for which, at in ((2, 0), (3, 1)):
        want = [sum(c[which] for c in counted if c[0] == key > 0 and c[1] < day) for key, day in asked]
        assert got[at].tolist() == want


def test_users_and_items_are_encoded_by_position_and_0_is_unknown() -> None:
    world = world_of(events())
    genres = world.encoders.vocabularies["genre"]
    got = world.item_inputs["genre"]
    assert len(got) == len(world.items) + 1 and got[0] == 0
    assert np.array_equal(got[1:], genres.lookup(world.items.attribute("genre")))
    assert set(world.user_inputs) == {"user", "age", "user_count", "user_rate"}
    assert world.user_inputs["age"].dtype == np.float32
    assert world.user_inputs["age"][0] == 0


def test_the_digest_tells_another_mapping_apart() -> None:
    encoders = world_of(events()).encoders
    again = world_of(events()).encoders
    assert encoders.digest() == again.digest()
    values = again.vocabularies["genre"].values
    again.vocabularies["genre"] = Vocabulary(values[::-1], again.vocabularies["genre"].counts)
    assert again.digest() != encoders.digest()
    sliced = pa.concat_arrays([pa.array(["x"]), values])[1:]  # the same values, elsewhere in memory
    again.vocabularies["genre"] = Vocabulary(sliced, again.vocabularies["genre"].counts)
    assert again.digest() == encoders.digest()


def test_values_that_share_a_row_are_counted() -> None:
    """Of the items that training and history events have; items of later days alone do not count."""
    hashed = Categorical(name="hashed_item", column="item_id", hash_buckets=9)
    schema = SCHEMA.model_copy(update={"features": (*SCHEMA.features, hashed)})
    log, world = events(), world_of(events())
    until = SPLIT.valid_from
    seen = {r["item_id"] for r in log.to_pylist() if r["date"] < until and r["item_id"] is not None}
    rows = Counter(hash_rows(pa.array(sorted(seen)), 9).tolist())
    expected = sum(n for n in rows.values() if n > 1) / len(seen)
    found = collisions(schema, Counts.of(log, schema, SPLIT), world.users, world.items)
    assert 0 < expected < 1 and found["hashed_item"] == pytest.approx(expected)
    assert found.keys() == {"device", "hashed_item"}


def limited(log: pa.Table, **limits: int) -> tuple[Encoders, dict[str, Admission]]:
    """The small schema with these limits on every vocabulary, fitted; every third row is history."""
    features = [
        f.model_copy(update=limits) if isinstance(f, Categorical) and not f.hash_buckets else f
        for f in SCHEMA.features
    ]
    schema = SCHEMA.model_copy(update={"features": tuple(features)})
    counts, world = Counts.of(log, schema, SPLIT), world_of(log)
    return fit(schema, counts, world.users, world.items, FREEZE)


@pytest.mark.parametrize(
    "limits",
    [
        {"min_count": 1},
        {"min_count": 20},
        {"max_age_days": 1},
        {"min_count": 2, "max_age_days": 2, "max_rows": 4},
        {"max_rows": 2},
    ],
    ids=str,
)
def test_limits_keep_the_values_that_a_loop_would_keep(limits: dict[str, int]) -> None:
    log = late_history(events())
    rows = [row for row in log.to_pylist() if row["date"] < SPLIT.valid_from]
    genres = dict(zip(*items().select(["item_id", "genre"]).to_pydict().values(), strict=True))
    found, admissions = limited(log, **limits)
    for feature, value_of in (
        ("user", lambda row: row["user_id"]),
        ("item", lambda row: row["item_id"]),
        ("genre", lambda row: genres.get(row["item_id"])),
    ):
        counted = Counter(value_of(row) for row in rows if value_of(row) is not None)
        newest: dict[str, dt.date] = {}
        for row in rows:
            day = (row["timestamp"] + dt.timedelta(hours=8)).date()
            newest[value_of(row)] = max(day, newest.get(value_of(row), day))
        since = max(newest.values()) - dt.timedelta(days=limits.get("max_age_days", 99))
        frequent = [value for value, count in counted.items() if count >= limits.get("min_count", 1)]
        recent = [value for value in frequent if newest[value] > since]
        best = sorted(recent, key=lambda value: (-counted[value], value))[: limits.get("max_rows", 99) - 1]
        assert found.vocabularies[feature].values.to_pylist() == best
        assert admissions[feature] == Admission(
            values=len(counted),
            rare=len(counted) - len(frequent),
            old=len(frequent) - len(recent),
            beyond=len(recent) - len(best),
            unknown=1 - sum(counted[value] for value in best) / len(rows),
        )
        assert found.schema[feature].rows == len(best) + 1


def test_what_is_evicted_does_not_depend_on_held_out_days() -> None:
    """Days of validation and test, and history rows of those days, may say what they like."""
    log = late_history(events())
    later = pc.greater_equal(log["date"], pa.scalar(SPLIT.valid_from))
    others = pc.if_else(later, "i1", log["item_id"])
    changed = log.set_column(log.column_names.index("item_id"), "item_id", others)
    limits = {"min_count": 2, "max_age_days": 2, "max_rows": 5}
    (one, told), (other, told_then) = limited(log, **limits), limited(changed, **limits)
    assert told == told_then
    for name, vocabulary in one.vocabularies.items():
        assert vocabulary.values.equals(other.vocabularies[name].values)


def test_rows_are_kept_over_growth_and_eviction() -> None:
    before, _ = limited(late_history(events()), max_rows=6)
    log, world = events(rows=900, seed=5), world_of(events(rows=900, seed=5))
    after, _ = fit(SCHEMA, Counts.of(log, SCHEMA, SPLIT), world.users, world.items, FREEZE, former=before)
    anew = world.encoders.vocabularies
    for name, vocabulary in after.vocabularies.items():
        former = before.vocabularies[name]
        kept = [v for v in former.values.to_pylist() if v in vocabulary.values.to_pylist()]
        assert kept and vocabulary.lookup(pa.array(kept)).tolist() == former.lookup(pa.array(kept)).tolist()
        assert set(vocabulary.values.to_pylist()) == set(anew[name].values.to_pylist())
        assert after.schema[name].rows == vocabulary.rows


NUMBERS = ({"kind": "numeric"}, {"kind": "numeric", "quantile": True}, {"kind": "bucketed"})


@pytest.mark.parametrize("more", NUMBERS)
def test_text_where_a_feature_takes_numbers_is_named(more: dict[str, object]) -> None:
    values = SCHEMA.model_dump()
    values["features"] += ({**more, "name": "said", "column": "items.genre"},)
    said = f"'said' is {more['kind']}, and 'items.genre' has text: .*categorical"
    with pytest.raises(DataError, match=said):
        world_of(events(), Schema.parse(values))


def test_an_attribute_that_no_table_has_is_named() -> None:
    features = (*SCHEMA.features, Categorical(name="mood", column="items.mood"))
    schema = SCHEMA.model_copy(update={"features": features})
    with pytest.raises(DataError, match="attribute 'mood'"):
        world_of(events(), schema)
