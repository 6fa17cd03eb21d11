"""What a model is told of the items, from the catalogue of prepared data."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from recsys_dist.data.prepared import Prepared
from recsys_dist.errors import DataError
from recsys_dist.train.catalogue import catalogue_of, occurrences
from tests.models.histories import ITEMS, batch_of, history_schema
from tests.train import prepared, tiny


def test_counts_of_the_splits_and_features_of_the_item_alone(tmp_path: Path) -> None:
    data = Prepared.open(prepared.make(tmp_path))
    first, both = (catalogue_of(data, tiny.schema(), s) for s in (("train",), ("train", "valid")))
    assert first.positives.tolist() == [0] + [1] * 39 and both.positives.tolist() == [0] + [2] * 39
    assert first.weight is not None and first.weight.tolist() == [0] + [1] * 39
    assert set(first.features) == {"item", "length"}  # neither the user's nor a history
    assert first.features["item"].tolist() == list(range(40))
    np.testing.assert_array_equal(first.features["length"], np.r_[0, data.items["length"].to_numpy()])
    assert set(catalogue_of(data, tiny.schema().select(["user", "item"]), ("train",)).features) == {"item"}


def test_data_of_an_older_version_are_refused(tmp_path: Path) -> None:
    path = prepared.make(tmp_path)
    items = pq.read_table(path / "items.parquet")
    pq.write_table(items.drop_columns(["length"]), path / "items.parquet")
    with pytest.raises(DataError, match=r"no column 'length': an older version .*; prepare the data again"):
        catalogue_of(Prepared.open(path), tiny.schema(), ("train",))


def test_occurrences_are_rows_not_events() -> None:
    """Item 3 is thrice in the first row, as candidate and in the history: that is one row."""
    first = batch_of(np.array([3, 4]), [[3, 3, 5], [3]], np.zeros(2))
    second = batch_of(np.array([5]), [[]], np.zeros(1)).pad(3)
    found = occurrences([first, second], history_schema())
    assert list(found) == ["item"] and len(found["item"]) == ITEMS
    assert {int(i): int(found["item"][i]) for i in found["item"].nonzero()} == {3: 2, 4: 1, 5: 2}
