"""The canonical log: every row is kept or quarantined with the right reason, and the ledger adds up."""

import datetime as dt
import json

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys_dist.data.logs import Ledger, LogSpec, Validated, duplicates, quarantine, validate
from recsys_dist.errors import SourceError
from recsys_dist.feature_kinds import Categorical, Numeric, Sequence, Statistic
from recsys_dist.schema import Label, Schema

SCHEMA = Schema(
    features=(
        Categorical(name="user", column="user_id"),
        Categorical(name="item", column="item_id"),
        Categorical(name="tab", column="tab"),
        Numeric(name="length", column="length"),
        Statistic(name="page_rate", key="page", label="click"),
        Categorical(name="city", column="users.city"),
        Sequence(name="clicked", of="item", where="click"),
    ),
    labels=(Label(name="click"), Label(name="watch_ms", kind="value")),
    ranking_label="click",
    recall_positive=("click",),
    utc_offset_hours=8,
)
SPEC = LogSpec.from_schema(SCHEMA)
NOW = dt.datetime(2024, 6, 1, tzinfo=dt.UTC)
GOOD = {
    "user_id": "u1",
    "item_id": 7,
    "timestamp": "1714572000000",  # 2024-05-01 14:00 UTC, 22:00 local
    "click": 1,
    "watch_ms": "1500",
    "tab": 3,
    "length": "2.5",
    "page": "home",
}


def chunk(*rows: dict[str, object]) -> pa.Table:
    """Rows that differ from a good one, every column as text."""
    full = [{**GOOD, "history": "0", "date": None, **row} for row in rows]
    columns = {
        name: pa.array([None if row[name] is None else str(row[name]) for row in full], pa.string())
        for name in full[0]
    }
    return pa.table({**columns, "row": pa.array(range(100, 100 + len(rows)))})


def check(*rows: dict[str, object]) -> Validated:
    return validate(chunk(*rows), SPEC, "log.csv", "ms", NOW)


@pytest.mark.parametrize("unit", ["s", "us"])
def test_moments_that_python_has_no_word_for_are_quarantined(unit: str) -> None:
    moments = pa.array([2**61, -(2**61)], pa.int64()).cast(pa.timestamp(unit, "UTC"))
    typed = chunk({}, {})
    typed = typed.set_column(typed.schema.get_field_index("timestamp"), "timestamp", moments)
    refused = validate(typed, SPEC, "log.parquet", "ms", NOW).quarantined
    assert refused["reason"].to_pylist() == ["timestamp is in the future", "timestamp is before 1990-01-01"]
    assert all(json.loads(row)["timestamp"] for row in refused["raw"].to_pylist())


def test_spec_names_what_features_read() -> None:
    assert SPEC.context == {"tab": False, "length": True, "page": False}
    assert SPEC.required == ["user_id", "item_id", "timestamp", "click", "watch_ms", "tab", "length", "page"]


def test_a_good_row_becomes_canonical() -> None:
    checked = check({})
    assert checked.quarantined.num_rows == 0
    assert checked.kept.schema == SPEC.arrow_schema()
    assert checked.kept.to_pylist() == [
        {
            "user_id": "u1",
            "item_id": "7",
            "timestamp": dt.datetime(2024, 5, 1, 14, tzinfo=dt.UTC),
            "date": dt.date(2024, 5, 1),
            "history": False,
            "click": 1,
            "watch_ms": 1500.0,
            "tab": "3",
            "length": 2.5,
            "page": "home",
        }
    ]


def test_the_day_is_local() -> None:
    late = check({"timestamp": "1714579200000"}, {"timestamp": "1714579199999"})  # 16:00 UTC = midnight
    assert late.kept["date"].to_pylist() == [dt.date(2024, 5, 2), dt.date(2024, 5, 1)]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"user_id": None}, "user_id is missing"),
        ({"item_id": " "}, "item_id is missing"),
        ({"timestamp": None}, "timestamp is missing"),
        ({"timestamp": "yesterday"}, "timestamp is not a time"),
        ({"timestamp": "631151999999"}, "timestamp is before 1990-01-01"),
        ({"timestamp": "-5"}, "timestamp is before 1990-01-01"),
        ({"timestamp": "1e300"}, "timestamp is in the future"),
        ({"timestamp": str(int(NOW.timestamp() * 1000) + 301_000)}, "timestamp is in the future"),
        ({"click": "2"}, "click is not 0 or 1"),
        ({"click": None}, "click is missing"),
        ({"watch_ms": "long"}, "watch_ms is not a number"),
        ({"watch_ms": "-1"}, "watch_ms is negative"),
        ({"watch_ms": "inf"}, "watch_ms is not finite"),
        ({"watch_ms": "1e39"}, "watch_ms is not finite"),
        ({"length": "wide"}, "length is not a number"),
        ({"length": "-inf"}, "length is not finite"),
        ({"history": "maybe"}, "history is not 0 or 1"),
        ({"date": "2024-02-30"}, "date is not a day"),
        ({"date": "20240503"}, "date is not the timestamp's day"),
        ({"user_id": None, "watch_ms": "-1"}, "user_id is missing"),  # the first that applies
    ],
)
def test_a_bad_row_is_quarantined_with_its_reason(change: dict[str, object], reason: str) -> None:
    checked = check({}, change, {"item_id": "8"})
    assert checked.kept["item_id"].to_pylist() == ["7", "8"]
    assert checked.kept_row.to_pylist() == [100, 102]
    (row,) = checked.quarantined.to_pylist()
    assert (row["part"], row["row"], row["reason"]) == ("log.csv", 101, reason)
    raw = {
        k: None if v is None else str(v) for k, v in ({**GOOD, "history": "0", "date": None} | change).items()
    }
    assert json.loads(row["raw"]) == raw


