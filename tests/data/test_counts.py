"""Counts against counting row by row."""

import datetime as dt
from collections import Counter, defaultdict

import numpy as np
import pyarrow as pa
import pytest

from recsys_dist.data.counts import Counts, counted_columns, is_positive
from recsys_dist.data.split import Split
from recsys_dist.feature_kinds import Bucketed, Categorical, Numeric
from recsys_dist.schema import Label, Schema
from tests.data.small_log import FIRST_DAY, SCHEMA, events

SPLIT = Split(valid_from=FIRST_DAY + dt.timedelta(days=5), test_from=FIRST_DAY + dt.timedelta(days=6))


def late_history(log: pa.Table) -> pa.Table:
    """Every third row a history row, on whatever day: in some logs events beside the exposures are."""
    return log.set_column(
        log.column_names.index("history"), "history", pa.array(np.arange(len(log)) % 3 == 0)
    )


def test_counts_are_those_of_a_loop_and_nothing_of_test_days() -> None:
    log = late_history(events())
    counts = Counts.of(log, SCHEMA, SPLIT)
    assert set(counts.by_column) == {"user_id", "item_id", "device"}
    for column, table in counts.by_column.items():
        rows, clicks, known = Counter(), Counter(), Counter()
        for row in log.to_pylist():
            if row["date"] < SPLIT.test_from and row[column] is not None:
                late = row["date"] >= SPLIT.valid_from
                period = (
                    ("late history" if late else "history")
                    if row["history"]
                    else ("valid" if late else "train")
                )
                key = (row[column], (row["timestamp"] + dt.timedelta(hours=8)).date(), period)
                rows[key] += 1
                known[key] += row["click"] is not None
                clicks[key] += row["click"] or 0
        got = {
            (r["value"], dt.date(1970, 1, 1) + dt.timedelta(days=r["day"]), r["period"]): r
            for r in table.to_pylist()
        }
        assert {key: r["rows"] for key, r in got.items()} == dict(rows)
        assert {key: r["click_rows"] for key, r in got.items()} == dict(known)
        assert {key: r["click_sum"] for key, r in got.items()} == {key: clicks[key] for key in rows}


def test_what_is_fitted_sees_no_held_out_day_even_as_history() -> None:
    log = late_history(events())
    fitted = [r for r in log.to_pylist() if r["date"] < SPLIT.valid_from]
    counts = Counts.of(log, SCHEMA, SPLIT)
    total = counts.totals("item_id", ("history", "train"))
    assert dict(zip(*total.to_pydict().values(), strict=True)) == Counter(r["item_id"] for r in fitted)
    clicks = [r["click"] for r in fitted if r["click"] is not None]
    assert counts.prior("click") == pytest.approx(sum(clicks) / len(clicks))


def test_counts_of_parts_add_up_to_those_of_the_whole() -> None:
    log = events()
    parts = [Counts.of(log.slice(start, 100), SCHEMA, SPLIT) for start in range(0, len(log), 100)]
    merged, whole = Counts.merge(parts), Counts.of(log, SCHEMA, SPLIT)
    keys = [("value", "ascending"), ("day", "ascending"), ("period", "ascending")]
    for column, table in whole.by_column.items():
        left, right = merged.by_column[column].sort_by(keys), table.sort_by(keys)
        assert left.drop_columns("watch_ms_sum").equals(right.drop_columns("watch_ms_sum"))
        assert left["watch_ms_sum"].to_numpy() == pytest.approx(right["watch_ms_sum"].to_numpy())


def test_merged_counts_do_not_depend_on_the_order_of_the_parts() -> None:
    log = events()
    parts = [Counts.of(log.slice(start, 60), SCHEMA, SPLIT) for start in range(0, len(log), 60)]
    there, back = Counts.merge(parts), Counts.merge(parts[::-1])
    for column, table in there.by_column.items():
        exact = [name for name in table.column_names if name != "watch_ms_sum"]
        assert table.select(exact).equals(back.by_column[column].select(exact))


def test_a_label_known_of_no_row_has_an_even_prior() -> None:
    log = events()
    unknown = log.set_column(log.column_names.index("click"), "click", pa.nulls(len(log), pa.int8()))
    assert Counts.of(unknown, SCHEMA, SPLIT).prior("click") == 0.5


def test_positive_is_any_wanted_label_and_unknown_is_not() -> None:
    table = pa.table({"click": pa.array([1, 0, None, 0, None]), "like": pa.array([0, 0, 1, None, None])})
    assert is_positive(table, SCHEMA).tolist() == [True, False, True, False, False]


def test_a_number_that_is_a_category_too_is_counted_as_it_is() -> None:
    plain = SCHEMA.model_dump()
    both = [{"kind": kind, "name": f"{kind}_n", "column": "n"} for kind in ("categorical", "bucketed")]
    schema = Schema.parse({**plain, "features": [*plain["features"], *both]})
    log = events()
    numbers = np.array([100_001.0, 112_346.0])[np.arange(len(log)) % 2]
    table = Counts.of(log.append_column("n", pa.array(numbers)), schema, SPLIT).by_column["n"]
    assert set(table["value"].to_pylist()) == {100_001.0, 112_346.0}


def test_a_label_may_be_called_positive() -> None:
    labels = [*SCHEMA.model_dump()["labels"], {"name": "positive"}]
    schema = Schema.parse({**SCHEMA.model_dump(), "labels": labels})
    log = events().append_column("positive", pa.array(np.ones(600, np.int8)))
    assert Counts.of(log, schema, SPLIT).prior("positive") == 1.0


def test_numbers_are_counted_to_a_thousandth() -> None:
    schema = Schema(
        features=(
            Categorical(name="item", column="item_id"),
            Numeric(name="price", column="price"),
            Bucketed(name="price_bucket", column="price"),
        ),
        labels=(Label(name="click"), Label(name="like")),
        ranking_label="click",
        recall_positive=("click",),
    )
    assert counted_columns(schema) == ["item_id", "price", "user_id"]
    log = events()
    rng = np.random.default_rng(0)
    prices = pa.array(
        np.r_[rng.lognormal(0, 9, len(log) - 3), 0.0, -7.25, 3.0], mask=np.arange(len(log)) == 5
    )
    table = Counts.of(log.append_column("price", prices), schema, SPLIT).by_column["price"]
    train = np.array([row["date"] < SPLIT.test_from for row in log.to_pylist()])
    exact = np.sort(prices.filter(pa.array(train)).drop_null().to_numpy())
    by_value: dict[float, int] = defaultdict(int)
    for row in table.to_pylist():
        by_value[row["value"]] += row["rows"]
    counted = np.repeat(sorted(by_value), [by_value[value] for value in sorted(by_value)])
    assert counted == pytest.approx(exact, rel=1e-3)
