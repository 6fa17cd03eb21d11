"""Batches against the rows they are made of, whatever the Arrow layout."""

import datetime as dt
import warnings

import numpy as np
import pyarrow as pa
import pytest

from recsys_dist.batch import Batch
from recsys_dist.data.collate import collate, columns
from recsys_dist.errors import DataError
from recsys_dist.feature_kinds import Categorical, Numeric, Sequence
from recsys_dist.schema import Label, Schema

SCHEMA = Schema(
    features=(
        Categorical(name="item", column="item_id"),
        Numeric(name="age", column="users.age"),
        Sequence(name="clicked", of="item", where="click"),
        Numeric(name="price", column="price"),
    ),
    labels=(Label(name="click"), Label(name="like")),
    ranking_label="click",
    recall_positive=("click",),
).fitted({"item": 10})


def table(rows: int = 7) -> pa.Table:
    rng = np.random.default_rng(0)
    lists = [rng.integers(0, 10, length).tolist() for length in rng.integers(0, 4, rows)]
    return pa.table(
        {
            "clicked": pa.array(lists, pa.list_(pa.int32())),
            "item": pa.array(rng.integers(0, 10, rows), pa.int32()),
            "age": pa.array(rng.random(rows), pa.float32()),
            "price": pa.array(rng.random(rows), pa.float32()),
            "click": pa.array(rng.integers(0, 2, rows), pa.float32()),
            "row_id": pa.array(np.arange(rows) + (3 << 32)),
            "timestamp": pa.array([dt.datetime(2024, 1, 1)] * rows),
        }
    )


def assert_equals_rows(batch: Batch, given: pa.Table) -> None:
    rows = given.to_pylist()
    assert batch.rows == len(rows)
    assert batch.dense.shape == (len(rows), 2)
    assert batch.dense.tolist() == [[r["age"], r["price"]] for r in rows]
    assert batch.sparse.keys() == ["item", "clicked"]
    by_key = {key: batch.sparse[key] for key in batch.sparse.keys()}  # noqa: SIM118
    assert [x.tolist() for x in by_key["item"].to_dense()] == [[r["item"]] for r in rows]
    assert [x.tolist() for x in by_key["clicked"].to_dense()] == [r["clicked"] or [] for r in rows]
    assert {name: label.tolist() for name, label in batch.labels.items()} == {
        "click": [r["click"] for r in rows]
    }
    assert batch.weight.tolist() == [r.get("weight", 1.0) for r in rows]
    assert batch.row_id.tolist() == [r["row_id"] for r in rows]


def test_a_batch_holds_the_rows_and_warns_of_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_equals_rows(collate(table(), SCHEMA), table())


def test_columns_name_all_that_is_read() -> None:
    assert columns(SCHEMA) == ["item", "age", "clicked", "price", "click", "like", "row_id"]


def test_rows_may_be_weighted() -> None:
    weighted = table().append_column("weight", pa.array(np.linspace(0, 1, 7), pa.float64()))
    assert_equals_rows(
        collate(weighted, SCHEMA), weighted.set_column(7, "weight", weighted["weight"].cast("f4"))
    )


@pytest.mark.parametrize("first", [0, 1, 3, 6, 7])
def test_slices_of_a_table_are_batches_of_their_rows(first: int) -> None:
    assert_equals_rows(collate(table().slice(first, 3), SCHEMA), table().slice(first, 3))


def test_chunks_are_joined() -> None:
    chunked = pa.concat_tables([table().slice(2, 3), table().slice(0, 1), table().slice(5)])
    assert chunked["clicked"].num_chunks == 3
    assert_equals_rows(collate(chunked, SCHEMA), chunked)


def test_an_empty_table_is_an_empty_batch() -> None:
    for empty in (table().slice(0, 0), table().schema.empty_table()):
        assert_equals_rows(collate(empty, SCHEMA), empty)


def test_a_null_list_is_an_empty_one_even_with_values_behind_it() -> None:
    lists = pa.ListArray.from_arrays(
        pa.array([0, 2, 4, 5], pa.int32()),
        pa.array([1, 2, 3, 4, 5], pa.int32()),
        mask=pa.array([False, True, False]),
    )
    given = table(3).set_column(0, "clicked", lists)
    assert given["clicked"].to_pylist() == [[1, 2], None, [5]]
    assert_equals_rows(collate(given, SCHEMA), given)


@pytest.mark.parametrize(
    ("column", "values"), [("item", [0, 10]), ("item", [-1, 3]), ("clicked", [[9], [3, 10]])]
)
def test_an_id_outside_its_table_is_named_with_the_limit(column: str, values: list) -> None:
    given = table(2)
    at = given.column_names.index(column)
    bad = given.set_column(at, column, pa.array(values, given.schema.field(column).type))
    number = r"(10|-1)"
    with pytest.raises(DataError, match=rf"feature '{column}': id {number} outside its table of 10 rows"):
        collate(bad, SCHEMA)
