"""What is fitted: statistics by day against a loop, and encoded entities."""

from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recsys_dist.data.counts import Counts
from recsys_dist.data.encoders import Statistics, _running, collisions
from recsys_dist.data.transforms import hash_rows
from recsys_dist.data.vocab import Vocabulary
from recsys_dist.errors import DataError
from recsys_dist.schema import Categorical
from tests.data.small_log import SCHEMA, events
from tests.data.test_examples import SPLIT, world_of

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


def test_an_attribute_that_no_table_has_is_named() -> None:
    features = (*SCHEMA.features, Categorical(name="mood", column="items.mood"))
    schema = SCHEMA.model_copy(update={"features": features})
    with pytest.raises(DataError, match="attribute 'mood'"):
        world_of(events(), schema)