def test_what_is_no_fault() -> None:
    checked = check(
        {"date": "20240502"},  # a log's own day may differ by one, around midnight
        {"tab": None, "length": "", "page": None},  # context may be missing
        {"click": "true", "watch_ms": "0"},
        {"timestamp": str(int(NOW.timestamp() * 1000) + 299_000)},  # clocks differ
    )
    assert checked.quarantined.num_rows == 0
    assert checked.kept["date"].to_pylist()[0] == dt.date(2024, 5, 2)
    assert checked.kept["length"].to_pylist()[1] is None


def test_history_rows_need_no_labels() -> None:
    checked = check({"history": "1", "click": None, "watch_ms": None}, {"history": "0", "watch_ms": None})
    assert checked.kept["click"].to_pylist() == [None]
    assert checked.quarantined["reason"].to_pylist() == ["watch_ms is missing"]


def test_a_missing_column_refuses_the_file() -> None:
    table = chunk({}).rename_columns({"watch_ms": "watchms"}).drop_columns(["tab"])
    with pytest.raises(
        SourceError, match=r"log.csv: required column 'watch_ms' is missing \(and tab\).*'watchms'"
    ):
        validate(table, SPEC, "log.csv", "ms", NOW)


def test_a_column_of_lists_refuses_the_file() -> None:
    table = chunk({}).set_column(1, "item_id", pa.array([[1, 2]]))
    with pytest.raises(SourceError, match=r"item_id.*list"):
        validate(table, SPEC, "log.csv", "ms", NOW)


def test_an_empty_chunk() -> None:
    checked = validate(chunk({}).slice(0, 0), SPEC, "log.csv", "ms", NOW)
    assert checked.kept.num_rows == checked.quarantined.num_rows == 0
    assert checked.kept.schema == SPEC.arrow_schema()


WORDS = st.sampled_from(
    ["", "0", "1", "-1", "2.5", "1e400", "NaN", "inf", "x", "1714572000000", "ü", "\t", "2024-05-01"]
)
CELL = st.one_of(st.none(), WORDS, st.text(max_size=3), st.integers().map(str), st.floats().map(repr))


@settings(max_examples=200)
@given(
    st.lists(st.fixed_dictionaries({}, optional=dict.fromkeys([*GOOD, "history", "date"], CELL)), min_size=1)
)
@pytest.mark.parametrize("unit", ["ms", "iso"])
def test_whatever_comes_is_kept_or_quarantined(unit: str, rows: list[dict[str, object]]) -> None:
    checked = validate(chunk(*rows), SPEC, "log.csv", unit, NOW)
    seen = sorted(checked.kept_row.to_pylist() + checked.quarantined["row"].to_pylist())
    assert seen == list(range(100, 100 + len(rows)))
    assert checked.kept.schema == SPEC.arrow_schema()
    kept = checked.kept
    assert kept["user_id"].null_count == kept["item_id"].null_count == kept["timestamp"].null_count == 0
    watched = np.array([w for w in kept["watch_ms"].to_pylist() if w is not None])
    assert np.isfinite(watched).all() and (watched >= 0).all()
    for raw in checked.quarantined["raw"].to_pylist():
        assert set(GOOD) <= set(json.loads(raw))


def events(rows: list[tuple[str, str, int, bool]]) -> pa.Table:
    users, items, times, history = zip(*rows, strict=True) if rows else ([], [], [], [])
    return pa.table(
        {
            "user_id": pa.array(users, pa.string()),
            "item_id": pa.array(items, pa.string()),
            "timestamp": pa.array(times, pa.int64()).cast(pa.timestamp("us", "UTC")),
            "history": pa.array(history, pa.bool_()),
        }
    )


@given(st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from("xyz"), st.integers(0, 3), st.booleans())))
def test_duplicates_keep_the_first(rows: list[tuple[str, str, int, bool]]) -> None:
    expected = [row in rows[:number] for number, row in enumerate(rows)]
    assert duplicates(events(rows)).tolist() == expected


def test_quarantine_of_rows_without_numbers() -> None:
    table = quarantine(events([("a", "x", 1, False)]), "bucket 3", "duplicate")
    (row,) = table.to_pylist()
    assert (row["part"], row["row"], row["reason"]) == ("bucket 3", None, "duplicate")
    assert json.loads(row["raw"])["timestamp"] == "1970-01-01 00:00:00.000001Z"


def test_the_ledger_adds_up() -> None:
    one = Ledger().add("a", check({}, {"user_id": None})).add("a", check({}, {"watch_ms": "-1"}))
    two = Ledger().add("b", check({}, {})).refuse("c", "c: is empty")
    total = Ledger.merge([one, two]).with_duplicates(1)
    total.check()
    assert (total.read, total.kept) == (6, 3)
    assert total.quarantined == {"user_id is missing": 1, "watch_ms is negative": 1, "duplicate": 1}
    assert Ledger.merge([two, one]).with_duplicates(1) == total
    assert Ledger.from_json(json.loads(json.dumps(total.to_json()))) == total
    assert "6 rows read = 3 kept + 3 quarantined" in total.summary()
    assert "1 file refused" in total.summary() and "c: is empty" in total.summary()
    with pytest.raises(AssertionError):
        total.with_duplicates(9).check()
