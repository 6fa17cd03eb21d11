"""Positions and attributes of users and items."""

import pyarrow as pa
import pytest

from recsys_dist.data.entities import Entities
from recsys_dist.errors import DataError

DESCRIBED = pa.table({"item_id": ["b", "a"], "genre": ["drama", None]})


def test_described_ids_come_first_then_those_seen() -> None:
    items = Entities.of(DESCRIBED, "item_id", pa.array(["c", "a", "d"]))
    assert items.ids.to_pylist() == ["b", "a", "c", "d"]
    assert items.attribute("genre").to_pylist() == ["drama", None, None, None]
    asked = pa.chunked_array([["d", "x"], ["b", None]])
    assert items.positions(asked).tolist() == [4, 0, 1, 0]


def test_a_log_without_a_table_of_items() -> None:
    items = Entities.of(None, "item_id", pa.array(["c", "a"]))
    assert (len(items), items.ids.to_pylist()) == (2, ["a", "c"])
    nothing = Entities.of(None, "item_id", pa.array([], pa.string()))
    assert nothing.positions(pa.array(["a"])).tolist() == [0]


def test_an_id_described_twice_is_named() -> None:
    twice = pa.table({"item_id": ["a", "b", "c", "b"]})
    with pytest.raises(DataError, match="the table of items has item_id b more than once"):
        Entities.of(twice, "item_id", pa.array([], pa.string()))


def test_an_attribute_that_the_table_lacks_names_those_it_has() -> None:
    items = Entities.of(DESCRIBED, "item_id", pa.array([], pa.string()))
    with pytest.raises(DataError, match=r"attribute 'gender'.*it has: item_id, genre"):
        items.attribute("gender")
